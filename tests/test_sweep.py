"""The program for budgeted batch classification: arguments and corrupt workdirs."""

import numpy as np
import pytest
from etils import epath

from imta_jax import config as config_lib
from imta_jax import sweep
from imta_jax.adaptive.cost import ExitCost
from imta_jax.errors import UsageError
from imta_jax.evaluate import SPLITS, Predictions, assess, save_predictions, write_tables
from imta_jax.training import workdir as layout


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


def test_a_sweep_of_a_finished_run(workdir, tmp_path, capsys):
  sweep.main([str(workdir), '--parameters', '0.5', '2', f'--output={tmp_path}/sweep'])
  assert len((tmp_path / 'sweep' / 'budget.csv').read_text().splitlines()) == 3
  assert (tmp_path / 'sweep' / 'budget.png').exists()
  assert '1 network(s) swept' in capsys.readouterr().out


@pytest.mark.parametrize('number', ['0', '-1', 'inf', 'nan'])
def test_wrong_parameters_are_refused(number, workdir, capsys):
  with pytest.raises(SystemExit):
    sweep.main([str(workdir), '--parameters', '0.5', number])
  message = f"argument --parameters: invalid positive float value: '{number}'"
  assert message in capsys.readouterr().err


def test_corrupt_workdirs_and_an_output_that_is_a_file_are_refused(workdir, tmp_path, capsys):
  (tmp_path / 'file').write_text('')
  with pytest.raises(SystemExit):
    sweep.main([str(workdir), f'--output={tmp_path}/file'])
  assert 'name a folder' in capsys.readouterr().err
  path = layout.predictions_path(workdir, 'phase_1', 'test')
  path.write_bytes(path.read_bytes()[:-40])
  with pytest.raises(UsageError, match='phase_1_test.npz is corrupt'):
    sweep.main([str(workdir)])
  save_predictions(Predictions(np.zeros((3, 4, 3), np.float32), np.zeros(4, np.int32)), path)
  with pytest.raises(UsageError, match='for the 2 exits of madds'):
    sweep.main([str(workdir)])
