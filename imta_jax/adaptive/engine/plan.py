"""Chooses batch sizes, and the stages that run as one program, by the cost of batches."""

import functools
from collections.abc import Mapping, Sequence

import numpy as np

# Batch size → cost of a batch, in any unit.
Costs = Mapping[int, float]

# The fused program is compiled for batch sizes at which it is expected to save at least this part
# of the cost of a batch.
_LEAST_TO_SPARE = 0.1

# Programs are divided where that is expected to take less time by more than this fraction: times
# are not exact, and sorting images takes time, too.
_LEAST_TO_GAIN = 0.05

# Among batch sizes within 10 % of the lowest cost per image, the largest is used.
_TIE = 0.1


class BatchPlan:
  """Batch sizes, and which stages run as one program.

  Attributes:
    full_batch: The batch size if there are enough images. It is the same for all stages, so that a
      batch that no image leaves passes from stage to stage unchanged.
  """

  def __init__(
    self,
    stage_costs: Sequence[Costs],
    fused_costs: Costs,
    known_exit_fractions: Sequence[tuple[Sequence[float], Sequence[float]]] = (),
    stops_early: bool = True,
  ):
    """Creates the plan.

    Args:
      stage_costs: [stage], cost of a batch.
      fused_costs: Cost of a batch in the program of all stages if no image leaves before the last
        exit; batches of other sizes run stage by stage.
      known_exit_fractions: Pairs (thresholds [exit], fraction of the images that leave at each
        exit [exit]).
      stops_early: See `programs.Programs`.
    """
    self._stops_early, self._num_stages = stops_early, len(stage_costs)
    self._costs = {
      size: np.array([costs[size] for costs in stage_costs]) for size in stage_costs[0]
    }
    # What a program of several stages spares, for each stage but the first.
    self._spared = {
      size: (self._costs[size].sum() - cost) / max(1, self._num_stages - 1)
      for size, cost in fused_costs.items()
    }
    image_costs = {size: costs.sum() / size for size, costs in self._costs.items()}
    most = (1 + _TIE) * min(image_costs.values())
    self.full_batch = max(size for size, cost in image_costs.items() if cost <= most)
    # (first, end) → see `cheapest_batches`.
    self._batches = {
      (first, end): cheapest_batches(
        {size: self._cost(first, end, size) for size in self._costs}, self.full_batch
      )
      for first in range(self._num_stages)
      for end in range(first + 1, self._num_stages + 1)
      if end == first + 1 or not stops_early or (first, end) == (0, self._num_stages)
    }
    self._reached = {
      np.asarray(thresholds, np.float32).tobytes(): (1 - np.cumsum((0, *fractions[:-1]))).round(9)
      for thresholds, fractions in known_exit_fractions
    }
    # The same thresholds are used again and again, and this takes as long as part of a small stage.
    self._cached_program_end = functools.lru_cache(maxsize=256)(self._find_program_end)

  def first_batch(self, stage: int, count: int) -> int:
    """The size of the next batch.

    Args:
      stage: The stage, counted from 0.
      count: Number of images queued for it.
    """
    _, first_batches = self._batches[stage, stage + 1]
    return first_batches[min(count, self.full_batch)]

  def program_end(self, first: int, size: int, thresholds: np.ndarray, total: float) -> int:
    """The stage before which a program that starts with stage `first` is likely to end best.

    Args:
      first: Counted from 0.
      size: Capacity of the batch.
      thresholds: [image, exit], float32, of the images in it.
      total: Number of images that share batches in later stages, these included, before any left.
    """
    return self._cached_program_end(first, size, thresholds.tobytes(), total)

  def _find_program_end(self, first, size, thresholds, total):
    if size not in self._spared:
      return first + 1
    thresholds = np.frombuffer(thresholds, np.float32).reshape(-1, self._num_stages)
    count = len(thresholds)
    if (thresholds == thresholds[0]).all():
      reached = self.reached_stages(thresholds[0])
    else:
      reached = np.mean([self.reached_stages(row) for row in thresholds], axis=0)
    reached = reached / (reached[first] or 1)
    # [stage], the least cost of all that follows for the images of this batch, which run it in
    # batches with others.
    rest = np.zeros(self._num_stages + 1)
    for stage in reversed(range(first + 1, self._num_stages)):
      rest[stage] = min(
        self._cost_of_share(stage, end, reached[stage], count, total) + rest[end]
        for end in range(stage + 1, self._num_stages + 1)
        if (stage, end) in self._batches
      )
    # A stage runs for every row if any image reaches it, or the program runs to its end.
    runs = 1 - (1 - reached) ** count if self._stops_early else np.ones(self._num_stages)
    costs = {
      end: self._cost(first, end, size, runs) + rest[end]
      for stage, end in self._batches
      if stage == first
    }
    most = (1 if self._stops_early else 1 + _LEAST_TO_GAIN) * min(costs.values())
    return max(end for end, cost in costs.items() if cost <= most)

  def _cost(self, first, end, size, runs=None):
    """Cost of a program of some stages, each of which runs with a probability."""
    costs = self._costs[size][first:end].copy()
    costs[1:] = np.maximum(costs[1:] - self._spared.get(size, 0), 0)
    return costs.sum() if runs is None else np.dot(costs, runs[first:end])

  def _cost_of_share(self, first, end, fraction, count, total):
    """Cost of a program for those of `count` images that reach it."""
    if not fraction:  # Also of infinitely many.
      return 0.0
    together = min(total * fraction, self.full_batch)
    least, _ = self._batches[first, end]
    return np.interp(together, np.arange(len(least)), least) / together * fraction * count

  def reached_stages(self, thresholds: np.ndarray) -> np.ndarray:
    """[stage], the expected fraction of images that runs each stage.

    If no exit fractions are known, images are assumed to leave in equal numbers at all remaining
    exits, unless a threshold lets all images leave, or none.

    Args:
      thresholds: [exit], float32.
    """
    if (reached := self._reached.get(thresholds.tobytes())) is not None:
      return reached
    even = 1 / np.arange(len(thresholds), 0, -1)
    leaving = np.select([thresholds > 1, thresholds <= 0], [0, 1], even)
    return np.cumprod((1, *(1 - leaving[:-1])))


def expected_costs(
  madds: Sequence[float], sizes: Sequence[int], overhead: float, stops_early: bool = True
) -> tuple[Sequence[Costs], Costs]:
  """Assumed costs of batches until they are timed, in multiply-adds.

  Args:
    madds: [exit], of an image that leaves there.
    sizes: All batch sizes.
    overhead: Cost of running a program besides its images.
    stops_early: See `BatchPlan`. Such a fused program is left out where it is not worth compiling.

  Returns:
    Costs of each stage, and of the fused program.
  """
  stages = [{size: overhead + size * work for size in sizes} for work in np.diff(madds, prepend=0)]
  spared = (len(madds) - 1) * overhead
  fused = {
    size: overhead + size * madds[-1]
    for size in sizes
    if size == 1 or not stops_early or spared > _LEAST_TO_SPARE * size * madds[-1]
  }
  return stages, fused


def cheapest_batches(costs: Costs, most: int) -> tuple[np.ndarray, list[int]]:
  """The cheapest way to divide a number of images into batches.

  Args:
    costs: Cost of a batch.
    most: The largest batch size to use.

  Returns:
    [count], for each number of images up to `most`: the lowest cost, and the size of the first
    batch to run for it.
  """
  sizes = sorted(size for size in costs if size <= most)
  least, first = [0.0], [0]
  for count in range(1, most + 1):
    # The smallest batch that holds all, unless several are cheaper by more than times are exact.
    best, chosen = np.inf, 0
    for size in sorted(sizes, key=lambda size: (size < count, abs(size - count))):
      cost = costs[size] + least[max(0, count - size)]
      if cost < (1 - _LEAST_TO_GAIN) * best:
        best, chosen = cost, size
    least.append(best)
    first.append(chosen)
  return np.array(least), first
