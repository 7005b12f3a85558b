"""Opens the data set that a config names: through TFDS, from arrays, or a folder of images.

TensorFlow is imported only if TFDS has to read the data.
"""

import contextlib
import json
import os
import re
import sys
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from imta_jax import runtime
from imta_jax.data import image_folder, tfds_files
from imta_jax.data.dataset import Dataset
from imta_jax.errors import UsageError, first_line
from imta_jax.runtime import import_tensorflow

_TFDS_FOLDER = '~/tensorflow_datasets'  # The default of TFDS.


def open_dataset(config: ConfigDict) -> Dataset:
  """Opens the data set that a config names.

  Args:
    config: A complete config; see imta_jax.config.

  Returns:
    The data set.

  Raises:
    UsageError: If it does not exist, cannot be prepared, does not match the config, or is not the
      same on all hosts.
  """
  for field in ('batch_size', 'evaluation_batch_size'):
    if config[field] % jax.device_count():
      raise UsageError(
        f'config.{field} is {config[field]}, not divisible by {jax.device_count()} devices: '
        f'make it a multiple of {jax.device_count()}'
      )
  with _first_host_first():
    dataset = _open_in_memory(config) if config.dataset.in_memory else _open_streamed(config)
  if dataset.num_images['train'] < config.batch_size:
    raise UsageError(
      f'config.batch_size is {config.batch_size}, more than the number of training images '
      f'({dataset.num_images["train"]}): choose a smaller batch size'
    )
  _check_hosts_agree(dataset, config.dataset.name)
  return dataset


@contextlib.contextmanager
def _first_host_first() -> Iterator[None]:
  """Lets other hosts wait for the first one, which prepares what is missing where they share it."""
  if jax.process_index():
    with runtime.watchdog_paused():
      multihost_utils.sync_global_devices('data set opened')
  yield
  if jax.process_index() == 0 and jax.process_count() > 1:
    multihost_utils.sync_global_devices('data set opened')


def _check_hosts_agree(dataset: Dataset, name: str) -> None:
  """Refuses hosts with different copies of the data set, whose batches would not fit together."""
  if jax.process_count() == 1:
    return
  fingerprints = multihost_utils.process_allgather(np.uint32(dataset.fingerprint()))
  others = np.flatnonzero(fingerprints != fingerprints[0])
  if others.size:
    raise UsageError(
      f'{name} is not the same on all hosts: process {others[0]} has other files or images than '
      'process 0: give every host the same copy, and the same version of it'
    )


def _open_in_memory(config: ConfigDict) -> Dataset:
  from imta_jax.data import arrays, in_memory, tfds_arrays

  if config.dataset.name == image_folder.NAME:
    side, channels = config.dataset.image_size, len(config.dataset.mean)
    folder = _scan(config.dataset)
    stored = image_folder.read(folder, (side, side, channels), config.dataset.crop)
    return in_memory.InMemoryDataset(stored, config)
  stored = arrays.load(config.dataset)
  if stored is not None:
    in_memory.check(stored.images['train'].shape[1:], config.dataset)
    return in_memory.InMemoryDataset(stored, config)
  builder = _prepared_builder(config.dataset)
  splits = _splits(builder, config.dataset)
  in_memory.check(builder.info.features['image'].shape, config.dataset)
  content = tfds_arrays.read(builder, splits)
  dataset = in_memory.InMemoryDataset(content, config)  # Checks the labels.
  arrays.store(config.dataset, content, builder.data_path / 'dataset_info.json')
  return dataset


def _open_streamed(config: ConfigDict) -> Dataset:
  from imta_jax.data import streamed

  if config.dataset.name == image_folder.NAME:
    from imta_jax.data.folder_reader import FolderReader

    folder = _scan(config.dataset)
    image_folder.check_headers(folder)  # Better found now than in the middle of an epoch.
    num_images = {split: len(paths) for split, paths in folder.paths.items()}
    reader = FolderReader(folder, config)
    return streamed.StreamedDataset(reader, folder.class_names, num_images, config)
  from imta_jax.data.tfds_reader import TfdsReader

  builder = _prepared_builder(config.dataset)
  splits = _splits(builder, config.dataset)
  class_names = builder.info.features['label'].names
  num_images = {split: count for split, (_, count) in splits.items()}
  reader = TfdsReader(builder, splits, config)
  return streamed.StreamedDataset(reader, class_names, num_images, config)


def _scan(dataset: ConfigDict) -> image_folder.ImageFolder:
  folder = image_folder.scan(dataset.data_dir)
  if jax.process_index() == 0:
    print(
      f'{dataset.data_dir}: {folder.summary()} → {dataset.image_size} × {dataset.image_size} '
      f'pixels, {"in memory" if dataset.in_memory else "streamed"}'
    )
  return folder


def _prepared_builder(dataset: ConfigDict) -> Any:
  import_tensorflow()
  import tensorflow_datasets as tfds

  from imta_jax.data import mnist5k  # noqa: F401  Registers the builder.

  data_dir = dataset.data_dir or os.environ.get('TFDS_DATA_DIR')
  try:
    builder = tfds.builder(dataset.name, data_dir=data_dir)
  except Exception as error:  # Corrupt metadata raises all kinds of exceptions.
    folder = epath.Path(data_dir or _TFDS_FOLDER).expanduser() / re.split('[/:]', dataset.name)[0]
    is_unknown = isinstance(error, tfds.core.DatasetNotFoundError | ValueError | AssertionError)
    corrupt = _corrupt_metadata(folder) or (None if is_unknown else f'the metadata in {folder}')
    if corrupt:
      raise UsageError(
        f'{corrupt} cannot be read ({first_line(error)}): {tfds_files.FIX_HINT}'
      ) from error
    raise UsageError(
      f'config.dataset.name is {dataset.name!r}, which was found neither in TFDS nor in '
      f'{data_dir or "its default folder"}: see tensorflow.org/datasets/catalog for the names'
    ) from None
  missing = {'image', 'label'} - set(builder.info.features or ())
  if missing:
    raise UsageError(
      f'config.dataset.name is {dataset.name!r}, which has no feature {sorted(missing)[0]!r}: '
      'choose a data set with the features `image` and `label`'
    )
  if not builder.info.splits:
    if not sys.stderr.isatty():
      tfds.disable_progress_bar()
    try:
      with runtime.watchdog_paused():
        builder.download_and_prepare()
    except Exception as error:
      raise UsageError(
        f'data set {dataset.name!r} is not prepared in {builder.data_dir}, and preparing it failed '
        f'({type(error).__name__}: {first_line(error)}): prepare it with '
        f'`tfds build {dataset.name}`, or set TFDS_DATA_DIR or config.dataset.data_dir'
      ) from error
  if not builder.info.splits:  # TFDS prepares nothing where there is a folder.
    raise UsageError(
      f'{builder.data_path} has no dataset_info.json that names splits: delete this folder, and '
      'the data set is prepared again'
    )
  return builder


def _corrupt_metadata(folder):
  """Returns the first file with metadata below a folder that is not JSON, if there is one."""
  for version in ('*', '*/*'):  # A builder's configs have folders of their own.
    for name in ('dataset_info.json', 'features.json'):
      for path in sorted(folder.glob(f'{version}/{name}')):
        try:
          json.loads(path.read_text())
        except (OSError, ValueError, RecursionError):
          return path
  return None


def _splits(builder: Any, dataset: ConfigDict) -> dict[str, tuple[str, int]]:
  """Returns {split: (TFDS instruction, number of images)}."""
  for field in ('train_split', 'test_split'):
    if dataset[field] not in builder.info.splits:
      raise UsageError(
        f'config.dataset.{field} is {dataset[field]!r}, which does not exist: {dataset.name} has '
        f'the splits {", ".join(builder.info.splits)}'
      )
  train, held_out = dataset.train_split, dataset.validation_size
  num_train = builder.info.splits[train].num_examples - held_out
  if num_train <= 0:
    raise UsageError(
      f'config.dataset.validation_size is {held_out}, but {dataset.name} has only '
      f'{num_train + held_out} training images: hold out fewer images'
    )
  return {
    'train': (f'{train}[:{num_train}]', num_train),
    'validation': (f'{train}[{num_train}:]', held_out),
    'test': (dataset.test_split, builder.info.splits[dataset.test_split].num_examples),
  }
