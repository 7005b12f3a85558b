"""The training protocol, on a data set that records which splits are read.

Validation accuracies during training are made up, so that the state of a phase with the best mean
accuracy over exits is neither its last state nor the best state of its last exit.
"""

import contextlib
import itertools
import shutil

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath

from imta_jax import config as config_lib
from imta_jax import evaluate
from imta_jax.data.dataset import Dataset
from imta_jax.errors import UsageError
from imta_jax.training import loop, networks
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
    return lambda step: self._batch('train', step)

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
  config.log_every_steps = 1
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
  return run(make_config())


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


def test_phase_two_starts_from_the_last_state_where_the_config_says_so(run):
  config = make_config()
  config.phases[0].chosen_state = 'last'
  workdir, _, _ = run(config)
  last = backbone_of(state_of(workdir, 'phase_1', LAST))
  assert are_equal(backbone_of(state_of(workdir, 'phase_2', LAST)), last)


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
    model = networks.create_model(config, config.phases[index], num_classes=3)
    predictions = evaluate.load_predictions(layout.predictions_path(workdir, name, 'test'))
    assert set(predictions.labels) == {LABELS['test']}
    expected = jax.jit(model.apply)(variables, images)
    np.testing.assert_allclose(predictions.logits, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(evaluation.accuracies['test', 1], predictions.accuracy())


@pytest.mark.parametrize(('in_memory', 'crop'), [(True, 'none'), (False, 'center')])
def test_image_files_are_cropped_as_the_data_set_was(in_memory, crop, finished, tmp_path):
  workdir, _, _ = finished
  copy = epath.Path(tmp_path / 'copy')
  shutil.copytree(workdir, copy)
  config = layout.load_config(copy)
  config.dataset.in_memory = in_memory
  (copy / 'config.json').write_text(config_lib.to_json(config))
  classifier = networks.load_classifier(copy)
  assert classifier.preprocessing == {'crop': crop}
  assert classifier.class_names == ('a', 'b', 'c')


def test_a_run_on_other_data_is_refused_and_keeps_its_evaluation(finished, tmp_path, monkeypatch):
  workdir = epath.Path(tmp_path / 'copy')
  shutil.copytree(finished[0], workdir)
  before = (workdir / 'evaluation/exits.csv').read_bytes()
  monkeypatch.setattr(RecordingDataset, 'class_names', ('a', 'b', 'wolf'))
  monkeypatch.setattr(loop, 'open_dataset', lambda config: RecordingDataset())
  with pytest.raises(UsageError, match=r"other data \(classes\[2\]: 'c' → 'wolf'\): choose"):
    loop.train_and_evaluate(make_config(), workdir)
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
