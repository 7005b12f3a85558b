"""Computes logits, and from the logits accuracies, tables and figures.

Only computing the logits [exit, image, class] needs an accelerator; the rest is NumPy.
"""

import dataclasses
import importlib.util
import io
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import scipy.special
from etils import epath

from imta_jax.adaptive.cost import ExitCost
from imta_jax.adaptive.guarantee import CalibrationSet
from imta_jax.adaptive.policy import (
  OperatingPoint,
  budget_sweep,
  cheapest_as_accurate,
  exit_scores,
  scores_and_correctness,
)
from imta_jax.adaptive.rules import RULES, get_rule
from imta_jax.adaptive.search import fit_temperatures
from imta_jax.data.dataset import Batch, Dataset
from imta_jax.errors import UsageError, first_line
from imta_jax.files import read_whole, write_csv, write_whole
from imta_jax.runtime import replicate

SPLITS = ('validation', 'test')

_EVALUATE_AGAIN = 'run the training command again, which evaluates again'

# Smallest range of the accuracy axis in figures, in percentage points.
_SMALLEST_SPAN = 5


@dataclasses.dataclass(frozen=True)
class Predictions:
  """A network's predictions for a split.

  Attributes:
    logits: [exit, image, class], float32.
    labels: [image], int32.
  """

  logits: np.ndarray
  labels: np.ndarray

  def accuracy(self, k: int = 1) -> np.ndarray:
    """Returns the top-k accuracy per exit, as fractions [exit].

    Of equal logits the first class ranks highest, as for argmax; NaN logits count as wrong.
    """
    labels = self.labels[:, np.newaxis]
    label_logits = np.take_along_axis(self.logits, labels[np.newaxis], axis=-1)
    is_before = np.arange(self.logits.shape[-1]) < labels
    ranks_higher = (self.logits > label_logits) | (is_before & (self.logits == label_logits))
    is_valid = ~np.isnan(self.logits).any(axis=-1)
    return (is_valid & (ranks_higher.sum(axis=-1) < k)).mean(axis=-1)

  def cross_entropy(self) -> np.ndarray:
    """Returns the mean cross-entropy per exit, [exit]."""
    label_logits = np.take_along_axis(self.logits, self.labels[np.newaxis, :, np.newaxis], axis=-1)
    return (scipy.special.logsumexp(self.logits, axis=-1) - label_logits[..., 0]).mean(axis=-1)

  def probabilities(self) -> np.ndarray:
    """Returns the softmax of the logits, [exit, image, class]."""
    return scipy.special.softmax(self.logits, axis=-1)


def predict(
  step: Callable[[Any, Batch], tuple], weights: Any, batches: Iterable[Batch]
) -> Predictions:
  """Runs a network over a split.

  Args:
    step: The mapped evaluation step; see `steps.make_predict_step`.
    weights: Variables of the network as that step takes them, replicated.
    batches: Batches of the split, from `Dataset.evaluation_batches`.

  Returns:
    The predictions for all images; they are the same on every host.
  """
  logits, labels = [], []
  pending = None

  def collect(result):
    batch_logits, batch_labels, mask = jax.device_get(result)
    logits.append(batch_logits[:, mask])
    labels.append(batch_labels[mask])

  for batch in batches:
    result = step(weights, batch)
    if pending is not None:
      collect(pending)  # Meanwhile the devices work on this batch.
    pending = result
  collect(pending)
  return Predictions(np.concatenate(logits, axis=1), np.concatenate(labels))


def predict_splits(
  step: Callable[[Any, Batch], tuple], weights: Any, dataset: Dataset
) -> dict[str, Predictions]:
  """Runs a network on the validation and test images; see `predict`."""
  weights = replicate(weights)
  return {split: predict(step, weights, dataset.evaluation_batches(split)) for split in SPLITS}


def save_predictions(predictions: Predictions, path: epath.Path) -> None:
  """Writes predictions to an .npz file."""
  _save_arrays(path, logits=predictions.logits, labels=predictions.labels)


def load_predictions(path: epath.Path) -> Predictions:
  """Loads predictions that `save_predictions` wrote.

  Raises:
    UsageError: If they are missing or corrupt.
  """
  arrays = _load_arrays(path)
  try:
    predictions = Predictions(arrays['logits'], arrays['labels'])
    num_exits, num_images, _ = predictions.logits.shape
    if not num_exits or predictions.labels.shape != (num_images,):
      raise ValueError(f'labels {predictions.labels.shape} for logits {predictions.logits.shape}')
  except (KeyError, ValueError) as error:
    raise UsageError(f'{path} is corrupt ({error}): {_EVALUATE_AGAIN}') from error
  return predictions


def save_scores(predictions: Predictions, path: epath.Path) -> None:
  """Writes what thresholds depend on to an .npz file: a hundredth of the logits of 1000 classes.

  Args:
    predictions: Predictions for validation images.
    path: The file.
  """
  probabilities, labels = predictions.probabilities(), predictions.labels
  temperatures = fit_temperatures(probabilities, labels)
  scores = {rule: exit_scores(probabilities, rule, temperatures) for rule in RULES}
  correct = scores_and_correctness('validation', probabilities, labels, len(probabilities)).correct
  _save_arrays(path, temperatures=temperatures, correct=correct, **scores)


def load_scores(path: epath.Path, rule: str) -> tuple[CalibrationSet, np.ndarray]:
  """Loads what `save_scores` wrote.

  Args:
    path: The file.
    rule: Name of an exit rule; see `adaptive.rules`.

  Returns:
    Scores by this rule, and the temperatures for the rule 'calibrated', [exit].

  Raises:
    UsageError: If they are missing or corrupt.
    ValueError: If there is no such rule.
  """
  get_rule(rule)
  arrays = _load_arrays(path)
  try:
    return CalibrationSet(arrays[rule], arrays['correct']), arrays['temperatures']
  except (KeyError, ValueError) as error:
    raise UsageError(f'{path} is corrupt ({error}): {_EVALUATE_AGAIN}') from error


def _save_arrays(path, **arrays):
  content = io.BytesIO()
  np.savez(content, **arrays)
  write_whole(path, content.getvalue())


def _load_arrays(path):
  content = read_whole(path, _EVALUATE_AGAIN)
  try:
    # Read as a whole: TensorFlow's files, which buckets have, cannot be sought as zipfile does.
    with np.load(io.BytesIO(content)) as arrays:
      return dict(arrays)
  except Exception as error:  # Corrupt files make their readers raise all kinds of exceptions.
    raise UsageError(f'{path} is corrupt ({first_line(error)}): {_EVALUATE_AGAIN}') from error


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """The results of one network: the accuracy of each exit, and budgeted batch classification.

  Attributes:
    name: Name of the network in the legends of figures.
    costs: The cost up to each exit, [exit].
    accuracies: {(split, k): [exit]}, top-k accuracies as fractions, for k = 1 and 5.
    points: Operating points, in the order of their budget parameters.
  """

  name: str
  costs: Sequence[ExitCost]
  accuracies: Mapping[tuple[str, int], np.ndarray]
  points: Sequence[OperatingPoint]


def assess(
  name: str, costs: Sequence[ExitCost], predictions: Mapping[str, Predictions], **sweep: Any
) -> Evaluation:
  """Evaluates a network from its costs and its predictions for validation and test images.

  Args:
    name: Name of the network in the legends of figures.
    costs: The cost up to each exit, [exit].
    predictions: {split: predictions} for the splits 'validation' and 'test'.
    **sweep: Options for `budget_sweep`.

  Returns:
    The evaluation.
  """
  validation, test = (predictions[split] for split in SPLITS)
  points = budget_sweep(
    validation.probabilities(),
    validation.labels,
    test.probabilities(),
    test.labels,
    [cost.madds for cost in costs],
    **sweep,
  )
  accuracies = {(split, k): predictions[split].accuracy(k) for split in SPLITS for k in (1, 5)}
  return Evaluation(name, costs, accuracies, points)


def write_tables(evaluations: Sequence[Evaluation], folder: epath.Path) -> None:
  """Writes exits.csv, budget.csv and evaluation.json."""
  exits, budgets = [], []
  for evaluation in evaluations:
    for index, cost in enumerate(evaluation.costs):
      row = {'network': evaluation.name, 'exit': index + 1, **dataclasses.asdict(cost)}
      for (split, k), accuracy in evaluation.accuracies.items():
        row[f'{split}_top{k}'] = round(float(accuracy[index]), 6)
      exits.append(row)
    for point in evaluation.points:
      budgets.append({'network': evaluation.name, **dataclasses.asdict(point)})
  # JSON has no infinity: thresholds of the last exit, and of exits that no image takes, are null.
  finite = [
    {**row, 'thresholds': [t if np.isfinite(t) else None for t in row['thresholds']]}
    for row in budgets
  ]
  content = json.dumps({'exits': exits, 'budget': finite}, indent=2) + '\n'
  write_whole(folder / 'evaluation.json', content.encode())
  for row in budgets:
    for field in ('thresholds', 'validation_exit_fractions', 'test_exit_fractions'):
      row[field] = ' '.join(f'{value:.6g}' for value in row[field])
  for rows, name in ((exits, 'exits.csv'), (budgets, 'budget.csv')):
    write_csv(folder / name, rows)


def load_costs(folder: epath.Path, name: str) -> list[ExitCost]:
  """Loads the costs of a network from the files that `write_tables` wrote.

  Raises:
    UsageError: If the network has none, or they are corrupt.
  """
  return _load_rows(folder, name, 'exits', lambda row: ExitCost(row['madds'], row['params']))


def load_accuracies(folder: epath.Path, name: str) -> list[float]:
  """Loads the top-1 accuracies of a network on test images, [exit], as fractions.

  Raises:
    UsageError: If the network has none, or they are corrupt.
  """
  return _load_rows(folder, name, 'exits', lambda row: row['test_top1'])


def load_points(folder: epath.Path, name: str) -> list[OperatingPoint]:
  """Loads the operating points of a network from the files that `write_tables` wrote.

  Raises:
    UsageError: If the network has none, or they are corrupt.
  """

  def point(row):
    fields = {field.name: row[field.name] for field in dataclasses.fields(OperatingPoint)}
    thresholds = [math.inf if t is None else t for t in fields['thresholds'][:-1]]
    fields['thresholds'] = [*thresholds, -math.inf]
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
    return OperatingPoint(**values)

  return _load_rows(folder, name, 'budget', point)


def _load_rows(folder, name, table, parse):
  path = folder / 'evaluation.json'
  content = read_whole(path, _EVALUATE_AGAIN)
  try:
    rows = [parse(row) for row in json.loads(content)[table] if row['network'] == name]
  except (ValueError, LookupError, TypeError, RecursionError) as error:
    raise UsageError(f'{path} is corrupt ({first_line(error)}): {_EVALUATE_AGAIN}') from error
  if not rows:
    raise UsageError(f'{folder} has no evaluation of {name}: let the training command finish')
  return rows


def write_figure(
  evaluations: Sequence[Evaluation], path: epath.Path, title: str, labels: Sequence[str]
) -> None:
  """Draws accuracy against average multiply-adds.

  Lines show budgeted batch classification; circles show single exits that classify all images.
  Dotted lines are the accuracy of the last exit. Diamonds mark the cheapest thresholds that are as
  accurate as the last exit on validation images, with their share of its multiply-adds.

  Args:
    evaluations: The networks.
    path: The PNG file to write.
    title: Heading of the figure.
    labels: What the legend calls each network.
  """
  figure = new_figure(6.4, 4.4)
  axes = figure.add_subplot()
  unit, unit_name = 1e6, 'million'
  is_any_marked = False
  for index, (evaluation, label) in enumerate(zip(evaluations, labels, strict=True)):
    points = sorted(evaluation.points, key=lambda point: point.test_madds)
    (line,) = axes.plot(
      [point.test_madds / unit for point in points],
      [100 * point.test_accuracy for point in points],
      '.-' if len(points) == 1 else '-',  # A line of one point would be invisible.
      label=label,
      linewidth=2,
    )
    axes.plot(
      [cost.madds / unit for cost in evaluation.costs],
      100 * evaluation.accuracies['test', 1],
      'o',
      color=line.get_color(),
      markersize=5,
      fillstyle='none',
    )
    is_any_marked |= _mark_cheapest(axes, evaluation, unit, line.get_color(), index % 2)
  gray = {'color': 'gray', 'markersize': 5}
  axes.plot([], [], 'o', fillstyle='none', label='one exit for all images', **gray)
  if is_any_marked:
    label = 'as accurate as the last exit on validation images'
    axes.plot([], [], 'D:', label=label, **gray)
  axes.set(
    xlabel=f'average multiply-adds per image ({unit_name})', ylabel='test accuracy (%)', title=title
  )
  low, high = axes.get_ylim()
  if high - low < _SMALLEST_SPAN:  # Otherwise a difference of a few images looks like a trend.
    middle = (low + high) / 2
    axes.set_ylim(middle - _SMALLEST_SPAN / 2, min(100, middle + _SMALLEST_SPAN / 2))
  axes.grid(alpha=0.3)
  axes.legend(loc='lower right')
  save_figure(figure, path)


def _mark_cheapest(axes, evaluation, unit, color, above):
  """Marks the cheapest point as accurate as the last exit on validation images, if there is one."""
  point = cheapest_as_accurate(evaluation.points, evaluation.accuracies['validation', 1][-1])
  if point is None:
    return False
  madds = evaluation.costs[-1].madds
  whole = 100 * evaluation.accuracies['test', 1][-1]
  x, y = point.test_madds / unit, 100 * point.test_accuracy
  axes.plot([evaluation.costs[0].madds / unit, madds / unit], [whole] * 2, ':', color=color)
  axes.plot([x], [y], 'D', color=color, markersize=6)
  axes.annotate(
    f'{point.test_madds / madds:.0%}',
    (x, y),
    (0, 8 if above else -8),
    textcoords='offset points',
    ha='center',
    va='bottom' if above else 'top',
    color=color,
    weight='bold',
  )
  return True


def require_matplotlib() -> None:
  """Raises UsageError if figures cannot be drawn."""
  if importlib.util.find_spec('matplotlib') is None:
    raise UsageError("figures need matplotlib: pip install 'imta_jax[train]'")


def new_figure(width: float, height: float) -> Any:
  """Returns an empty `matplotlib.figure.Figure`, whose sides are in inches."""
  require_matplotlib()
  # A notebook hands its backend on, which Matplotlib refuses at its import if it is not installed.
  os.environ.pop('MPLBACKEND', None)
  from matplotlib.figure import Figure

  return Figure(figsize=(width, height), layout='constrained')


def save_figure(figure: Any, path: epath.Path) -> None:
  """Writes a figure to a PNG file.

  Raises:
    UsageError: If it cannot be written.
  """
  content = io.BytesIO()
  figure.savefig(content, format='png', dpi=150)
  write_whole(path, content.getvalue())
