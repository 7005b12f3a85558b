"""The compiled programs: one per stage, and one of all stages.

`XlaPrograms` are those of JAX, for every device. `onnx_programs` has others for CPUs.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from ..compiler import compiler_options
from .batches import Carry, Join, compile_join_on_device, join_on_device, join_on_host

Tree = Any
Array = Any  # NumPy or JAX.
# (probabilities, those of the exit before) → score; both are [image, class].
Score = Callable[[Array, Array], Array]
# (weights, carry of the previous stage) → carry for the next one.
Stage = Callable[[Tree, Carry], Carry]

# The batch sizes that XLA compiles. Remaining images use smaller batches.
BATCH_SIZES = (1, 4, 16, 64, 256)

# A threshold is the score of a validation image, which must leave. Programs round differently, so
# thresholds are lowered by this fraction of (1 - threshold); for trained networks top probabilities
# were measured to differ by up to 7e-6 of it.
_SLACK = 1e-5

# Largest size of weights, in bytes, that are compiled into a program as constants. Passing hundreds
# of arrays takes as long as a small stage; large constants would take long to compile.
_MOST_CONSTANTS = 2**25

# Assumed cost of running a program besides its images, until programs are timed, in multiply-adds
# that take as long: measured as 20 to 40 million on two CPU cores, where small batches fill no
# vectors; estimated for accelerators, where it is the time of the host relative to a faster device.
_OVERHEAD_ON_CPU = 4e7
_OVERHEAD_ON_ACCELERATORS = 1e9


class Programs(Protocol):
  """Programs of a network, each compiled when it is first called with a batch size.

  Attributes:
    batch_sizes: The sizes to use, in ascending order.
    carries: [stage], shapes of the input of each stage for one image.
    join: Joins rows of several carries.
    stops_early: Whether `run_all_stages` stops when all images have left; otherwise it is the
      whole network, for when early exits do not pay.
    overhead: Assumed cost of running a program besides its images, in multiply-adds.
  """

  batch_sizes: tuple[int, ...]
  carries: Sequence[Carry]
  join: Join
  stops_early: bool
  overhead: float

  def run_stage(
    self, index: int, carry: Carry, thresholds: np.ndarray, keep: bool = True
  ) -> tuple[Carry, Array, Array]:
    """Runs a stage.

    Args:
      index: The stage, counted from 0.
      carry: Its input.
      thresholds: [row] of its exit.
      keep: Whether results must outlast the next call with this stage and number of rows.

    Returns:
      The next carry, probabilities [row, class], and which images leave [row].
    """

  def run_all_stages(self, images: np.ndarray, thresholds: np.ndarray) -> tuple[Array, Array]:
    """Runs all stages.

    Args:
      images: [row, height, width, channels].
      thresholds: [row, exit].

    Returns:
      Probabilities [row, class] at the exit that an image takes, and this exit [row].
    """

  def compile_joins(self, sizes: Sequence[int]) -> None:
    """Compiles what `join` needs for batches of some sizes."""


class XlaPrograms:
  """Programs that XLA compiles; see `Programs`."""

  stops_early = True

  def __init__(
    self,
    stages: Sequence[Stage],
    weights: Sequence[Tree],
    scores: Sequence[Score],
    carries: Sequence[Carry],
    batch_sizes: Sequence[int] = BATCH_SIZES,
  ):
    """Prepares the programs.

    Args:
      stages: All stages.
      weights: The weights of each stage.
      scores: The exit rule at each exit; see `rules`.
      carries: See the class.
      batch_sizes: See the class; 1 must be among them.
    """
    is_on_cpu = jax.default_backend() == 'cpu'
    self.batch_sizes, self.carries = tuple(sorted(batch_sizes)), carries
    self.join: Join = join_on_host if is_on_cpu else join_on_device
    self.overhead = _OVERHEAD_ON_CPU if is_on_cpu else _OVERHEAD_ON_ACCELERATORS
    self._stages = [
      _program(partial(_run_stage, stage, score), of_stage)
      for stage, score, of_stage in zip(stages, scores, weights, strict=True)
    ]
    self.run_all_stages = _program(partial(_run_all_stages, stages, scores), weights)

  def run_stage(
    self, index: int, carry: Carry, thresholds: np.ndarray, keep: bool = True
  ) -> tuple[Carry, Array, Array]:
    del keep  # All of them do.
    return self._stages[index](carry, thresholds)

  def compile_joins(self, sizes: Sequence[int]) -> None:
    if self.join is join_on_device:
      for carry in self.carries[1:]:
        compile_join_on_device(carry, sizes)


def lower(thresholds: Array) -> Array:
  """Thresholds that a score reaches although programs round differently."""
  return thresholds - _SLACK * (1 - thresholds).clip(0)


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
  leaves = score(probabilities, before) >= lower(thresholds)
  return (features, logits), probabilities, leaves


def _run_all_stages(stages, scores, weights, images, thresholds):
  """Stops on the device when all images have left."""

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
