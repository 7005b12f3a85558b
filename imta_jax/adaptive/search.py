"""What is fitted to validation images: thresholds within a budget, and temperatures.

Trying all thresholds takes images^(exits - 1) trials. But if all thresholds except one are fixed,
the best value of that one is found by sorting. Coordinate ascent does that exit by exit, first for
accuracy less a price per multiply-add, then within the budget.
"""

import numpy as np
import scipy.optimize
import scipy.special
from numpy.typing import ArrayLike

from imta_jax.adaptive.rules import choose_exits

# Prices per multiply-add for which thresholds are searched before any budget is known.
_NUM_PRICES = 24
_MAX_ROUNDS = 12

_MAX_TEMPERATURE = 20.0


class Search:
  """Thresholds for validation images, of which the best are kept.

  All thresholds that were tried are candidates for every budget, so that more budget never costs
  accuracy.
  """

  def __init__(self, scores: np.ndarray, correct: np.ndarray, madds: ArrayLike):
    """Starts a search.

    Args:
      scores: [exit, image], of validation images; see `policy.exit_scores`.
      correct: [exit, image], whether the answer of an exit is right.
      madds: [exit], multiply-adds up to and including each exit.
    """
    self._scores, self._madds = scores, np.asarray(madds, np.float64)
    self._correct = correct.astype(np.float64)
    self._num_exits, self._num_images = scores.shape
    self._order = np.argsort(-scores, axis=1, kind='stable')
    # (accuracy, multiply-adds, thresholds), each averaged over images.
    self._found: list[tuple[float, float, np.ndarray]] = []

  def add(self, thresholds: ArrayLike) -> None:
    """Makes thresholds a candidate."""
    thresholds = np.array(thresholds, self._scores.dtype)
    thresholds[-1] = -np.inf
    exits = choose_exits(self._scores, thresholds)
    images = np.arange(self._num_images)
    self._found.append((self._correct[exits, images].mean(), self._madds[exits].mean(), thresholds))

  def explore(self) -> None:
    """Searches thresholds for prices from those that keep all images to those that keep none."""
    span = self._madds[-1] - self._madds[0] or 1.0  # Any price will do if all exits cost the same.
    for price in np.geomspace(1e-3, 10, _NUM_PRICES) / span:
      self.add(self._ascend(self.best(np.inf), lambda accuracy, cost, p=price: accuracy - p * cost))

  def best(self, budget: float) -> np.ndarray:
    """Returns the thresholds found so far with the highest accuracy within a budget, [exit]."""
    affordable = [found for found in self._found if found[1] <= budget]
    accuracy, _, thresholds = max(affordable, key=lambda found: (found[0], -found[1]))
    return thresholds

  def optimize(self, budget: float) -> np.ndarray:
    """Searches on from the best thresholds within a budget.

    Args:
      budget: Multiply-adds per image, at least those of the first exit.

    Returns:
      [exit], thresholds whose average cost on validation images is at most the budget.
    """

    def within_budget(accuracy, cost):
      # Among equals the cheaper, by less than an image is worth.
      value = accuracy - 1e-3 / self._num_images * cost / self._madds[-1]
      return np.where(cost <= budget, value, -np.inf)

    self.add(self._ascend(self.best(budget), within_budget))
    return self.best(budget)

  def _ascend(self, thresholds, value):
    """Improves value(accuracy, multiply-adds) by one threshold at a time until none helps."""
    thresholds, highest = thresholds.copy(), -np.inf
    for _ in range(_MAX_ROUNDS):
      before = highest
      for exit in range(self._num_exits - 1):
        thresholds[exit], highest = self._best_threshold(exit, thresholds, value)
      if highest <= before:
        break
    return thresholds

  def _best_threshold(self, exit, thresholds, value):
    """Returns the best threshold of an exit if those of the others stay, and its value."""
    others = thresholds.copy()
    others[exit] = np.inf
    without = choose_exits(self._scores, others)  # Where images leave that do not leave here.
    scores = self._scores[exit]
    order = self._order[exit]
    order = order[(without > exit)[order] & ~np.isnan(scores[order])]
    images = np.arange(self._num_images)
    accuracy, cost = self._correct[without, images], self._madds[without]
    # What the images of the highest scores change by leaving here, one after another.
    gains = np.cumsum(self._correct[exit, order] - accuracy[order])
    costs = np.cumsum(self._madds[exit] - cost[order])
    values = value(
      (accuracy.sum() + np.append(0.0, gains)) / self._num_images,
      (cost.sum() + np.append(0.0, costs)) / self._num_images,
    )
    # Images with the same score leave together.
    sorted_scores = scores[order]
    tied = np.append(False, sorted_scores == np.append(sorted_scores[1:], -np.inf))
    values[tied[: len(values)]] = -np.inf
    best = int(np.argmax(values))
    return (np.inf if best == 0 else sorted_scores[best - 1]), values[best]


def fit_temperatures(probabilities: ArrayLike, labels: ArrayLike) -> np.ndarray:
  """Fits a temperature per exit: the one with the lowest cross-entropy after scaling.

  Source: On Calibration of Modern Neural Networks (Guo et al., ICML 2017).

  Args:
    probabilities: [exit, image, class], of validation images; those with NaN are left out.
    labels: [image].

  Returns:
    [exit], between 1/20 and 20; 1 changes nothing, and above 1 the network is less sure.

  Raises:
    ValueError: If labels are no classes of the probabilities.
  """
  probabilities, labels = np.asarray(probabilities), np.asarray(labels)
  num_classes = probabilities.shape[-1]
  if not labels.size or labels.min() < 0 or labels.max() >= num_classes:
    raise ValueError(f'labels must be from 0 to {num_classes - 1}, one for each image')
  smallest = np.finfo(np.float32).tiny  # Probabilities can be 0, their logarithms cannot.
  return np.array([_fit(np.log(np.maximum(p, smallest)), labels) for p in probabilities])


def _fit(logits, labels):
  is_finite = np.isfinite(logits).all(axis=-1)
  if not is_finite.any():
    return 1.0
  logits, labels = logits[is_finite], labels[is_finite]
  images = np.arange(len(labels))

  def cross_entropy(log_temperature):
    scaled = logits / np.exp(log_temperature)
    return (scipy.special.logsumexp(scaled, axis=-1) - scaled[images, labels]).mean()

  bound = np.log(_MAX_TEMPERATURE)
  result = scipy.optimize.minimize_scalar(cross_entropy, bounds=(-bound, bound), method='bounded')
  return float(np.exp(result.x))
