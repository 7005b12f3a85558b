"""Small data sets as plain arrays, kept on disk so that a run starts without TensorFlow."""

import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
from typing import Any

import numpy as np
from absl import logging
from etils import epath
from ml_collections import ConfigDict

from imta_jax.compilation_cache import cache_folder

_FIELDS = ('name', 'train_split', 'test_split', 'validation_size')
_SPLITS = ('train', 'validation', 'test')


@dataclasses.dataclass(frozen=True)
class Arrays:
  """A data set.

  Attributes:
    class_names: A name a class.
    images: By split, [image, height, width, channels], unsigned bytes.
    labels: By split, [image], int32.
  """

  class_names: list[str]
  images: dict[str, np.ndarray]
  labels: dict[str, np.ndarray]


def load(dataset: ConfigDict) -> Arrays | None:
  """Reads what `store` kept.

  Args:
    dataset: The data set's config.

  Returns:
    The arrays, or None if there are none, or the prepared data set has changed since.
  """
  folder = _folder(dataset)
  try:
    record = json.loads((folder / 'record.json').read_text())
    if record['stamp'] != _stamp(epath.Path(record['source'])):
      return None
    images, labels = (
      {split: np.load(folder / f'{split}_{kind}.npy') for split in _SPLITS}
      for kind in ('images', 'labels')
    )
  except (OSError, ValueError, KeyError):  # Not there, or damaged.
    return None
  return Arrays(record['class_names'], images, labels)


def read(builder: Any, splits: dict[str, tuple[str, int]]) -> Arrays:
  """Reads a prepared data set through TFDS.

  Args:
    builder: Its TFDS builder.
    splits: The TFDS instruction, and the number of images, of each split.

  Returns:
    The arrays.
  """
  import tensorflow_datasets as tfds

  images, labels = {}, {}
  for split, (instruction, _) in splits.items():
    content = tfds.as_numpy(builder.as_dataset(split=instruction, batch_size=-1))
    images[split], labels[split] = content['image'], content['label'].astype(np.int32)
  return Arrays(list(builder.info.features['label'].names), images, labels)


def store(dataset: ConfigDict, arrays: Arrays, source: epath.Path) -> None:
  """Keeps a data set for `load`; where that cannot be, says so and goes on.

  Args:
    dataset: The data set's config.
    arrays: The data set.
    source: A file of the prepared data set, which changes when that does.
  """
  folder = _folder(dataset)
  try:
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = epath.Path(tempfile.mkdtemp(dir=folder.parent))
    for split in _SPLITS:
      np.save(part / f'{split}_images.npy', arrays.images[split])
      np.save(part / f'{split}_labels.npy', arrays.labels[split])
    record = {'source': str(source), 'stamp': _stamp(source), 'class_names': arrays.class_names}
    (part / 'record.json').write_text(json.dumps(record, indent=2))
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(part, folder)
  except OSError as error:
    logging.warning('The data set could not be kept in %s (%s).', folder, error.strerror)


def _folder(dataset: ConfigDict) -> epath.Path:
  data_dir = dataset.data_dir or os.environ.get('TFDS_DATA_DIR')
  key = [dataset[field] for field in _FIELDS]
  key.append(data_dir and os.path.abspath(os.path.expanduser(data_dir)))
  digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:12]
  return cache_folder('data') / f'{dataset.name.replace("/", "_").replace(":", "_")}-{digest}'


def _stamp(path: epath.Path) -> list[float]:
  stat = path.stat()
  return [stat.mtime, stat.length]
