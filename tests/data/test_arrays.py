"""Arrays from the cache or from arrays_dir: the same data as from TFDS, and never stale."""

import io
import json
import os
import pickle
import pwd
import resource
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from etils import epath

from imta_jax import config as config_lib
from imta_jax import prepare
from imta_jax.data import arrays
from imta_jax.data.pipeline import open_dataset
from imta_jax.errors import UsageError
from imta_jax.runtime import cache_folder


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
def test_corrupt_arrays_are_read_again(stored, name):
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
  with pytest.raises(UsageError, match='test_labels_0.npy is corrupt'):
    arrays.load(config.dataset)


def test_where_nothing_can_be_kept_the_run_goes_on(mnist5k_config, tmp_path, monkeypatch):
  (tmp_path / 'file').write_text('')
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'file'))
  assert open_dataset(mnist5k_config).num_images['test'] == 1_000


def run_out_of_space(action):
  """Calls a function whose files cannot be larger than 40 kB."""
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, limits[1]))
  try:
    action()
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_cache_that_cannot_be_written_is_warned_of_and_leaves_nothing(
  mnist5k_config, tmp_path, monkeypatch, caplog
):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  run_out_of_space(lambda: open_dataset(mnist5k_config))
  assert 'could not be cached' in caplog.text and 'File too large' in caplog.text
  assert not list(cache_folder('data').iterdir())
  assert arrays.load(mnist5k_config.dataset) is None


@pytest.fixture
def tiny_disk(tmp_path):
  """A file system of 1 MB."""
  folder = tmp_path / 'disk'
  folder.mkdir()
  command = ['mount', '-t', 'tmpfs', '-o', 'size=1m', 'tmpfs', str(folder)]
  try:
    subprocess.run(command, check=True, capture_output=True)
  except (OSError, subprocess.CalledProcessError):
    pytest.skip('no file system can be mounted here')
  yield folder
  subprocess.run(['umount', str(folder)], check=True)


def test_a_cache_on_a_full_disk_is_warned_of_and_leaves_nothing(
  mnist5k_config, tiny_disk, monkeypatch, caplog
):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tiny_disk))
  assert open_dataset(mnist5k_config).num_images['test'] == 1_000
  assert 'No space left on device' in caplog.text
  assert not list(cache_folder('data').iterdir())


@pytest.mark.parametrize('shift', [-(10**9), 10**9], ids=['past', 'future'])
def test_clocks_do_not_matter(stored, shift):
  """A cached set is recognised by a stamp that is equal, not by one that is younger."""
  config, folder = stored
  record = json.loads((folder / 'record.json').read_text())
  times = os.stat(record['source'])
  try:
    os.utime(record['source'], (times.st_atime, times.st_mtime + shift))
    assert arrays.load(config.dataset) is None  # Read anew, even if it seems older.
    open_dataset(config)
    assert arrays.load(config.dataset) is not None  # Kept, even if it seems to be of the future.
  finally:
    os.utime(record['source'], (times.st_atime, times.st_mtime))


def test_a_source_of_another_size_and_the_same_time_is_read_again(stored):
  config, folder = stored
  source = Path(json.loads((folder / 'record.json').read_text())['source'])
  times, content = os.stat(source), source.read_bytes()
  try:
    source.write_bytes(content + b'\n')
    os.utime(source, (times.st_atime, times.st_mtime))
    assert arrays.load(config.dataset) is None
  finally:
    source.write_bytes(content)
    os.utime(source, (times.st_atime, times.st_mtime))


def test_data_sets_of_unknown_owners_are_read_and_written(stored, tmp_path, monkeypatch, capsys):
  config, folder = stored
  monkeypatch.delattr(pwd, 'getpwuid')
  assert arrays.load(config.dataset) is not None
  shutil.rmtree(folder)
  open_dataset(config)
  assert arrays.load(config.dataset) is not None
  monkeypatch.setenv('TFDS_DATA_DIR', str(config.dataset.data_dir))
  prepare.main(['--config=configs/mnist5k.py', str(tmp_path / 'arrays')])
  assert capsys.readouterr().out.endswith(' MB\n')


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


@pytest.fixture
def small(tmp_path):
  """A data set's config with arrays_dir set, and that folder."""
  dataset = config_lib.default().dataset
  dataset.update(name='small', arrays_dir=str(tmp_path / 'small'))
  images = {split: np.zeros((4, 2, 2, 1), np.uint8) for split in arrays.SPLITS}
  labels = {split: np.array([0, 1, 0, 1], np.int32) for split in arrays.SPLITS}
  content = arrays.Arrays(['a', 'b'], images, labels)
  arrays.write(dataset, content, epath.Path(dataset.arrays_dir))
  assert arrays.load(dataset).class_names == ['a', 'b']
  return dataset, tmp_path / 'small'


def refusal(dataset):
  with pytest.raises(UsageError) as caught:
    arrays.load(dataset)
  message = str(caught.value)
  assert '\n' not in message and 'write it again with python -m imta_jax.data.prepare' in message
  return message


FIELDS = (
  'name',
  'train_split',
  'test_split',
  'validation_size',
  'class_names',
  'num_chunks',
  'crc32',
)


@pytest.mark.parametrize('field', FIELDS)
def test_a_record_with_a_missing_or_wrong_field_is_refused(small, field):
  dataset, folder = small
  path = folder / 'record.json'
  record = json.loads(path.read_text())
  for value in (..., None, 5, 'zz', [1], {'train': 'x'}, {'train': 10**12}, {'train': -1}):
    changed = {**record, field: value}
    if value is ...:
      del changed[field]
    path.write_text(json.dumps(changed))
    refusal(dataset)


@pytest.mark.parametrize('text', ['', '5', '[1]', '{', '[' * 100_000, '\0', '\udcff'])
def test_a_record_that_is_none_is_refused(small, text):
  dataset, folder = small
  (folder / 'record.json').write_bytes(text.encode(errors='surrogateescape'))
  refusal(dataset)


class Command:
  """Runs a command when it is unpickled."""

  def __init__(self, command):
    self._command = command

  def __reduce__(self):
    return os.system, (self._command,)


def claim(shape):
  """Returns an array file that claims a shape and has no elements."""
  content = io.BytesIO()
  header = {'descr': '|u1', 'fortran_order': False, 'shape': shape}
  np.lib.format.write_array_header_1_0(content, header)
  return content.getvalue()


@pytest.mark.parametrize(
  'content',
  [b'', b'\x93NUMPY', claim((10**12,)), claim((10**30,)), claim((10**12, 0, 0, 1))],
  ids=['empty', 'cut', '10^12', '10^30', 'no_elements'],
)
def test_an_array_that_claims_more_than_it_has_is_refused(small, content):
  dataset, folder = small
  (folder / 'part_0/train_images_0.npy').write_bytes(content)
  assert 'train_images_0.npy is corrupt' in refusal(dataset)


def test_no_object_is_unpickled(small, tmp_path):
  dataset, folder = small
  command = Command(f'touch {tmp_path}/ran')
  path = folder / 'part_0/train_images_0.npy'
  path.write_bytes(pickle.dumps(command))
  assert 'train_images_0.npy is corrupt' in refusal(dataset)
  np.save(path, np.array([command], object), allow_pickle=True)
  assert 'train_images_0.npy is corrupt' in refusal(dataset)
  assert not (tmp_path / 'ran').exists()
