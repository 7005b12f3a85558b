"""Runs each stage for the images that need it."""

import collections
import contextlib
import itertools
import threading
import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np

from .batches import (
  Batch,
  Predictions,
  Queue,
  capacity,
  join_on_host,
  zeros,
)
from .plan import BatchPlan, expected_costs
from .programs import Programs
from .read_ahead import ReadAhead

# How often `Runner.compile` times the programs, in turns. The turn that took the least time counts,
# since times of one turn are comparable.
_TIMINGS = 3

# In a turn, batches of each size run for at least this long: a busy machine interrupts long batches
# more often than short ones, but a second of long ones as often as a second of short ones.
_SECONDS_A_TURN = 0.1

# One turn suffices for batches that take this many seconds.
_LONG = 1.0


class Runner:
  """Runs each stage for the images that need it.

  Attributes:
    programs: The compiled programs.
    plan: The batch sizes to use.
  """

  def __init__(
    self,
    programs: Programs,
    madds: Sequence[float],
    known_exit_fractions: Sequence[tuple[Sequence[float], Sequence[float]]] = (),
  ):
    """Plans by multiply-adds.

    Args:
      programs: The programs, which are compiled when first run.
      madds: [exit], multiply-adds of an image that leaves there.
      known_exit_fractions: See `BatchPlan`.
    """
    self.programs = programs
    self._known_exit_fractions, self._lock = known_exit_fractions, threading.Lock()
    self._num_stages = len(madds)
    stage_costs, fused_costs = expected_costs(
      madds, programs.batch_sizes, programs.overhead, programs.stops_early
    )
    self._fused_sizes = tuple(fused_costs)
    self.plan = self._plan(stage_costs, fused_costs)

  def _plan(self, stage_costs, fused_costs):
    stops_early = self.programs.stops_early
    return BatchPlan(stage_costs, fused_costs, self._known_exit_fractions, stops_early)

  def run_together(self, images: np.ndarray, thresholds: np.ndarray) -> Predictions:
    """Runs images as a batch that does not shrink, until all have left.

    Args:
      images: [image, height, width, channels].
      thresholds: [image, exit].
    """
    if self.programs.stops_early:
      _, probabilities, exits = self.programs.run(0, self._num_stages, images, thresholds)
    else:
      with self._lock:  # Programs write their results where they wrote those of the call before.
        probabilities, exits = self._run_in_turn(images, thresholds)
    exits = np.asarray(exits, np.int64)
    return Predictions(np.arange(len(images)), np.asarray(probabilities), exits)

  def _run_in_turn(self, images, thresholds):
    """Runs stages until all images have left; returns probabilities and exits."""
    count, end = len(images), self.plan.program_end(0, len(images), thresholds, len(images))
    carry, here, exits = self.programs.run(0, end, images, thresholds, keep=False)
    probabilities = np.array(here)
    while (exits < 0).any():
      first, end = end, self.plan.program_end(end, count, thresholds, count)
      carry, here, leaving = self.programs.run(first, end, carry, thresholds, keep=False)
      stays = exits < 0
      probabilities[stays], exits[stays] = here[stays], leaving[stays]
    return probabilities, exits

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
    queues = [Queue(join_on_host), *(Queue(self.programs.join) for _ in self.programs.carries)]
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

  def compile(self, thresholds: np.ndarray, largest: int | None = None) -> None:
    """Compiles what `run` can need, times it, and plans by these times.

    Args:
      thresholds: [exit], for which stages that share a program are compiled, too.
      largest: The largest number of images per call to prepare for; default: any number.
    """
    sizes = [
      size
      for smaller, size in itertools.pairwise((0, *self.programs.batch_sizes))
      if largest is None or smaller < largest
    ]
    self.programs.compile_joins(sizes)
    costs = {size: np.full(self._num_stages + 1, np.inf) for size in sizes}
    for turn in range(1 + _TIMINGS):  # The first turn compiles.
      for size, least in costs.items():
        if turn < 2 or least.sum() < _LONG:
          costs[size] = min(least, self._time(size), key=np.sum)
    stage_costs = [
      {size: costs[size][stage] for size in sizes} for stage in range(self._num_stages)
    ]
    fused_costs = {size: costs[size][-1] for size in sizes if size in self._fused_sizes}
    self.plan = self._plan(stage_costs, fused_costs)
    for size in sizes:
      self._warm_up(size, thresholds)

  def _warm_up(self, size, thresholds):
    """Runs the programs that a batch takes which no image leaves."""
    rows, first = np.tile(thresholds, (size, 1)), 0
    while first < self._num_stages:
      end = self.plan.program_end(first, size, rows, size)
      carry = zeros(self.programs.carries[first], size)
      jax.block_until_ready(self.programs.run(first, end, carry, rows))
      first = end

  def time_all_stages(self, size: int) -> float:
    """Seconds that the program of all stages takes for a batch that no image leaves early."""
    images = zeros(self.programs.carries[0], size)
    thresholds = np.full((size, self._num_stages), np.inf, np.float32)
    start = time.perf_counter()
    jax.block_until_ready(self.programs.run(0, self._num_stages, images, thresholds))
    return time.perf_counter() - start

  def _time(self, size: int) -> np.ndarray:
    """Times batches of which no image leaves before the last exit.

    Args:
      size: Images per batch.

    Returns:
      Seconds of each stage and of the fused program; 0 if it is not used at this size.
    """
    rows, (images, *others) = np.arange(size), self.programs.carries
    thresholds = np.full((size, len(others) + 1), np.inf, np.float32)
    pixels = np.zeros((size, *images.shape[1:]), images.dtype)
    carries = [pixels, *(zeros(one, size) for one in others)]

    def run(first, end):
      if size == 1 and not self.programs.stops_early:  # As `run_together` runs it.
        np.asarray(self.programs.run(first, end, carries[first], thresholds, keep=False)[-1])
        return
      # The carries of a previous stage are joined.
      carry = self.programs.join([carries[first]], [rows], size) if first else pixels
      self._run_batch(first, end, Batch(carry, rows, rows, thresholds))()

    runs = [partial(run, stage, stage + 1) for stage in range(len(carries))]
    if size in self._fused_sizes:
      runs.append(partial(run, 0, len(carries)))
    seconds, count = np.zeros(len(carries) + 1), 0
    while seconds.sum() < _SECONDS_A_TURN:
      for index, run_it in enumerate(runs):
        start = time.perf_counter()
        run_it()
        seconds[index] += time.perf_counter() - start
      count += 1
    return seconds / count

  def _start(self, index, queues, total):
    """Starts the next batch of a stage, with those that run as one program with it.

    Args:
      index: The stage, counted from 0.
      queues: The queues of all stages.
      total: Number of images that share batches in later stages, these included.

    Returns:
      The queue for the remaining images, and a function that waits for the results: the answers of
      images that leave, or None, and a batch of the remaining images.
    """
    batch = queues[index].take(self.plan.first_batch(index, queues[index].count))
    end = self.plan.program_end(index, capacity(batch.carry), batch.thresholds, total)
    return queues[end], self._run_batch(index, end, batch)

  def _run_batch(self, first, end, batch):
    """Starts a program on a batch; see `_start`."""
    carry, probabilities, exits = self.programs.run(first, end, batch.carry, batch.bounds())
    return lambda: batch.divide(carry, probabilities, np.asarray(exits, np.int64))


def _put_images(queue, first_index, images, thresholds):
  """Queues images for the first stage, and returns their number."""
  rows = np.arange(len(images))
  queue.put(Batch(images, rows, first_index + rows, thresholds))
  return len(images)
