"""From logits to accuracies, tables and figures."""

import csv
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from etils import epath
from matplotlib.figure import Figure

from imta_jax.adaptive.cost import ExitCost
from imta_jax.adaptive.policy import budget_sweep, exit_scores
from imta_jax.adaptive.rules import RULES
from imta_jax.adaptive.search import fit_temperatures
from imta_jax.errors import UsageError
from imta_jax.evaluate import (
  SPLITS,
  Evaluation,
  Predictions,
  assess,
  load_accuracies,
  load_costs,
  load_points,
  load_predictions,
  load_scores,
  save_predictions,
  save_scores,
  write_figure,
  write_tables,
)

ROOT = Path(__file__).parents[1]
NUM_EXITS, NUM_IMAGES, NUM_CLASSES = 2, 40, 8
COSTS = [ExitCost(madds=1_000_000, params=300), ExitCost(madds=2_500_000, params=700)]


def draw_predictions(seed):
  random = np.random.default_rng(seed)
  labels = random.integers(NUM_CLASSES, size=NUM_IMAGES, dtype=np.int32)
  logits = random.standard_normal((NUM_EXITS, NUM_IMAGES, NUM_CLASSES), np.float32)
  logits[1, np.arange(NUM_IMAGES), labels] += 1.5
  return Predictions(logits, labels)


@pytest.fixture(scope='module')
def predictions():
  return {'validation': draw_predictions(0), 'test': draw_predictions(1)}


@pytest.fixture(scope='module')
def evaluation(predictions):
  return assess('IMTA', COSTS, predictions, parameters=(0.05, 1.0, 2.0))


@pytest.mark.parametrize('k', [1, 5])
def test_accuracy_counts_labels_among_the_k_highest(predictions, k):
  logits, labels = predictions['test'].logits, predictions['test'].labels
  expected = []
  for exit_logits in logits:
    highest = [
      sorted(range(NUM_CLASSES), key=lambda c, row=row: -row[c])[:k] for row in exit_logits
    ]
    right = sum(label in best for label, best in zip(labels, highest, strict=True))
    expected.append(right / NUM_IMAGES)
  assert 0 < expected[0] < expected[1]
  np.testing.assert_allclose(predictions['test'].accuracy(k), expected)


def test_of_equal_logits_the_first_class_ranks_highest():
  logits = np.array([[[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 1.0, 1.0]]], np.float32)
  predictions = Predictions(logits, np.array([0, 1, 2], np.int32))
  np.testing.assert_allclose(predictions.accuracy(), [1 / 3])
  np.testing.assert_array_equal(predictions.accuracy(2), [1])
  constant = Predictions(np.zeros((1, 4, 8)), np.array([0, 4, 5, 7]))
  np.testing.assert_array_equal(constant.accuracy(), [0.25])
  np.testing.assert_array_equal(constant.accuracy(5), [0.5])


def test_logits_that_are_no_numbers_count_as_wrong():
  nan = np.nan
  logits = np.array([[[nan, nan, nan], [nan, 1.0, 0.0], [0.0, nan, 1.0], [2.0, 1.0, 0.0]]])
  predictions = Predictions(logits, np.array([0, 1, 1, 0], np.int32))
  np.testing.assert_array_equal(predictions.accuracy(), [0.25])
  np.testing.assert_array_equal(predictions.accuracy(3), [0.25])


def test_accuracies_in_bfloat16_are_those_of_argmax_and_of_the_budget_table(
  tiny_msdnet, random_variables, tmp_path
):
  model = tiny_msdnet(collaboration='network', dtype='bfloat16')
  random = np.random.default_rng(0)
  images = random.standard_normal((500, 8, 8, 3), np.float32)
  logits = np.asarray(jax.jit(model.apply)(random_variables(model, (8, 8, 3)), images))
  assert (np.diff(np.sort(logits)) == 0).mean() < 1e-4  # Not rounded to bfloat16.
  # Half of the labels are right.
  labels = np.where(random.random(500) < 0.5, logits[-1].argmax(axis=-1), random.integers(100))
  prediction = Predictions(logits, labels)
  accuracy = prediction.accuracy()
  np.testing.assert_array_equal(accuracy, (logits.argmax(axis=-1) == labels).mean(axis=-1))
  # So large a parameter sends all images to the last exit.
  evaluation = assess('IMTA', COSTS, dict.fromkeys(SPLITS, prediction), parameters=(0.1, 1e6))
  write_tables([evaluation], epath.Path(tmp_path))
  exits, budget = (read_csv(epath.Path(tmp_path) / name) for name in ('exits.csv', 'budget.csv'))
  assert budget[-1]['thresholds'] == 'inf -inf'
  assert float(budget[-1]['test_accuracy']) == float(exits[-1]['test_top1']) == accuracy[-1]


def test_cross_entropy_is_the_average_negative_log_likelihood(predictions):
  logits, labels = predictions['test'].logits.astype(np.float64), predictions['test'].labels
  expected = [
    np.mean(
      [
        -np.log(np.exp(row[label]) / np.exp(row).sum())
        for row, label in zip(exit_logits, labels, strict=True)
      ]
    )
    for exit_logits in logits
  ]
  np.testing.assert_allclose(predictions['test'].cross_entropy(), expected, rtol=1e-5)


def test_cross_entropy_of_large_logits_does_not_overflow():
  predictions = Predictions(np.array([[[1000.0, 0.0]]]), np.array([1], np.int32))
  np.testing.assert_allclose(predictions.cross_entropy(), [1000.0])


def test_probabilities_are_the_softmax(predictions):
  logits = predictions['test'].logits
  expected = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
  np.testing.assert_allclose(predictions['test'].probabilities(), expected, rtol=1e-5)


def test_predictions_are_read_as_they_were_written(predictions, tmp_path):
  path = epath.Path(tmp_path) / 'evaluation' / 'test.npz'
  save_predictions(predictions['test'], path)
  loaded = load_predictions(path)
  for name in ('logits', 'labels'):
    written, read = (getattr(value, name) for value in (predictions['test'], loaded))
    np.testing.assert_array_equal(read, written)
    assert read.dtype == written.dtype
  assert [file.name for file in path.parent.iterdir()] == ['test.npz']


def test_assessment_is_accuracies_and_the_budget_sweep(predictions, evaluation):
  validation, test = predictions['validation'], predictions['test']
  assert evaluation.name == 'IMTA' and evaluation.costs == COSTS
  assert evaluation.points == budget_sweep(
    validation.probabilities(),
    validation.labels,
    test.probabilities(),
    test.labels,
    [1_000_000, 2_500_000],
    parameters=(0.05, 1.0, 2.0),
  )
  assert set(evaluation.accuracies) == {
    (split, k) for split in ('validation', 'test') for k in (1, 5)
  }
  for (split, k), accuracy in evaluation.accuracies.items():
    np.testing.assert_array_equal(accuracy, predictions[split].accuracy(k))


@pytest.fixture(scope='module')
def tables(evaluation, tmp_path_factory):
  """The folder that `write_tables` writes for two networks."""
  folder = epath.Path(tmp_path_factory.mktemp('tables')) / 'evaluation'
  other = Evaluation('other', evaluation.costs, evaluation.accuracies, evaluation.points[:1])
  write_tables([evaluation, other], folder)
  return folder


def read_csv(path):
  with path.open() as file:
    return list(csv.DictReader(file))


def test_only_the_tables_are_written(tables):
  names = {path.name for path in tables.iterdir()}
  assert names == {'exits.csv', 'budget.csv', 'evaluation.json'}


def test_exits_table_holds_costs_and_accuracies(tables, evaluation):
  rows = read_csv(tables / 'exits.csv')
  assert [(row['network'], row['exit']) for row in rows] == [
    ('IMTA', '1'),
    ('IMTA', '2'),
    ('other', '1'),
    ('other', '2'),
  ]
  for index, row in enumerate(rows[:2]):
    assert int(row['madds']) == COSTS[index].madds
    assert int(row['params']) == COSTS[index].params
    for split in ('validation', 'test'):
      for k in (1, 5):
        expected = evaluation.accuracies[split, k][index]
        assert float(row[f'{split}_top{k}']) == pytest.approx(expected, abs=1e-6)


def test_budget_table_holds_the_operating_points(tables, evaluation):
  rows = read_csv(tables / 'budget.csv')
  assert [row['network'] for row in rows] == ['IMTA'] * 3 + ['other']
  fields = ('validation_accuracy', 'validation_madds', 'test_accuracy', 'test_madds')
  for row, point in zip(rows, [*evaluation.points, evaluation.points[0]], strict=True):
    for field in ('parameter', *fields):
      assert float(row[field]) == pytest.approx(getattr(point, field), rel=1e-9)
    for field in ('thresholds', 'test_exit_fractions'):
      values = [float(value) for value in row[field].split()]
      assert values == pytest.approx(list(getattr(point, field)), rel=1e-5)
    assert float(row['thresholds'].split()[-1]) == -np.inf


def test_json_holds_the_same_and_is_valid(tables, evaluation):
  def refuse(constant):
    raise AssertionError(f'{constant} is not JSON')

  content = json.loads((tables / 'evaluation.json').read_text(), parse_constant=refuse)
  assert set(content) == {'exits', 'budget'}
  assert len(content['exits']) == 4 and len(content['budget']) == 4
  for index, row in enumerate(content['exits'][:2]):
    assert (row['network'], row['exit']) == ('IMTA', index + 1)
    assert (row['madds'], row['params']) == (COSTS[index].madds, COSTS[index].params)
    expected = evaluation.accuracies['test', 5][index]
    assert row['test_top5'] == pytest.approx(expected, abs=1e-6)
  for row, point in zip(content['budget'], evaluation.points, strict=False):
    assert row['test_accuracy'] == pytest.approx(point.test_accuracy)
    assert row['test_madds'] == pytest.approx(point.test_madds)
    assert row['test_exit_fractions'] == pytest.approx(point.test_exit_fractions)
    assert row['thresholds'] == [t if np.isfinite(t) else None for t in point.thresholds]
    assert row['thresholds'][-1] is None


@pytest.fixture
def figures(monkeypatch):
  """The figures that are saved."""
  figures, savefig = [], Figure.savefig

  def keep(figure, *args, **options):
    figures.append(figure)
    return savefig(figure, *args, **options)

  monkeypatch.setattr(Figure, 'savefig', keep)
  return figures


def test_figure_shows_the_sweep_and_the_exits(evaluation, tmp_path, figures):
  path = epath.Path(tmp_path) / 'evaluation' / 'budget.png'
  write_figure([evaluation], path, 'CIFAR-100', ['phase_1 (with GE)'])
  assert path.read_bytes().startswith(b'\x89PNG\r\n\x1a\n')
  assert [file.name for file in path.parent.iterdir()] == ['budget.png']
  (figure,) = figures
  (axes,) = figure.axes
  assert axes.get_title() == 'CIFAR-100'
  assert 'million' in axes.get_xlabel() and '%' in axes.get_ylabel()
  line, exits = axes.lines[:2]
  assert line.get_label() == 'phase_1 (with GE)'
  assert line.get_marker() == 'None'
  points = sorted(evaluation.points, key=lambda point: point.test_madds)
  np.testing.assert_allclose(line.get_xdata(), [point.test_madds / 1e6 for point in points])
  np.testing.assert_allclose(line.get_ydata(), [100 * point.test_accuracy for point in points])
  np.testing.assert_allclose(exits.get_xdata(), [1.0, 2.5])
  np.testing.assert_allclose(exits.get_ydata(), 100 * evaluation.accuracies['test', 1])
  # A single budget is a point, which a line alone would not show.
  evaluation = dataclasses.replace(evaluation, points=evaluation.points[:1])
  write_figure([evaluation], path, 'CIFAR-100', ['phase_1'])
  assert figures[1].axes[0].lines[0].get_marker() == '.'


@pytest.mark.parametrize('is_reached', [True, False])
def test_figure_marks_the_cheapest_thresholds_as_accurate_on_validation_images(
  evaluation, is_reached, tmp_path, figures
):
  points = [
    dataclasses.replace(
      evaluation.points[0],
      validation_accuracy=accuracy,
      validation_madds=madds,
      test_accuracy=accuracy - 0.02,
      test_madds=madds + 0.3e6,
    )
    for accuracy, madds in ((0.6, 0.9e6), (0.7, 1.2e6), (0.8, 1.5e6))
  ]
  last = 0.7 if is_reached else 0.9
  accuracies = {('validation', 1): np.array([0.5, last]), ('test', 1): np.array([0.5, 0.66])}
  evaluation = dataclasses.replace(evaluation, points=points, accuracies=accuracies)
  write_figure([evaluation], epath.Path(tmp_path) / 'budget.png', 'CIFAR-100', ['phase_1'])
  (axes,) = figures[0].axes
  assert [text.get_text() for text in axes.texts] == (['60%'] if is_reached else [])
  diamonds = [line.get_xydata().tolist() for line in axes.lines if line.get_marker() == 'D']
  assert diamonds == ([[[1.5, 68.0]], []] if is_reached else [])


@pytest.mark.parametrize('rule', RULES)
def test_scores_are_those_of_the_rule(predictions, tmp_path, rule):
  path, validation = epath.Path(tmp_path) / 'scores.npz', predictions['validation']
  save_scores(validation, path)
  scores, temperatures = load_scores(path, rule)
  probabilities = validation.probabilities()
  np.testing.assert_array_equal(temperatures, fit_temperatures(probabilities, validation.labels))
  np.testing.assert_array_equal(scores.scores, exit_scores(probabilities, rule, temperatures))
  assert scores.scores.dtype == np.float32
  np.testing.assert_array_equal(scores.correct, probabilities.argmax(-1) == validation.labels)


LOGITS, LABELS = np.zeros((1, 2, 3), np.float32), np.zeros(2, np.int32)


@pytest.mark.parametrize(
  'content',
  [
    {'logits': LOGITS},
    {'logits': LOGITS[0], 'labels': LABELS},
    {'logits': LOGITS[:0], 'labels': LABELS},
    {'logits': LOGITS, 'labels': LABELS[:1]},
    {'logits': LOGITS.astype(object), 'labels': LABELS},
  ],
  ids=['no labels', 'no exits', 'empty', 'labels missing', 'objects'],
)
def test_corrupt_arrays_are_refused_by_name(tmp_path, content):
  path = epath.Path(tmp_path) / 'phase_1.npz'
  np.savez(path, **content)
  for load in (load_predictions, lambda path: load_scores(path, 'margin')):
    with pytest.raises(UsageError, match='phase_1.npz is corrupt .*: run the training command'):
      load(path)


@pytest.mark.parametrize('load', [load_predictions, load_costs, load_accuracies, load_points])
@pytest.mark.parametrize('content', [None, b'', b'[]', b'\xff', b'{"exits": [3], "budget": [3]}'])
def test_missing_and_corrupt_files_are_refused_by_name(tmp_path, load, content):
  path = epath.Path(tmp_path) / 'evaluation.json'
  if content is not None:
    path.write_bytes(content)
  arguments = (path,) if load is load_predictions else (path.parent, 'IMTA')
  reason = 'cannot be read' if content is None else 'is corrupt'
  with pytest.raises(UsageError, match=f'evaluation.json {reason}') as caught:
    load(*arguments)
  assert '\n' not in str(caught.value)


def test_networks_are_loaded_as_they_were_written(tables, evaluation):
  assert load_costs(tables, 'IMTA') == COSTS
  assert load_accuracies(tables, 'IMTA') == pytest.approx(list(evaluation.accuracies['test', 1]))
  assert load_points(tables, 'IMTA') == list(evaluation.points)
  with pytest.raises(UsageError, match='has no evaluation of ISC'):
    load_points(tables, 'ISC')


def test_a_notebooks_backend_does_no_harm(tmp_path):
  program = """
import sys
from etils import epath
from imta_jax.evaluate import new_figure, save_figure
save_figure(new_figure(2, 1), epath.Path(sys.argv[1]))
"""
  subprocess.run(
    [sys.executable, '-c', program, tmp_path / 'figure.png'],
    env={**os.environ, 'MPLBACKEND': 'unknown'},
    check=True,
    timeout=100,
  )
  assert (tmp_path / 'figure.png').read_bytes().startswith(b'\x89PNG')


def test_all_figures_are_made_in_one_place():
  using = [
    path.name
    for folder in ('imta_jax', 'experiments')
    for path in (ROOT / folder).rglob('*.py')
    if 'matplotlib.figure' in path.read_text(encoding='utf-8')
  ]
  assert using == ['evaluate.py']
