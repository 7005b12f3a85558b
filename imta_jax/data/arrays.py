"""Small data sets as plain arrays, cached between runs or copied to another machine."""

import dataclasses
import hashlib
import io
import json
import os
import shutil
import tempfile
import zlib
from typing import Any

import numpy as np
from absl import logging
from etils import epath
from ml_collections import ConfigDict

from imta_jax.errors import UsageError
from imta_jax.files import size_and_time
from imta_jax.runtime import cache_folder

SPLITS = ('train', 'validation', 'test')
_FIELDS = ('name', 'train_split', 'test_split', 'validation_size')
_PART_BYTES = 48_000_000
# What reading raises if files are missing or corrupt.
_READ_ERRORS = (OSError, ValueError, KeyError, TypeError, RecursionError)


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
  folder = _cache_folder(dataset)
  try:
    record = json.loads((folder / 'record.json').read_text())
    if record['stamp'] != list(size_and_time(epath.Path(record['source']))):
      return None
    return _read_parts(folder, record)
  except _READ_ERRORS:
    return None


def _load_arrays_dir(dataset):
  folder = epath.Path(dataset.arrays_dir)
  hint = 'write it again with python -m imta_jax.prepare'
  try:
    record = json.loads((folder / 'record.json').read_text())
    arrays = _read_parts(folder, record)
  except _READ_ERRORS as error:
    is_clear = isinstance(error, OSError | ValueError)
    raise UsageError(
      f'config.dataset.arrays_dir is {dataset.arrays_dir}, which does not contain a complete data '
      f'set ({error if is_clear else f"record.json is corrupt: {error!r}"}): {hint}'
    ) from error
  for field in _FIELDS:
    if (value := record.get(field)) != dataset[field]:
      raise UsageError(
        f'config.dataset.arrays_dir is {dataset.arrays_dir}, whose {field} is {value!r}, not '
        f'{dataset[field]!r}: {hint}'
      )
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
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, ignore_cleanup_errors=True) as temporary:
      part = epath.Path(temporary) / 'arrays'
      write(dataset, arrays, part, {'source': str(source), 'stamp': size_and_time(source)})
      shutil.rmtree(folder, ignore_errors=True)
      os.replace(part, folder)
  except OSError as error:
    logging.warning('The data set could not be cached in %s (%s).', folder, error.strerror)


def write(
  dataset: ConfigDict, arrays: Arrays, folder: epath.Path, extra: dict[str, Any] | None = None
) -> list[epath.Path]:
  """Writes a data set to a folder, in parts of limited size.

  Args:
    dataset: The data set's config.
    arrays: The data set.
    folder: The folder to write.
    extra: More fields for record.json.

  Returns:
    The folders of the parts.

  Raises:
    OSError: If a file cannot be written; without record.json, which comes last, `load` refuses the
      folder.
  """
  parts, bytes_left = [], 0
  num_chunks, checksums = {}, {}
  for split in SPLITS:
    images, labels = arrays.images[split], arrays.labels[split]
    chunk_size = max(1, _PART_BYTES // (images[:1].nbytes + labels[:1].nbytes))
    starts = range(0, len(labels), chunk_size)
    num_chunks[split] = len(starts)
    for number, start in enumerate(starts):
      chunk = slice(start, start + chunk_size)
      size = images[chunk].nbytes + labels[chunk].nbytes
      if size > bytes_left:
        parts.append(folder / f'part_{len(parts)}')
        parts[-1].mkdir(parents=True, exist_ok=True)
        bytes_left = _PART_BYTES
      bytes_left -= size
      for kind, array in (('images', images), ('labels', labels)):
        name = f'{split}_{kind}_{number}.npy'
        content = io.BytesIO()  # Errors in writing an array to a file do not say the reason.
        np.save(content, array[chunk])
        (parts[-1] / name).write_bytes(content.getvalue())
        checksums[name] = _checksum(array[chunk])
  record = {field: dataset[field] for field in _FIELDS} | {
    'class_names': arrays.class_names,
    'num_chunks': num_chunks,
    'crc32': checksums,
  }
  (folder / 'record.json').write_text(json.dumps(record | (extra or {}), indent=2) + '\n')
  return parts


def _read_parts(folder: epath.Path, record: dict[str, Any]) -> Arrays:
  """Reads the arrays that `write` wrote; each chunk may be in any subfolder."""
  paths = {path.name: path for path in folder.glob('*/*.npy')}

  class_names = record['class_names']
  if not isinstance(class_names, list) or not all(isinstance(name, str) for name in class_names):
    raise ValueError('class_names in record.json are not names')

  def load_chunks(split, kind):
    chunks = []
    for number in range(record['num_chunks'][split]):
      name = f'{split}_{kind}_{number}.npy'
      if name not in paths:
        raise ValueError(f'{name} is missing')
      chunks.append(_load_chunk(paths[name], record['crc32'][name]))
    return chunks[0] if len(chunks) == 1 else np.concatenate(chunks)

  images = {split: load_chunks(split, 'images') for split in SPLITS}
  labels = {split: load_chunks(split, 'labels') for split in SPLITS}
  return Arrays(class_names, images, labels)


def _load_chunk(path, checksum):
  try:
    # Mapped first, because a header may claim more elements than the file or the memory has.
    chunk = np.array(np.lib.format.open_memmap(path, mode='r'))
  except (OSError, ValueError, OverflowError) as error:
    raise ValueError(f'{path.name} is corrupt: {error}') from error
  if _checksum(chunk) != checksum:
    raise ValueError(f'{path.name} is corrupt')
  return chunk


def _checksum(array: np.ndarray) -> int:
  return zlib.crc32(np.ascontiguousarray(array))


def _cache_folder(dataset: ConfigDict) -> epath.Path:
  data_dir = dataset.data_dir or os.environ.get('TFDS_DATA_DIR')
  key = [dataset[field] for field in _FIELDS]
  key.append(data_dir and os.path.abspath(os.path.expanduser(data_dir)))
  digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:12]
  return cache_folder('data') / f'{dataset.name.replace("/", "_").replace(":", "_")}-{digest}'
