"""Arrays from the cache or from arrays_dir: the same data as from TFDS, and never stale."""

import json
import os

import numpy as np
import pytest
from etils import epath

from imta_jax.compilation_cache import cache_folder
from imta_jax.data import arrays
from imta_jax.data.pipeline import open_dataset
from imta_jax.errors import UsageError


@pytest.fixture
def stored(mnist5k_config, tmp_path, monkeypatch):
  """A config whose data set is in a cache of its own, and its folder there."""
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  assert arrays.load(mnist5k_config.dataset) is None
  open_dataset(mnist5k_config)
  (folder,) = cache_folder('data').iterdir()
  return mnist5k_config, folder


def test_what_is_kept_is_what_tfds_gives(stored, mnist5k_splits):
  config, _ = stored
  kept = arrays.load(config.dataset)
  images = np.concatenate([kept.images['train'], kept.images['validation']])
  np.testing.assert_array_equal(images, mnist5k_splits['train'][0])
  np.testing.assert_array_equal(kept.images['test'], mnist5k_splits['test'][0])
  np.testing.assert_array_equal(kept.labels['test'], mnist5k_splits['test'][1])
  assert kept.labels['test'].dtype == np.int32
  assert kept.class_names == [str(digit) for digit in range(10)]


def test_a_kept_data_set_is_opened_without_tfds(stored, monkeypatch):
  monkeypatch.setattr('imta_jax.data.pipeline._prepared_builder', None)
  dataset = open_dataset(stored[0])
  assert dataset.num_images == {'train': 100, 'validation': 3_900, 'test': 1_000}


@pytest.mark.parametrize('field', ['validation_size', 'data_dir'])
def test_another_config_has_arrays_of_its_own(stored, field):
  config, _ = stored
  config.dataset[field] = {'validation_size': 3_800, 'data_dir': 'elsewhere'}[field]
  assert arrays.load(config.dataset) is None


def test_a_data_set_prepared_again_is_read_again(stored):
  config, folder = stored
  source = json.loads((folder / 'record.json').read_text())['source']
  times = os.stat(source)
  os.utime(source, (times.st_atime, times.st_mtime + 10))
  assert arrays.load(config.dataset) is None
  open_dataset(config)
  assert arrays.load(config.dataset) is not None


@pytest.mark.parametrize(
  'name', ['record.json', 'part_0/train_images_0.npy', 'part_0/test_labels_0.npy']
)
def test_damaged_arrays_are_read_again(stored, name):
  config, folder = stored
  (folder / name).write_bytes((folder / name).read_bytes()[:40])
  assert arrays.load(config.dataset) is None
  assert open_dataset(config).num_images['test'] == 1_000
  assert arrays.load(config.dataset) is not None


@pytest.mark.parametrize('name', ['train_images_0', 'test_labels_0'])
def test_arrays_with_other_values_are_read_again(stored, name):
  config, folder = stored
  path = folder / 'part_0' / f'{name}.npy'
  content = bytearray(path.read_bytes())
  content[-100] ^= 1
  path.write_bytes(content)
  assert arrays.load(config.dataset) is None
  assert open_dataset(config).num_images['test'] == 1_000
  assert arrays.load(config.dataset) is not None


def test_carried_arrays_with_other_values_are_refused(carried):
  config, folder = carried
  (path,) = folder.glob('*/test_labels_0.npy')
  content = bytearray(path.read_bytes())
  content[-4] ^= 1
  path.write_bytes(bytes(content))
  with pytest.raises(UsageError, match='test_labels_0.npy is damaged'):
    arrays.load(config.dataset)


def test_where_nothing_can_be_kept_the_run_goes_on(mnist5k_config, tmp_path, monkeypatch):
  (tmp_path / 'file').write_text('')
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'file'))
  assert open_dataset(mnist5k_config).num_images['test'] == 1_000


@pytest.fixture
def carried(stored, tmp_path, monkeypatch):
  """A config with arrays_dir set to a folder of several parts; TFDS cannot be used."""
  config, _ = stored
  monkeypatch.setattr(arrays, '_PART_BYTES', 500_000)
  folder = tmp_path / 'carried'
  parts = arrays.write(config.dataset, arrays.load(config.dataset), epath.Path(folder))
  assert len(parts) > 5
  for part in parts:
    assert sum(path.stat().length for path in part.iterdir()) < 510_000
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'empty'))
  monkeypatch.setattr('imta_jax.data.pipeline._prepared_builder', None)
  config.dataset.arrays_dir = str(folder)
  return config, folder


def test_carried_arrays_are_what_was_kept(carried, mnist5k_splits):
  config, folder = carried
  # Whichever folder a chunk has travelled in.
  (folder / 'part_1').rename(folder / 'second_journey')
  dataset = open_dataset(config)
  images = np.concatenate([dataset.arrays.images[split] for split in ('train', 'validation')])
  np.testing.assert_array_equal(images, mnist5k_splits['train'][0])
  np.testing.assert_array_equal(dataset.arrays.images['test'], mnist5k_splits['test'][0])
  np.testing.assert_array_equal(dataset.arrays.labels['test'], mnist5k_splits['test'][1])


@pytest.mark.parametrize('name', ['record.json', 'part_2'])
def test_carried_arrays_that_are_not_whole_are_refused(name, carried):
  config, folder = carried
  (folder / name).rename(folder.parent / 'lost')
  with pytest.raises(UsageError, match=r'does not contain a complete data set .*imta_jax\.prepare'):
    open_dataset(config)


def test_carried_arrays_of_another_split_are_refused(carried):
  config, _ = carried
  config.dataset.validation_size = 1_000
  with pytest.raises(UsageError, match='whose validation_size is 3900, not 1000'):
    open_dataset(config)
