"""Data sets written as arrays, and training on them without TensorFlow."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from imta_jax.data import prepare
from imta_jax.errors import UsageError

ROOT = Path(__file__).parents[2]
# TensorFlow and what needs it cannot be imported.
TRAIN = (
  'import sys\n'
  "for name in ('tensorflow', 'tensorflow_datasets', 'clu', 'tensorboard'):\n"
  '  sys.modules[name] = None\n'
  'from imta_jax import main; main.run()'
)


@pytest.fixture(scope='module')
def folder(tmp_path_factory, mnist5k_builder, data_dir):
  del mnist5k_builder
  folder = tmp_path_factory.mktemp('prepared')
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv('TFDS_DATA_DIR', data_dir)
    prepare.main([f'--config={ROOT}/configs/mnist5k.py', str(folder / 'arrays')])
  return folder


def train(folder, *flags):
  return subprocess.run(
    [
      sys.executable,
      '-c',
      TRAIN,
      '--config=configs/mnist5k.py:exits=2',
      '--config.evaluation_batch_size=500',
      '--config.model.scale_factors=1,2',
      '--config.model.bottleneck_factors=1,2',
      '--config.phases[0].steps=3',
      '--config.phases[1].steps=2',
      f'--workdir={folder}/run',
      *flags,
    ],
    cwd=ROOT,
    env={
      **os.environ,
      'JAX_PLATFORMS': 'cpu',
      'JAX_DISABLE_MOST_OPTIMIZATIONS': 'true',
      'XDG_CACHE_HOME': str(folder / 'cache'),
    },
    capture_output=True,
    text=True,
    timeout=300,
  )


@pytest.mark.slow
def test_a_machine_without_tensorflow_trains_on_carried_arrays(folder):
  result = train(folder, f'--config.dataset.arrays_dir={folder}/arrays')
  assert (result.returncode, result.stderr) == (0, '')
  assert result.stdout.count('TensorFlow is not installed: metrics go to metrics.jsonl') == 1
  lines = [json.loads(line) for line in (folder / 'run/metrics.jsonl').read_text().splitlines()]
  assert {(line['phase'], line['step']) for line in lines} == {('phase_1', 3), ('phase_2', 2)}
  assert (folder / 'run/evaluation/exits.csv').exists()


def test_without_arrays_a_line_says_what_is_missing(folder):
  result = train(folder, '--workdir=elsewhere')
  assert result.returncode == 1
  (line,) = result.stderr.splitlines()
  assert line.startswith('error: TensorFlow is not installed')
  assert 'arrays_dir' in line


def test_what_cannot_be_prepared_is_refused(folder, tmp_path):
  with pytest.raises(UsageError, match='is not empty'):
    prepare.main([f'--config={ROOT}/configs/mnist5k.py', str(folder)])
  with pytest.raises(UsageError, match='is streamed'):
    prepare.main([f'--config={ROOT}/configs/imagenet.py', str(tmp_path / 'arrays')])


def test_a_folder_that_cannot_be_written_is_refused(
  tmp_path, monkeypatch, mnist5k_builder, data_dir
):
  del mnist5k_builder
  monkeypatch.setenv('TFDS_DATA_DIR', data_dir)
  (tmp_path / 'file').write_text('')
  with pytest.raises(UsageError, match='cannot be read or written .Not a directory.: make room'):
    prepare.main([f'--config={ROOT}/configs/mnist5k.py', str(tmp_path / 'file/arrays')])
