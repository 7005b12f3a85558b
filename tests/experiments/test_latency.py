"""Latency: what is measured, what it saves, and a measurement of a small network."""

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
from imta_jax.errors import UsageError

sys.path.insert(0, str(Path(__file__).parents[2] / 'experiments'))
import latency
import latency_report
from latency_report import Timing

INF = float('inf')
MADDS = (10.0, 30.0)
# Average multiply-adds 12, 14, 20 and 28.
POINTS = [
  OperatingPoint((0.1, -INF), (0.9, 0.1), 0.80),
  OperatingPoint((0.2, -INF), (0.8, 0.2), 0.896),
  OperatingPoint((0.5, -INF), (0.5, 0.5), 0.91),
  OperatingPoint((0.9, -INF), (0.1, 0.9), 0.90),
]


@pytest.mark.parametrize(
  ('accuracy', 'expected'), [(0.5, 12), (0.895, 14), (0.9, 20), (0.91, 20), (0.92, None)]
)
def test_cheapest_that_is_accurate(accuracy, expected):
  point = latency.cheapest(POINTS, MADDS, accuracy)
  found = None if point is None else latency.average_madds(point, MADDS)
  assert found == (expected if expected is None else pytest.approx(expected))


@pytest.mark.parametrize(('budget', 'expected'), [(11, None), (13, 0), (27, 2), (1e9, 3)])
def test_most_expensive_within_a_budget(budget, expected):
  point = latency.most_expensive(POINTS, MADDS, budget)
  assert point == (None if expected is None else POINTS[expected])


def test_methods():
  methods = latency.choose_methods(POINTS, MADDS, 0.9, budgets=(5, 15))
  assert [(c.name, c.thresholds, c.is_adaptive) for c in methods] == [
    ('all exits', None, False),
    ('exit 1', (-INF, -INF), False),
    ('exit 2', (INF, -INF), False),
    ('as accurate', (0.5, -INF), True),
    ('within 0.5 points', (0.2, -INF), True),
    ('budget 15', (0.2, -INF), True),
  ]


def timing(method, madds, time_ratio, is_adaptive=False, mode='predict', batch_size=1):
  return Timing(
    method, is_adaptive, mode, batch_size, 8, 0.9, madds, 2.0, 500.0, None, None, time_ratio
  )


@pytest.mark.parametrize(
  ('of_last_exit', 'whole', 'saved'), [(0.8, 'exit 2', 0.5), (1.25, 'all exits', 0.6)]
)
def test_savings_are_those_against_the_faster_whole_network(of_last_exit, whole, saved):
  timings = [
    timing('all exits', 30.0, 1.0),
    timing('exit 1', 10.0, 0.2),
    timing('exit 2', 30.0, of_last_exit),
    timing('within 0.5 points', 18.0, 0.4, is_adaptive=True),
    timing('all exits', 30.0, 1.0, batch_size=4),
    timing('exit 2', 30.0, 0.5, batch_size=4),
  ]
  savings = latency_report.compute_savings(timings)
  assert [s.timing for s in savings] == timings
  (first,) = (s for s in savings if s.is_whole_network and s.timing.batch_size == 1)
  assert first.timing.method == whole
  assert (first.madds_saving, first.time_saving, first.share) == (0, 0, None)
  assert (savings[3].madds_saving, savings[3].time_saving) == pytest.approx((0.4, saved))
  assert savings[3].share == pytest.approx(saved / 0.4)
  assert savings[5].is_whole_network  # Each batch size has its own.


def test_verdicts_name_the_share_and_what_is_slower():
  timings = [
    timing('all exits', 30.0, 1.0),
    timing('exit 2', 30.0, 0.8),
    timing('within 0.5 points', 15.0, 0.44, is_adaptive=True),
    timing('budget 20', 20.0, 0.88, is_adaptive=True),
  ]
  savings = latency_report.compute_savings(timings)
  assert latency_report.verdicts(savings) == [
    'within 0.5 points, predict 1: 90 % of the saved multiply-adds is saved as time; '
    'goal 80 %: met',
    'slower than the whole network: budget 20, predict 1 (+10 %)',
  ]
  nothing_near = latency_report.verdicts(savings[:2])
  assert nothing_near[0].startswith('no thresholds are within 0.5 points')
  assert nothing_near[1].endswith(': none')


@pytest.mark.parametrize('name', ['mnist5k', 'cifar100'])
def test_committed_tables_follow_from_the_committed_times(name):
  folder = Path(__file__).parents[2] / f'experiments/results/{name}/latency'
  content = json.loads((folder / 'latency.json').read_text())
  savings = latency_report.compute_savings([Timing(**row) for row in content['timings']])
  assert latency_report.to_csv(savings) == (folder / 'latency.csv').read_text()


def test_batches_are_full_and_of_different_images():
  images = np.arange(11).reshape(11, 1, 1, 1)
  for size, most, expected in ((4, 9, 2), (1, 3, 3), (11, 9, 1)):
    batches = latency.batches_of(images, size, most)
    assert [len(batch) for batch in batches] == [size] * expected
    assert len(np.unique(batches)) == size * expected


@pytest.fixture(scope='module')
def timings(random_variables):
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
  methods = latency.choose_methods(operating_points, MADDS, 0.9)
  full = latency.full_program(model, variables, dataset)
  labels = np.asarray(full(images))[-1].argmax(axis=-1)
  labels[0] = (labels[0] + 1) % 5
  runs = {
    method: {
      mode: latency.partial(latency.run, full, classifier, method, mode)
      for mode in ('predict', 'stream')
    }
    for method in methods
  }
  accuracies = latency.measure_accuracies(runs, images, labels, 4)
  timings = []
  for mode, size in (('predict', 1), ('predict', 4), ('stream', 4)):
    of_mode = {method: of_modes[mode] for method, of_modes in runs.items()}
    batches = latency.batches_of(images, size, 5)
    timings += latency.measure(of_mode, batches, MADDS, accuracies, mode, repeats=2)
  return timings


def test_a_measurement(timings):
  assert {(timing.mode, timing.batch_size, timing.images) for timing in timings} == {
    ('predict', 1, 5),
    ('predict', 4, 8),
    ('stream', 4, 8),
  }
  for timing in timings:
    assert timing.milliseconds > 0
    assert timing.milliseconds * timing.images_per_second == pytest.approx(1000)
    assert (timing.p50 is None) == (timing.mode == 'stream')
    if timing.method in ('all exits', 'exit 2'):
      assert timing.accuracy == pytest.approx(8 / 9)
      assert timing.madds == 30
    if timing.method == 'all exits':
      assert timing.time_ratio == 1
    if timing.method == 'exit 1':
      assert timing.madds == 10
    if timing.is_adaptive:
      assert 10 < timing.madds < 30


def test_files(timings, tmp_path, capsys):
  folder = epath.Path(tmp_path)
  description = {'title': 't', 'command': 'c', 'machine': 'm', 'load_average': 0.5}
  latency.write_timings(timings, description, folder)
  content = json.loads((folder / 'latency.json').read_text())
  assert (content['command'], content['machine']) == ('c', 'm')
  latency_report.main([str(folder)])
  with (tmp_path / 'latency.csv').open() as file:
    table = list(csv.DictReader(file))
  assert [row['method'] for row in table] == [timing.method for timing in timings]
  assert [row['method'] for row in content['timings']] == [timing.method for timing in timings]
  assert (tmp_path / 'latency.png').stat().st_size > 1000
  printed = capsys.readouterr().out
  assert printed.count('\n| ') == len(timings) + 2
  assert printed.count(' * ') >= 3


def test_a_folder_without_times_is_refused(tmp_path):
  with pytest.raises(UsageError, match=r'latency\.json does not exist'):
    latency_report.main([str(tmp_path)])
