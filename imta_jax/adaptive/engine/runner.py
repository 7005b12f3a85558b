"""Runs each stage for the images that need it."""

import collections
import contextlib
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np

from .batches import (
  Batch,
  Carry,
  Predictions,
  Queue,
  capacity,
  compile_join_on_device,
  join_on_device,
  join_on_host,
  zeros,
)
from .plan import BatchPlan, expected_costs
from .programs import Score, Stage, Tree, all_stages_program, stage_program
from .read_ahead import ReadAhead

# The batch sizes that are compiled. Remaining images use smaller batches.
BATCH_SIZES = (1, 4, 16, 64, 256)

# How often `Runner.compile` times the programs, in turns; the shortest time counts.
_TIMINGS = 5

# In a turn, batches of each size run for at least this long: a busy machine interrupts long batches
# more often than short ones, but a second of long ones as often as a second of short ones.
_SECONDS_A_TURN = 0.2

# One turn suffices for batches that take this many seconds.
_LONG = 1.0


class Runner:
  """Runs each stage for the images that need it.

  Attributes:
    stages: The program of each stage, see `stage_program`.
    all_stages: The fused program, see `all_stages_program`.
    join: Joins rows of several carries.
    plan: The batch sizes to use.
  """

  def __init__(
    self,
    stages: Sequence[Stage],
    weights: Sequence[Tree],
    scores: Sequence[Score],
    image: jax.ShapeDtypeStruct,
    madds: Sequence[float],
    known_exit_fractions: Sequence[tuple[Sequence[float], Sequence[float]]] = (),
    batch_sizes: Sequence[int] = BATCH_SIZES,
  ):
    """Prepares the programs, which are compiled when first run.

    Args:
      stages: Functions (weights, carry) → carry. The first reads images, the others
        (features, logits [batch, class]), which all of them give.
      weights: The weights of each stage.
      scores: The exit rule at each exit; see `rules`.
      image: Shape (height, width, channels) and type of an image.
      madds: [exit], multiply-adds of an image that leaves there.
      known_exit_fractions: See `BatchPlan`.
      batch_sizes: The batch sizes that may be compiled; 1 must be among them.
    """
    platform = jax.default_backend()
    self.stages = list(map(stage_program, stages, weights, scores))
    self.all_stages = all_stages_program(stages, weights, scores)
    self.join = join_on_host if platform == 'cpu' else join_on_device
    self._batch_sizes, self._known_exit_fractions = tuple(sorted(batch_sizes)), known_exit_fractions
    stage_costs, fused_costs = expected_costs(madds, self._batch_sizes, platform)
    self._fused_sizes = tuple(fused_costs)
    self.plan = BatchPlan(stage_costs, fused_costs, known_exit_fractions)
    # [stage], the input of each stage for one image.
    self._carries: list[Carry] = [jax.ShapeDtypeStruct((1, *image.shape), image.dtype)]
    for stage, of_stage in zip(stages, weights, strict=True):
      self._carries.append(jax.eval_shape(stage, of_stage, self._carries[-1]))

  @property
  def num_classes(self) -> int:
    """The number of classes."""
    _, logits = self._carries[-1]
    return logits.shape[-1]

  def run_one(self, images: np.ndarray, thresholds: np.ndarray) -> Predictions:
    """Runs a single image as one program.

    Args:
      images: [1, height, width, channels].
      thresholds: [1, exit].
    """
    probabilities, exits = map(np.asarray, self.all_stages(images, thresholds))
    return Predictions(np.zeros(1, np.int64), probabilities, exits.astype(np.int64))

  def run(
    self, source: Iterator[tuple[np.ndarray, np.ndarray]], total: float
  ) -> Iterator[Predictions]:
    """Runs stages until all images of a source have left.

    A stage runs as soon as it has a full batch, the last such stage first, so that queues stay
    short. When the source is exhausted, queues are emptied from the first stage to the last. The
    device works on a batch while the host sorts the images of the previous one. Another thread asks
    the source for more meanwhile, so that answers do not wait for it.

    Args:
      source: Pairs of images [image, height, width, channels] and thresholds [image, exit].
      total: Number of images in the source.

    Yields:
      Predictions as they are decided; indices count all images of the source.
    """
    with contextlib.closing(ReadAhead(source)) as ahead:
      yield from self._run(ahead, total)

  def _run(self, source, total):
    """See `run`; the source is a `ReadAhead`."""
    queues = [Queue(join_on_host), *(Queue(self.join) for _ in self.stages)]
    in_flight: collections.deque[Any] = collections.deque()
    num_read, is_open = 0, True
    while True:
      full = [i for i, queue in enumerate(queues) if queue.count >= self.plan.full_batch]
      if full:  # Run the deepest full queue, and keep one batch in flight.
        if is_open:
          source.fetch()
        in_flight.append(self._start(full[-1], queues, total))
        if len(in_flight) == 1:
          continue
      elif is_open and (source.is_ready() or not in_flight):  # Else read.
        item = source.take()
        if item is not None:
          num_read += _put_images(queues[0], num_read, *item)
        is_open = item is not None and num_read < total
        continue
      elif not in_flight:  # Else flush the shallowest queue.
        waiting = [i for i, queue in enumerate(queues) if queue.count]
        if not waiting:
          return
        in_flight.append(self._start(waiting[0], queues, total))
      next_queue, results = in_flight.popleft()
      answers, remaining = results()
      next_queue.put(remaining)
      if answers is not None:
        yield answers

  def compile(self, largest: int | None = None) -> None:
    """Compiles everything that `run` can need, times it, and plans by these times.

    Args:
      largest: The largest number of images per call to prepare for; default: any number.
    """
    sizes = [
      size
      for smaller, size in itertools.pairwise((0, *self._batch_sizes))
      if largest is None or smaller < largest
    ]
    carries = self._carries[: len(self.stages)]
    if self.join is join_on_device:
      for carry in carries[1:]:
        compile_join_on_device(carry, sizes)
    costs = {size: np.full(len(carries) + 1, np.inf) for size in sizes}
    for turn in range(1 + _TIMINGS):  # The first turn compiles.
      for size, least in costs.items():
        if turn < 2 or least.sum() < _LONG:
          costs[size] = np.minimum(least, self._time(carries, size))
    stage_costs = [{size: costs[size][stage] for size in sizes} for stage in range(len(carries))]
    fused_costs = {size: costs[size][-1] for size in sizes if size in self._fused_sizes}
    self.plan = BatchPlan(stage_costs, fused_costs, self._known_exit_fractions)

  def _time(self, carries: Sequence[Carry], size: int) -> np.ndarray:
    """Times batches of which no image leaves before the last exit.

    Args:
      carries: [stage], the input of each stage for one image.
      size: Images per batch.

    Returns:
      Seconds of each stage and of the fused program; 0 if it is not used at this size.
    """
    rows = np.arange(size)
    thresholds = np.full((size, len(self.stages)), np.inf, np.float32)
    runs: list[tuple[Callable[[Batch], Any], Carry]] = [
      (partial(self._run_stage, stage), zeros(one, size)) for stage, one in enumerate(carries)
    ]
    if size in self._fused_sizes:
      runs.append((self._run_all_stages, runs[0][1]))
    seconds, count = np.zeros(len(carries) + 1), 0
    while seconds.sum() < _SECONDS_A_TURN:
      for index, (run, carry) in enumerate(runs):
        start = time.perf_counter()
        # The carries of a previous stage are joined.
        joined = self.join([carry], [rows], size) if isinstance(carry, tuple) else carry
        run(Batch(joined, rows, rows, thresholds))()
        seconds[index] += time.perf_counter() - start
      count += 1
    return seconds / count

  def _start(self, index, queues, total):
    """Starts the next batch of a stage.

    Args:
      index: The stage, counted from 0.
      queues: The queues of all stages.
      total: Number of images that share batches in later stages, these included.

    Returns:
      The queue for the remaining images, and the function that waits for results, see `_run_stage`.
    """
    batch = queues[index].take(self.plan.first_batch(index, queues[index].count))
    fused = index == 0 and self.plan.is_faster_fused(capacity(batch.carry), batch.thresholds, total)
    run = self._run_all_stages if fused else partial(self._run_stage, index)
    return queues[index + 1], run(batch)

  def _run_stage(self, index, batch):
    """Starts a stage on a batch.

    Returns:
      A function that waits for the results: the answers of images that leave, or None, and a batch
      of the remaining images.
    """
    carry, probabilities, leaves = self.stages[index](batch.carry, batch.bounds(index))

    def results():
      # The last exit takes all images, NaN included.
      leaving = np.asarray(leaves) | (index + 1 == len(self.stages))
      return batch.divide(carry, probabilities, np.where(leaving, index, -1))

    return results

  def _run_all_stages(self, batch):
    """Starts all stages on a batch of images; see `_run_stage`."""
    probabilities, exits = self.all_stages(batch.carry, batch.bounds())
    return lambda: batch.divide(None, probabilities, np.asarray(exits, np.int64))


def _put_images(queue, first_index, images, thresholds):
  """Queues images for the first stage, and returns their number."""
  rows = np.arange(len(images))
  queue.put(Batch(images, rows, first_index + rows, thresholds))
  return len(images)
