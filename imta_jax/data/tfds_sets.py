"""Data sets of TFDS: preparing them, reading them whole, and naming what is corrupt in them.

TensorFlow is imported only when a function is called; its errors do not name files.
"""

import contextlib
import os
import sys
from collections.abc import Mapping
from typing import Any, NoReturn

import numpy as np
from ml_collections import ConfigDict

from imta_jax import runtime
from imta_jax.data.arrays import Arrays
from imta_jax.errors import UsageError, first_line

# {split: (TFDS instruction, number of images)}
Splits = Mapping[str, tuple[str, int]]


def open_builder(dataset: ConfigDict) -> Any:
  """Opens a data set, and prepares it if it is not prepared yet.

  Args:
    dataset: The data set's config.

  Returns:
    The TFDS builder.

  Raises:
    UsageError: If there is no such data set, it has no images and labels, or it cannot be prepared.
  """
  runtime.import_tensorflow()
  import tensorflow_datasets as tfds

  from imta_jax.data import mnist5k  # noqa: F401  Registers the builder.

  data_dir = dataset.data_dir or os.environ.get('TFDS_DATA_DIR')
  try:
    builder = tfds.builder(dataset.name, data_dir=data_dir)
  except Exception as error:  # Corrupt metadata raises all kinds of exceptions.
    raise UsageError(
      f'config.dataset.name is {dataset.name!r}, which TFDS cannot open in '
      f'{data_dir or "its default folder"} ({first_line(error)}): see '
      'tensorflow.org/datasets/catalog for the names; delete a corrupt data set to prepare it again'
    ) from error
  missing = {'image', 'label'} - set(builder.info.features or ())
  if missing:
    raise UsageError(
      f'config.dataset.name is {dataset.name!r}, which has no feature {sorted(missing)[0]!r}: '
      'choose a data set with the features `image` and `label`'
    )
  if not builder.info.splits:
    _prepare(builder, dataset.name)
  return builder


def _prepare(builder, name):
  import tensorflow_datasets as tfds

  if not sys.stderr.isatty():
    tfds.disable_progress_bar()
  try:
    with runtime.watchdog_paused():
      builder.download_and_prepare()
  except Exception as error:
    raise UsageError(
      f'data set {name!r} is not prepared in {builder.data_dir}, and preparing it failed '
      f'({type(error).__name__}: {first_line(error)}): prepare it with `tfds build {name}`, or set '
      'TFDS_DATA_DIR or config.dataset.data_dir'
    ) from error


def find_splits(builder: Any, dataset: ConfigDict) -> Splits:
  """Returns the splits of a config, with images held out for validation.

  Raises:
    UsageError: If a split does not exist, or no training images are left.
  """
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


def read_arrays(builder: Any, splits: Splits) -> Arrays:
  """Reads a whole data set into memory.

  Raises:
    UsageError: If the data set is corrupt; the message names the file.
  """
  import tensorflow as tf
  import tensorflow_datasets as tfds

  images, labels = {}, {}
  for split, (instruction, count) in splits.items():
    try:
      # As one batch, because TFDS would pad images of other shapes.
      batch = builder.as_dataset(split=instruction).batch(count).get_single_element()
    except (tf.errors.OpError, AssertionError) as error:  # TFDS asserts that a folder exists.
      refuse(builder, instruction, error)
    content = tfds.as_numpy(batch)
    images[split], labels[split] = content['image'], content['label'].astype(np.int32)
  return Arrays(list(builder.info.features['label'].names), images, labels)


def refuse(builder: Any, split: Any, error: Exception) -> NoReturn:
  """Ends a run whose data set cannot be read; looks for what is corrupt, which may take an epoch.

  Args:
    builder: The TFDS builder.
    split: The TFDS instruction that was read.
    error: What was raised.

  Raises:
    UsageError: With the first record that is corrupt or, if none is, with the error.
  """
  import tensorflow as tf
  import tensorflow_datasets as tfds

  features = builder.info.features

  def decode(record):
    image = features.deserialize_example(record)['image']
    return tf.ensure_shape(image, features['image'].shape)

  corrupt = f'{builder.data_path} cannot be read ({first_line(error)})'
  adapter = tfds.core.file_adapters.ADAPTER_FOR_FORMAT[builder.info.file_format]
  for file in builder.info.splits[split].file_instructions:
    num_intact = 0
    with contextlib.suppress(tf.errors.OpError):  # Nothing is read after the first error.
      for _ in adapter.make_tf_data(file.filename).map(decode, tf.data.AUTOTUNE):
        num_intact += 1
    if num_intact < file.examples_in_shard:
      corrupt = f'record {num_intact} (counted from 0) of {file.filename} cannot be read'
      break
  raise UsageError(
    f'{corrupt}: restore it from a copy, or delete the data set and prepare it again'
  ) from error
