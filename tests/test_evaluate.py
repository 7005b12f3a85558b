"""From logits to accuracies, tables and figures."""

import csv
import dataclasses
import json
import os
import zipfile

import jax
import numpy as np
import pytest
from etils import epath
from matplotlib.figure import Figure

from imta_jax import models
from imta_jax.adaptive.cost import ExitCost
from imta_jax.adaptive.policy import budget_sweep
from imta_jax.errors import UsageError
from imta_jax.evaluate import (
  _ROWS,
  SPLITS,
  Evaluation,
  Predictions,
  assess,
  load_accuracies,
  load_costs,
  load_points,
  load_predictions,
  save_predictions,
  write_figure,
  write_tables,
)

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


def test_accuracy_is_top_1_unless_told_otherwise(predictions):
  np.testing.assert_array_equal(predictions['test'].accuracy(), predictions['test'].accuracy(1))


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
  random_variables, tmp_path
):
  model = models.create(
    'msdnet',
    num_exits=2,
    step_mode='even',
    channels=4,
    growth_rate=4,
    scale_factors=(1,),
    bottleneck_factors=(1,),
    collaboration='network',
    dtype='bfloat16',
  )
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


def test_figure_shows_the_sweep_and_the_exits(evaluation, tmp_path, monkeypatch):
  figures = []
  savefig = Figure.savefig

  def keep(figure, *args, **options):
    figures.append(figure)
    return savefig(figure, *args, **options)

  monkeypatch.setattr(Figure, 'savefig', keep)
  path = epath.Path(tmp_path) / 'evaluation' / 'budget.png'
  write_figure([evaluation], path, 'CIFAR-100', ['phase_1 (with GE)'])
  assert path.read_bytes().startswith(b'\x89PNG\r\n\x1a\n')
  assert [file.name for file in path.parent.iterdir()] == ['budget.png']
  (figure,) = figures
  (axes,) = figure.axes
  assert axes.get_title() == 'CIFAR-100'
  assert 'million' in axes.get_xlabel() and '%' in axes.get_ylabel()
  line, exits, _ = axes.lines
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


def damages():
  """Arguments of `numpy.savez`, or bytes, that are no predictions of 2 images of 3 classes."""
  logits, labels = np.zeros((1, 2, 3), np.float32), np.zeros(2, np.int32)
  return {
    'nothing': b'',
    'text': b'logits',
    'no labels': {'logits': logits},
    'no exits': {'logits': logits[0], 'labels': labels},
    'no images': {'logits': logits[:, :0], 'labels': labels[:0]},
    'labels missing': {'logits': logits, 'labels': labels[:1]},
    'labels of two axes': {'logits': logits, 'labels': labels[np.newaxis]},
    'labels that are no integers': {'logits': logits, 'labels': labels.astype(np.float32)},
    'a label below': {'logits': logits, 'labels': labels - 1},
    'a label beyond': {'logits': logits, 'labels': labels + 3},
    'complex logits': {'logits': logits.astype(complex), 'labels': labels},
    'objects': {'logits': logits.astype(object), 'labels': labels},
  }


@pytest.mark.parametrize('damage', damages())
def test_corrupt_predictions_are_refused_by_name(tmp_path, damage):
  path, content = epath.Path(tmp_path) / 'phase_1_test.npz', damages()[damage]
  if isinstance(content, dict):
    np.savez(path, **content)
  else:
    path.write_bytes(content)
  with pytest.raises(UsageError, match='phase_1_test.npz .*: run the training command again'):
    load_predictions(path)


@pytest.mark.slow
def test_predictions_that_would_fill_memory_are_refused(tmp_path):
  path = epath.Path(tmp_path) / 'phase_1_test.npz'
  with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as archive:
    for name in range(5):
      with archive.open(f'{name}.npy', 'w') as entry:
        for _ in range(4):
          entry.write(bytes(2**26))
  with pytest.raises(
    UsageError, match='phase_1_test.npz is corrupt .* would grow to 1,342,177,280'
  ):
    load_predictions(path)


def test_pipes_huge_and_missing_files_are_refused_at_once(tmp_path):
  for name, load in (('phase_1_test.npz', load_predictions), ('evaluation.json', load_tables)):
    path = epath.Path(tmp_path) / name
    with pytest.raises(UsageError, match='evaluation.json|phase_1_test.npz|has no evaluation'):
      load(path)
    path.write_bytes(b'')
    os.truncate(path, 2**40)
    with pytest.raises(UsageError, match=f'{name} is too large .1,099,511,627,776 bytes'):
      load(path)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(UsageError, match=f'{name} is not a regular file'):
      load(path)
    path.unlink()
    path.mkdir()
    with pytest.raises(UsageError, match=f'{name} is not a regular file'):
      load(path)


def load_tables(path):
  return load_costs(path.parent, 'IMTA')


@pytest.mark.parametrize(
  'content',
  [
    b'',
    b'[]',
    b'3',
    b'\xff',
    b'[' * 100_000,
    b'{}',
    b'{"exits": {}, "budget": {}}',
    b'{"exits": [3], "budget": [3]}',
    b'{"exits": [{}], "budget": [{}]}',
    b'{"exits": [{"network": "IMTA"}], "budget": [{"network": "IMTA"}]}',
  ],
  ids=range(10),
)
def test_corrupt_tables_are_refused_by_name(tmp_path, content):
  folder = epath.Path(tmp_path)
  (folder / 'evaluation.json').write_bytes(content)
  for load in (load_costs, load_accuracies, load_points):
    with pytest.raises(UsageError, match='evaluation.json is corrupt') as caught:
      load(folder, 'IMTA')
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize('value', [None, 'x', -1, 1e999, float('nan'), 10**400, [], [None]])
def test_every_value_of_a_table_is_checked(tables, tmp_path, value):
  folder = epath.Path(tmp_path)
  for load, table in ((load_costs, 'exits'), (load_points, 'budget')):
    for field in _ROWS[table]:
      if field == 'thresholds' and value in ([], [None]):
        continue  # A threshold may be infinite.
      if field.endswith('fractions') and value == []:
        continue
      content = json.loads((tables / 'evaluation.json').read_text())
      content[table][-1][field] = value
      (folder / 'evaluation.json').write_text(json.dumps(content))
      with pytest.raises(UsageError, match=f"its rows '{table}' are not valid"):
        load(folder, content[table][0]['network'])
