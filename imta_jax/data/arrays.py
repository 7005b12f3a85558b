"""Small data sets as plain arrays in a file, cached between runs or copied to another machine."""

import dataclasses
import hashlib
import json
import os
import tempfile
from typing import Any

import numpy as np
from absl import logging
from etils import epath
from ml_collections import ConfigDict

from imta_jax.errors import UsageError, first_line
from imta_jax.files import size_and_time
from imta_jax.runtime import cache_folder

SPLITS = ('train', 'validation', 'test')
_FIELDS = ('name', 'train_split', 'test_split', 'validation_size')
_FILE = 'arrays.npz'


@dataclasses.dataclass(frozen=True)
class Arrays:
  """A data set in memory.

  Attributes:
    class_names: One name per class.
    images: {split: uint8 [image, height, width, channels]}.
    labels: {split: int32 [image]}.
  """

  class_names: list[str]
  images: dict[str, np.ndarray]
  labels: dict[str, np.ndarray]


def load(dataset: ConfigDict) -> Arrays | None:
  """Loads a data set from `dataset.arrays_dir` or, if that is not set, from the cache.

  Args:
    dataset: The data set's config.

  Returns:
    The arrays. None if arrays_dir is not set and the data set is not in the cache, or has been
    prepared again since it was cached.

  Raises:
    UsageError: If arrays_dir is set but does not contain this data set completely.
  """
  if dataset.arrays_dir:
    return _load_arrays_dir(dataset)
  try:
    record, arrays = _read(_cache_folder(dataset))
    is_current = record['stamp'] == list(size_and_time(epath.Path(record['source'])))
  except Exception:  # Corrupt files raise all kinds of exceptions.
    return None
  return arrays if is_current else None


def _load_arrays_dir(dataset):
  place = f'config.dataset.arrays_dir is {dataset.arrays_dir}'
  hint = 'write it again with python -m imta_jax.data.prepare'
  try:
    record, arrays = _read(epath.Path(dataset.arrays_dir))
  except Exception as error:  # Corrupt files raise all kinds of exceptions.
    raise UsageError(
      f'{place}, which does not contain a complete data set ({first_line(error)}): {hint}'
    ) from error
  for field in _FIELDS:
    value = record.get(field)
    if value != dataset[field]:
      raise UsageError(f'{place}, whose {field} is {value!r}, not {dataset[field]!r}: {hint}')
  return arrays


def store(dataset: ConfigDict, arrays: Arrays, source: epath.Path) -> None:
  """Writes a data set to the cache, for `load`; logs a warning if it cannot be written.

  Args:
    dataset: The data set's config.
    arrays: The data set.
    source: A file of the prepared data set that changes whenever the data set does.
  """
  folder = _cache_folder(dataset)
  try:
    write(dataset, arrays, folder, source=str(source), stamp=size_and_time(source))
  except OSError as error:
    logging.warning('The data set could not be cached in %s (%s).', folder, error.strerror)


def write(dataset: ConfigDict, arrays: Arrays, folder: epath.Path, **record: Any) -> epath.Path:
  """Writes a data set to a folder, atomically.

  Args:
    dataset: The data set's config.
    arrays: The data set.
    folder: The folder, which is made if it does not exist.
    **record: What else is recorded.

  Returns:
    The file.

  Raises:
    OSError: If it cannot be written.
  """
  record |= {field: dataset[field] for field in _FIELDS} | {'class_names': arrays.class_names}
  images = {f'{split}_images': array for split, array in arrays.images.items()}
  labels = {f'{split}_labels': array for split, array in arrays.labels.items()}
  folder.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory(dir=folder, ignore_cleanup_errors=True) as temporary:
    part = os.path.join(temporary, _FILE)
    content: dict[str, Any] = {'record': json.dumps(record), **images, **labels}
    np.savez(part, **content)
    os.replace(part, folder / _FILE)
  return folder / _FILE


def _read(folder: epath.Path) -> tuple[dict[str, Any], Arrays]:
  """Reads the record and the arrays that `write` wrote; the file contains their checksums."""
  with np.load(folder / _FILE, allow_pickle=False) as content:
    record = json.loads(content['record'].item())
    images = {split: content[f'{split}_images'] for split in SPLITS}
    labels = {split: content[f'{split}_labels'] for split in SPLITS}
  return record, Arrays(record['class_names'], images, labels)


def _cache_folder(dataset: ConfigDict) -> epath.Path:
  data_dir = dataset.data_dir or os.environ.get('TFDS_DATA_DIR')
  key = [dataset[field] for field in _FIELDS]
  key.append(data_dir and os.path.abspath(os.path.expanduser(data_dir)))
  digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:12]
  return cache_folder('data') / f'{dataset.name.replace("/", "_").replace(":", "_")}-{digest}'
