"""The main job as a user runs it: end to end, interrupted, and used afterwards."""

import contextlib
import csv
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath

from imta_jax import config as config_lib
from imta_jax import evaluate
from imta_jax.adaptive.engine import AdaptiveClassifier
from imta_jax.adaptive.policy import cheapest_as_accurate, choose_exits
from imta_jax.data import arrays
from imta_jax.errors import UsageError
from imta_jax.training import loop, signals, workdir_lock
from imta_jax.training import workdir as layout

ROOT = Path(__file__).parents[2]
CONFIG = f'{ROOT}/configs/mnist5k.py:exits=2'
# 32 training images: 4 steps per epoch, 3 + 1 epochs.
OVERRIDES = (
  '--config.batch_size=8',
  '--config.evaluation_batch_size=64',
  '--config.log_every_steps=2',
  '--config.tensorboard=False',
  '--config.dataset.image_size=12',
  '--config.model.base=1',
  '--config.model.step=1',
  '--config.model.scale_factors=1,',
  '--config.model.bottleneck_factors=1,',
  '--config.phases[0].epochs=3',
  '--config.phases[1].epochs=1',
)
LAST_STEPS = {'phase_1': 12, 'phase_2': 4}


@pytest.fixture(scope='module')
def command(tmp_path_factory):
  """The command line, but for the workdir, with noise in place of the digits."""
  folder, draw = tmp_path_factory.mktemp('arrays'), np.random.default_rng(0).integers
  sizes = {'train': 32, 'validation': 48, 'test': 64}
  noise = arrays.Arrays(
    [str(digit) for digit in range(10)],
    {split: draw(0, 256, (n, 12, 12, 1), np.uint8) for split, n in sizes.items()},
    {split: draw(0, 10, n, np.int32) for split, n in sizes.items()},
  )
  arrays.write(config_lib.load(CONFIG).dataset, noise, epath.Path(folder))
  program = (sys.executable, '-m', 'imta_jax.main', f'--config={CONFIG}')
  return (*program, *OVERRIDES, f'--config.dataset.arrays_dir={folder}')


def start(command, workdir, *overrides):
  return subprocess.Popen(
    [*command, f'--workdir={workdir}', *overrides],
    cwd=ROOT,
    env={
      **os.environ,
      'JAX_PLATFORMS': 'cpu',
      'JAX_DISABLE_MOST_OPTIMIZATIONS': 'true',  # Compiling takes longer than running here.
      'XLA_FLAGS': '',
      'PYTHONUNBUFFERED': '1',
    },
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def interrupt(process, line_start, number):
  """Sends a signal once a line of output begins so, and returns the exit status."""
  for line in process.stdout:
    if line.startswith(line_start):
      process.send_signal(number)
      break
  else:
    pytest.fail(f'no line {line_start!r}')
  process.communicate(timeout=120)
  return process.returncode


def records(workdir):
  return [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]


def contents(workdir):
  """All that a run leaves and that does not depend on time, by name."""
  found = {}
  for path in sorted(workdir.glob('checkpoints/phase_?/*')):
    if path.name.isdigit():
      state = ocp.StandardCheckpointer().restore(path / 'state')
      for name, leaf in jax.tree_util.tree_leaves_with_path(state):
        found[f'{path.relative_to(workdir)}{jax.tree_util.keystr(name)}'] = np.asarray(leaf)
  for record in records(workdir):
    for name, value in record.items():
      if name.startswith(('train/', 'validation/')):
        found[f'{record["phase"]} step {record["step"]} {name}'] = np.asarray(value)
  for path in sorted(workdir.glob('evaluation/*.npz')):
    with np.load(path) as saved:
      found |= {f'{path.name}/{name}': saved[name] for name in saved}
  for name in ('evaluation.json', 'exits.csv', 'budget.csv'):
    found[name] = np.frombuffer((workdir / 'evaluation' / name).read_bytes(), np.uint8)
  return found


def assert_identical(workdir, other):
  found, expected = contents(workdir), contents(other)
  assert found.keys() == expected.keys()
  for name, value in expected.items():
    np.testing.assert_array_equal(found[name], value, err_msg=name)


@pytest.fixture(scope='module')
def finished(command, tmp_path_factory):
  """A run of the program that nothing interrupted, and what it printed."""
  workdir = epath.Path(tmp_path_factory.mktemp('finished'))
  process = start(command, workdir)
  output, errors = process.communicate(timeout=300)
  assert process.returncode == 0, output + errors
  return workdir, output, errors


def test_main_job_leaves_tables_figure_metrics_and_checkpoints(finished):
  workdir, output, errors = finished
  assert errors == ''
  rows = list(csv.DictReader((workdir / 'evaluation/exits.csv').open()))
  assert [(row['network'], row['exit']) for row in rows] == [
    (phase, number) for phase in ('phase_1', 'phase_2') for number in ('1', '2')
  ]
  assert int(rows[0]['madds']) < int(rows[1]['madds'])
  assert all(0 <= float(row['test_top1']) <= float(row['test_top5']) <= 1 for row in rows)
  points = list(csv.DictReader((workdir / 'evaluation/budget.csv').open()))
  assert len(points) == 2 * 40
  assert (workdir / 'evaluation/budget.png').read_bytes().startswith(b'\x89PNG')
  assert len(re.findall(r'^phase_1 epoch \d/3 ', output, re.MULTILINE)) == 3
  assert str(workdir / 'evaluation/budget.png') in output
  for phase, last in LAST_STEPS.items():
    of_phase = [record for record in records(workdir) if record['phase'] == phase]
    logged = [record['step'] for record in of_phase if 'train/loss' in record]
    assert logged == list(range(2, last + 1, 2))
    tags = {tag for record in of_phase for tag in record}
    assert tags == {
      *('step', 'phase', 'train/loss', 'train/learning_rate', 'train/gradient_norm'),
      *(f'train/accuracy_exit_{number}' for number in (1, 2)),
      *(f'validation/{name}_exit_{n}' for name in ('accuracy', 'cross_entropy') for n in (1, 2)),
      *('speed/images_per_second', 'speed/steps_per_second', 'speed/fraction_waiting_for_data'),
    }


def test_finished_run_evaluates_again(finished, capsys):
  workdir, *_ = finished
  before = (workdir / 'evaluation/exits.csv').read_text()
  (workdir / 'evaluation/exits.csv').unlink()
  loop.train_and_evaluate(layout.load_config(workdir), workdir)
  assert ' epoch ' not in capsys.readouterr().out
  assert (workdir / 'evaluation/exits.csv').read_text() == before


@pytest.mark.slow
@pytest.mark.parametrize('flags', [(), ('--recompute', '--phases=all')], ids=['', 'recompute'])
def test_sweep_needs_only_workdirs(flags, finished, tmp_path):
  workdir, *_ = finished
  subprocess.run(
    [sys.executable, 'experiments/budget_sweep.py', workdir, f'--output={tmp_path}', *flags],
    cwd=ROOT,
    check=True,
    capture_output=True,
  )
  swept = list(csv.DictReader((tmp_path / 'budget.csv').open()))
  own = list(csv.DictReader((workdir / 'evaluation/budget.csv').open()))
  assert swept == own[-len(swept) :] and len(swept) == (80 if flags else 40)
  assert (tmp_path / 'budget.png').exists()


@pytest.mark.parametrize('phase', [0, 1])
def test_engine_runs_what_was_trained(phase, finished):
  workdir, *_ = finished
  name = list(LAST_STEPS)[phase]
  images = arrays.load(layout.load_config(workdir).dataset).images['test']
  classifier = AdaptiveClassifier.from_workdir(workdir, phase=phase)
  probabilities = evaluate.load_predictions(
    layout.predictions_path(workdir, name, 'test')
  ).probabilities()
  confidence = probabilities.max(axis=-1)
  # Half of the images leave at the first exit; none is next to the threshold.
  thresholds = [np.sort(confidence[0])[31:33].mean(), np.inf]
  answers = classifier.predict(images, thresholds)
  exits = choose_exits(confidence, thresholds)
  np.testing.assert_array_equal(answers.exits, exits)
  expected = probabilities[exits, np.arange(len(exits))]
  np.testing.assert_allclose(answers.probabilities, expected, atol=1e-4)
  # Unless a budget is given: the cheapest thresholds as accurate as the last exit on validation.
  validation = evaluate.load_predictions(layout.predictions_path(workdir, name, 'validation'))
  points = evaluate.load_points(layout.evaluation_folder(workdir), name)
  cheapest = cheapest_as_accurate(points, validation.accuracy()[-1])
  expected = np.inf if cheapest is None else cheapest.thresholds[0]
  assert classifier.thresholds[0] == np.float32(expected)


def test_unknown_sweeps_and_phases_of_a_workdir_are_refused(finished):
  with pytest.raises(ValueError, match="sweep 'best' is unknown"):
    AdaptiveClassifier.from_workdir(finished[0], sweep='best')
  with pytest.raises(UsageError, match='phase_4 does not exist: the run has phase_1, phase_2'):
    AdaptiveClassifier.from_workdir(finished[0], phase=3)


def test_interrupted_run_ends_with_identical_parameters(finished, command, tmp_path):
  workdir = epath.Path(tmp_path)
  process = start(command, workdir)
  assert interrupt(process, 'phase_1: first step', signal.SIGTERM) == 128 + signal.SIGTERM
  assert len(list(tmp_path.glob('checkpoints/phase_1/*'))) == 1
  process = start(command, workdir)
  assert interrupt(process, 'phase_1 epoch 2/', signal.SIGKILL) == -signal.SIGKILL
  loop.train_and_evaluate(layout.load_config(workdir), workdir)
  assert_identical(workdir, finished[0])


def is_saving(workdir):
  return any(workdir.glob('checkpoints/*/*-tmp*'))


@pytest.mark.slow
def test_killed_runs_end_with_the_same_states_metrics_and_evaluation(finished, command, tmp_path):
  begin = time.monotonic()  # Timed with the compilation cache filled.
  start(command, tmp_path / 'again').communicate()
  duration = time.monotonic() - begin
  moments, number, num_unfinished = random.Random(0), 0, 0
  while num_unfinished < 2:  # A save may end before the signal arrives.
    number += 1
    workdir = epath.Path(tmp_path / f'killed_{number}')
    process = start(command, workdir)
    while not is_saving(workdir):
      assert process.poll() is None, 'the run ended before it saved'
      time.sleep(0.002)
    process.kill()
    process.communicate()
    num_unfinished += is_saving(workdir)
    process = start(command, workdir)
    with contextlib.suppress(subprocess.TimeoutExpired):
      process.communicate(timeout=moments.uniform(0, duration))
    process.kill()
    process.communicate()
    assert start(command, workdir).communicate()[1] == ''
    assert_identical(workdir, finished[0])


@pytest.mark.slow
def test_any_number_of_steps_at_once_ends_with_identical_parameters(
  finished, tmp_path, monkeypatch
):
  config = layout.load_config(finished[0])
  config.log_every_steps = 100
  for number in (2, 3):
    config.steps_per_dispatch = number
    workdir = epath.Path(tmp_path / str(number))
    if number == 3:  # The second run is stopped once.
      with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(signals.StopRequest, 'requested', lambda stop: True)
        loop.train_and_evaluate(config, workdir)
      assert (workdir / 'checkpoints/phase_1/1').exists()
    loop.train_and_evaluate(config, workdir)
  assert_identical(tmp_path / '3', tmp_path / '2')


@pytest.mark.slow
def test_damage_and_a_full_disk_take_one_line_each_and_no_result(finished, command, tmp_path):
  interrupt(start(command, tmp_path), 'phase_1 epoch 2/', signal.SIGTERM)
  folder = tmp_path / 'checkpoints/phase_1'
  latest = max(folder.iterdir(), key=lambda path: int(path.name))
  data = max((path for path in latest.rglob('*') if path.is_file()), key=lambda p: p.stat().st_size)
  content = bytearray(data.read_bytes())
  content[len(content) // 2] ^= 0x55
  data.write_bytes(content)
  before = {path.name for path in folder.iterdir()} - {latest.name}

  limit = len(content) // 2048  # Half of the largest file, in KiB.
  limited = start(('bash', '-c', f'ulimit -f {limit}; exec "$@"', 'bash', *command), tmp_path)
  _, errors = limited.communicate(timeout=300)
  assert limited.returncode == 1
  lines = errors.splitlines()  # Orbax and asyncio add their own.
  assert [line for line in lines if 'Skipping corrupt checkpoint' in line and str(latest) in line]
  # Another thread may have begun the line.
  (error,) = (line for line in lines if 'error: a checkpoint in ' in line)
  assert 'File too large' in error
  after = {path.name for path in folder.iterdir()}
  assert before <= after and all('-tmp' in name for name in after - before)

  workdir = epath.Path(tmp_path)
  loop.train_and_evaluate(layout.load_config(workdir), workdir)
  assert_identical(workdir, finished[0])


def test_a_second_run_in_a_workdir_is_refused(finished):
  workdir, *_ = finished
  refusal = f'workdir {workdir} is in use by process {os.getpid()} on '
  with workdir_lock.hold(workdir), pytest.raises(UsageError, match=refusal):
    loop.train_and_evaluate(layout.load_config(workdir), workdir)
