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
    stops_early: Whether the program of all stages stops when all images have left; then no other
      stages share a program. Otherwise a program runs to its end, and any stages can share one.
    overhead: Assumed cost of running a program besides its images, in multiply-adds.
  """

  batch_sizes: tuple[int, ...]
  carries: Sequence[Carry]
  join: Join
  stops_early: bool
  overhead: float

  def run(
    self, first: int, end: int, carry: Carry, thresholds: np.ndarray, keep: bool = True
  ) -> tuple[Carry, Array, Array]:
    """Runs stages `first` to `end` - 1 as one program.

    Args:
      first: The first stage, counted from 0.
      end: The stage after the last one to run.
      carry: The input of the first one.
      thresholds: [row, exit], of all exits.
      keep: Whether results must outlast the next call with these stages and number of rows.

    Returns:
      The input of stage `end`, if there is one; probabilities [row, class] at the exit that an
      image takes; and this exit [row], or -1 if the image stays.
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
    runs = [
      partial(_run_stage, index, stage, score, index + 1 == len(stages))
      for index, (stage, score) in enumerate(zip(stages, scores, strict=True))
    ]
    self._stages = [_program(run, of_stage) for run, of_stage in zip(runs, weights, strict=True)]
    self._all_stages = _program(partial(_run_all_stages, runs), weights)

  def run(
    self, first: int, end: int, carry: Carry, thresholds: np.ndarray, keep: bool = True
  ) -> tuple[Carry, Array, Array]:
    del keep  # All results outlast other calls.
    if end == first + 1:
      return self._stages[first](carry, thresholds)
    return self._all_stages(carry, thresholds)

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


def _run_stage(index, stage, score, is_last, weights, carry, thresholds):
  """See `Programs.run`."""
  features, logits = stage(weights, carry)
  probabilities = jax.nn.softmax(logits.astype(jnp.float32))
  before = jax.nn.softmax(carry[1].astype(jnp.float32)) if index else probabilities
  leaves = score(probabilities, before) >= lower(thresholds[:, index])
  # The last exit takes all images, NaN included.
  return (features, logits), probabilities, jnp.where(leaves | is_last, index, -1)


def _run_all_stages(runs, weights, images, thresholds):
  """Stops on the device when all images have left."""

  def run(index, carry, probabilities, exits):
    carry, here, leaving = runs[index](weights[index], carry, thresholds)
    stays = exits < 0
    probabilities = jnp.where(stays[:, jnp.newaxis], here, probabilities)
    exits = jnp.where(stays, leaving, exits)
    if index + 1 == len(runs):
      return probabilities, exits
    return jax.lax.cond(
      (exits >= 0).all(),
      lambda _, *answers: answers,
      partial(run, index + 1),
      carry,
      probabilities,
      exits,
    )

  return (), *run(0, images, jnp.zeros((len(images), 1)), jnp.full(len(images), -1))
