"""Streamed data sets: the order of the images, on one host and on two."""

import io
import itertools

import jax
import numpy as np
import pytest
from PIL import Image

from imta_jax import config as config_lib
from imta_jax.data.pipeline import open_dataset
from imta_jax.data.streamed import StreamedDataset
from imta_jax.errors import UsageError

NUM_TRAIN, NUM_VALIDATION, NUM_TEST = 43, 7, 17
BATCH_SIZE = 8
STEPS_PER_EPOCH = 5
LEVELS = np.array([32, 96, 160, 224])


def photo(number):
  """Returns a JPEG with a colour and a size that depend on the number, lighter to the right."""
  colour = LEVELS[np.array([number // 16, number // 4 % 4, number % 4])]
  height, width = 24 + number % 5, 24 + number % 7
  pixels = colour + np.linspace(-10, 10, width)[np.newaxis, :, np.newaxis]
  pixels = np.broadcast_to(pixels, (height, width, 3)).round().astype(np.uint8)
  content = io.BytesIO()
  Image.fromarray(pixels).save(content, 'JPEG', quality=95, subsampling=0)
  return content.getvalue()


@pytest.fixture(scope='session')
def photos(prepare_numbered, data_dir):
  """Prepares a data set of photos in several files; each photo has its own class."""
  feature = {'shape': (None, None, 3), 'encoding_format': 'jpeg'}
  counts = {'train': NUM_TRAIN + NUM_VALIDATION, 'test': NUM_TEST}
  prepare_numbered(
    'photos', data_dir, feature, counts, lambda number: io.BytesIO(photo(number)), num_files=3
  )
  return 'photos'


@pytest.fixture
def config(photos, data_dir):
  config = config_lib.default()
  config.update(batch_size=BATCH_SIZE, evaluation_batch_size=BATCH_SIZE)
  config.dataset.update(
    name=photos,
    data_dir=data_dir,
    validation_size=NUM_VALIDATION,
    image_size=12,
    mean=(0.1, 0.2, 0.3),
    std=(0.4, 0.5, 0.6),
    in_memory=False,
  )
  return config


@pytest.fixture
def take(flat, train_batches):
  def batches(dataset, first_step, count, phase=0):
    stream = itertools.islice(train_batches(dataset, first_step, phase), count)
    return [flat(batch) for batch in stream]

  return batches


def numbers_of(images):
  """Returns the numbers of the photos, recognised by their colours."""
  pixels = 255 * (images * np.array([0.4, 0.5, 0.6]) + np.array([0.1, 0.2, 0.3]))
  colours = pixels.mean(axis=(1, 2))
  levels = np.abs(colours[..., np.newaxis] - LEVELS).argmin(-1)
  return (levels @ [16, 4, 1]).tolist()


def assert_same(one, other):
  assert one.keys() == other.keys()
  for name in one:
    np.testing.assert_array_equal(one[name], other[name])


def test_large_images_are_streamed(config):
  dataset = open_dataset(config)
  assert isinstance(dataset, StreamedDataset)
  assert dataset.num_images == {
    'train': NUM_TRAIN,
    'validation': NUM_VALIDATION,
    'test': NUM_TEST,
  }
  assert dataset.steps_per_epoch == STEPS_PER_EPOCH
  assert dataset.image_shape == (12, 12, 3)
  assert len(dataset.class_names) == 64


def test_batches_depend_on_seed_and_step_alone(config, take):
  run = take(open_dataset(config), 0, 2 * STEPS_PER_EPOCH + 1)
  dataset = open_dataset(config)
  for first_step in (2, STEPS_PER_EPOCH - 1, STEPS_PER_EPOCH, 2 * STEPS_PER_EPOCH - 1):
    for offset, batch in enumerate(take(dataset, first_step, 2)):
      assert_same(batch, run[first_step + offset])
  config.seed = 1
  (other,) = take(open_dataset(config), 0, 1)
  assert np.any(other['label'] != run[0]['label'])


def test_stacks_of_steps_hold_the_same_batches(config, take):
  one_by_one = take(open_dataset(config), 1, 2 * STEPS_PER_EPOCH)
  config.steps_per_dispatch = 3
  stacked = take(open_dataset(config), 1, 2 * STEPS_PER_EPOCH)  # Resumed inside of a stack.
  for batch, expected in zip(stacked, one_by_one, strict=True):
    assert_same(batch, expected)
  stack = open_dataset(config).train_reader(0, 1)(1)
  assert stack['label'].shape[1] == 3  # What a dispatch of several steps reads at once.


def test_each_phase_shuffles_anew(config, take):
  ((first,), (second,)) = (take(open_dataset(config), 0, 1, phase) for phase in (0, 1))
  assert first['label'].tolist() != second['label'].tolist()


def test_an_epoch_visits_an_image_once_and_the_next_in_another_order(config, take):
  batches = take(open_dataset(config), 0, 2 * STEPS_PER_EPOCH)
  epochs = []
  for first in (0, STEPS_PER_EPOCH):
    epoch = batches[first : first + STEPS_PER_EPOCH]
    labels = np.concatenate([batch['label'] for batch in epoch])
    assert numbers_of(np.concatenate([batch['image'] for batch in epoch])) == labels.tolist()
    assert len(set(labels.tolist())) == STEPS_PER_EPOCH * BATCH_SIZE
    epochs.append(labels.tolist())
  assert epochs[0] != epochs[1]
  assert epochs[0] != sorted(epochs[0])


def test_images_are_cropped_anew_in_each_epoch(config, take):
  config.batch_size = NUM_TRAIN - NUM_TRAIN % 8
  one, other = take(open_dataset(config), 0, 2)
  of_label = dict(zip(one['label'].tolist(), one['image'], strict=True))
  pairs = [
    (image, of_label[label])
    for image, label in zip(other['image'], other['label'].tolist(), strict=True)
    if label in of_label
  ]
  assert len(pairs) > 30
  assert np.mean([np.array_equal(*pair) for pair in pairs]) < 0.1


def test_batches_are_floats_and_integers_a_device(config, train_batches):
  dataset, devices = open_dataset(config), jax.local_device_count()
  train = next(train_batches(dataset, 0))
  test = next(dataset.evaluation_batches('test'))
  assert set(train) == {'image', 'label'}
  assert set(test) == {'image', 'label', 'mask'}
  for batch in (train, test):
    assert batch['image'].shape == (devices, BATCH_SIZE // devices, 12, 12, 3)
    assert batch['label'].shape == (devices, BATCH_SIZE // devices)
    assert (batch['image'].dtype, batch['label'].dtype) == (np.float32, np.int32)
  assert test['mask'].dtype == np.bool_


@pytest.mark.parametrize('batch_size', [8, 16, 24])
def test_evaluation_visits_every_image_once(batch_size, config, collect):
  config.evaluation_batch_size = batch_size
  dataset = open_dataset(config)
  for split, expected in (
    ('validation', NUM_VALIDATION),
    ('test', NUM_TEST),
  ):
    images, labels = collect(dataset.evaluation_batches(split))
    assert len(labels) == len(set(labels.tolist())) == expected
    assert numbers_of(images) == labels.tolist()
  assert sorted(labels) == list(range(NUM_TEST))


def test_training_and_validation_images_are_apart(config, collect, take):
  config.batch_size = 40
  dataset = open_dataset(config)
  train = {label for batch in take(dataset, 0, 4) for label in batch['label'].tolist()}
  validation = set(collect(dataset.evaluation_batches('validation'))[1].tolist())
  assert not train & validation
  assert train | validation <= set(range(NUM_TRAIN + NUM_VALIDATION))
  assert len(validation) == NUM_VALIDATION


def test_validation_is_augmented_where_asked_and_test_never(config, collect):
  plain = open_dataset(config.copy_and_resolve_references())
  config.dataset.augment_validation = True
  augmented = open_dataset(config)
  for split in ('validation', 'test'):
    images, labels = collect(plain.evaluation_batches(split))
    changed, same_labels = collect(augmented.evaluation_batches(split))
    np.testing.assert_array_equal(labels, same_labels)
    differ = np.any(images != changed, axis=(1, 2, 3))
    assert differ.all() if split == 'validation' else not differ.any()
    np.testing.assert_array_equal(changed, collect(augmented.evaluation_batches(split))[0])


def test_two_hosts_share_an_epoch(config, as_host, take):
  config.batch_size = 16
  hosts = []
  for index in range(2):
    as_host(index, 2)
    dataset = open_dataset(config)
    assert dataset.steps_per_epoch == 2  # The smaller part has 21 images, 8 a batch.
    batches = take(dataset, 0, 4)
    assert [len(batch['label']) for batch in batches] == [8] * 4
    assert_same(take(dataset, 3, 1)[0], batches[3])
    hosts.append([batch['label'].tolist() for batch in batches])
  for epoch in (slice(0, 2), slice(2, 4)):
    seen = [label for host in hosts for batch in host[epoch] for label in batch]
    assert len(seen) == len(set(seen)) == 32


@pytest.mark.parametrize('split', ['validation', 'test'])
def test_two_hosts_share_an_evaluation(split, config, as_host, collect):
  config.evaluation_batch_size = 16
  counts, labels = [], []
  for index in range(2):
    as_host(index, 2)
    batches = list(open_dataset(config).evaluation_batches(split))
    counts.append(len(batches))
    labels.append(collect(batches)[1].tolist())
  assert counts[0] == counts[1] == (2 if split == 'test' else 1)
  assert not set(labels[0]) & set(labels[1])
  expected = NUM_TEST if split == 'test' else NUM_VALIDATION
  assert len(set(labels[0] + labels[1])) == len(labels[0] + labels[1]) == expected


def test_two_hosts_crop_and_flip_apart(config, as_host, monkeypatch, train_batches):
  """Images on different hosts are augmented with different random numbers."""
  from imta_jax.data import preprocess

  seeds = []

  def note(encoded, size, flip, seed):
    del flip
    import tensorflow as tf

    tf.py_function(lambda seed: seeds.append(tuple(seed.numpy())), [seed], [])
    return preprocess.decode_center_crop(encoded, size)

  config.batch_size = 16
  monkeypatch.setattr(preprocess, 'decode_random_crop', note)
  of_host = []
  for index in range(2):
    as_host(index, 2)
    seeds.clear()
    next(train_batches(open_dataset(config), 0))
    of_host.append(set(seeds))
  assert of_host[0]
  assert not of_host[0] & of_host[1]


def test_colours_need_three_means(config):
  config.dataset.mean = (0.5,)
  with pytest.raises(UsageError, match='3 numbers'):
    open_dataset(config)
