"""Opening a data set: its splits, and errors."""

import contextlib
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils
from PIL import Image

from imta_jax import config as config_lib
from imta_jax import runtime
from imta_jax.data import image_folder
from imta_jax.data.pipeline import open_dataset
from imta_jax.errors import UsageError


def refusal(config):
  with pytest.raises(UsageError) as caught:
    config_lib.validate(config)
    open_dataset(config)
  message = str(caught.value)
  assert '\n' not in message
  return message


@pytest.mark.parametrize('field', ['batch_size', 'evaluation_batch_size'])
def test_a_batch_that_devices_do_not_divide_is_refused(field, mnist5k_config, monkeypatch):
  mnist5k_config.update(batch_size=12, evaluation_batch_size=12)
  mnist5k_config[field] = 16
  monkeypatch.setattr(jax, 'device_count', lambda: 3)
  message = refusal(mnist5k_config)
  assert f'config.{field} is 16' in message
  assert 'multiple of 3' in message


def test_holding_out_all_training_images_is_refused(mnist5k_config):
  mnist5k_config.dataset.validation_size = 4_000
  message = refusal(mnist5k_config)
  assert 'config.dataset.validation_size is 4000' in message and '4000 training images' in message


@pytest.mark.parametrize('field', ['train_split', 'test_split'])
def test_an_unknown_split_is_refused_naming_those_there_are(field, mnist5k_config):
  mnist5k_config.dataset[field] = 'tset'
  message = refusal(mnist5k_config)
  assert f"config.dataset.{field} is 'tset'" in message
  assert {'train', 'test'} <= set(message.split('has the splits ')[-1].split(', '))


def test_a_batch_larger_than_the_training_set_is_refused(mnist5k_config):
  mnist5k_config.batch_size = 104
  message = refusal(mnist5k_config)
  assert 'config.batch_size is 104' in message and '(100)' in message


@pytest.mark.parametrize('name', ['nope', '', 'mnist5k/nope', 'mnist5k:9.9.9'])
def test_an_unknown_data_set_is_refused(name, mnist5k_config):
  mnist5k_config.dataset.name = name
  assert f'config.dataset.name is {name!r}, which TFDS cannot open' in refusal(mnist5k_config)


@pytest.mark.parametrize('content', [b'', b'{"name": "mn', b'[1]', bytes(range(256))])
def test_corrupt_metadata_is_refused_with_its_folder(
  mnist5k_config, tmp_path, monkeypatch, content
):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
  shutil.copytree(Path(mnist5k_config.dataset.data_dir) / 'mnist5k', tmp_path / 'mnist5k')
  mnist5k_config.dataset.data_dir = str(tmp_path)
  (tmp_path / 'mnist5k/1.0.0/dataset_info.json').write_bytes(content)
  message = refusal(mnist5k_config)
  assert f"'mnist5k', which TFDS cannot open in {tmp_path} (" in message
  assert 'delete a corrupt data set' in message


def test_a_data_set_without_labels_is_refused(mnist5k_config):
  mnist5k_config.dataset.name = 'celeb_a'
  message = refusal(mnist5k_config)
  assert "'celeb_a'" in message
  assert "'label'" in message


@pytest.fixture
def pauses(monkeypatch):
  """A list to which each pause of the watch over hosts is added."""
  events = []

  @contextlib.contextmanager
  def paused():
    events.append('pauses')
    yield

  monkeypatch.setattr(runtime, 'watchdog_paused', paused)
  return events


def test_a_data_set_that_cannot_be_prepared_is_refused_saying_how(mnist5k_config, tmp_path, pauses):
  mnist5k_config.dataset.update(name='imagenet2012', data_dir=str(tmp_path))
  message = refusal(mnist5k_config)
  assert pauses == ['pauses']  # Preparing may take hours.
  assert "'imagenet2012' is not prepared" in message
  assert str(tmp_path) in message
  assert 'tfds build imagenet2012' in message
  assert 'TFDS_DATA_DIR' in message


def write_images(root):
  for name in ('dark', 'light'):
    for number in range(6):
      path = root / name / f'{number}.bmp'
      path.parent.mkdir(parents=True, exist_ok=True)
      Image.new('RGB', (8, 8), (number, 0, 99 * (name == 'light'))).save(path)


@pytest.fixture
def folder_config(tmp_path):
  """Config of a folder of images."""
  write_images(tmp_path / 'images')
  config = config_lib.default()
  config.update(batch_size=2, evaluation_batch_size=2)
  folder = str(tmp_path / 'images')
  config.dataset.update(name='image_folder', data_dir=folder, image_size=8, padding=0)
  return config


def test_a_corrupt_file_of_a_folder_in_memory_is_refused_at_once(folder_config):
  path = Path(folder_config.dataset.data_dir) / 'dark/0.bmp'
  path.write_text('no image')
  with pytest.raises(UsageError, match=rf'1 image\(s\) cannot be read: {path}: not an image'):
    open_dataset(folder_config)


def fingerprint(config):
  return open_dataset(config).fingerprint()


CHANGES = {
  'renamed class': lambda root: (root / 'dark').rename(root / 'night'),
  'exchanged classes': lambda root: exchange(root / 'dark', root / 'light'),
  'added image': lambda root: shutil.copy(root / 'dark/0.bmp', root / 'dark/new.bmp'),
  'removed image': lambda root: (root / 'light/3.bmp').unlink(),
  'other image': lambda root: Image.new('RGB', (8, 9), (77, 0, 0)).save(root / 'dark/2.bmp'),
}


def exchange(one, other):
  one.rename(one.with_name('temporary'))
  other.rename(one)
  one.with_name('temporary').rename(other)


@pytest.mark.parametrize('in_memory', [True, False])
@pytest.mark.parametrize('change', CHANGES.values(), ids=CHANGES)
def test_a_fingerprint_tells_changed_folders_apart(change, in_memory, folder_config, tmp_path):
  folder_config.dataset.in_memory = in_memory
  first = fingerprint(folder_config)
  write_images(tmp_path / 'copy')
  folder_config.dataset.data_dir = str(tmp_path / 'copy')
  assert fingerprint(folder_config) == first
  change(tmp_path / 'copy')
  assert fingerprint(folder_config) != first


def test_a_fingerprint_of_images_in_memory_depends_on_each_of_them(folder_config):
  dataset = open_dataset(folder_config)
  first = dataset.fingerprint()
  for split in dataset.num_images:
    images = dataset.arrays.images[split]
    images[-1, -1, -1, -1] ^= 1
    assert dataset.fingerprint() != first
    images[-1, -1, -1, -1] ^= 1
    dataset.arrays.labels[split][-1] ^= 1
    assert dataset.fingerprint() != first
    dataset.arrays.labels[split][-1] ^= 1
  assert dataset.fingerprint() == first


def test_a_fingerprint_of_a_streamed_set_depends_on_its_files_and_splits(mnist5k_config):
  mnist5k_config.dataset.update(in_memory=False, mean=(0.1,) * 3, std=(0.3,) * 3)
  first = fingerprint(mnist5k_config)
  mnist5k_config.dataset.validation_size -= 1
  assert fingerprint(mnist5k_config) != first


def test_hosts_with_other_images_than_the_first_are_refused(folder_config, as_host, monkeypatch):
  as_host(0, 3)
  open_dataset(folder_config)
  monkeypatch.setattr(
    multihost_utils, 'process_allgather', lambda value: np.array([value, value, value + 1])
  )
  with pytest.raises(UsageError, match='image_folder is not the same on all hosts: process 2'):
    open_dataset(folder_config)


@pytest.mark.parametrize('index', [0, 1])
def test_the_first_host_opens_a_set_before_the_others_and_prints_alone(
  index, folder_config, as_host, monkeypatch, pauses, capsys
):
  events, scan = pauses, image_folder.scan
  as_host(index, 2)
  monkeypatch.setattr(multihost_utils, 'sync_global_devices', lambda name: events.append('waits'))
  monkeypatch.setattr(image_folder, 'scan', lambda path: events.append('opens') or scan(path))
  open_dataset(folder_config)
  assert events == (['pauses', 'waits', 'opens'] if index else ['opens', 'waits'])
  out = capsys.readouterr().out
  assert out == '' if index else '2 classes (dark, light); 8 train, ' in out
