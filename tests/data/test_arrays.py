"""Arrays from the cache or from arrays_dir: the same data as from TFDS, and never stale."""

import json
import os
import pwd
import resource
from pathlib import Path

import numpy as np
import pytest
from etils import epath

from imta_jax import config as config_lib
from imta_jax.data import arrays, tfds_sets
from imta_jax.data.pipeline import open_dataset
from imta_jax.errors import UsageError
from imta_jax.runtime import cache_folder


@pytest.fixture
def stored(mnist5k_config, tmp_path, monkeypatch):
  """A config whose data set is in a cache of its own, and its file there."""
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  assert arrays.load(mnist5k_config.dataset) is None
  open_dataset(mnist5k_config)
  (folder,) = cache_folder('data').iterdir()
  (path,) = Path(folder).iterdir()
  return mnist5k_config, path


@pytest.fixture
def source(stored):
  """The file of TFDS that says whether the cache is current; restored after the test."""
  with np.load(stored[1]) as content:
    path = Path(json.loads(content['record'].item())['source'])
  times, content = os.stat(path), path.read_bytes()
  yield path
  path.write_bytes(content)
  os.utime(path, (times.st_atime, times.st_mtime))


def test_what_is_kept_is_what_tfds_gives_and_opened_without_it(stored, mnist5k_splits, monkeypatch):
  config, _ = stored
  monkeypatch.setattr(tfds_sets, 'open_builder', None)
  assert open_dataset(config).num_images == {'train': 100, 'validation': 3_900, 'test': 1_000}
  kept = arrays.load(config.dataset)
  images = np.concatenate([kept.images['train'], kept.images['validation']])
  np.testing.assert_array_equal(images, mnist5k_splits['train'][0])
  np.testing.assert_array_equal(kept.images['test'], mnist5k_splits['test'][0])
  np.testing.assert_array_equal(kept.labels['test'], mnist5k_splits['test'][1])
  assert kept.labels['test'].dtype == np.int32
  assert kept.class_names == [str(digit) for digit in range(10)]


@pytest.mark.parametrize(('field', 'value'), [('validation_size', 3_800), ('data_dir', 'other')])
def test_another_config_has_arrays_of_its_own(stored, field, value):
  config, _ = stored
  config.dataset[field] = value
  assert arrays.load(config.dataset) is None


def flip_a_value(path):
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 1  # In the images.
  path.write_bytes(bytes(content))


CORRUPTIONS = {
  'cut': lambda path: path.write_bytes(path.read_bytes()[:-40]),
  'empty': lambda path: path.write_bytes(b''),
  'flipped': flip_a_value,
}


@pytest.mark.parametrize('corruption', CORRUPTIONS)
def test_corrupt_arrays_are_read_again(stored, corruption):
  config, path = stored
  CORRUPTIONS[corruption](path)
  assert arrays.load(config.dataset) is None
  assert open_dataset(config).num_images['test'] == 1_000
  assert arrays.load(config.dataset) is not None


@pytest.mark.parametrize('shift', [-(10**9), 10**9], ids=['past', 'future'])
def test_a_data_set_prepared_again_is_read_again_whatever_clocks_say(stored, source, shift):
  """A cached set is recognized by a stamp that is equal, not by one that is younger."""
  config, _ = stored
  times = os.stat(source)
  os.utime(source, (times.st_atime, times.st_mtime + shift))
  assert arrays.load(config.dataset) is None
  open_dataset(config)
  assert arrays.load(config.dataset) is not None


def test_a_source_of_another_size_and_the_same_time_is_read_again(stored, source):
  times = os.stat(source)
  source.write_bytes(source.read_bytes() + b'\n')
  os.utime(source, (times.st_atime, times.st_mtime))
  assert arrays.load(stored[0].dataset) is None


def test_data_sets_of_unknown_owners_are_read(stored, monkeypatch):
  monkeypatch.delattr(pwd, 'getpwuid')
  assert arrays.load(stored[0].dataset) is not None


def test_a_cache_that_cannot_be_written_is_warned_of_and_leaves_nothing(
  mnist5k_config, tmp_path, monkeypatch, caplog
):
  """Files cannot be larger than 40 kB, as on a disk that is full."""
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, limits[1]))
  try:
    open_dataset(mnist5k_config)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  assert 'could not be cached' in caplog.text and 'File too large' in caplog.text
  assert not list(cache_folder('data').glob('*/*'))
  assert arrays.load(mnist5k_config.dataset) is None


@pytest.fixture
def small(tmp_path):
  """A data set's config with arrays_dir set, and the file in that folder."""
  dataset = config_lib.default().dataset
  dataset.update(name='small', arrays_dir=str(tmp_path / 'small'))
  images = {split: np.zeros((4, 2, 2, 1), np.uint8) for split in arrays.SPLITS}
  labels = {split: np.array([0, 1, 0, 1], np.int32) for split in arrays.SPLITS}
  content = arrays.Arrays(['a', 'b'], images, labels)
  path = arrays.write(dataset, content, epath.Path(dataset.arrays_dir))
  assert arrays.load(dataset).class_names == ['a', 'b']
  return dataset, Path(path)


def refusal(dataset):
  with pytest.raises(UsageError) as caught:
    arrays.load(dataset)
  message = str(caught.value)
  assert '\n' not in message and 'write it again with python -m imta_jax.data.prepare' in message
  return message


@pytest.mark.parametrize('corruption', [*CORRUPTIONS, 'gone'])
def test_carried_arrays_that_are_not_whole_are_refused(small, corruption):
  dataset, path = small
  CORRUPTIONS.get(corruption, Path.unlink)(path)
  assert 'does not contain a complete data set' in refusal(dataset)


def test_carried_arrays_of_another_split_are_refused(small):
  dataset, _ = small
  dataset.validation_size = 1_000
  assert 'whose validation_size is 5000, not 1000' in refusal(dataset)


class Command:
  """Runs a command when it is unpickled."""

  def __init__(self, command):
    self._command = command

  def __reduce__(self):
    return os.system, (self._command,)


def test_no_object_is_unpickled(small, tmp_path):
  dataset, path = small
  with np.load(path) as content:
    changed = dict(content)
  changed['test_images'] = np.array([Command(f'touch {tmp_path}/ran')], object)
  np.savez(path, **changed)
  refusal(dataset)
  assert not (tmp_path / 'ran').exists()
  with np.load(path, allow_pickle=True) as content:
    assert content['test_images'] == [0]  # The command is one.
