"""Small data sets for tests, prepared once."""

import itertools

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils

from imta_jax import config as config_lib
from imta_jax import runtime
from imta_jax.data.pipeline import open_dataset


@pytest.fixture(scope='session')
def data_dir(tmp_path_factory):
  return str(tmp_path_factory.mktemp('tfds'))


def make_mnist5k_config(data_dir):
  """Returns a config with 100 training images, in 6 batches of 16, and no augmentation."""
  config = config_lib.default()
  config.update(batch_size=16, evaluation_batch_size=200)
  config.dataset.update(
    name='mnist5k',
    data_dir=data_dir,
    validation_size=3_900,
    image_size=28,
    mean=(0.131,),
    std=(0.308,),
    padding=0,
    flip=False,
  )
  return config


@pytest.fixture(scope='session')
def mnist5k_builder(tfds, data_dir):
  """The builder, prepared by opening the data set as in a first run."""
  open_dataset(make_mnist5k_config(data_dir))
  builder = tfds.builder('mnist5k', data_dir=data_dir)
  assert builder.info.splits
  return builder


@pytest.fixture(scope='session')
def mnist5k_splits(tfds, mnist5k_builder):
  """{split: (images, labels)}, as stored."""
  return {
    split: (arrays['image'], arrays['label'])
    for split, arrays in tfds.as_numpy(mnist5k_builder.as_dataset(batch_size=-1)).items()
  }


@pytest.fixture
def mnist5k_config(mnist5k_builder, data_dir):
  del mnist5k_builder
  return make_mnist5k_config(data_dir)


def flatten(batch):
  """Returns a batch on the host, without the axis over devices."""
  return {name: np.concatenate(np.asarray(array)) for name, array in batch.items()}


@pytest.fixture(scope='session')
def flat():
  return flatten


@pytest.fixture
def as_host(monkeypatch):
  """A function that makes this process one of several hosts, all others of which agree with it."""

  def become(index, count):
    monkeypatch.setattr(jax, 'process_count', lambda: count)
    monkeypatch.setattr(jax, 'process_index', lambda: index)
    monkeypatch.setattr(multihost_utils, 'sync_global_devices', lambda name: None)
    monkeypatch.setattr(
      multihost_utils, 'process_allgather', lambda value: np.array([value] * count)
    )

  return become


@pytest.fixture(scope='session')
def collect():
  """A function that returns the images and labels of evaluation batches, without padding."""

  def images_and_labels(batches):
    batches = [flatten(batch) for batch in batches]
    return tuple(
      np.concatenate([batch[name][batch['mask']] for batch in batches])
      for name in ('image', 'label')
    )

  return images_and_labels


@pytest.fixture(scope='session')
def train_batches():
  """A function that yields a data set's training batches, drawn as in a training step."""

  def batches(dataset, first_step, phase=0):
    axes = (dataset.source_axes, None)
    draw = jax.pmap(dataset.draw, axis_name=runtime.AXIS, in_axes=axes)
    read = dataset.train_reader(phase, first_step)
    for step in itertools.count(first_step):
      yield draw(read(step), np.int32(step))

  return batches
