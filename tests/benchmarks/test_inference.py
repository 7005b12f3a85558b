"""Inference: which methods are measured, what they save, and a measurement of a small network."""

import argparse
import csv
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from etils import epath

from imta_jax.adaptive.engine import OperatingPoint
from imta_jax.adaptive.engine.onnx_programs import installed_runtimes

EXPERIMENTS = Path(__file__).parents[2] / 'experiments'
sys.path.insert(0, str(EXPERIMENTS / 'benchmarks'))
import inference  # noqa: E402

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
  assert inference.choose_methods(POINTS, MADDS, 0.9) == [
    ('engine, no early exit', (INF, INF)),
    ('engine, as accurate', (0.5, -INF)),
    ('engine, within 0.5 points', (0.2, -INF)),
    ('engine, budget 50%', (0.2, -INF)),
    ('engine, budget 75%', (0.5, -INF)),
  ]
  names = [method.name for method in inference.choose_methods(POINTS[:1], MADDS, 0.92)]
  assert names == ['engine, no early exit', 'engine, budget 50%', 'engine, budget 75%']


def timing(method, madds, time_ratio, mode='predict', batch_size=1):
  return {
    'method': method,
    'mode': mode,
    'batch_size': batch_size,
    'madds': madds,
    'time_ratio': time_ratio,
  }


TIMINGS = [
  timing('XLA', 30.0, 1.0),
  timing('OpenVINO', 30.0, 0.8),
  timing('engine, no early exit', 30.0, 1.0),
  timing('engine, within 0.5 points', 18.0, 0.4),
  timing('XLA', 30.0, 0.5, batch_size=4),
  timing('engine, within 0.5 points', 15.0, 0.6, batch_size=4),
]


def test_savings_are_those_against_the_fastest_whole_network():
  rows = inference.compute_savings(TIMINGS)
  assert [{name: row[name] for name in TIMINGS[0]} for row in rows] == TIMINGS
  assert [row['of_fastest'] for row in rows] == pytest.approx([1.25, 1, 1.25, 0.5, 1, 1.2])
  assert (rows[3]['madds_saving'], rows[3]['time_saving']) == pytest.approx((0.4, 0.5))
  assert rows[3]['share'] == pytest.approx(1.25)
  assert rows[2]['share'] is None
  assert inference.verdicts(rows) == [
    'engine, within 0.5 points, predict 1: 50% of the time, 40% of the multiply-adds',
    'engine, within 0.5 points, predict 4: -20% of the time, 50% of the multiply-adds',
    'slower than the fastest whole network: engine, no early exit, predict 1 (+25%); '
    'engine, within 0.5 points, predict 4 (+20%)',
  ]


@pytest.mark.parametrize('name', ['mnist5k', 'cifar100', 'flowers'])
def test_committed_tables_follow_from_the_committed_times(name):
  folder = EXPERIMENTS / f'results/{name}/latency'
  timings = json.loads((folder / 'latency.json').read_text())['timings']
  with (folder / 'latency.csv').open() as file:
    table = list(csv.DictReader(file))
  rows = inference.compute_savings(timings)
  as_text = [{k: '' if v is None else str(v) for k, v in row.items()} for row in rows]
  assert as_text == table


@pytest.mark.slow
def test_a_measurement(classifier, images, tmp_path, capsys):
  pytest.importorskip('onnx')
  programs = inference.whole_networks(classifier, None)
  assert list(programs) == [
    'XLA',
    *({'openvino': 'OpenVINO', 'onnxruntime': 'ONNX Runtime'}[r] for r in installed_runtimes()),
  ]
  logits = programs['XLA'](images)
  for program in programs.values():
    np.testing.assert_allclose(program(images), logits, atol=1e-4 * np.abs(logits).max())
  labels = logits.argmax(axis=-1)
  labels[0] = (labels[0] + 1) % 5
  methods = [
    *map(inference.Method, programs),
    inference.Method(inference.NO_EARLY_EXIT, (INF, INF)),
    inference.Method('engine, as accurate', tuple(classifier.thresholds)),
  ]
  options = argparse.Namespace(batch_sizes=(1, 4, 16), calls=5, repeats=2)
  timings = inference.measure(methods, programs, classifier, images, labels, options)
  assert {(t['mode'], t['batch_size'], t['images']) for t in timings} == {
    ('predict', 1, 5),
    ('predict', 4, 4),
  }
  for timing in timings:
    assert timing['milliseconds'] > 0
    if timing['method'] != 'engine, as accurate':
      assert timing['madds'] == classifier.madds[-1]
      assert timing['accuracy'] == pytest.approx(1 - 1 / timing['images'], rel=1e-4)
    if timing['method'] == inference.NO_EARLY_EXIT:
      assert timing['time_ratio'] == 1
  assert any(t['madds'] < classifier.madds[-1] for t in timings)
  description = {'title': 't', 'machine': 'm', 'load_average': 0.5}
  inference.report(timings, description, epath.Path(tmp_path))
  assert json.loads((tmp_path / 'latency.json').read_text()) == {**description, 'timings': timings}
  with (tmp_path / 'latency.csv').open() as file:
    assert [row['method'] for row in csv.DictReader(file)] == [t['method'] for t in timings]
  assert (tmp_path / 'latency.png').stat().st_size > 1000
  assert capsys.readouterr().out.count('\n| ') == len(timings) + 2
