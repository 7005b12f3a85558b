"""Chooses batch sizes by the cost of batches."""

import functools
from collections.abc import Mapping, Sequence

import numpy as np

# Batch size → cost of a batch, in any unit.
Costs = Mapping[int, float]

# The fused program is compiled for batch sizes at which it is expected to save at least this part
# of the cost of a batch.
_LEAST_TO_SPARE = 0.1

# Stages run instead of a program that does not stop early where they are expected to take less time
# by more than this fraction: times are not exact, and sorting images takes time, too.
_LEAST_TO_GAIN = 0.05

# Among batch sizes within 10 % of the lowest cost per image, the largest is used.
_TIE = 0.1


class BatchPlan:
  """Batch sizes, and which batches run as the fused program of all stages.

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
      fused_costs: Cost of a batch in the fused program if no image leaves before the last exit.
      known_exit_fractions: Pairs (thresholds [exit], fraction of the images that leave at each
        exit [exit]).
      stops_early: Whether the fused program stops when all images have left.
    """
    self._stops_early = stops_early
    self._stage_costs, self._fused_costs = tuple(stage_costs), fused_costs
    image_costs = {
      size: sum(costs[size] for costs in stage_costs) / size for size in stage_costs[0]
    }
    most = (1 + _TIE) * min(image_costs.values())
    self.full_batch = max(size for size, cost in image_costs.items() if cost <= most)
    self._least_costs, self._first_batches = zip(
      *(cheapest_batches(costs, self.full_batch) for costs in stage_costs), strict=True
    )
    self._reached = {
      np.asarray(thresholds, np.float32).tobytes(): 1 - np.cumsum((0, *fractions[:-1]))
      for thresholds, fractions in known_exit_fractions
    }
    # The same thresholds are used again and again, and this takes as long as part of a small stage.
    self._cached_expectation = functools.lru_cache(maxsize=256)(self._expect_faster_fused)

  def first_batch(self, stage: int, count: int) -> int:
    """The size of the next batch.

    Args:
      stage: The stage, counted from 0.
      count: Number of images queued for it.
    """
    return self._first_batches[stage][min(count, self.full_batch)]

  def is_faster_fused(self, size: int, thresholds: np.ndarray, total: float) -> bool:
    """Whether the fused program is likely to be faster for a batch than stage by stage.

    Args:
      size: Capacity of the batch.
      thresholds: [image, exit], float32, of the images in it.
      total: Number of images that share batches in later stages, these included.
    """
    return self._cached_expectation(size, thresholds.tobytes(), total)

  def _expect_faster_fused(self, size, thresholds, total):
    if size not in self._fused_costs:
      return False
    thresholds = np.frombuffer(thresholds, np.float32).reshape(-1, len(self._stage_costs))
    count = len(thresholds)
    if (thresholds == thresholds[0]).all():
      reached = self.reached_stages(thresholds[0])
    else:
      reached = np.mean([self.reached_stages(row) for row in thresholds], axis=0)
    costs = np.array([costs[size] for costs in self._stage_costs])
    # Every row runs a stage that any image reaches; each stage costs less than as its own program.
    runs = 1 - (1 - reached) ** count if self._stops_early else np.ones(len(costs))
    spared = (costs.sum() - self._fused_costs[size]) / max(1, len(costs) - 1)
    fused = costs[0] + np.dot(costs[1:] - spared, runs[1:])
    # Stage by stage, only the images that reach a stage run it.
    by_stages = costs[0]
    for fraction, least in zip(reached[1:], self._least_costs[1:], strict=True):
      if fraction:
        together = min(total * fraction, self.full_batch)
        by_stages += np.interp(together, np.arange(len(least)), least) / together * fraction * count
    return bool(fused < (1 if self._stops_early else 1 + _LEAST_TO_GAIN) * by_stages)

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
  costs = {size: cost for size, cost in costs.items() if size <= most}
  least, first = [0.0], [0]
  for count in range(1, most + 1):
    cost, size = min((cost + least[max(0, count - size)], -size) for size, cost in costs.items())
    least.append(cost)
    first.append(-size)
  return np.array(least), first
