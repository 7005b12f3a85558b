"""Latency: who is measured, what is saved, and a measurement of a small network."""

import csv
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from etils import epath
from ml_collections import ConfigDict

from imta_jax import models
from imta_jax.adaptive.engine import AdaptiveClassifier, OperatingPoint

sys.path.insert(0, str(Path(__file__).parents[2] / 'experiments'))
import latency

INF = float('inf')
MADDS = (10.0, 30.0)
# Average multiply-adds 12, 14, 20 and 28.
SETTINGS = [
  OperatingPoint((0.1, -INF), (0.9, 0.1), 0.80),
  OperatingPoint((0.2, -INF), (0.8, 0.2), 0.896),
  OperatingPoint((0.5, -INF), (0.5, 0.5), 0.91),
  OperatingPoint((0.9, -INF), (0.1, 0.9), 0.90),
]


@pytest.mark.parametrize(
  ('accuracy', 'expected'), [(0.5, 12), (0.895, 14), (0.9, 20), (0.91, 20), (0.92, None)]
)
def test_cheapest_that_is_accurate(accuracy, expected):
  setting = latency.cheapest(SETTINGS, MADDS, accuracy)
  found = None if setting is None else latency.average_madds(setting, MADDS)
  assert found == (expected if expected is None else pytest.approx(expected))


@pytest.mark.parametrize(('budget', 'expected'), [(11, None), (13, 0), (27, 2), (1e9, 3)])
def test_dearest_within_a_budget(budget, expected):
  setting = latency.dearest(SETTINGS, MADDS, budget)
  assert setting == (None if expected is None else SETTINGS[expected])


def test_contestants():
  contestants = latency.choose_contestants(SETTINGS, MADDS, 0.9, budgets=(5, 15))
  assert [(c.name, c.thresholds, c.is_adaptive) for c in contestants] == [
    ('full network', None, False),
    ('exit 1', (-INF, -INF), False),
    ('exit 2', (INF, -INF), False),
    ('as accurate', (0.5, -INF), True),
    ('within 0.5 points', (0.2, -INF), True),
    ('budget 15', (0.2, -INF), True),
  ]


def test_savings():
  assert latency.savings(0.25, 0.4) == pytest.approx((0.75, 0.6, 0.8))
  assert latency.savings(0.5, 1.1) == pytest.approx((0.5, -0.1, -0.2))
  assert latency.savings(1.0, 0.9)[2] is None


def test_batches_are_full_and_of_different_images():
  images = np.arange(11).reshape(11, 1, 1, 1)
  for size, most, expected in ((4, 9, 2), (1, 3, 3), (11, 9, 1)):
    batches = latency.batches_of(images, size, most)
    assert [len(batch) for batch in batches] == [size] * expected
    assert len(np.unique(batches)) == size * expected


@pytest.fixture(scope='module')
def rows(random_variables):
  shape, random = (8, 8, 1), np.random.default_rng(0)
  model = models.create('resnet', depth=8, exits_after=(1,), num_classes=5)
  variables = random_variables(model, shape)
  dataset = ConfigDict({'mean': (0.5,), 'std': (0.25,)})
  classifier = AdaptiveClassifier.from_model(
    model, variables, (INF, -INF), shape, mean=(0.5,), std=(0.25,), batch_sizes=(1, 4)
  )
  images = random.integers(0, 256, (9, *shape), np.uint8)
  middle = float(np.median(classifier.predict(images, (-INF, -INF)).confidences))
  operating_points = [OperatingPoint((middle, -INF), (0.5, 0.5), 0.9)]
  contestants = latency.choose_contestants(operating_points, MADDS, 0.9)
  full = latency.full_program(model, variables, dataset)
  labels = np.asarray(full(images))[-1].argmax(axis=-1)
  labels[0] = (labels[0] + 1) % 5
  runs = {
    contestant: {
      mode: latency.partial(latency.run, full, classifier, contestant, mode)
      for mode in ('predict', 'stream')
    }
    for contestant in contestants
  }
  accuracies = latency.measure_accuracies(runs, images, labels, 4)
  rows = []
  for mode, size in (('predict', 1), ('predict', 4), ('stream', 4)):
    of_mode = {contestant: of_modes[mode] for contestant, of_modes in runs.items()}
    batches = latency.batches_of(images, size, 5)
    rows += latency.measure(of_mode, batches, MADDS, accuracies, mode, repeats=2)
  return rows


def test_a_measurement(rows):
  assert {(row.mode, row.batch_size, row.images) for row in rows} == {
    ('predict', 1, 5),
    ('predict', 4, 8),
    ('stream', 4, 8),
  }
  for row in rows:
    assert row.milliseconds > 0
    assert row.milliseconds * row.images_per_second == pytest.approx(1000)
    assert (row.p50 is None) == (row.mode == 'stream')
    if row.contestant in ('full network', 'exit 2'):
      assert row.accuracy == pytest.approx(8 / 9)
      assert (row.madds, row.share) == (30, None)
    if row.contestant == 'full network':
      assert row.time_ratio == 1
    if row.contestant == 'exit 1':
      assert row.madds == 10
    if row.is_adaptive:
      assert 10 < row.madds < 30
      assert row.share == pytest.approx(row.time_saving / row.madds_saving)


def test_verdicts(rows):
  lines = latency.verdicts(rows)
  assert len(lines) == 4
  assert all('goal 80 %' in line for line in lines[:3])
  slower = [row for row in rows if row.time_ratio > 1]
  assert lines[3].count('(+') == len(slower)


def test_files(rows, tmp_path):
  folder = epath.Path(tmp_path)
  latency.write_tables(rows, {'command': 'c', 'machine': 'm'}, folder)
  latency.write_figure(rows, folder / 'latency.png', 'title')
  content = json.loads((folder / 'latency.json').read_text())
  assert (content['command'], content['machine']) == ('c', 'm')
  with (tmp_path / 'latency.csv').open() as file:
    table = list(csv.DictReader(file))
  assert [row['contestant'] for row in table] == [row.contestant for row in rows]
  assert [row['contestant'] for row in content['rows']] == [row.contestant for row in rows]
  assert (tmp_path / 'latency.png').stat().st_size > 1000
  assert latency.render(rows).count('\n') == len(rows) + 1
