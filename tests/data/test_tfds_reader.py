"""Data sets of TFDS: a corrupt file or image is named; the same batches every time."""

import io
import itertools
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from imta_jax import config as config_lib
from imta_jax.data import pipeline, preprocess
from imta_jax.data.pipeline import open_dataset
from imta_jax.data.tfds_reader import TfdsReader
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
def config(intact, tmp_path):
  """Config of a copy of the data set that a test may corrupt."""
  config = config_lib.default()
  config.update(batch_size=BATCH_SIZE, evaluation_batch_size=BATCH_SIZE)
  config.dataset.update(
    name='numbered',
    data_dir=str(shutil.copytree(intact, tmp_path / 'data')),
    validation_size=NUM_VALIDATION,
    image_size=SIDE,
    in_memory=False,
  )
  return config


def files_of(config, split='train'):
  folder = Path(config.dataset.data_dir) / 'numbered/1.0.0'
  return sorted(folder.glob(f'numbered-{split}.tfrecord-*'))


def flip(path, position):
  content = bytearray(path.read_bytes())
  content[position] ^= 1
  path.write_bytes(bytes(content))


def cut(path):
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


CORRUPTIONS = {
  'cut': cut,
  'empty': lambda path: path.write_bytes(b''),
  'flipped': lambda path: flip(path, path.stat().st_size // 2),
  'flipped_length': lambda path: flip(path, 0),
  'garbage': lambda path: path.write_bytes(bytes(range(256)) * 9),
}


def records_of(path):
  import tensorflow as tf

  return [tf.train.Example.FromString(r.numpy()) for r in tf.data.TFRecordDataset(str(path))]


def label_of(record):
  return record.features.feature['label'].int64_list.value[0]


def write_records(path, records):
  import tensorflow as tf

  with tf.io.TFRecordWriter(str(path)) as writer:
    for record in records:
      writer.write(record.SerializeToString())


def replace_image(path, number, image=b'no image'):
  """Replaces the image of a record, whose checksums stay valid, and returns its label."""
  records = records_of(path)
  records[number].features.feature['image'].bytes_list.value[0] = image
  write_records(path, records)
  return label_of(records[number])


def replace_label(path, number, label):
  records = records_of(path)
  records[number].features.feature['label'].int64_list.value[0] = label
  write_records(path, records)


def reader_of(config):
  builder = pipeline._prepared_builder(config.dataset)
  return TfdsReader(builder, pipeline._splits(builder, config.dataset), config)


def refusal(config, split='train'):
  """Returns the one line with which an epoch or an evaluation ends."""
  with pytest.raises(UsageError) as caught:
    reader = reader_of(config)
    batches = reader.train_batches(0, 0) if split == 'train' else reader.evaluation_batches(split)
    list(itertools.islice(batches, STEPS_PER_EPOCH + 1))
  message = str(caught.value)
  assert '\n' not in message
  return message


def labels(batches):
  """Returns the labels of images that are not masked, and checks that they belong to the images."""
  found = []
  for batch in batches:
    image, label, mask = (batch[name][0] for name in ('image', 'label', 'mask'))
    np.testing.assert_array_equal(
      image[mask], np.broadcast_to(4 * label[mask, None, None, None], image[mask].shape)
    )
    found.append(label[mask].tolist())
  return found


def train(config, first_step, count):
  return list(itertools.islice(reader_of(config).train_batches(0, first_step), count))


def assert_same(batches, others):
  for batch, other in zip(batches, others, strict=True):
    jax.tree.map(np.testing.assert_array_equal, batch, other)


@pytest.mark.parametrize('corruption', CORRUPTIONS)
@pytest.mark.parametrize('split', ['train', 'test'])
def test_a_corrupt_file_is_named(config, corruption, split):
  path = files_of(config, split)[1]
  CORRUPTIONS[corruption](path)
  message = refusal(config, split)
  assert message.startswith(f'{path} is corrupt: only the first ')
  assert message.endswith('delete the data set and prepare it again')


@pytest.mark.parametrize('corruption', ['cut', 'empty'])
def test_a_corrupt_file_of_a_set_in_memory_is_named(config, corruption):
  config.dataset.in_memory = True
  path = files_of(config)[2]
  CORRUPTIONS[corruption](path)
  with pytest.raises(UsageError, match=f'^{path} is corrupt: only the first'):
    open_dataset(config)


def test_an_image_of_another_shape_in_memory_is_named(config):
  config.dataset.in_memory = True
  path = files_of(config)[1]
  small = io.BytesIO()
  Image.new('RGB', (2, 2)).save(small, 'PNG')
  replace_image(path, 3, small.getvalue())
  name = f'record 3 (counted from 0) of {path}: its image is corrupt'
  with pytest.raises(UsageError, match=f'^{re.escape(name)}'):
    open_dataset(config)


@pytest.mark.parametrize('in_memory', [False, True])
def test_a_record_without_an_image_is_named(config, in_memory):
  config.dataset.in_memory = in_memory
  path = files_of(config)[1]
  replace_image(path, 3)
  with pytest.raises(UsageError) as caught:
    open_dataset(config).train_reader(0, 0)(0)
  assert str(caught.value).startswith(f'record 3 (counted from 0) of {path}: its image is corrupt')


def test_a_file_that_is_gone_is_named(config):
  path = files_of(config)[1]
  reader = reader_of(config)
  batches = reader.train_batches(0, 0)
  for _ in range(STEPS_PER_EPOCH):
    next(batches)
  path.unlink()  # Between two epochs.
  with pytest.raises(UsageError, match=f'^{path} cannot be read .No such file or directory'):
    next(batches)


def test_a_folder_that_goes_away_during_a_run_is_named(config):
  reader = reader_of(config)
  batches = reader.train_batches(0, 0)
  next(batches)
  path = files_of(config)[0]
  shutil.rmtree(config.dataset.data_dir)
  for split in ('validation', 'test'):
    with pytest.raises(UsageError, match='numbered-.* cannot be read .No such file or directory'):
      next(reader.evaluation_batches(split))
  with pytest.raises(UsageError, match=f'^{path} cannot be read'):
    list(itertools.islice(batches, STEPS_PER_EPOCH))


@pytest.mark.parametrize('count', [1, 2, 4])
def test_over_all_hosts_an_epoch_has_every_image_once_also_after_resuming(config, as_host, count):
  epochs = [[], []]
  for index in range(count):
    as_host(index, count)
    run = train(config, 0, 2 * STEPS_PER_EPOCH)
    assert {batch['label'].size for batch in run} == {BATCH_SIZE // count}
    assert_same(train(config, 3, 2), run[3:5])
    for number, epoch in enumerate(epochs):
      epoch += sum(labels(run[number * STEPS_PER_EPOCH :][:STEPS_PER_EPOCH]), [])
  for epoch in epochs:
    assert len(epoch) == len(set(epoch)) == STEPS_PER_EPOCH * BATCH_SIZE
  assert epochs[0] != epochs[1]


@pytest.mark.parametrize('count', [1, 2, 4])
@pytest.mark.parametrize('split', ['validation', 'test'])
def test_over_all_hosts_an_evaluation_has_every_image_once(config, as_host, split, count):
  found, num_batches = [], set()
  for index in range(count):
    as_host(index, count)
    batches = list(reader_of(config).evaluation_batches(split))
    num_batches.add(len(batches))
    found += sum(labels(batches), [])
  assert len(num_batches) == 1
  assert len(found) == len(set(found)) == {'validation': NUM_VALIDATION, 'test': NUM_TEST}[split]


@pytest.mark.parametrize('count', [1, 2, 4])
def test_no_two_hosts_share_the_seed_of_a_crop(config, as_host, monkeypatch, count):
  import tensorflow as tf

  def show_seed(encoded, size, flip, seed):
    del encoded, flip
    return tf.cast(tf.fill((size, size, 3), seed[1] + 3 * (seed[0] % 40)), tf.uint8)

  monkeypatch.setattr(preprocess, 'decode_random_crop', show_seed)
  seeds = []
  for index in range(count):
    as_host(index, count)
    for batch in train(config, 0, STEPS_PER_EPOCH):
      seeds += batch['image'][0, :, 0, 0, 0].tolist()
  assert len(seeds) == len(set(seeds)) == STEPS_PER_EPOCH * BATCH_SIZE


@pytest.mark.parametrize('label', [-1, 64])
@pytest.mark.parametrize('in_memory', [False, True])
def test_a_label_that_is_no_class_is_refused(config, in_memory, label):
  config.dataset.in_memory = in_memory
  for split in ('train', 'test'):
    path = files_of(config, split)[0]
    before = path.read_bytes()
    replace_label(path, 2, label)
    with pytest.raises(
      UsageError, match=f'the {split} split of numbered has the label {label}, but .* 0 to 63'
    ):
      dataset = open_dataset(config)
      list(dataset.evaluation_batches('test'))
      read = dataset.train_reader(0, 0)
      for step in range(2 * STEPS_PER_EPOCH):
        read(step)
    path.write_bytes(before)
  open_dataset(config)  # Wrong labels are not kept in the cache.
