"""Opens the data set that a config names: through TFDS, from arrays, or a folder of images."""

import contextlib
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from imta_jax import runtime
from imta_jax.data import arrays, image_folder, in_memory, tfds_sets
from imta_jax.data.dataset import Dataset
from imta_jax.data.folder_reader import FolderReader
from imta_jax.data.in_memory import InMemoryDataset
from imta_jax.data.streamed import StreamedDataset
from imta_jax.errors import UsageError


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
    if config.dataset.name == image_folder.NAME:
      dataset = _open_folder(config)
    elif config.dataset.in_memory:
      dataset = _open_in_memory(config)
    else:
      dataset = _open_streamed(config)
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


def _open_folder(config: ConfigDict) -> Dataset:
  dataset = config.dataset
  side = dataset.image_size
  folder = image_folder.scan(dataset.data_dir)
  if jax.process_index() == 0:
    print(
      f'{dataset.data_dir}: {folder.summary()} → {side} × {side} pixels, '
      f'{"in memory" if dataset.in_memory else "streamed"}'
    )
  if dataset.in_memory:
    shape = (side, side, len(dataset.mean))
    return InMemoryDataset(image_folder.read(folder, shape, dataset.crop), config)
  num_images = {split: len(paths) for split, paths in folder.paths.items()}
  return StreamedDataset(FolderReader(folder, config), folder.class_names, num_images, config)


def _open_in_memory(config: ConfigDict) -> Dataset:
  stored = arrays.load(config.dataset)
  if stored is not None:
    return InMemoryDataset(stored, config)
  builder, splits = tfds_sets.open_builder(config.dataset)
  in_memory.check(builder.info.features['image'].shape, config.dataset)
  content = tfds_sets.read_arrays(builder, splits)
  dataset = InMemoryDataset(content, config)  # Checks the labels.
  arrays.store(config.dataset, content, builder.data_path / 'dataset_info.json')
  return dataset


def _open_streamed(config: ConfigDict) -> Dataset:
  builder, splits = tfds_sets.open_builder(config.dataset)
  reader = tfds_sets.TfdsReader(builder, splits, config)
  num_images = {split: count for split, (_, count) in splits.items()}
  return StreamedDataset(reader, builder.info.features['label'].names, num_images, config)
