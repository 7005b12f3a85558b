"""Data sets in memory: the order of the images, and their preprocessing."""

import copy
import itertools

import jax
import numpy as np
import pytest

from imta_jax.data.in_memory import InMemoryDataset
from imta_jax.data.pipeline import open_dataset
from imta_jax.errors import UsageError

STEPS_PER_EPOCH = 6


@pytest.fixture
def numbers_of(mnist5k_splits, mnist5k_config):
  """A function that returns the indices of normalized images in their split."""
  dataset = mnist5k_config.dataset
  tables = {
    split: {image.tobytes(): number for number, image in enumerate(images)}
    for split, (images, _) in mnist5k_splits.items()
  }

  def numbers(images, split):
    pixels = 255 * (images * dataset.std[0] + dataset.mean[0])
    np.testing.assert_allclose(pixels, pixels.round(), atol=1e-2)
    return [tables[split][image.tobytes()] for image in pixels.round().astype(np.uint8)]

  return numbers


@pytest.fixture
def take(flat, train_batches):
  """A function that returns training batches, starting at a given step."""

  def batches(dataset, first_step, count, phase=0):
    stream = itertools.islice(train_batches(dataset, first_step, phase), count)
    return [flat(batch) for batch in stream]

  return batches


def assert_same(one, other):
  assert one.keys() == other.keys()
  for name in one:
    np.testing.assert_array_equal(one[name], other[name])


def test_small_images_are_kept_in_memory(mnist5k_config):
  dataset = open_dataset(mnist5k_config)
  assert isinstance(dataset, InMemoryDataset)
  assert dataset.num_images == {'train': 100, 'validation': 3_900, 'test': 1_000}
  assert dataset.steps_per_epoch == STEPS_PER_EPOCH
  assert dataset.image_shape == (28, 28, 1)
  assert list(dataset.class_names) == list('0123456789')


def test_batches_depend_on_seed_phase_and_step_alone(mnist5k_config, take):
  mnist5k_config.dataset.update(padding=2, flip=True)
  dataset = open_dataset(mnist5k_config)
  run = take(dataset, 0, STEPS_PER_EPOCH + 1)
  for first_step in (3, STEPS_PER_EPOCH):
    (batch,) = take(dataset, first_step, 1)
    assert_same(batch, run[first_step])
  (phase_two,) = take(dataset, 0, 1, phase=1)
  mnist5k_config.seed = 1
  (other_seed,) = take(open_dataset(mnist5k_config), 0, 1)
  orders = {tuple(batch['label'].tolist()) for batch in (run[0], phase_two, other_seed)}
  assert len(orders) == 3


def test_images_are_drawn_by_the_keys_of_epoch_step_and_place(mnist5k_config, mnist5k_splits, take):
  """Resumed runs of any version draw the same batches."""
  mnist5k_config.dataset.update(padding=2, flip=True)
  step, place, size = STEPS_PER_EPOCH + 3, 5, 16
  (batch,) = take(open_dataset(mnist5k_config), step, 1)
  key = jax.random.fold_in(jax.random.key(mnist5k_config.seed), 1)  # Epoch 1, step 3.
  order_key, augment_key = jax.random.split(key)
  index = jax.random.permutation(order_key, 100)[3 * size + place]
  image_key = jax.random.fold_in(jax.random.fold_in(augment_key, 3), place)
  crop_key, flip_key = jax.random.split(image_key)
  top, left = jax.random.randint(crop_key, (2,), 0, 5)
  images, labels = mnist5k_splits['train']
  image = np.pad(images[index], ((2, 2), (2, 2), (0, 0)))[top : top + 28, left : left + 28]
  image = image[:, ::-1] if jax.random.bernoulli(flip_key) else image
  dataset = mnist5k_config.dataset
  expected = (image / 255 - dataset.mean[0]) / dataset.std[0]
  np.testing.assert_allclose(batch['image'][place], expected, rtol=1e-4, atol=1e-5)
  assert batch['label'][place] == labels[index]


def test_an_epoch_visits_an_image_once_and_the_next_in_another_order(
  mnist5k_config, mnist5k_splits, numbers_of, take
):
  batches = take(open_dataset(mnist5k_config), 0, 2 * STEPS_PER_EPOCH)
  epochs = []
  for first in (0, STEPS_PER_EPOCH):
    epoch = batches[first : first + STEPS_PER_EPOCH]
    numbers = numbers_of(np.concatenate([batch['image'] for batch in epoch]), 'train')
    labels = np.concatenate([batch['label'] for batch in epoch])
    assert len(set(numbers)) == STEPS_PER_EPOCH * 16
    assert max(numbers) < 100
    np.testing.assert_array_equal(labels, mnist5k_splits['train'][1][numbers])
    epochs.append(numbers)
  one, other = epochs
  assert one != other
  assert np.mean(np.equal(one, other)) < 0.2
  assert one != sorted(one)


@pytest.mark.parametrize('batch_size', [304, 1_504])
def test_evaluation_visits_every_image_once(
  batch_size, mnist5k_config, mnist5k_splits, numbers_of, collect
):
  mnist5k_config.evaluation_batch_size = batch_size
  mnist5k_config.dataset.validation_size = 300
  dataset = open_dataset(mnist5k_config)
  for split, stored, expected in (
    ('validation', 'train', range(3_700, 4_000)),
    ('test', 'test', range(1_000)),
  ):
    images, labels = collect(dataset.evaluation_batches(split))
    numbers = numbers_of(images, stored)
    assert sorted(numbers) == list(expected)
    np.testing.assert_array_equal(labels, mnist5k_splits[stored][1][numbers])


def test_batches_have_one_shape_and_type(mnist5k_config, train_batches):
  mnist5k_config.evaluation_batch_size = 304
  dataset, devices = open_dataset(mnist5k_config), jax.local_device_count()
  train = next(train_batches(dataset, 0))
  assert train['image'].shape == (devices, 16 // devices, 28, 28, 1)
  assert (train['image'].dtype, train['label'].dtype) == (np.float32, np.int32)
  batches = list(dataset.evaluation_batches('test'))
  assert [int(batch['mask'].sum()) for batch in batches] == [304, 304, 304, 88]
  for batch in batches:
    assert batch['image'].shape == (devices, 304 // devices, 28, 28, 1)
    assert batch['label'].shape == batch['mask'].shape == (devices, 304 // devices)


def test_validation_is_augmented_where_asked_and_test_never(mnist5k_config, collect):
  mnist5k_config.dataset.update(validation_size=200, padding=2)
  plain = open_dataset(copy.deepcopy(mnist5k_config))
  mnist5k_config.dataset.augment_validation = True
  augmented = open_dataset(mnist5k_config)

  images, labels = collect(plain.evaluation_batches('validation'))
  changed, same_labels = collect(augmented.evaluation_batches('validation'))
  assert np.mean(np.any(images != changed, axis=(1, 2, 3))) > 0.9
  np.testing.assert_array_equal(labels, same_labels)
  again, _ = collect(augmented.evaluation_batches('validation'))
  np.testing.assert_array_equal(changed, again)

  for one, other in zip(
    collect(plain.evaluation_batches('test')),
    collect(augmented.evaluation_batches('test')),
    strict=True,
  ):
    np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
  ('field', 'value', 'words'),
  [
    ('image_size', 32, ['image_size is 32', '(28, 28, 1)', 'in_memory']),
    ('mean', (0.1, 0.2, 0.3), ['mean and std', '1 channels', 'mnist5k']),
    ('std', (0.1, 0.2, 0.3), ['mean and std', '1 channels', 'mnist5k']),
  ],
)
def test_what_does_not_fit_the_images_is_refused(field, value, words, mnist5k_config):
  mnist5k_config.dataset[field] = value
  with pytest.raises(UsageError) as caught:
    open_dataset(mnist5k_config)
  for word in words:
    assert word in str(caught.value)
