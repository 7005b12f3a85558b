"""Metrics: lines that are written, lines that a resumed run keeps, and no TensorFlow import."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from etils import epath

from imta_jax.errors import UsageError
from imta_jax.training import metrics as metrics_lib
from imta_jax.training.metrics import Metrics


@pytest.fixture
def path(tmp_path):
  return epath.Path(tmp_path / 'metrics.jsonl')


def write(path, phase, first_step, steps):
  with Metrics(path, phase, first_step, None) as metrics:
    for step in steps:
      metrics.write(step, {'loss': step / 2}, 'train/')


def read(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_line_has_step_phase_and_a_number_per_metric(path):
  with Metrics(path, 'phase_1', 0, None) as metrics:
    metrics.write(3, {'loss': np.float32(0.5), 'accuracy': np.array([0.25, 1])}, 'train/')
  assert read(path) == [
    {
      'step': 3,
      'phase': 'phase_1',
      'train/loss': 0.5,
      'train/accuracy_exit_1': 0.25,
      'train/accuracy_exit_2': 1.0,
    }
  ]


def test_a_resumed_run_writes_each_step_once_and_lines_of_other_phases_stay(path):
  write(path, 'phase_1', 0, [2, 4])
  write(path, 'phase_2', 0, [2, 4, 6])
  with path.open('a') as file:
    file.write('{"step": 8, "pha')  # The run was killed here.
  write(path, 'phase_1', 4, [])  # It was finished.
  write(path, 'phase_2', 2, [4, 5])
  write(path, 'phase_1', 2, [4])  # Its last checkpoint was corrupt.
  expected = [('phase_1', 2), ('phase_2', 2), ('phase_2', 4), ('phase_2', 5), ('phase_1', 4)]
  assert [(record['phase'], record['step']) for record in read(path)] == expected


@pytest.mark.parametrize('line', ['[]', '{"phase": "phase_1", "step": null}', '{'])
def test_lines_that_are_no_metrics_are_removed(line, path):
  path.write_text(line + '\n')
  write(path, 'phase_1', 0, [2])
  assert [record['step'] for record in read(path)] == [2]


def test_a_bucket_gets_several_lines_at_once(path):
  metrics = Metrics(path, 'phase_1', 0, None)
  metrics._seconds_between_writes = metrics_lib._SECONDS_BETWEEN_WRITES  # As for a path in one.
  metrics.write(1, {'loss': 1.0})
  metrics.write(2, {'loss': 1.0})
  assert not path.exists()
  metrics.flush()
  metrics.write(3, {'loss': 1.0})
  assert [record['step'] for record in read(path)] == [1, 2]
  metrics.close()
  assert [record['step'] for record in read(path)] == [1, 2, 3]


def test_no_tensorflow_is_imported_without_tensorboard(path):
  program = (
    'import sys; from etils import epath; from imta_jax.training.metrics import Metrics\n'
    f"with Metrics(epath.Path({str(path)!r}), 'phase_1', 0, None) as metrics:\n"
    "  metrics.write(1, {'loss': 1.0})\n"
    "assert not {'tensorflow', 'clu'} & set(sys.modules)"
  )
  subprocess.run([sys.executable, '-c', program], check=True, timeout=60)
  assert len(read(path)) == 1


def test_a_full_disk_is_told_in_one_line(path):
  with Metrics(path, 'phase_1', 0, None) as metrics:
    os.symlink('/dev/full', path)
    with pytest.raises(UsageError, match=r'metrics.jsonl cannot be .* \(No space left on device\)'):
      metrics.write(1, {'loss': 1.0})
    path.unlink()


def test_tensorboard_on_a_full_disk_is_told_in_one_line(path, tmp_path):
  folder = tmp_path / 'tensorboard'
  folder.write_text('')  # TensorFlow cannot make a folder here.
  with (
    pytest.raises(UsageError, match='tensorboard cannot be written .*config.tensorboard'),
    Metrics(path, 'phase_1', 0, epath.Path(folder)) as metrics,
  ):
    metrics.write(1, {'loss': 1.0})
