"""The paper's tables and figures: statistics, runs, and every program on a tiny set."""

import importlib
import json
import platform
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import flax
import jax
import numpy as np
import pytest
from etils import epath

from imta_jax.errors import UsageError
from imta_jax.training import workdir as layout

sys.path.insert(0, str(Path(__file__).parents[2] / 'experiments/paper'))
import ablation
import figure_6
import figure_7
import report
import runs
import table_2

ROOT = Path(__file__).parents[2]
PROGRAMS = sorted(
  path.stem
  for path in (ROOT / 'experiments/paper').glob('*.py')
  if path.stem.startswith(('table_', 'figure_', 'recipes'))
)
# MNIST-5k in the place of the paper's sets, and two exits.
TINY = [
  '--seeds=1',
  '--scale=0.01',
  *(
    f'--config.{field}'
    for field in (
      'dataset.name=mnist5k',
      'dataset.test_split=test',
      'dataset.validation_size=500',
      'dataset.image_size=28',
      'dataset.mean=(0.131,)',
      'dataset.std=(0.308,)',
      'dataset.in_memory=True',
      'model.num_exits=2',
      'model.channels=2',
      'model.growth_rate=2',
      'model.scale_factors=(1, 2)',
      'model.bottleneck_factors=(1, 2)',
      'phases[0].steps=2',
      'phases[1].steps=2',
      'tensorboard=False',
    )
  ),
]


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
  """Folder of the runs of Figure 7, trained by its command."""
  folder = tmp_path_factory.mktemp('paper')
  program = str(ROOT / 'experiments/paper/figure_7.py')
  arguments = [program, '--train', f'--runs={folder}', *TINY]
  result = subprocess.run([sys.executable, *arguments], capture_output=True, text=True)
  assert result.returncode == 0, result.stderr
  assert result.stdout.count('phase_1: first step') == 1  # ISC goes on from the other's phase I.
  return epath.Path(folder)


@pytest.mark.slow
def test_a_run_that_shares_phase_one_trains_phase_two_alone(trained):
  chosen = runs.Runs(trained, 0.01, 1, {})
  first, second = (layout.phase_name(index) for index in (0, 1))
  assert [record['phase'] for record in chosen.metrics(figure_7.WITH, 0)].count(first) == 0
  assert {record['phase'] for record in chosen.metrics(figure_7.WITHOUT, 0)} == {first, second}
  without, with_isc = (
    chosen.predictions(run, 0, 'test')[0].logits for run in (figure_7.WITHOUT, figure_7.WITH)
  )
  np.testing.assert_array_equal(without, with_isc)
  # The first exit has no predecessor, so ISC leaves its training as it is.
  without, with_isc = (
    chosen.predictions(run, 1, 'test')[0].logits for run in (figure_7.WITHOUT, figure_7.WITH)
  )
  np.testing.assert_array_equal(without[0], with_isc[0])
  assert np.any(without[1] != with_isc[1])


@pytest.mark.slow
@pytest.mark.parametrize('name', PROGRAMS)
def test_a_program_writes_its_results_once_its_runs_are_there(
  name, trained, tmp_path, monkeypatch, capsys
):
  program = importlib.import_module(name)
  for run in program.RUNS:  # As if each had been trained.
    shutil.copytree(trained / figure_7.WITHOUT, tmp_path / run.name)
  monkeypatch.setattr(sys, 'argv', [f'{name}.py', f'--runs={tmp_path}', *TINY])
  program.main()
  output = tmp_path / name
  printed = capsys.readouterr().out
  about = (output / 'README.md').read_text()
  assert f'{name}.py' in about and '1 seed(s), 0.01 of the length' in about
  assert len(list((output / 'configs').iterdir())) == len(program.RUNS)
  if not name.startswith('figure'):
    assert about.strip() == printed.strip()
    assert '| exit 1 | exit 2 |' in about
  else:
    assert (output / f'{name}.png').read_bytes().startswith(b'\x89PNG')
    assert (output / f'{name}.csv').read_text().count('\n') > 1


@pytest.mark.parametrize('name', PROGRAMS)
def test_a_program_names_the_commands_of_missing_runs(name, tmp_path, monkeypatch, capsys):
  program = importlib.import_module(name)
  monkeypatch.setattr(sys, 'argv', [f'{name}.py', f'--runs={tmp_path}', '--seeds=1'])
  with pytest.raises(UsageError, match=f'^{len(program.RUNS)} of {len(program.RUNS)} runs'):
    program.main()
  commands = capsys.readouterr().out.splitlines()
  assert len(set(commands)) == len(program.RUNS)
  assert all(line.startswith('python -m imta_jax.main --config=configs/') for line in commands)


def test_lengths_and_fields_reach_the_command(tmp_path):
  chosen = runs.Runs(epath.Path(tmp_path), 0.5, 1, {'model.channels': '8'})
  (isc,) = (run for run in table_2.RUNS if run.name.endswith('/ISC'))
  command = runs.command(chosen, isc, 3)
  assert command[3] == '--config=configs/cifar100.py:exits=5'
  assert set(command[4:]) == {
    f'--workdir={tmp_path}/cifar100_exits=5/ISC/seed_3',
    '--config.seed=3',
    '--config.phases[0].epochs=150.0',
    '--config.phases[1].epochs=90.0',
    '--config.phases[0].gradient_equilibrium=off',
    '--config.phases[1].loss=cross_entropy',
    '--config.model.channels=8',
  }


def test_a_training_that_fails_is_named(tmp_path, monkeypatch):
  monkeypatch.setattr(
    runs.subprocess, 'run', lambda command, **_: subprocess.CompletedProcess(command, 1)
  )
  chosen = runs.Runs(epath.Path(tmp_path), 1.0, 1, {})
  with pytest.raises(UsageError, match=r'cifar100_exits=5/none/seed_0 ended with status 1$'):
    runs.train(chosen, table_2.RUNS[0], 0)


def test_a_run_without_checkpoints_to_go_on_from_trains_phase_one_itself(tmp_path, monkeypatch):
  commands = []
  monkeypatch.setattr(
    runs.subprocess,
    'run',
    lambda command, **_: commands.append(command) or subprocess.CompletedProcess(command, 0),
  )
  (isc,) = (run for run in table_2.RUNS if run.name.endswith('/ISC'))
  runs.train(runs.Runs(epath.Path(tmp_path), 1.0, 1, {}), isc, 0)
  assert len(commands) == 1 and not list(tmp_path.iterdir())


def test_runs_can_be_left_out(tmp_path, monkeypatch, capsys):
  arguments = [f'--runs={tmp_path}', '--seeds=1', '--without=partitioning,OFA']
  monkeypatch.setattr(sys, 'argv', ['table_2.py', *arguments])
  with pytest.raises(UsageError, match='^4 of 4 runs'):
    table_2.main()
  assert 'partitioning' not in capsys.readouterr().out


def test_rows_without_runs_are_left_out(tmp_path, monkeypatch):
  monkeypatch.setattr(runs.Runs, 'has', lambda _, run: 'partitioning' not in run)
  monkeypatch.setattr(runs.Runs, 'accuracies', lambda *_: np.ones((1, 5)))
  monkeypatch.setattr(report, 'provenance', lambda *_: '')
  chosen, output = runs.Runs(epath.Path(tmp_path), 1.0, 1, {}), epath.Path(tmp_path)
  table = ablation.write(chosen, output, table_2.FOLDER, 'Table 2', {})
  assert '| OFA - none |' in table and 'partitioning' not in table


def test_runs_at_the_same_time_wait_for_those_they_go_on_from(tmp_path, monkeypatch):
  active, most, order = set(), [], []
  together = threading.Barrier(3)

  def train(chosen, run, seed, shares_device):
    assert shares_device
    active.add((run.name, seed))
    most.append(len(active))
    if run.first_phase_of is not None:
      assert (run.first_phase_of, seed) in order
    elif seed == 0:
      together.wait(30)  # The first three runs are active at once.
    active.remove((run.name, seed))
    order.append((run.name, seed))

  monkeypatch.setattr(runs, 'train', train)
  wanted = [(run, seed) for seed in range(2) for run in table_2.RUNS]
  runs.train_all(runs.Runs(epath.Path(tmp_path), 1.0, 2, {}), wanted, jobs=3)
  assert max(most) == 3
  assert sorted(order) == sorted((run.name, seed) for run, seed in wanted)


def test_no_more_runs_start_after_one_has_failed(tmp_path, monkeypatch):
  started = []

  def train(chosen, run, seed, shares_device):
    started.append(run.name)
    raise UsageError('ended with status 1')

  monkeypatch.setattr(runs, 'train', train)
  wanted = [(run, 0) for run in table_2.RUNS]
  with pytest.raises(UsageError, match='ended with status 1'):
    runs.train_all(runs.Runs(epath.Path(tmp_path), 1.0, 1, {}), wanted, jobs=1)
  assert len(started) == 1


@pytest.mark.slow
def test_results_name_the_devices_of_the_runs(trained):
  chosen = runs.Runs(trained, 0.01, 1, {})
  about = report.provenance(chosen, [figure_7.WITHOUT])
  versions = f'jax {jax.__version__}, flax {flax.__version__}'
  assert f'hours on 1 × cpu ({versions}, Python {platform.python_version()}). The conf' in about


def test_an_argument_that_does_not_exist_is_named(monkeypatch):
  monkeypatch.setattr(sys, 'argv', ['table_2.py', '--epochs=3'])
  with pytest.raises(UsageError, match="'--epochs=3' is not an argument"):
    table_2.main()


def write_metrics(folder, lines):
  """Writes the metrics of the first repetition of 'run', and returns the runs in the folder."""
  chosen = runs.Runs(epath.Path(folder), 1.0, 1, {})
  path = layout.metrics_path(chosen.workdir('run', 0))
  path.parent.mkdir(parents=True)
  path.write_text(''.join(f'{json.dumps(line)}\n' for line in lines))
  return chosen


def test_the_time_of_a_run_is_that_of_its_steps(tmp_path):
  lines = [
    {'step': 50, 'phase': 'phase_1', 'speed/steps_per_second': 10.0},
    {'step': 50, 'phase': 'phase_1', 'train/loss': 1.0},
    {'step': 70, 'phase': 'phase_1', 'speed/steps_per_second': 4.0},
    {'step': 30, 'phase': 'phase_2', 'speed/steps_per_second': 3.0},
  ]
  chosen = write_metrics(tmp_path, lines)
  assert chosen.training_seconds('run', 0) == 5 + 5 + 10


def test_differences_are_paired_and_have_students_intervals():
  base = np.array([[50.0, 60.0], [52.0, 64.0], [47.0, 58.0]])
  gains = np.array([[1.0, 2.0], [2.0, 2.0], [3.0, -1.0]])
  one = report.row('GE', base + gains, (61.0, 70.0))
  other = report.row('none', base, (60.0, 71.0))
  difference = report.difference(one, other)
  np.testing.assert_allclose(difference.mean, [2.0, 1.0, 1.5])
  # t(0.975, 2 degrees of freedom) = 4.3027; deviations 1, sqrt(3) and 0.5 over sqrt(3) seeds.
  np.testing.assert_allclose(
    difference.margin, [4.3027 / 3**0.5, 4.3027, 4.3027 * 0.5 / 3**0.5], rtol=1e-4
  )
  np.testing.assert_allclose(difference.paper, [1.0, -1.0, 0.0])


@pytest.mark.parametrize(
  ('mean', 'margin', 'paper', 'verdict'),
  [
    (0.5, 0.4, 0.3, 'reproduces'),
    (-0.5, 0.4, -0.3, 'reproduces'),
    (0.5, 0.4, -0.3, 'opposite'),
    (0.5, 0.6, 0.3, 'unclear'),
    (0.5, np.nan, 0.3, 'unclear'),
  ],
)
def test_a_verdict_needs_an_interval_on_one_side_of_zero(mean, margin, paper, verdict):
  difference = report.Difference('a - b', *(np.array([x]) for x in (mean, margin, paper)))
  assert difference.verdicts() == [verdict]


def test_the_papers_numbers_stand_beside_networks_with_as_many_exits_only():
  assert report.row('GE', np.ones((1, 2)), (1.0, 2.0)).paper == (1.0, 2.0)
  assert report.row('GE', np.ones((1, 2)), (1.0, 2.0, 3.0)).paper is None


def test_tables_show_the_paper_ours_and_the_difference(tmp_path):
  ours = np.array([[59.0, 60.0], [61.0, 60.0]])
  rows = [report.row('GE', ours, (60.35, 64.38)), report.row('none', ours - 1, (60.09, 63.73))]
  text = report.write_table(
    epath.Path(tmp_path), 'Table', rows, [report.difference(*rows)], 'Made by hand.'
  )
  for line in (
    '| GE, paper | 60.35 | 64.38 |',
    '| GE, ours | 60.00 ± 1.41 | 60.00 ± 0.00 |',
    '| difference | -0.35 | -4.38 |',
    '| GE - none | +1.00 ± 0.00 (paper +0.26: reproduces) | +1.00 ± 0.00 (paper +0.65: reproduces)'
    ' | +1.00 ± 0.00 (paper +0.45: reproduces) |',
  ):
    assert line in text.splitlines()
  assert text.endswith('Made by hand.')
  assert (tmp_path / 'table.csv').read_text().splitlines()[:2] == [
    'row,exit,paper,mean,standard_deviation,seeds',
    'GE,1,60.35,60.0,1.4142,59 61',
  ]
  assert 'GE - none,average,1.0,0.0,0.455,reproduces' in (tmp_path / 'differences.csv').read_text()


def test_confidence_ranks_start_with_the_most_confident_image():
  probabilities = np.array([[[0.9, 0.1], [0.4, 0.6], [0.2, 0.8]]])
  np.testing.assert_array_equal(figure_7.confidence_ranks(probabilities), [[1, 3, 2]])


def test_validation_curves_are_averages_over_exits_of_phase_one(tmp_path):
  lines = [
    {'step': 5, 'phase': 'phase_1', 'train/accuracy_exit_1': 0.9},
    {
      'step': 5,
      'phase': 'phase_1',
      'validation/accuracy_exit_1': 0.2,
      'validation/accuracy_exit_2': 0.4,
    },
    {'step': 5, 'phase': 'phase_2', 'validation/accuracy_exit_1': 0.8},
  ]
  steps, accuracies = figure_6.validation_curve(write_metrics(tmp_path, lines), 'run')
  np.testing.assert_array_equal(steps, [5])
  np.testing.assert_allclose(accuracies, [30.0])
