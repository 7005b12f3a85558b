"""The compiled programs: one per stage, and the fused program of all stages."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from ..compiler import compiler_options
from .batches import Carry

Tree = Any
# (probabilities, those of the exit before) → score; both are [image, class].
Score = Callable[[jax.Array, jax.Array], jax.Array]
# (weights, carry of the previous stage) → carry for the next one.
Stage = Callable[[Tree, Carry], Carry]

# A threshold is the score of a validation image, which must leave. Programs round differently, so
# thresholds are lowered by this fraction of (1 - threshold); for trained networks top probabilities
# were measured to differ by up to 7e-6 of it.
_SLACK = 1e-5

# Largest size of weights, in bytes, that are compiled into a program as constants. Passing hundreds
# of arrays takes as long as a small stage; large constants would take long to compile.
_MOST_CONSTANTS = 2**25


def stage_program(stage: Stage, weights: Tree, score: Score) -> Callable:
  """The program of one stage.

  Args:
    stage: The stage.
    weights: Its weights.
    score: The exit rule; see `rules`.

  Returns:
    A function of (carry, thresholds [image] of this exit), compiled when first called with a shape,
    that returns the next carry, probabilities [image, class], and which images leave [image].
  """
  return _program(partial(_run_stage, stage, score), weights)


def all_stages_program(
  stages: Sequence[Stage], weights: Sequence[Tree], scores: Sequence[Score]
) -> Callable:
  """The fused program of all stages; it stops on the device when all images have left.

  Args:
    stages: All stages.
    weights: The weights of each stage.
    scores: The exit rule at each exit; see `rules`.

  Returns:
    A function of (images, thresholds [image, exit]), compiled when first called with a shape, that
    returns probabilities [image, class] and exits [image].
  """
  return _program(partial(_run_all_stages, stages, scores), weights)


def _program(function, weights):
  """A function of (weights, …), compiled when first called with the rest."""
  if sum(leaf.nbytes for leaf in jax.tree.leaves(weights)) > _MOST_CONSTANTS:
    return partial(jax.jit(function, compiler_options=compiler_options()), weights)

  def with_constants(*rest):
    # The barrier prevents constant folding, whose results differ from program to program.
    return function(jax.lax.optimization_barrier(weights), *rest)

  return jax.jit(with_constants, compiler_options=compiler_options())


def _run_stage(stage, score, weights, carry, thresholds):
  features, logits = stage(weights, carry)
  probabilities = jax.nn.softmax(logits.astype(jnp.float32))
  is_first = not isinstance(carry, tuple)
  before = probabilities if is_first else jax.nn.softmax(carry[1].astype(jnp.float32))
  lowered = thresholds - _SLACK * jnp.maximum(0, 1 - thresholds)
  return (features, logits), probabilities, score(probabilities, before) >= lowered


def _run_all_stages(stages, scores, weights, images, thresholds):
  def run(index, carry, answers):
    probabilities, exits = answers
    carry, here, leaves = _run_stage(
      stages[index], scores[index], weights[index], carry, thresholds[:, index]
    )
    is_last = index + 1 == len(stages)
    stay = exits < 0
    answers = (
      jnp.where(stay[:, jnp.newaxis], here, probabilities),
      jnp.where(stay & (leaves | is_last), index, exits),
    )
    if is_last:
      return answers
    all_exited = (answers[1] >= 0).all()
    return jax.lax.cond(
      all_exited, lambda _, answers: answers, partial(run, index + 1), carry, answers
    )

  return run(0, images, (jnp.zeros((len(images), 1)), jnp.full(len(images), -1, jnp.int32)))
