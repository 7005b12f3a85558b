"""Data sets written as arrays, and training on them without TensorFlow."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from imta_jax import config as config_lib
from imta_jax import prepare
from imta_jax.data.pipeline import open_dataset
from imta_jax.errors import UsageError

ROOT = Path(__file__).parents[1]
# TensorFlow and what needs it cannot be imported.
TRAIN = (
  'import sys\n'
  "for name in ('tensorflow', 'tensorflow_datasets', 'clu', 'tensorboard'):\n"
  '  sys.modules[name] = None\n'
  'from imta_jax import main; main.run()'
)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp('prepared')
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv('TFDS_DATA_DIR', str(folder / 'tfds'))
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


def test_a_folder_with_something_in_it_is_refused(folder):
  with pytest.raises(UsageError, match='is not empty'):
    prepare.main([f'--config={ROOT}/configs/mnist5k.py', str(folder)])


def test_a_streamed_data_set_is_refused(tmp_path):
  with pytest.raises(UsageError, match='is streamed'):
    prepare.main([f'--config={ROOT}/configs/imagenet.py', str(tmp_path / 'arrays')])


def test_a_folder_that_cannot_be_written_is_refused_and_does_not_pass_for_complete(folder):
  """Files cannot be larger than 400 kB, as on a disk that is full."""
  program = (
    'import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, 400_000))\n'
    'from imta_jax import command_line, prepare; command_line.run(prepare.main)'
  )
  arguments = ['--config=configs/mnist5k.py', f'{folder}/cut']
  result = subprocess.run(
    [sys.executable, '-c', program, *arguments],
    cwd=ROOT,
    env={**os.environ, 'JAX_PLATFORMS': 'cpu', 'TFDS_DATA_DIR': f'{folder}/tfds'},
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert result.returncode == 2
  assert result.stderr.splitlines()[-1].startswith(
    f'error: {folder}/cut cannot be read or written (File too large): make room'
  )
  assert 'Traceback' not in result.stderr
  config = config_lib.load_file(f'{ROOT}/configs/mnist5k.py')
  config.dataset.arrays_dir = f'{folder}/cut'
  with pytest.raises(UsageError, match='does not contain a complete data set'):
    open_dataset(config)
