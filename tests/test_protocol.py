"""The protocol of training, on a data set that keeps a record of what is read of it.

Training labels are all of one class and validation labels of another, so the validation accuracy
never rises: the best state of a phase is that of its first epoch.
"""

import itertools

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath

from imta_jax import config as config_lib
from imta_jax import evaluate, train
from imta_jax import workdir as layout
from imta_jax.data.dataset import Dataset

NUM_EPOCHS, STEPS_PER_EPOCH = 3, 2
FIRST, LAST = STEPS_PER_EPOCH, NUM_EPOCHS * STEPS_PER_EPOCH
LABELS = {'train': 0, 'validation': 1, 'test': 2}


class RecordingDataset(Dataset):
  """Noise; `reads` lists what was read: (split, first step or None)."""

  class_names = ('a', 'b', 'c')
  image_shape = (8, 8, 1)
  num_images = dict.fromkeys(LABELS, 16)
  steps_per_epoch = STEPS_PER_EPOCH

  def __init__(self):
    self.reads = []

  def train_batches(self, first_step):
    self.reads.append(('train', first_step))
    return (self._batch('train', step) for step in itertools.count(first_step))

  def evaluation_batches(self, split):
    self.reads.append((split, None))
    batch = self._batch(split, 0)
    yield {**batch, 'mask': np.ones(batch['label'].shape, bool)}

  def _batch(self, split, number):
    random = np.random.default_rng([LABELS[split], number])
    lead = (jax.local_device_count(), 16 // jax.local_device_count())
    return {
      'image': random.normal(size=(*lead, *self.image_shape)).astype(np.float32),
      'label': np.full(lead, LABELS[split], np.int32),
    }


def make_config():
  config = config_lib.default()
  config.batch_size = 16
  config.log_every_steps = 1
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


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """A function that trains with a config; gives the workdir, the reads and the evaluations."""

  def train_with(config):
    workdir, dataset = epath.Path(tmp_path_factory.mktemp('run')), RecordingDataset()
    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(train, 'open_dataset', lambda config: dataset)
      return workdir, dataset.reads, train.train_and_evaluate(config, workdir)

  return train_with


@pytest.fixture(scope='module')
def finished(run):
  return run(make_config())


def state_of(workdir, phase, step):
  return ocp.StandardCheckpointer().restore(workdir / 'checkpoints' / phase / str(step) / 'state')


def steps_kept(workdir, phase):
  return {int(path.name) for path in (workdir / 'checkpoints' / phase).iterdir()}


def backbone_of(state):
  """All but the classifiers, of parameters and batch statistics."""
  params = {**(state['frozen'] or {}), **state['trained']}
  return {
    name: {part: tree for part, tree in trees.items() if not part.startswith('classifiers_')}
    for name, trees in (('params', params), ('batch_stats', state['batch_stats']))
  }


def are_equal(tree, other):
  return jax.tree.all(jax.tree.map(np.array_equal, tree, other))


def test_the_test_images_are_read_once_per_network_and_last(finished):
  _, reads, _ = finished
  of_a_phase = [('train', 0)] + [('validation', None)] * NUM_EPOCHS
  assert reads == of_a_phase * 2 + [('validation', None), ('test', None)] * 2


def test_phase_two_starts_from_and_keeps_the_best_backbone_of_phase_one(finished):
  workdir, _, _ = finished
  assert FIRST in steps_kept(workdir, 'phase_1')
  best, last = (backbone_of(state_of(workdir, 'phase_1', step)) for step in (FIRST, LAST))
  assert not are_equal(best, last)
  for step in steps_kept(workdir, 'phase_2'):
    assert are_equal(backbone_of(state_of(workdir, 'phase_2', step)), best)


def test_phase_two_starts_from_the_last_state_where_the_config_says_so(run):
  config = make_config()
  config.phases[0].chosen_state = 'last'
  workdir, _, _ = run(config)
  last = backbone_of(state_of(workdir, 'phase_1', LAST))
  assert are_equal(backbone_of(state_of(workdir, 'phase_2', LAST)), last)


def test_what_is_evaluated_is_the_chosen_state_of_each_phase(finished):
  workdir, _, evaluations = finished
  for evaluation, name in zip(evaluations, ('phase_1', 'phase_2'), strict=True):
    predictions = {
      split: evaluate.load_predictions(layout.predictions_path(workdir, name, split))
      for split in evaluate.SPLITS
    }
    for split, label in (('validation', 1), ('test', 2)):
      assert set(predictions[split].labels) == {label}
    # The best validation accuracy of the phase, averaged over exits.
    record = workdir / 'checkpoints' / name / str(FIRST) / 'record' / 'metadata'
    assert f'"validation_accuracy": {predictions["validation"].accuracy().mean()}' in (
      record.read_text()
    )
    np.testing.assert_array_equal(evaluation.accuracies['test', 1], predictions['test'].accuracy())
