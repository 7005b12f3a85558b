"""Streamed folders of images: every image once, the same order after resuming, broken files."""

import collections
import itertools
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from imta_jax import config as config_lib
from imta_jax.data import folder_reader, image_folder
from imta_jax.data.folder_reader import FolderReader
from imta_jax.data.pipeline import open_dataset
from imta_jax.errors import UsageError

NUM_PER_CLASS, BATCH_SIZE = 30, 8
NUM_TRAIN, NUM_VALIDATION, NUM_TEST = 47, 6, 7  # By the hashes of the paths.


@pytest.fixture(scope='module')
def root(tmp_path_factory):
  """A folder of images whose grey level is their number, in two classes."""
  root = tmp_path_factory.mktemp('images')
  for index, name in enumerate(('even', 'odd')):
    (root / name).mkdir()
    for number in range(NUM_PER_CLASS):
      level = 4 * (2 * number + index)
      Image.new('L', (20 + number, 24), level).save(root / name / f'{number}.png')
  return root


@pytest.fixture
def config(root):
  config = config_lib.default()
  config.batch_size, config.evaluation_batch_size = BATCH_SIZE, 8
  config.dataset.update(name=image_folder.NAME, data_dir=str(root), image_size=16, in_memory=False)
  return config


def levels(batch):
  """Returns what identifies each image of a batch, and checks that crops have one colour."""
  images = batch['image'].reshape(-1, *batch['image'].shape[2:])
  np.testing.assert_array_equal(images, np.broadcast_to(images[:, :1, :1], images.shape))
  np.testing.assert_array_equal(images[:, 0, 0, 0] // 4 % 2, batch['label'].reshape(-1))
  return images[:, 0, 0, 0].tolist()


def take(batches, count):
  return [levels(batch) for batch in itertools.islice(batches, count)]


def test_an_epoch_takes_no_image_twice_and_orders_differ(config, root):
  reader = FolderReader(image_folder.scan(str(root)), config)
  steps = NUM_TRAIN // BATCH_SIZE
  first, second = np.array(take(reader.train_batches(0, 0), 2 * steps)).reshape(2, -1)
  assert len(set(first)) == len(set(second)) == steps * BATCH_SIZE
  assert list(first) != list(second)


def test_each_phase_and_epoch_crops_an_image_anew(config, root, tmp_path, monkeypatch):
  folder = image_folder.scan(str(shutil.copytree(root, tmp_path / 'images')))
  draws = []

  def note(path, size, min_area, flip, random):
    if path in folder.paths['train']:  # Readers of other tests may still read ahead.
      draws.append((path, random.random()))
    return np.zeros((size, size, 3), np.uint8)

  monkeypatch.setattr(FolderReader, '_decoded', lambda self, path: path)
  monkeypatch.setattr(folder_reader, 'random_crop', note)
  reader = FolderReader(folder, config)
  steps = len(folder.paths['train']) // BATCH_SIZE
  for phase in range(2):
    list(itertools.islice(reader.train_batches(phase, 0), 2 * steps))
  assert len({draw for _, draw in draws}) == len(draws) > 3 * len({path for path, _ in draws})


@pytest.mark.parametrize('room', [0, 40_000, 2**31])
def test_images_are_decoded_once_while_there_is_room(room, config, root, tmp_path, monkeypatch):
  monkeypatch.setattr(folder_reader, '_MAX_KEPT', room)
  monkeypatch.setattr('os.cpu_count', lambda: 1)  # Two threads may decode an image at once.
  # Readers of other tests may still read ahead in their folder.
  folder = image_folder.scan(str(shutil.copytree(root, tmp_path / 'images')))
  decoded, decode = collections.Counter(), folder_reader.decode_rgb

  def count(path, shorter_side):
    if path in folder.paths['train']:
      decoded[path] += 1
    return decode(path, shorter_side)

  monkeypatch.setattr(folder_reader, 'decode_rgb', count)
  epochs = 4
  reader = FolderReader(folder, config)
  num_batches = epochs * (len(folder.paths['train']) // BATCH_SIZE)
  assert len(take(reader.train_batches(0, 0), num_batches)) == num_batches
  reader._pool.shutdown()  # Waits for what is read ahead.
  repeated = sum(count > 1 for count in decoded.values())
  assert repeated == 0 if room == 2**31 else repeated > NUM_TRAIN // 4
  # 20 to 49 × 24 pixels each.
  assert len(reader._kept) == len(decoded) if room == 2**31 else len(reader._kept) * 1_440 <= room


def test_batches_after_resuming_are_the_same(config, root):
  reader = FolderReader(image_folder.scan(str(root)), config)
  batches = list(itertools.islice(reader.train_batches(0, 0), 9))
  for first_step in (1, 5, 7):
    for expected, batch in zip(
      batches[first_step:], reader.train_batches(0, first_step), strict=False
    ):
      np.testing.assert_array_equal(batch['image'], expected['image'])
      np.testing.assert_array_equal(batch['label'], expected['label'])


def test_hosts_share_an_epoch(config, root, as_host):
  folder = image_folder.scan(str(root))
  config.batch_size = 2 * BATCH_SIZE
  seen = []
  for host in range(2):
    as_host(host, 2)
    batches = take(FolderReader(folder, config).train_batches(0, 0), 2)
    assert take(FolderReader(folder, config).train_batches(0, 1), 1) == batches[1:]
    seen += sum(batches, [])
  assert len(set(seen)) == 4 * BATCH_SIZE


@pytest.mark.parametrize('augment', [False, True])
def test_evaluation_takes_every_image_once(config, root, augment):
  folder = image_folder.scan(str(root))
  config.dataset.augment_validation = augment
  for split, labels in folder.labels.items():
    images = []
    for batch in FolderReader(folder, config).evaluation_batches(split):
      mask = batch.get('mask', np.ones(batch['label'].shape, bool)).reshape(-1)
      images += np.array(levels(batch))[mask].tolist()
    assert len(images) == len(set(images)) == len(labels)


@pytest.mark.parametrize(
  ('augment', 'split', 'expected'),
  [(False, 'validation', 'center'), (True, 'validation', 'random'), (True, 'test', 'center')],
)
def test_center_crops_are_evaluated_unless_validation_is_augmented(
  augment, split, expected, config, root, monkeypatch
):
  folder, crops = image_folder.scan(str(root)), set()

  def note(crop, path, *_):
    if path in folder.paths[split]:  # Readers of other tests may still read ahead.
      crops.add(crop)
    return np.zeros((16, 16, 3), np.uint8)

  monkeypatch.setattr(folder_reader, 'read_image', lambda path, shape, crop: note(crop, path))
  monkeypatch.setattr(FolderReader, '_decoded', lambda self, path: path)
  monkeypatch.setattr(folder_reader, 'random_crop', partial(note, 'random'))
  config.dataset.augment_validation = augment
  list(FolderReader(folder, config).evaluation_batches(split))
  assert crops == {expected}


def test_the_data_set_is_opened_by_its_name(config):
  dataset = open_dataset(config)
  assert dataset.class_names == ['even', 'odd']
  assert dataset.num_images == {
    'train': NUM_TRAIN,
    'validation': NUM_VALIDATION,
    'test': NUM_TEST,
  }
  assert dataset.steps_per_epoch == NUM_TRAIN // BATCH_SIZE
  (batch, *_) = dataset.evaluation_batches('test')
  assert batch['image'].dtype == np.float32


@pytest.mark.parametrize('content', [None, 'no image'])
def test_a_file_that_is_gone_or_corrupt_is_named(config, root, tmp_path, content):
  folder = image_folder.scan(str(shutil.copytree(root, tmp_path / 'images')))
  for path in map(Path, folder.paths['train']):
    path.unlink() if content is None else path.write_text(content)
  reason = 'not an image' if content else 'cannot be read: No such file'
  with pytest.raises(UsageError, match=rf'^{tmp_path}/.*\d.png: {reason}.*restore or remove'):
    next(FolderReader(folder, config).train_batches(0, 0))
