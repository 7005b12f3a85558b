"""The main job as a user runs it: end to end, interrupted, and on several devices and hosts."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath
from tensorboard.backend.event_processing import event_accumulator
from tensorboard.util import tensor_util

from imta_jax import evaluate
from imta_jax.adaptive.engine import AdaptiveClassifier
from imta_jax.adaptive.policy import cheapest_as_accurate, choose_exits, exit_scores
from imta_jax.data import arrays
from imta_jax.errors import UsageError
from imta_jax.training import workdir as layout
from imta_jax.training import workdir_lock

ROOT = Path(__file__).parents[2]
# 2 exits, 96 training images: 6 steps an epoch, 3 + 2 epochs.
COMMAND = (
  sys.executable,
  '-m',
  'imta_jax.main',
  '--config=configs/mnist5k.py:exits=2',
  '--config.dataset.validation_size=3904',
  '--config.batch_size=16',
  '--config.evaluation_batch_size=1000',
  '--config.log_every_steps=2',
  '--config.model.scale_factors=1,2',
  '--config.model.bottleneck_factors=1,2',
  '--config.phases[0].epochs=3',
  '--config.phases[1].epochs=2',
  # Small steps: on several devices sums have another order, which training amplifies.
  '--config.phases[0].learning_rate=0.01',
  '--config.phases[1].learning_rate=0.01',
)
LAST_STEPS = {'phase_1': 18, 'phase_2': 12}


@pytest.fixture(scope='session')
def environment(tmp_path_factory):
  folder = tmp_path_factory.mktemp('shared')
  return {
    **os.environ,
    'TFDS_DATA_DIR': str(folder / 'tfds'),
    'JAX_PLATFORMS': 'cpu',
    'JAX_DISABLE_MOST_OPTIMIZATIONS': 'true',  # Compiling takes longer than running here.
    'XLA_FLAGS': '',
    'PYTHONUNBUFFERED': '1',
  }


def start(workdir, environment, *overrides, **variables):
  return subprocess.Popen(
    [*COMMAND, f'--workdir={workdir}', *overrides],
    cwd=ROOT,
    env={**environment, **variables},
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def run(workdir, environment, *overrides, **variables):
  process = start(workdir, environment, *overrides, **variables)
  output, errors = process.communicate(timeout=300)
  assert process.returncode == 0, output + errors
  return output, errors


def interrupt(process, line_start, number):
  """Sends a signal once a line of output begins so, and waits for the end."""
  for line in process.stdout:
    if line.startswith(line_start):
      process.send_signal(number)
      break
  else:
    pytest.fail(f'no line {line_start!r}')
  process.communicate(timeout=120)
  return process.returncode


def final_states(workdir, last_steps=LAST_STEPS):
  return {
    phase: ocp.StandardCheckpointer().restore(workdir / 'checkpoints' / phase / str(step) / 'state')
    for phase, step in last_steps.items()
  }


def assert_identical(states, others):
  jax.tree.map(np.testing.assert_array_equal, states, others)


def losses(workdir):
  lines = (workdir / 'metrics.jsonl').read_text().splitlines()
  records = [json.loads(line) for line in lines]
  return [(r['phase'], r['step'], r['train/loss']) for r in records if 'train/loss' in r]


@pytest.fixture(scope='session')
def finished(tmp_path_factory, environment):
  """A run that nothing interrupted, and what it printed."""
  workdir = tmp_path_factory.mktemp('finished')
  output, errors = run(workdir, environment)
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
  for phase in LAST_STEPS:
    assert list((workdir / 'tensorboard' / phase).glob('events.*'))
  assert len(re.findall(r'^phase_1 epoch \d/3 ', output, re.MULTILINE)) == 3
  assert str(workdir / 'evaluation/budget.png') in output


def test_metrics_hold_training_validation_and_speed(finished):
  workdir, _, _ = finished
  events = event_accumulator.EventAccumulator(str(workdir / 'tensorboard/phase_1'))
  events.Reload()
  tags = set(events.Tags()['tensors'])
  assert {
    'train/loss',
    'train/learning_rate',
    'train/accuracy_exit_2',
    'validation/accuracy_exit_1',
    'validation/cross_entropy_exit_2',
    'speed/fraction_waiting_for_data',
  } <= tags
  assert [event.step for event in events.Tensors('train/loss')] == list(range(2, 19, 2))


def test_last_layers_alone_change_in_phase_two(finished):
  workdir, _, _ = finished
  states = final_states(workdir)
  assert set(states['phase_2']['trained']) == {'classifiers_0', 'classifiers_1'}
  assert set(states['phase_2']['opt_state'][1][0]['trace']) == {'classifiers_0', 'classifiers_1'}


def test_finished_run_evaluates_again(finished, environment):
  workdir, _, _ = finished
  before = (workdir / 'evaluation/exits.csv').read_text()
  (workdir / 'evaluation/exits.csv').unlink()
  output, _ = run(workdir, environment)
  assert ' epoch ' not in output
  assert (workdir / 'evaluation/exits.csv').read_text() == before


@pytest.mark.slow
def test_sweep_needs_only_workdirs(finished, environment, tmp_path):
  workdir, _, _ = finished
  for flags in ((), ('--recompute', '--phases=all')):
    subprocess.run(
      [sys.executable, 'experiments/budget_sweep.py', workdir, f'--output={tmp_path}', *flags],
      cwd=ROOT,
      env=environment,
      check=True,
      capture_output=True,
    )
    swept = list(csv.DictReader((tmp_path / 'budget.csv').open()))
    own = list(csv.DictReader((workdir / 'evaluation/budget.csv').open()))
    assert swept == own[-len(swept) :]
    assert (tmp_path / 'budget.png').exists()
  assert len(swept) == 80


def test_engine_runs_what_was_trained(finished, environment, monkeypatch):
  workdir, *_ = finished
  workdir = epath.Path(workdir)
  monkeypatch.setenv('TFDS_DATA_DIR', environment['TFDS_DATA_DIR'])
  images = arrays.load(layout.load_config(workdir).dataset).images['test']
  for phase, name in enumerate(LAST_STEPS):
    classifier = AdaptiveClassifier.from_workdir(workdir, phase=phase)
    predictions = evaluate.load_predictions(layout.predictions_path(workdir, name, 'test'))
    probabilities = predictions.probabilities()
    # Half of the images leave at the first exit.
    thresholds = [np.median(probabilities[0].max(axis=-1)), np.inf]
    answers = classifier.predict(images, thresholds)
    confidence = probabilities.max(axis=-1)
    exits = choose_exits(confidence, thresholds)
    # Programs round differently: images next to the threshold may leave elsewhere.
    np.testing.assert_allclose(confidence[0, answers.exits != exits], thresholds[0], rtol=1e-4)
    assert (answers.exits != exits).mean() < 0.02
    np.testing.assert_allclose(
      answers.probabilities, probabilities[answers.exits, np.arange(len(exits))], atol=1e-4
    )
    # Unless a budget is given: the cheapest thresholds as accurate as the last exit on validation.
    validation = evaluate.load_predictions(layout.predictions_path(workdir, name, 'validation'))
    points = evaluate.load_points(layout.evaluation_folder(workdir), name)
    cheapest = cheapest_as_accurate(points, validation.accuracy()[-1])
    expected = (np.inf,) * 2 if cheapest is None else cheapest.thresholds
    # The last exit takes all images, whatever its threshold.
    np.testing.assert_array_equal(classifier.thresholds[:-1], np.float32(expected[:-1]))
    last_madds = classifier.madds[-1]
    classifier.choose(budget=last_madds)
    assert len(classifier.operating_points) == 40
  # Another rule and sweep give other operating points; a promise takes the validation images.
  other = AdaptiveClassifier.from_workdir(workdir, rule='calibrated', sweep='optimal', max_loss=0.9)
  assert other.operating_points[0].thresholds != classifier.operating_points[0].thresholds
  assert other.rule == 'calibrated' and other.temperatures != (1.0, 1.0)
  scores = exit_scores(validation.probabilities(), 'calibrated', other.temperatures)
  np.testing.assert_array_equal(other.validation.scores, scores)
  np.testing.assert_array_equal(other.thresholds, other.thresholds_losing(0.9, 0.95))
  assert other.operating_points[-1].accuracy >= validation.accuracy().max()
  with pytest.raises(ValueError, match="sweep 'best' is unknown"):
    AdaptiveClassifier.from_workdir(workdir, sweep='best')
  with pytest.raises(UsageError, match='phase 4 does not exist: .* has 1 to 2'):
    AdaptiveClassifier.from_workdir(workdir, phase=3)


def test_interrupted_run_ends_with_identical_parameters(finished, environment, tmp_path):
  for moment, num_saved in (('phase_1: ', 0), ('phase_1: first step', 1)):
    status = interrupt(start(tmp_path, environment), moment, signal.SIGTERM)
    assert status == 128 + signal.SIGTERM
    assert len(list(tmp_path.glob('checkpoints/phase_1/*'))) == num_saved

  for moment in ('phase_1 epoch 1/', 'phase_2 epoch 1/'):
    process = start(tmp_path, environment)
    assert interrupt(process, moment, signal.SIGKILL) == -signal.SIGKILL

  run(tmp_path, environment)
  assert_identical(final_states(tmp_path), final_states(finished[0]))
  assert losses(tmp_path) == losses(finished[0])


@pytest.mark.slow
def test_any_number_of_steps_at_once_ends_with_identical_parameters(environment, tmp_path):
  short = ('--config.phases[0].epochs=2', '--config.phases[1].epochs=1')
  run(tmp_path / 'two', environment, *short, '--config.steps_per_dispatch=2')
  several = (*short, '--config.steps_per_dispatch=5')
  process = start(tmp_path / 'five', environment, *several)
  assert interrupt(process, 'phase_1 epoch 1/', signal.SIGTERM) == 128 + signal.SIGTERM
  run(tmp_path / 'five', environment, *several)
  last_steps = {'phase_1': 12, 'phase_2': 6}
  two, five = (final_states(tmp_path / name, last_steps) for name in ('two', 'five'))
  assert_identical(two, five)


@pytest.mark.slow
def test_checkpoints_by_time_save_what_an_epoch_has_done(finished, environment, tmp_path):
  flags = ('--config.checkpoint_every_epochs=3', '--config.checkpoint_every_minutes=1e-6')
  assert interrupt(start(tmp_path, environment, *flags), 'phase_1 epoch 1/', signal.SIGKILL) < 0
  saved = {path.name for path in (tmp_path / 'checkpoints/phase_1').iterdir()}
  saved = {int(name) for name in saved if name.isdigit()}
  assert saved and saved <= {2, 4, 8}  # Not at step 6, the end of an epoch without a validation.
  run(tmp_path, environment, *flags)
  last = {'phase_1': 18}
  assert_identical(final_states(tmp_path, last), final_states(finished[0], last))


@pytest.mark.slow
def test_damage_and_a_full_disk_take_one_line_each_and_no_result(finished, environment, tmp_path):
  interrupt(start(tmp_path, environment), 'phase_1 epoch 2/', signal.SIGTERM)
  folder = tmp_path / 'checkpoints/phase_1'
  latest = max(folder.iterdir(), key=lambda path: int(path.name))
  data = max((path for path in latest.rglob('*') if path.is_file()), key=lambda p: p.stat().st_size)
  content = bytearray(data.read_bytes())
  content[len(content) // 2] ^= 0x55
  data.write_bytes(content)
  before = {path.name for path in folder.iterdir()} - {latest.name}

  limited = ['bash', '-c', 'ulimit -f 500; exec "$@"', 'bash', *COMMAND, f'--workdir={tmp_path}']
  result = subprocess.run(
    limited, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
  )
  assert result.returncode == 1
  lines = result.stderr.splitlines()  # Orbax and asyncio add their own.
  assert [line for line in lines if 'Skipping corrupt checkpoint' in line and str(latest) in line]
  (error,) = (line for line in lines if line.startswith('error: a checkpoint in '))
  assert 'File too large' in error
  after = {path.name for path in folder.iterdir()}
  assert before <= after and all('-tmp' in name for name in after - before)

  run(tmp_path, environment)
  assert_identical(final_states(tmp_path), final_states(finished[0]))


def test_a_second_run_in_a_workdir_is_refused(finished, environment):
  workdir, *_ = finished
  with workdir_lock.hold(epath.Path(workdir)):
    _, errors = (second := start(workdir, environment)).communicate(timeout=100)
  assert second.returncode == 1
  (line,) = errors.splitlines()
  assert line.startswith(f'error: workdir {workdir} is in use by process {os.getpid()} on ')


@pytest.mark.slow
def test_loss_that_is_not_finite_stops_and_keeps_the_last_checkpoint(
  finished, environment, tmp_path
):
  process = start(tmp_path, environment, '--config.phases[1].learning_rate=2e9')
  _, errors = process.communicate(timeout=300)
  assert process.returncode == 1
  (line,) = errors.splitlines()
  assert line.startswith('error: phase_2: the loss is not finite at step')
  assert (tmp_path / 'checkpoints/phase_1/18').exists()


@pytest.mark.slow
def test_eight_devices_train_as_one_does(finished, environment, tmp_path):
  flags = '--xla_force_host_platform_device_count=8'
  output, _ = run(tmp_path, environment, XLA_FLAGS=flags)
  assert '8 × cpu' in output
  assert_trained_alike(tmp_path, finished[0])


def assert_trained_alike(workdir, other):
  """Equal but for the order of sums, which training amplifies: closely at first, less later."""
  for tag in ('train/loss', 'train/gradient_norm', 'train/accuracy_exit_1'):
    first, first_of_other = (first_value(folder, tag) for folder in (workdir, other))
    np.testing.assert_allclose(first, first_of_other, rtol=1e-4)

  def compare(array, array_of_other):
    scale = np.abs(array_of_other).max() + 1e-3
    np.testing.assert_allclose(array / scale, array_of_other / scale, atol=0.1)

  states, states_of_other = final_states(workdir), final_states(other)
  for phase in states:
    for part in ('trained', 'batch_stats'):
      jax.tree.map(compare, states[phase][part], states_of_other[phase][part])


def first_value(workdir, tag):
  events = event_accumulator.EventAccumulator(str(workdir / 'tensorboard/phase_1'))
  events.Reload()
  return tensor_util.make_ndarray(events.Tensors(tag)[0].tensor_proto)
