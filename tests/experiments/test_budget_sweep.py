"""The program for budgeted batch classification: arguments and corrupt workdirs."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from etils import epath

from imta_jax import config as config_lib
from imta_jax.adaptive.cost import ExitCost
from imta_jax.evaluate import SPLITS, Predictions, assess, save_predictions, write_tables
from imta_jax.training import workdir as layout

PATH = Path(__file__).parents[2] / 'experiments' / 'budget_sweep.py'


@pytest.fixture
def workdir(tmp_path):
  """A workdir with the files that an evaluated run of two exits and three classes leaves."""
  folder, config = epath.Path(tmp_path) / 'run', config_lib.default()
  config.phases = config.phases[:1]
  layout.claim(config, folder, list('abc'))
  random = np.random.default_rng(0)
  predictions = {
    split: Predictions(
      random.standard_normal((2, 20, 3), np.float32), random.integers(3, size=20, dtype=np.int32)
    )
    for split in SPLITS
  }
  for split, prediction in predictions.items():
    save_predictions(prediction, layout.predictions_path(folder, 'phase_1', split))
  costs = [ExitCost(10, 5), ExitCost(20, 9)]
  write_tables([assess('phase_1', costs, predictions)], layout.evaluation_folder(folder))
  return folder


def run(*arguments):
  return subprocess.run(
    [sys.executable, PATH, *map(str, arguments)], capture_output=True, text=True, check=False
  )


def test_a_sweep_of_a_finished_run(workdir, tmp_path):
  done = run(workdir, '--parameters', '0.5', '2', f'--output={tmp_path}/sweep')
  assert done.returncode == 0, done.stderr
  assert len((tmp_path / 'sweep' / 'budget.csv').read_text().splitlines()) == 3


def test_wrong_arguments_and_corrupt_workdirs_end_in_one_line(workdir, tmp_path):
  (tmp_path / 'file').write_text('')
  for number in ('0', '-1', 'inf', 'nan'):
    done = run(workdir, '--parameters', '0.5', number)
    assert done.returncode == 2
    assert f"argument --parameters: invalid positive float value: '{number}'" in done.stderr
  done = run(workdir, f'--output={tmp_path}/file')
  assert done.returncode == 2 and 'name a folder' in done.stderr
  path = layout.predictions_path(workdir, 'phase_1', 'test')
  path.write_bytes(path.read_bytes()[:-40])
  done = run(workdir)
  assert done.returncode == 2
  assert done.stderr.startswith('error: ') and done.stderr.count('\n') == 1
  assert 'phase_1_test.npz is corrupt' in done.stderr
  save_predictions(Predictions(np.zeros((3, 4, 3), np.float32), np.zeros(4, np.int32)), path)
  done = run(workdir)
  assert done.returncode == 2 and done.stderr.count('\n') == 1
  assert 'for the 2 exits of madds' in done.stderr
