"""What is compiled: a stage, or all of them as one program."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from .batches import Carry
from .compiler import compiler_options

Tree = Any
# (weights, what the stage before gave) → what the next one reads.
Stage = Callable[[Tree, Carry], Carry]

# A threshold is the confidence of a validation image, which shall leave. Rounding differs between
# programs, so thresholds are lowered by this part of what they lack of certainty; confidences of
# trained networks were seen to differ by up to 7e-6 of it.
_SLACK = 1e-5

# Bytes of weights up to which a program has them as constants. Handing over some hundred arrays
# takes as long as a small stage; large ones would take long to compile.
_MOST_CONSTANTS = 2**25


def stage_program(stage: Stage, weights: Tree) -> Callable:
  """One stage.

  Args:
    stage: Which.
    weights: Its weights.

  Returns:
    A function of (carry, thresholds [image] of this exit), compiled when first called with a shape,
    which gives the carry, probabilities [image, class] and who leaves, [image].
  """
  return _program(partial(_run_stage, stage), weights)


def all_stages_program(stages: Sequence[Stage], weights: Sequence[Tree]) -> Callable:
  """All stages; the device alone decides where images leave, and is done when all have.

  Args:
    stages: All.
    weights: Of each.

  Returns:
    A function of (images, thresholds [image, exit]), compiled when first called with a shape, which
    gives probabilities [image, class] and exits [image].
  """
  return _program(partial(_run_all_stages, stages), weights)


def _program(function, weights):
  """A function of (weights, …), compiled when first called with the rest."""
  if sum(leaf.nbytes for leaf in jax.tree.leaves(weights)) > _MOST_CONSTANTS:
    return partial(jax.jit(function, compiler_options=compiler_options()), weights)

  def with_constants(*rest):
    # Behind the barrier, for what XLA computes of constants differs from program to program.
    return function(jax.lax.optimization_barrier(weights), *rest)

  return jax.jit(with_constants, compiler_options=compiler_options())


def _run_stage(stage, weights, carry, thresholds):
  features, logits = stage(weights, carry)
  probabilities = jax.nn.softmax(logits.astype(jnp.float32))
  lowered = thresholds - _SLACK * jnp.maximum(0, 1 - thresholds)
  return (features, logits), probabilities, probabilities.max(axis=-1) >= lowered


def _run_all_stages(stages, weights, images, thresholds):
  def run(index, carry, answers):
    probabilities, exits = answers
    carry, here, leaves = _run_stage(stages[index], weights[index], carry, thresholds[:, index])
    is_last = index + 1 == len(stages)
    stay = exits < 0
    answers = (
      jnp.where(stay[:, jnp.newaxis], here, probabilities),
      jnp.where(stay & (leaves | is_last), index, exits),
    )
    if is_last:
      return answers
    everyone_left = (answers[1] >= 0).all()
    return jax.lax.cond(
      everyone_left, lambda _, answers: answers, partial(run, index + 1), carry, answers
    )

  return run(0, images, (jnp.zeros((len(images), 1)), jnp.full(len(images), -1, jnp.int32)))
