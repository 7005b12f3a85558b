"""Data sets of TFDS that are streamed: their batches, on one host and on several, and errors."""

import io
import itertools
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from imta_jax import config as config_lib
from imta_jax.data import preprocess, tfds_sets
from imta_jax.data.pipeline import open_dataset
from imta_jax.data.streamed import StreamedDataset
from imta_jax.errors import UsageError

NUM_TRAIN, NUM_VALIDATION, NUM_TEST, NUM_FILES = 43, 7, 17, 4
BATCH_SIZE, STEPS_PER_EPOCH = 8, 5
SIDE = 12


@pytest.fixture(scope='module')
def intact(prepare_numbered, tmp_path_factory):
  """A prepared data set of several files; the label and the grey level of an image say which."""
  folder = tmp_path_factory.mktemp('numbered')
  feature = {'shape': (SIDE, SIDE, 3), 'encoding_format': 'png'}
  counts = {'train': NUM_TRAIN + NUM_VALIDATION, 'test': NUM_TEST}

  def draw(number):
    return np.full((SIDE, SIDE, 3), 4 * number, np.uint8)

  prepare_numbered('numbered', folder, feature, counts, draw, NUM_FILES)
  return folder


@pytest.fixture
def config(intact):
  config = config_lib.default()
  config.update(batch_size=BATCH_SIZE, evaluation_batch_size=BATCH_SIZE)
  config.dataset.update(
    name='numbered',
    data_dir=str(intact),
    validation_size=NUM_VALIDATION,
    image_size=SIDE,
    mean=(0.1, 0.2, 0.3),
    std=(0.4, 0.5, 0.6),
    in_memory=False,
  )
  return config


@pytest.fixture
def copied(config, tmp_path):
  """Config of a copy of the data set that a test may corrupt."""
  config.dataset.data_dir = str(shutil.copytree(config.dataset.data_dir, tmp_path / 'data'))
  return config


@pytest.fixture
def take(flat, train_batches):
  def batches(dataset, first_step, count, phase=0):
    stream = itertools.islice(train_batches(dataset, first_step, phase), count)
    return [flat(batch) for batch in stream]

  return batches


def numbers_of(images):
  """Returns the numbers of normalized images, recognized by their grey levels."""
  pixels = 255 * (images * np.array([0.4, 0.5, 0.6]) + np.array([0.1, 0.2, 0.3]))
  np.testing.assert_allclose(pixels, np.broadcast_to(pixels[:, :1, :1, :1], pixels.shape), atol=0.1)
  return (pixels[:, 0, 0, 0].round() // 4).astype(int).tolist()


def reader_of(config):
  return tfds_sets.TfdsReader(*tfds_sets.open_builder(config.dataset), config)


def read(config, first_step, count, phase=0):
  """Returns this host's training batches, whose images must be those of the labels."""
  batches = list(itertools.islice(reader_of(config).train_batches(phase, first_step), count))
  for batch in batches:
    assert (batch['image'] == 4 * batch['label'][..., None, None, None]).all()
  return batches


def labels_of(batches):
  return [label for batch in batches for label in batch['label'][batch['mask']].tolist()]


def assert_same(one, other):
  jax.tree.map(np.testing.assert_array_equal, one, other)


def test_large_images_are_streamed_as_floats_and_integers_a_device(config, train_batches):
  dataset, devices = open_dataset(config), jax.local_device_count()
  assert isinstance(dataset, StreamedDataset)
  assert dataset.num_images == {'train': 43, 'validation': 7, 'test': 17}
  assert dataset.steps_per_epoch == STEPS_PER_EPOCH
  assert dataset.image_shape == (SIDE, SIDE, 3)
  assert len(dataset.class_names) == 64
  train = next(train_batches(dataset, 0))
  test, *others = dataset.evaluation_batches('test')
  assert sum(batch['mask'].sum() for batch in (test, *others)) == NUM_TEST
  assert set(train) == {'image', 'label'} and set(test) == {'image', 'label', 'mask'}
  for batch in (train, test):
    assert batch['image'].shape == (devices, BATCH_SIZE // devices, SIDE, SIDE, 3)
    assert batch['label'].shape == (devices, BATCH_SIZE // devices)
    assert (batch['image'].dtype, batch['label'].dtype) == (np.float32, np.int32)


def test_batches_depend_on_seed_phase_and_step_alone(config):
  run = read(config, 0, 2 * STEPS_PER_EPOCH + 1)
  for first_step in (2, STEPS_PER_EPOCH - 1, STEPS_PER_EPOCH):
    assert_same(read(config, first_step, 2), run[first_step : first_step + 2])
  orders = [labels_of(run[:1]), labels_of(run[STEPS_PER_EPOCH:][:1]), list(range(BATCH_SIZE))]
  orders.append(labels_of(read(config, 0, 1, phase=1)))
  config.seed = 1
  orders.append(labels_of(read(config, 0, 1)))
  assert len(set(map(tuple, orders))) == 5


def test_batches_do_not_depend_on_the_number_of_workers(config, monkeypatch):
  import tensorflow as tf

  runs = []
  for num_workers in (1, 7):
    monkeypatch.setattr(tf.data, 'AUTOTUNE', num_workers)
    runs.append(read(config, 3, STEPS_PER_EPOCH))
  assert_same(*runs)


@pytest.mark.parametrize(
  ('buffer', 'expected'), [(2 * BATCH_SIZE, [0, 0, 0, 1, 1, 1]), (100, [1, 1, 1, 1, 1, 2])]
)
def test_an_epoch_is_opened_when_the_buffer_of_the_one_before_is_no_longer_refilled(
  config, monkeypatch, buffer, expected
):
  opened = []

  class Pool(ThreadPoolExecutor):
    def submit(self, function, epoch):
      opened.append(epoch)
      return super().submit(function, epoch)

  monkeypatch.setattr(tfds_sets, 'ThreadPoolExecutor', Pool)
  monkeypatch.setattr(tfds_sets, '_SHUFFLE_BUFFER', buffer)
  batches = reader_of(config).train_batches(0, 0)
  assert [len(opened) for _ in itertools.islice(batches, STEPS_PER_EPOCH + 1)] == expected


def test_stacks_of_steps_hold_the_same_batches(config, take):
  one_by_one = take(open_dataset(config), 1, 2 * STEPS_PER_EPOCH)
  config.steps_per_dispatch = 3
  stacked = take(open_dataset(config), 1, 2 * STEPS_PER_EPOCH)  # Resumed inside of a stack.
  for batch, expected in zip(stacked, one_by_one, strict=True):
    assert_same(batch, expected)
  stack = open_dataset(config).train_reader(0, 1)(1)
  assert stack['label'].shape[1] == 3  # What a dispatch of several steps reads at once.


@pytest.mark.parametrize('count', [1, 2])
def test_over_all_hosts_an_epoch_has_every_image_once_also_after_resuming(config, as_host, count):
  epochs = [[], []]
  for index in range(count):
    as_host(index, count)
    run = read(config, 0, 2 * STEPS_PER_EPOCH)
    assert {batch['label'].size for batch in run} == {BATCH_SIZE // count}
    assert_same(read(config, 3, 2), run[3:5])
    for number, epoch in enumerate(epochs):
      epoch += labels_of(run[number * STEPS_PER_EPOCH :][:STEPS_PER_EPOCH])
  for epoch in epochs:
    assert len(epoch) == len(set(epoch)) == STEPS_PER_EPOCH * BATCH_SIZE
  assert epochs[0] != epochs[1]


@pytest.mark.parametrize('count', [1, 2])
def test_over_all_hosts_an_evaluation_has_every_image_once(config, as_host, count):
  seen = set()
  for split, size in (('validation', NUM_VALIDATION), ('test', NUM_TEST)):
    found, num_batches = [], set()
    for index in range(count):
      as_host(index, count)
      batches = list(reader_of(config).evaluation_batches(split))
      num_batches.add(len(batches))
      found += labels_of(batches)
    assert len(num_batches) == 1
    assert len(found) == len(set(found)) == size
    seen |= {(split == 'test', label) for label in found}
  assert len(seen) == NUM_VALIDATION + NUM_TEST


def test_training_and_validation_images_are_apart(config):
  config.batch_size = 40
  train = set(labels_of(read(config, 0, 4)))
  validation = set(labels_of(reader_of(config).evaluation_batches('validation')))
  assert not train & validation and len(validation) == NUM_VALIDATION
  assert train | validation <= set(range(NUM_TRAIN + NUM_VALIDATION))


@pytest.mark.parametrize('count', [1, 2])
def test_no_two_hosts_share_the_seed_of_a_crop(config, as_host, monkeypatch, count):
  import tensorflow as tf

  def show_seed(encoded, size, min_area, flip, seed):
    del encoded, min_area, flip
    return tf.cast(tf.fill((size, size, 3), seed[1] + 3 * (seed[0] % 40)), tf.uint8)

  monkeypatch.setattr(preprocess, 'decode_random_crop', show_seed)
  seeds = []
  for index in range(count):
    as_host(index, count)
    for batch in itertools.islice(reader_of(config).train_batches(0, 0), STEPS_PER_EPOCH):
      seeds += batch['image'][0, :, 0, 0, 0].tolist()
  assert len(seeds) == len(set(seeds)) == STEPS_PER_EPOCH * BATCH_SIZE


def test_validation_is_augmented_where_asked_and_test_never(config, collect, monkeypatch):
  import tensorflow as tf

  def black(encoded, size, min_area, flip, seed):
    del encoded, min_area, flip, seed
    return tf.zeros((size, size, 3), tf.uint8)

  monkeypatch.setattr(preprocess, 'decode_random_crop', black)
  for augments in (False, True):
    config.dataset.augment_validation = augments
    dataset = open_dataset(config)
    for split in ('validation', 'test'):
      images, labels = collect(dataset.evaluation_batches(split))
      is_black = np.array(numbers_of(images)) == 0
      np.testing.assert_array_equal(is_black, (labels == 0) | (augments and split == 'validation'))


def test_colours_need_three_means(config):
  config.dataset.mean = (0.5,)
  with pytest.raises(UsageError, match='3 numbers'):
    open_dataset(config)


def files_of(config, split='train'):
  folder = Path(config.dataset.data_dir) / 'numbered/1.0.0'
  return sorted(folder.glob(f'numbered-{split}.tfrecord-*'))


def flip(path, position):
  content = bytearray(path.read_bytes())
  content[position] ^= 1
  path.write_bytes(bytes(content))


CORRUPTIONS = {
  'cut': lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
  'empty': lambda path: path.write_bytes(b''),
  'flipped': lambda path: flip(path, path.stat().st_size // 2),
  'gone': lambda path: path.unlink(),
}


def change_record(path, number, feature, value):
  """Replaces a feature in a record, whose checksums stay valid."""
  import tensorflow as tf

  dataset = tf.data.TFRecordDataset(str(path))
  records = [tf.train.Example.FromString(record.numpy()) for record in dataset]
  kind = 'bytes_list' if feature == 'image' else 'int64_list'
  getattr(records[number].features.feature[feature], kind).value[0] = value
  with tf.io.TFRecordWriter(str(path)) as writer:
    for record in records:
      writer.write(record.SerializeToString())


def refusal(config, split='train'):
  """Returns the one line with which an epoch or an evaluation ends."""
  with pytest.raises(UsageError) as caught:
    dataset = open_dataset(config)
    if split == 'train':
      read = dataset.train_reader(0, 0)
      for step in range(2 * STEPS_PER_EPOCH):
        read(step)
    else:
      list(dataset.evaluation_batches(split))
  message = str(caught.value)
  assert '\n' not in message
  return message


@pytest.mark.parametrize('corruption', CORRUPTIONS)
@pytest.mark.parametrize('in_memory', [False, True])
def test_a_corrupt_file_is_named(copied, corruption, in_memory):
  copied.dataset.in_memory = in_memory
  path = files_of(copied)[1]
  CORRUPTIONS[corruption](path)
  message = refusal(copied)
  assert message.startswith('record ') and f' (counted from 0) of {path} cannot be read' in message
  assert message.endswith('delete the data set and prepare it again')


def png(side):
  content = io.BytesIO()
  Image.new('RGB', (side, side)).save(content, 'PNG')
  return content.getvalue()


@pytest.mark.parametrize(
  ('in_memory', 'image'), [(False, b'no image'), (True, b'no image'), (True, png(2))]
)
def test_a_record_without_an_image_is_named(copied, in_memory, image):
  copied.dataset.in_memory = in_memory
  path = files_of(copied, 'test')[1]
  change_record(path, 3, 'image', image)
  assert refusal(copied, 'test').startswith(f'record 3 (counted from 0) of {path} cannot be read')


def test_a_folder_that_goes_away_during_a_run_is_named(copied):
  dataset = open_dataset(copied)
  path = files_of(copied, 'test')[0]
  shutil.rmtree(copied.dataset.data_dir)
  with pytest.raises(UsageError, match=f'^record 0 .counted from 0. of {path} cannot be read'):
    next(dataset.evaluation_batches('test'))


@pytest.mark.parametrize(('in_memory', 'label'), [(False, 64), (True, -1)])
def test_a_label_that_is_no_class_is_refused(copied, in_memory, label):
  copied.dataset.in_memory = in_memory
  for split in ('train', 'test'):
    path = files_of(copied, split)[0]
    before = path.read_bytes()
    change_record(path, 2, 'label', label)
    expected = f'the {split} split of numbered has the label {label}, but its classes are 0 to 63'
    assert expected in refusal(copied, split)
    path.write_bytes(before)
  open_dataset(copied)  # Wrong labels are not kept in the cache.
