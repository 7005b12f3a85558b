"""Arrays that are kept between runs: the same data, and never stale data."""

import json
import os

import numpy as np
import pytest

from imta_jax.compilation_cache import cache_folder
from imta_jax.data import arrays
from imta_jax.data.pipeline import open_dataset


@pytest.fixture
def stored(mnist5k_config, tmp_path, monkeypatch):
  """A config whose data set is kept in a cache of its own, and the folder."""
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


@pytest.mark.parametrize('name', ['record.json', 'train_images.npy', 'test_labels.npy'])
def test_damaged_arrays_are_read_again(stored, name):
  config, folder = stored
  (folder / name).write_bytes((folder / name).read_bytes()[:40])
  assert arrays.load(config.dataset) is None
  assert open_dataset(config).num_images['test'] == 1_000
  assert arrays.load(config.dataset) is not None


def test_where_nothing_can_be_kept_the_run_goes_on(mnist5k_config, tmp_path, monkeypatch):
  (tmp_path / 'file').write_text('')
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'file'))
  assert open_dataset(mnist5k_config).num_images['test'] == 1_000
