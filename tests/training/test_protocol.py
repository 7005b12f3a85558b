"""The training protocol, on a data set that records which splits are read.

Validation accuracies during training are made up, so that the state of a phase with the best mean
accuracy over exits is neither its last state nor the best state of its last exit.
"""

import concurrent.futures
import contextlib
import itertools
import json
import shutil
import signal
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath

from imta_jax import config as config_lib
from imta_jax import evaluate
from imta_jax.adaptive.engine import AdaptiveClassifier
from imta_jax.adaptive.policy import (
  BUDGET_PARAMETERS,
  budget_sweep,
  exit_scores,
  optimal_sweep,
)
from imta_jax.data.dataset import Dataset
from imta_jax.errors import UsageError
from imta_jax.training import loop, signals
from imta_jax.training import workdir as layout

STEPS_PER_EPOCH = 2
# Validation accuracy after each epoch, of each exit.
ACCURACIES = ((0.5, 1.0), (1.0, 0.75), (0.25, 0.75))
NUM_EPOCHS = len(ACCURACIES)
BEST, LAST = 2 * STEPS_PER_EPOCH, 3 * STEPS_PER_EPOCH
LABELS = {'train': 0, 'validation': 1, 'test': 2}
NUM_IMAGES = 16


class RecordingDataset(Dataset):
  """A data set of noise; `reads` lists what was read: (split, phase or None)."""

  class_names = ('a', 'b', 'c')
  image_shape = (8, 8, 1)
  num_images = dict.fromkeys(LABELS, NUM_IMAGES)
  steps_per_epoch = STEPS_PER_EPOCH
  source_axes = 0

  def __init__(self):
    self.reads = []

  def train_reader(self, phase, first_step):
    self.reads.append(('train', phase))
    # Like a stream, it gives batches one after another, whatever step they are asked for.
    batches = (self._batch('train', step) for step in itertools.count(first_step))
    return lambda step: next(batches)

  def draw(self, source, step):
    return source

  def evaluation_batches(self, split):
    self.reads.append((split, None))
    batch = self._batch(split, 0)
    yield {**batch, 'mask': np.ones(batch['label'].shape, bool)}

  def fingerprint(self):
    return 0

  def _batch(self, split, number):
    random = np.random.default_rng([LABELS[split], number])
    lead = (jax.local_device_count(), NUM_IMAGES // jax.local_device_count())
    return {
      'image': random.normal(size=(*lead, *self.image_shape)).astype(np.float32),
      'label': np.full(lead, LABELS[split], np.int32),
    }


def make_config():
  config = config_lib.default()
  config.batch_size = NUM_IMAGES
  config.log_every_steps, config.tensorboard = 1, False
  config.dataset.update(image_size=8, mean=(0.5,), std=(0.25,))
  config.model.update(
    num_exits=2,
    step_mode='even',
    base=1,
    step=1,
    channels=2,
    growth_rate=2,
    scale_factors=(1,),
    bottleneck_factors=(1,),
  )
  for phase in config.phases:
    phase.update(epochs=float(NUM_EPOCHS), learning_rate=0.05)
  return config


def make_predictions(accuracies):
  """Returns predictions for validation images with the given accuracies [exit]."""
  labels = np.full(NUM_IMAGES, LABELS['validation'], np.int32)
  logits = np.zeros((len(accuracies), NUM_IMAGES, 3), np.float32)
  for of_exit, accuracy in zip(logits, accuracies, strict=True):
    of_exit[: round(accuracy * NUM_IMAGES), LABELS['validation']] = 1
  return evaluate.Predictions(logits, labels)


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """A function that trains with a config; returns the workdir, the reads and the evaluations."""

  def train_with(config):
    workdir, dataset = epath.Path(tmp_path_factory.mktemp('run')), RecordingDataset()
    predict, made_up = evaluate.predict, itertools.chain(*[ACCURACIES] * len(config.phases))

    def predict_or_make_up(*arguments):
      predictions = predict(*arguments)
      is_validation = predictions.labels[0] == LABELS['validation']
      accuracies = next(made_up, None) if is_validation else None
      return predictions if accuracies is None else make_predictions(accuracies)

    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(loop, 'open_dataset', lambda config: dataset)
      patch.setattr(evaluate, 'predict', predict_or_make_up)
      return workdir, dataset.reads, loop.train_and_evaluate(config, workdir)

  return train_with


@pytest.fixture(scope='module')
def finished(run):
  config = make_config()
  config.tensorboard = True
  return run(config)


def state_of(workdir, phase, step):
  return ocp.StandardCheckpointer().restore(workdir / 'checkpoints' / phase / str(step) / 'state')


def steps_kept(workdir, phase):
  return {int(path.name) for path in (workdir / 'checkpoints' / phase).iterdir()}


def backbone_of(state):
  """Returns parameters and batch statistics of everything but the classifiers."""
  params = {**(state['frozen'] or {}), **state['trained']}
  return {
    name: {part: tree for part, tree in trees.items() if not part.startswith('classifiers_')}
    for name, trees in (('params', params), ('batch_stats', state['batch_stats']))
  }


def are_equal(tree, other):
  return jax.tree.all(jax.tree.map(np.array_equal, tree, other))


def test_the_test_images_are_read_once_per_network_and_last(finished):
  _, reads, _ = finished
  of_phases = [[('train', phase)] + [('validation', None)] * NUM_EPOCHS for phase in range(2)]
  assert reads == sum(of_phases, []) + [('validation', None), ('test', None)] * 2


def test_phase_two_starts_from_and_keeps_the_best_backbone_of_phase_one(finished):
  workdir, _, _ = finished
  best, last = (backbone_of(state_of(workdir, 'phase_1', step)) for step in (BEST, LAST))
  assert not are_equal(best, last)
  assert steps_kept(workdir, 'phase_2') == {BEST, LAST}
  for step in (BEST, LAST):
    assert are_equal(backbone_of(state_of(workdir, 'phase_2', step)), best)


def test_the_best_state_of_each_phase_is_evaluated(finished):
  workdir, _, evaluations = finished
  config = make_config()
  images = np.concatenate(RecordingDataset()._batch('test', 0)['image'])
  for index, (name, evaluation) in enumerate(zip(('phase_1', 'phase_2'), evaluations, strict=True)):
    state = state_of(workdir, name, BEST)
    variables = {
      'params': {**(state['frozen'] or {}), **state['trained']},
      'batch_stats': state['batch_stats'],
    }
    model = config_lib.create_model(config, config.phases[index], num_classes=3)
    predictions = evaluate.load_predictions(layout.predictions_path(workdir, name, 'test'))
    assert set(predictions.labels) == {LABELS['test']}
    assert set(predictions.labels) == {LABELS['test']}
    expected = jax.jit(model.apply)(variables, images)
    np.testing.assert_allclose(predictions.logits, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(evaluation.accuracies['test', 1], predictions.accuracy())


def test_metrics_of_each_phase_go_to_tensorboard(finished):
  for phase in ('phase_1', 'phase_2'):
    (events,) = (finished[0] / 'tensorboard' / phase).glob('events.*')
    for tag in (b'train/loss', b'validation/accuracy_exit_2', b'speed/images_per_second'):
      assert tag in events.read_bytes()


@pytest.mark.parametrize(('in_memory', 'crop'), [(True, 'none'), (False, 'center')])
def test_image_files_are_cropped_as_the_data_set_was(in_memory, crop, finished, tmp_path):
  workdir, _, _ = finished
  copy = epath.Path(tmp_path / 'copy')
  shutil.copytree(workdir, copy)
  config = layout.load_config(copy)
  config.dataset.in_memory = in_memory
  (copy / 'config.json').write_text(json.dumps(config_lib.to_dict(config)))
  classifier = AdaptiveClassifier.from_workdir(copy)
  assert classifier.preprocessing == {'crop': crop}
  assert classifier.class_names == ('a', 'b', 'c')


@pytest.mark.parametrize(
  ('name', 'value', 'difference'),
  [
    ('class_names', ('a', 'b', 'wolf'), r"classes\[2\]: 'c' → 'wolf'"),
    (
      'num_images',
      {**dict.fromkeys(LABELS, NUM_IMAGES), 'test': 17},
      r'data.num_images.test: 16 → 17',
    ),
    ('fingerprint', lambda self: 1, 'data.fingerprint: 0 → 1'),
  ],
  ids=['classes', 'numbers', 'pixels'],
)
def test_a_run_on_other_data_is_refused_and_keeps_its_evaluation(
  name, value, difference, finished, tmp_path, monkeypatch
):
  workdir = epath.Path(tmp_path / 'copy')
  shutil.copytree(finished[0], workdir)
  before = (workdir / 'evaluation/exits.csv').read_bytes()
  monkeypatch.setattr(RecordingDataset, name, value)
  monkeypatch.setattr(loop, 'open_dataset', lambda config: RecordingDataset())
  with pytest.raises(UsageError, match=rf'other data \({difference}\): choose'):
    loop.train_and_evaluate(layout.load_config(workdir), workdir)
  assert (workdir / 'evaluation/exits.csv').read_bytes() == before


def test_the_config_of_a_workdir_is_read_while_its_lock_is_held(finished, tmp_path, monkeypatch):
  workdir = epath.Path(tmp_path / 'run')

  @contextlib.contextmanager
  def hold_after_another_run(workdir):
    shutil.copytree(finished[0], workdir)  # It has trained and ended in the meantime.
    yield

  monkeypatch.setattr(loop, 'open_dataset', lambda config: RecordingDataset())
  monkeypatch.setattr(loop.workdir_lock, 'hold', hold_after_another_run)
  config = make_config()
  config.seed = 7
  with pytest.raises(UsageError, match='belongs to another config or .*config.seed: 0 → 7'):
    loop.train_and_evaluate(config, workdir)


@pytest.fixture
def train_until(monkeypatch):
  """A function that trains on noise until the run asks for the n-th time whether to stop."""

  def run(workdir, config, num_calls):
    calls = itertools.count(1)
    monkeypatch.setattr(loop, 'open_dataset', lambda config: RecordingDataset())
    monkeypatch.setattr(signals.StopRequest, 'requested', lambda stop: next(calls) >= num_calls)
    with pytest.raises(SystemExit):
      loop.train_and_evaluate(config, workdir)

  return run


def test_a_stopped_run_goes_on_from_its_step_and_stops_again_before_the_next_phase(
  finished, train_until, tmp_path
):
  workdir = epath.Path(tmp_path)
  train_until(workdir, make_config(), 3)
  assert steps_kept(workdir, 'phase_1') == {2, 3}
  train_until(workdir, make_config(), LAST - 3)
  assert [path.name for path in (workdir / 'checkpoints').iterdir()] == ['phase_1']
  ended, expected = (state_of(folder, 'phase_1', LAST) for folder in (workdir, finished[0]))
  assert are_equal(ended, expected)
  lines = map(json.loads, (workdir / 'metrics.jsonl').read_text().splitlines())
  rates = {line['step']: line['train/learning_rate'] for line in lines if 'train/loss' in line}
  assert list(rates) == list(range(1, LAST + 1))
  # Divided by ten after a half and three quarters of the steps.
  np.testing.assert_allclose(list(rates.values()), [5e-2, 5e-2, 5e-2, 5e-3, 5e-4, 5e-4], rtol=1e-5)


@pytest.mark.parametrize(
  ('first', 'log_every_steps', 'message'),
  [
    (1, 100, 'phase_1: the loss is not finite at step 1: .* there is no checkpoint yet'),
    (3, 1, 'phase_1: the loss is not finite at step 3: .* the checkpoint of step 2 is kept'),
  ],
  ids=['at a stop', 'at a log'],
)
def test_no_state_that_is_not_finite_is_saved(
  first, log_every_steps, message, train_until, tmp_path, monkeypatch
):
  def draw(dataset, source, step):
    factor = jnp.where(step + 1 < first, 1, jnp.nan)
    return {**source, 'image': factor * source['image']}

  config = make_config()
  config.log_every_steps = log_every_steps
  monkeypatch.setattr(RecordingDataset, 'draw', draw)
  with pytest.raises(UsageError, match=message):
    train_until(epath.Path(tmp_path), config, first)
  assert steps_kept(tmp_path, 'phase_1') == set(range(2, first))


def test_each_phase_starts_from_the_last_state_of_the_one_before_where_the_config_says_so(run):
  config = make_config()
  third = config.phases[1].copy_and_resolve_references()
  third.learning_rate, third.weight_decay = 1e-30, 0.0  # It stays where it starts.
  config.phases = [*config.phases, third]
  for phase in config.phases:
    phase.chosen_state = 'last'
  workdir, _, _ = run(config)
  first, second, third = (state_of(workdir, f'phase_{number}', LAST) for number in (1, 2, 3))
  assert are_equal(backbone_of(second), backbone_of(first))
  assert_close = partial(np.testing.assert_allclose, rtol=0, atol=1e-20)
  jax.tree.map(assert_close, third['trained'], second['trained'])


def test_only_phase_one_starts_from_init_from(run, finished, capsys):
  config = make_config()
  config.init_from = str(finished[0])
  for phase in config.phases:
    phase.chosen_state = 'last'
  workdir, _, _ = run(config)
  output = capsys.readouterr().out
  assert f'phase_1 starts from {config.init_from}: loaded ' in output
  assert 'phase_2 starts from' not in output
  first, second = (state_of(workdir, f'phase_{number}', LAST) for number in (1, 2))
  assert are_equal(backbone_of(second), backbone_of(first))


def test_checkpoints_by_time_where_the_first_host_says_so_save_an_unfinished_epoch(
  finished, tmp_path, monkeypatch
):
  config, workdir, calls = make_config(), epath.Path(tmp_path), itertools.count(1)
  config.phases = config.phases[:1]
  config.checkpoint_every_minutes, config.checkpoint_every_epochs = 1e6, NUM_EPOCHS

  def crash_after_three_steps(stop):
    if next(calls) == 3:
      raise RuntimeError
    return False

  monkeypatch.setattr(loop, 'open_dataset', lambda config: RecordingDataset())
  monkeypatch.setattr(loop.multihost_utils, 'broadcast_one_to_all', lambda is_due: np.True_)
  monkeypatch.setattr(signals.StopRequest, 'requested', crash_after_three_steps)
  with pytest.raises(RuntimeError):
    loop.train_and_evaluate(config, workdir)
  assert steps_kept(workdir, 'phase_1') == {2, 3}
  loop.train_and_evaluate(config, workdir)
  ended, expected = (state_of(folder, 'phase_1', LAST) for folder in (workdir, finished[0]))
  assert are_equal(ended, expected)


@pytest.mark.parametrize(
  ('in_memory', 'steps_per_dispatch', 'expected'),
  [(True, None, None), (True, 3, 3), (False, None, 1), (False, 3, 3)],
)
def test_streams_are_dispatched_step_by_step_unless_the_config_says_otherwise(
  in_memory, steps_per_dispatch, expected, monkeypatch
):
  config = make_config()
  config.dataset.in_memory, config.steps_per_dispatch = in_memory, steps_per_dispatch
  monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
  assert loop._steps_per_dispatch(config) == expected


@pytest.mark.parametrize(
  ('rule', 'sweep'),
  [('top_probability', 'geometric'), ('calibrated', 'optimal'), ('margin', 'optimal')],
)
def test_operating_points_are_those_of_the_rule_and_the_sweep(rule, sweep, finished, tmp_path):
  workdir, random = epath.Path(tmp_path / 'copy'), np.random.default_rng(0)
  shutil.copytree(finished[0], workdir)
  labels = random.integers(0, 3, 200, dtype=np.int32)
  logits = random.normal(size=(2, 200, 3)) + 2 * np.eye(3)[labels] * [[[0.5]], [[1.0]]]
  validation = evaluate.Predictions(logits.astype(np.float32), labels)
  evaluate.save_scores(validation, layout.scores_path(workdir, 'phase_1'))
  classifier = AdaptiveClassifier.from_workdir(workdir, phase=0, rule=rule, sweep=sweep)
  splits = (validation.probabilities(), validation.labels) * 2
  how = {'rule': rule, 'temperatures': classifier.temperatures}
  madds = classifier.madds
  if sweep == 'geometric':
    points = budget_sweep(*splits, madds, BUDGET_PARAMETERS, **how)
  else:
    budgets = np.linspace(madds[0], madds[-1], len(BUDGET_PARAMETERS))
    points = optimal_sweep(*splits, madds, budgets, **how)
  assert classifier.rule == rule
  assert [p.thresholds for p in classifier.operating_points] == [p.thresholds for p in points]
  assert (classifier.temperatures != (1.0, 1.0)) == (rule == 'calibrated')
  scores = exit_scores(validation.probabilities(), **how)
  np.testing.assert_array_equal(classifier.validation.scores, scores)


def test_a_workdir_is_opened_with_the_confidence_that_is_asked_for(finished):
  workdir, _, _ = finished
  first, *_ = AdaptiveClassifier.from_workdir(workdir, max_loss=0.5).thresholds
  strict, *_ = AdaptiveClassifier.from_workdir(
    workdir, max_loss=0.5, confidence=1 - 1e-6
  ).thresholds
  assert first < strict == np.inf  # Few images promise little.


def test_a_run_in_another_thread_leaves_signals_alone(tmp_path, monkeypatch):
  def handlers():
    return [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

  def requested(stop):
    during.append(handlers())
    return False

  config, before, during = make_config(), handlers(), []
  config.phases = config.phases[:1]
  monkeypatch.setattr(loop, 'open_dataset', lambda config: RecordingDataset())
  monkeypatch.setattr(signals.StopRequest, 'requested', requested)
  with concurrent.futures.ThreadPoolExecutor(1) as executor:
    evaluations = executor.submit(loop.train_and_evaluate, config, tmp_path).result()
  assert [evaluation.name for evaluation in evaluations] == ['phase_1']
  assert during and all(found == before for found in [*during, handlers()])
