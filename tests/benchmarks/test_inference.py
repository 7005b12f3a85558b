"""Inference: which methods are measured, what they save, and a measurement of a small network."""

import argparse
import csv
import json
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from etils import epath
from ml_collections import ConfigDict

from imta_jax import models
from imta_jax.adaptive.engine import AdaptiveClassifier, OperatingPoint
from imta_jax.errors import UsageError

sys.path.insert(0, str(Path(__file__).parents[2] / 'experiments'))
sys.path.insert(0, str(Path(__file__).parents[2] / 'experiments/benchmarks'))
import inference
import savings

EXPERIMENTS = Path(__file__).parents[2] / 'experiments'
INF = float('inf')
MADDS = (10.0, 30.0)
# Average multiply-adds 12, 14, 20 and 28.
POINTS = [
  OperatingPoint((0.1, -INF), (0.9, 0.1), 0.80),
  OperatingPoint((0.2, -INF), (0.8, 0.2), 0.896),
  OperatingPoint((0.5, -INF), (0.5, 0.5), 0.91),
  OperatingPoint((0.9, -INF), (0.1, 0.9), 0.90),
]


def test_methods():
  methods = inference.choose_methods(POINTS, MADDS, 0.9, budgets=(5, 15))
  assert methods == [
    ('exit 1', (-INF, -INF), False),
    ('exit 2', (INF, -INF), False),
    ('as accurate', (0.5, -INF), True),
    ('within 0.5 points', (0.2, -INF), True),
    ('budget 15', (0.2, -INF), True),
  ]
  names = [method.name for method in inference.choose_methods(POINTS, MADDS, 0.92, budgets=(1e9,))]
  assert names == ['exit 1', 'exit 2', 'budget 1,000,000,000']  # No point is so accurate.


def timing(method, madds, time_ratio, is_adaptive=False, mode='predict', batch_size=1):
  return {
    'method': method,
    'is_adaptive': is_adaptive,
    'mode': mode,
    'batch_size': batch_size,
    'madds': madds,
    'time_ratio': time_ratio,
  }


@pytest.mark.parametrize(
  ('of_last_exit', 'whole', 'saved'), [(0.8, 'exit 2', 0.5), (1.25, 'all exits', 0.6)]
)
def test_savings_are_those_against_the_faster_whole_network(of_last_exit, whole, saved):
  timings = [
    timing('all exits', 30.0, 1.0),
    timing('ONNX Runtime', 30.0, 0.1),
    timing('exit 1', 10.0, 0.2),
    timing('exit 2', 30.0, of_last_exit),
    timing('within 0.5 points', 18.0, 0.4, is_adaptive=True),
    timing('all exits', 30.0, 1.0, batch_size=4),
    timing('exit 2', 30.0, 0.5, batch_size=4),
  ]
  rows = savings.compute_savings(timings)
  assert [{name: row[name] for name in timings[0]} for row in rows] == timings
  (first,) = (s for s in rows if s['is_whole_network'] and s['batch_size'] == 1)
  assert first['method'] == whole
  assert (first['madds_saving'], first['time_saving'], first['share']) == (0, 0, None)
  assert (rows[4]['madds_saving'], rows[4]['time_saving']) == pytest.approx((0.4, saved))
  assert rows[4]['share'] == pytest.approx(saved / 0.4)
  assert rows[6]['is_whole_network']  # Each batch size has its own.


def test_verdicts_name_the_share_and_what_is_slower():
  timings = [
    timing('all exits', 30.0, 1.0),
    timing('exit 2', 30.0, 0.8),
    timing('within 0.5 points', 15.0, 0.44, is_adaptive=True),
    timing('budget 20', 20.0, 0.88, is_adaptive=True),
  ]
  rows = savings.compute_savings(timings)
  assert savings.verdicts(rows) == [
    'within 0.5 points, predict 1: 90% of the saved multiply-adds is saved as time',
    'slower than the whole network: budget 20, predict 1 (+10%)',
  ]
  assert savings.verdicts(rows[:2]) == ['slower than the whole network: none']


@pytest.mark.parametrize('name', ['mnist5k', 'cifar100'])
def test_committed_tables_follow_from_the_committed_times(name):
  folder = EXPERIMENTS / f'results/{name}/latency'
  timings = json.loads((folder / 'latency.json').read_text())['timings']
  with (folder / 'latency.csv').open() as file:
    table = list(csv.DictReader(file))
  rows = savings.compute_savings(timings)
  as_text = [{k: '' if v is None else str(v) for k, v in row.items()} for row in rows]
  assert as_text == table


def test_batches_are_full_and_of_different_images():
  images = np.arange(11).reshape(11, 1, 1, 1)
  for size, most, expected in ((4, 9, 2), (1, 3, 3), (11, 9, 1)):
    batches = inference.batches_of(images, size, most)
    assert [len(batch) for batch in batches] == [size] * expected
    assert len(np.unique(batches)) == size * expected


@pytest.fixture(scope='module')
def network(random_variables):
  """A model, its variables, an engine, and images."""
  shape = (16, 16, 1)
  fields = {'step_mode': 'even', 'scale_factors': (1, 2), 'bottleneck_factors': (1, 2)}
  model = models.create('msdnet', num_exits=2, channels=4, growth_rate=4, num_classes=5, **fields)
  variables = random_variables(model, shape)
  classifier = AdaptiveClassifier.from_model(
    model, variables, (INF, -INF), shape, mean=(0.5,), std=(0.25,), batch_sizes=(1, 4), madds=MADDS
  )
  return (
    model,
    variables,
    classifier,
    np.random.default_rng(0).integers(0, 256, (9, *shape), np.uint8),
  )


DATASET = ConfigDict({'mean': (0.5,), 'std': (0.25,)})


@pytest.mark.slow
def test_a_measurement(network):
  model, variables, classifier, images = network
  middle = float(np.median(classifier.predict(images, (-INF, -INF)).confidences))
  points = [OperatingPoint((middle, -INF), (0.5, 0.5), 0.9)]
  methods = [inference.Method('all exits'), *inference.choose_methods(points, MADDS, 0.9)]
  program = inference.xla_program(model, variables, DATASET)
  labels = program(images)[-1].argmax(axis=-1)
  labels[0] = (labels[0] + 1) % 5
  timings = inference.measure(
    methods,
    partial(inference.run, {'all exits': program}, classifier),
    images,
    labels,
    MADDS,
    argparse.Namespace(batch_sizes=(1, 4), calls=5, repeats=2),
  )
  assert {(t['mode'], t['batch_size'], t['images']) for t in timings} == {
    ('predict', 1, 5),
    ('predict', 4, 8),
    ('stream', 4, 8),
  }
  for timing in timings:
    assert timing['milliseconds'] > 0
    assert timing['milliseconds'] * timing['images_per_second'] == pytest.approx(1000, rel=1e-4)
    assert (timing['p50'] is None) == (timing['mode'] == 'stream')
    if timing['method'] in ('all exits', 'exit 2'):
      assert timing['accuracy'] == pytest.approx(8 / 9, rel=1e-4)
      assert timing['madds'] == 30
    if timing['method'] == 'all exits':
      assert timing['time_ratio'] == 1
    if timing['method'] == 'exit 1':
      assert timing['madds'] == 10
    if timing['is_adaptive']:
      assert 10 < timing['madds'] < 30


def test_files(tmp_path, capsys):
  timings = [
    {
      **timing(method, madds, ratio, is_adaptive, mode, batch_size),
      'images': 8,
      'accuracy': 0.9,
      'milliseconds': 2.0,
      'images_per_second': 500.0,
      'p50': None,
    }
    for mode, batch_size in (('predict', 1), ('predict', 4), ('stream', 4))
    for method, madds, ratio, is_adaptive in (
      ('all exits', 30.0, 1.0, False),
      ('exit 2', 30.0, 0.9, False),
      ('as accurate', 15.0, 0.5, True),
    )
  ]
  description = {'title': 't', 'command': 'c', 'machine': 'm', 'load_average': 0.5}
  inference.report(timings, description, epath.Path(tmp_path))
  content = json.loads((tmp_path / 'latency.json').read_text())
  assert content == {**description, 'timings': timings}
  with (tmp_path / 'latency.csv').open() as file:
    table = list(csv.DictReader(file))
  assert [row['method'] for row in table] == [timing['method'] for timing in timings]
  assert (tmp_path / 'latency.png').stat().st_size > 1000
  printed = capsys.readouterr().out
  assert printed.count('\n| ') == len(timings) + 2
  assert printed.count('| *  ') == 3


@pytest.mark.slow
def test_onnx_runtime_gives_the_logits_of_all_exits(network, tmp_path):
  pytest.importorskip('jax2onnx')
  pytest.importorskip('onnxruntime')
  import export_onnx

  model, variables, classifier, images = network
  export_onnx.write_export(classifier, epath.Path(tmp_path / 'onnx'))
  expected = inference.xla_program(model, variables, DATASET)(images)
  logits = inference.onnx_program(tmp_path / 'onnx')(images)
  np.testing.assert_allclose(logits, expected, rtol=1e-3, atol=1e-4)


def test_a_folder_that_is_no_onnx_export_is_refused(tmp_path):
  pytest.importorskip('onnxruntime')
  with pytest.raises(UsageError, match='is not an export: it has no manifest.json'):
    inference.onnx_program(tmp_path)
