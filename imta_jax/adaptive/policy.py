"""Thresholds for a budget, and the accuracy that the budget buys.

An exit rule gives each image a score at each exit, by default its highest probability. The image
leaves at the first exit at which its score reaches the threshold; the last exit takes all remaining
images. Everything here is arithmetic on probabilities [exit, image, class], NumPy or JAX arrays
alike, and on costs per exit.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from imta_jax.adaptive.guarantee import CalibrationSet
from imta_jax.adaptive.rules import DEFAULT_RULE, choose_exits, get_rule
from imta_jax.adaptive.search import Search

# The paper's budget parameters: 0.05, 0.10 … 2.00.
BUDGET_PARAMETERS = tuple(index / 20 for index in range(1, 41))


@dataclasses.dataclass(frozen=True)
class OperatingPoint:
  """Accuracy and cost of a network with one set of thresholds.

  Attributes:
    parameter: The budget parameter p, or the budget, that gave the thresholds.
    thresholds: [exit], the score from which an image leaves.
    validation_accuracy: Fraction of validation images classified correctly.
    validation_madds: Average multiply-adds per validation image.
    validation_exit_fractions: Fraction of the validation images that leave at each exit.
    test_accuracy: Fraction of test images classified correctly.
    test_madds: Average multiply-adds per test image.
    test_exit_fractions: Fraction of the test images that leave at each exit.
  """

  parameter: float
  thresholds: tuple[float, ...]
  validation_accuracy: float
  validation_madds: float
  validation_exit_fractions: tuple[float, ...]
  test_accuracy: float
  test_madds: float
  test_exit_fractions: tuple[float, ...]


def geometric_shares(p: float, num_exits: int) -> np.ndarray:
  """Target shares of the images per exit: that of exit k is proportional to p^k.

  Args:
    p: Budget parameter, above 0; below 1 early exits take most images, above 1 late exits do.
    num_exits: The number of exits.

  Returns:
    [num_exits], summing to 1.

  Raises:
    ValueError: If p is not above 0 and finite, or there is no exit.
  """
  if not 0 < p < np.inf:
    raise ValueError(f'budget parameter {p} is out of range: it must be above 0 and finite')
  if num_exits < 1:
    raise ValueError(f'{num_exits} exits cannot share images: there must be 1 or more')
  # The highest power is 1, so that it neither overflows nor vanishes.
  powers = np.arange(num_exits, dtype=np.float64) - (num_exits - 1 if p > 1 else 0)
  shares = p**powers
  return shares / shares.sum()


def exit_scores(
  probabilities: ArrayLike, rule: str = DEFAULT_RULE, temperatures: ArrayLike | None = None
) -> np.ndarray:
  """How sure a network is of each image at each exit.

  Args:
    probabilities: [exit, image, class].
    rule: Name of the exit rule; see `rules`.
    temperatures: [exit], for the rule 'calibrated'; see `search.fit_temperatures`.

  Returns:
    [exit, image].

  Raises:
    ValueError: If there is no such rule, or not one temperature above 0 per exit.
  """
  score = get_rule(rule)
  probabilities = np.asarray(probabilities)
  before = [probabilities[0], *probabilities[:-1]]
  of_exits = np.ones(len(before)) if temperatures is None else np.asarray(temperatures)
  if of_exits.shape != (len(before),) or not all(0 < t < np.inf for t in of_exits):
    raise ValueError(f'temperatures {of_exits.tolist()} must be above 0, one for each exit')
  return np.stack(
    [
      # A Python number leaves the precision as it is.
      np.asarray(score(p, q, float(temperature)))
      for p, q, temperature in zip(probabilities, before, of_exits, strict=True)
    ]
  )


def find_thresholds(
  probabilities: ArrayLike,
  shares: ArrayLike,
  rule: str = DEFAULT_RULE,
  temperatures: ArrayLike | None = None,
) -> np.ndarray:
  """Thresholds at which the exits take given shares of these images.

  The threshold of exit k is the score of the floor(n × share)-th image, in descending order of
  their scores, among those that no earlier exit has taken. If that number is 0, no image leaves
  there.

  Args:
    probabilities: [exit, image, class], of validation images.
    shares: [exit], the target fraction of images per exit.
    rule: See `exit_scores`.
    temperatures: See `exit_scores`.

  Returns:
    [exit]; infinity if no image leaves there, minus infinity at the last exit.

  Raises:
    ValueError: If there is not one share from 0 to 1 per exit, or the rule is wrong.
  """
  scores = exit_scores(probabilities, rule, temperatures)
  of_exits = np.asarray(shares)
  if of_exits.shape != (len(scores),) or not all(0 <= share <= 1 for share in of_exits):
    raise ValueError(
      f'shares {of_exits.tolist()} must be from 0 to 1, one for each of {len(scores)} exits'
    )
  return _thresholds(scores, np.argsort(-scores, axis=1, kind='stable'), of_exits)


def budget_sweep(
  validation_probabilities: ArrayLike,
  validation_labels: ArrayLike,
  test_probabilities: ArrayLike,
  test_labels: ArrayLike,
  madds: ArrayLike,
  parameters: Iterable[float] = BUDGET_PARAMETERS,
  rule: str = DEFAULT_RULE,
  temperatures: ArrayLike | None = None,
) -> list[OperatingPoint]:
  """Budgeted batch classification: thresholds from validation, applied to test images.

  Args:
    validation_probabilities: [exit, validation image, class].
    validation_labels: [validation image].
    test_probabilities: [exit, test image, class].
    test_labels: [test image].
    madds: [exit], multiply-adds per image up to and including each exit.
    parameters: Budget parameters p; see `geometric_shares`.
    rule: See `exit_scores`.
    temperatures: See `exit_scores`.

  Returns:
    One operating point per parameter, in their order.

  Raises:
    ValueError: If the shapes of the arrays do not match, or a number is out of range.

  Example:
    >>> import imta_jax
    >>> import numpy as np
    >>> first_exit = [[0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [0.7, 0.3]]
    >>> last_exit = [[1.0, 0.0], [0.9, 0.1], [0.1, 0.9], [0.2, 0.8]]
    >>> images = (np.array([first_exit, last_exit]), np.array([0, 0, 1, 1]))
    >>> points = imta_jax.budget_sweep(*images, *images, madds=(10, 30), parameters=(0.1, 1.0))
    >>> [(point.test_madds, point.test_accuracy) for point in points]
    [(15.0, 0.75), (20.0, 1.0)]
  """
  validation = (validation_probabilities, validation_labels)
  test = (test_probabilities, test_labels)
  sets = _calibration_sets(validation, test, madds, rule, temperatures)
  return geometric_points(*sets, madds, parameters)


def optimal_sweep(
  validation_probabilities: ArrayLike,
  validation_labels: ArrayLike,
  test_probabilities: ArrayLike,
  test_labels: ArrayLike,
  madds: ArrayLike,
  budgets: ArrayLike,
  rule: str = DEFAULT_RULE,
  temperatures: ArrayLike | None = None,
) -> list[OperatingPoint]:
  """Budgeted batch classification with thresholds that are searched, not given by a rule.

  They have the highest validation accuracy within each budget that the search finds: never less
  than those of `budget_sweep` within that budget, and never less than with a smaller budget. See
  `search`.

  Args:
    validation_probabilities: [exit, validation image, class].
    validation_labels: [validation image].
    test_probabilities: [exit, test image, class].
    test_labels: [test image].
    madds: [exit], multiply-adds per image up to and including each exit.
    budgets: Average multiply-adds per validation image, at least those of the first exit.
    rule: See `exit_scores`.
    temperatures: See `exit_scores`.

  Returns:
    One operating point per budget, in their order; its parameter is the budget.

  Raises:
    ValueError: If the shapes of the arrays do not match, or a number is out of range, as a budget
      that is less than the first exit takes.

  Example:
    >>> import imta_jax
    >>> import numpy as np
    >>> first_exit = [[0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [0.7, 0.3]]
    >>> last_exit = [[1.0, 0.0], [0.9, 0.1], [0.1, 0.9], [0.2, 0.8]]
    >>> images = (np.array([first_exit, last_exit]), np.array([0, 0, 1, 1]))
    >>> points = imta_jax.optimal_sweep(*images, *images, madds=(10, 30), budgets=(10, 20))
    >>> [(point.test_madds, point.test_accuracy) for point in points]
    [(10.0, 0.75), (20.0, 1.0)]
  """
  validation = (validation_probabilities, validation_labels)
  test = (test_probabilities, test_labels)
  sets = _calibration_sets(validation, test, madds, rule, temperatures)
  return optimal_points(*sets, madds, budgets)


def geometric_points(
  validation: CalibrationSet,
  test: CalibrationSet,
  madds: ArrayLike,
  parameters: Iterable[float] = BUDGET_PARAMETERS,
) -> list[OperatingPoint]:
  """`budget_sweep` from scores."""
  madds = _costs(madds)
  order = np.argsort(-validation.scores, axis=1, kind='stable')
  points = []
  for p in parameters:
    thresholds = _thresholds(validation.scores, order, geometric_shares(p, len(madds)))
    points.append(_operating_point(p, thresholds, validation, test, madds))
  return points


def optimal_points(
  validation: CalibrationSet,
  test: CalibrationSet,
  madds: ArrayLike,
  budgets: ArrayLike | None = None,
) -> list[OperatingPoint]:
  """`optimal_sweep` from scores; by default at 40 budgets from the first exit to the last."""
  madds = _costs(madds)
  if budgets is None:
    budgets = np.linspace(madds[0], madds[-1], len(BUDGET_PARAMETERS))
  budgets = np.asarray(budgets)
  for budget in budgets:
    if not budget >= madds[0]:
      raise ValueError(
        f'budget {budget:,.0f} is below the {madds[0]:,.0f} multiply-adds of the first exit: '
        'choose at least that'
      )
  order = np.argsort(-validation.scores, axis=1, kind='stable')
  search = Search(validation.scores, validation.correct, madds)
  for extreme in (-np.inf, np.inf):  # All images leave at the first exit, or at the last one.
    search.add(np.full(len(madds), extreme))
  for p in BUDGET_PARAMETERS:
    search.add(_thresholds(validation.scores, order, geometric_shares(p, len(madds))))
  search.explore()
  for budget in budgets:
    search.optimize(budget)
  return [
    _operating_point(budget, search.best(budget), validation, test, madds) for budget in budgets
  ]


def operating_points(
  validation: CalibrationSet, madds: ArrayLike, sweep: str
) -> list[OperatingPoint]:
  """The operating points of a network for which only validation images are known.

  Args:
    validation: Scores of validation images, which also stand for the test images.
    madds: [exit], multiply-adds per image up to and including each exit.
    sweep: 'geometric' or 'optimal'; see `budget_sweep` and `optimal_sweep`.

  Returns:
    40 operating points.

  Raises:
    ValueError: If there is no such sweep, or scores and costs do not match.
  """
  sweeps = {'geometric': geometric_points, 'optimal': optimal_points}
  if sweep not in sweeps:
    raise ValueError(f'sweep {sweep!r} is unknown: choose from {", ".join(sweeps)}')
  return sweeps[sweep](validation, validation, madds)


def cheapest_as_accurate(
  points: Sequence[OperatingPoint], accuracy: float
) -> OperatingPoint | None:
  """The cheapest operating point that reaches an accuracy on validation images.

  Args:
    points: Operating points from `budget_sweep`.
    accuracy: The accuracy to reach, a fraction.

  Returns:
    The point, or None if none reaches it.
  """
  enough = [point for point in points if point.validation_accuracy >= accuracy]
  return min(enough, key=lambda point: point.validation_madds, default=None)


def scores_and_correctness(
  split: str,
  probabilities: ArrayLike,
  labels: ArrayLike,
  num_exits: int,
  rule: str = DEFAULT_RULE,
  temperatures: ArrayLike | None = None,
) -> CalibrationSet:
  """Reduces probabilities to what thresholds depend on.

  Args:
    split: What the images are called in an error.
    probabilities: [exit, image, class].
    labels: [image].
    num_exits: The number of exits that is expected.
    rule: See `exit_scores`.
    temperatures: See `exit_scores`.

  Returns:
    Scores, and whether the answers are right.

  Raises:
    ValueError: If the shapes of the arrays do not match, or the rule is wrong.
  """
  probabilities, labels = np.asarray(probabilities), np.asarray(labels)
  if not labels.size:
    raise ValueError(f'there are no {split} images')
  if probabilities.ndim != 3 or probabilities.shape[:2] != (num_exits, labels.size):
    raise ValueError(
      f'{split} probabilities of shape {probabilities.shape} must be [exit, image, class] for the '
      f'{num_exits} exits of madds and {labels.size} labels'
    )
  scores = exit_scores(probabilities, rule, temperatures)
  # An image with NaN probabilities counts as wrong.
  return CalibrationSet(scores, (probabilities.argmax(axis=-1) == labels) & ~np.isnan(scores))


def _calibration_sets(
  validation: tuple[ArrayLike, ArrayLike],
  test: tuple[ArrayLike, ArrayLike],
  madds: ArrayLike,
  rule: str,
  temperatures: ArrayLike | None,
) -> tuple[CalibrationSet, CalibrationSet]:
  """Reduces (probabilities, labels) of both splits; see `scores_and_correctness`."""
  num_exits = len(_costs(madds))
  return (
    scores_and_correctness('validation', *validation, num_exits, rule, temperatures),
    scores_and_correctness('test', *test, num_exits, rule, temperatures),
  )


def _costs(madds: ArrayLike) -> np.ndarray:
  """Multiply-adds as an array, if they can be: an exit includes the ones before."""
  madds = np.asarray(madds, np.float64)
  if madds.ndim != 1 or not madds.size or not np.isfinite(madds).all():
    raise ValueError(f'madds {madds.tolist()} must be finite, one for each exit')
  if madds[0] <= 0 or (np.diff(madds) < 0).any():
    raise ValueError(f'madds {madds.tolist()} must be above 0 and increase from exit to exit')
  return madds


def _thresholds(scores, order, shares):
  """`find_thresholds` from scores [exit, image] and their descending order [exit, image]."""
  num_exits, num_images = scores.shape
  thresholds = np.full(num_exits, np.inf, scores.dtype)
  thresholds[-1] = -np.inf
  waiting = np.ones(num_images, bool)
  for index in range(num_exits - 1):
    takes = int(num_images * shares[index])
    candidates = order[index][(waiting & ~np.isnan(scores[index]))[order[index]]]
    if takes and candidates.size:
      # After ties at earlier exits fewer images than the share may remain; then all of them leave.
      threshold = scores[index, candidates[min(takes, candidates.size) - 1]]
      thresholds[index] = threshold
      waiting &= ~(scores[index] >= threshold)
  return thresholds


def _operating_point(parameter, thresholds, validation, test, madds):
  figures: dict[str, Any] = {}
  for split, images in (('validation', validation), ('test', test)):
    exits = choose_exits(images.scores, thresholds)
    fractions = np.bincount(exits, minlength=len(madds)) / exits.size
    figures[f'{split}_accuracy'] = float(images.correct[exits, np.arange(exits.size)].mean())
    figures[f'{split}_madds'] = float(fractions @ madds)
    figures[f'{split}_exit_fractions'] = tuple(fractions.tolist())
  return OperatingPoint(float(parameter), tuple(thresholds.tolist()), **figures)
