"""Reads whole data sets through TFDS, for those that are kept in memory."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from imta_jax.data import tfds_files
from imta_jax.data.arrays import Arrays
from imta_jax.errors import UsageError


def read(
  builder: Any, splits: Mapping[str, tuple[str, int]], *, skip_damaged: bool = False
) -> Arrays:
  """Reads a prepared data set.

  Args:
    builder: The TFDS builder of the data set.
    splits: {split: (TFDS instruction, number of images)}.
    skip_damaged: Whether to leave out what is damaged, with a warning.

  Returns:
    The arrays.

  Raises:
    UsageError: If the data set is damaged and damage is not skipped, or no image of a split is
      intact; the message names the file.
  """
  import tensorflow as tf
  import tensorflow_datasets as tfds

  images, labels = {}, {}
  for split, (instruction, count) in splits.items():
    try:
      # As one batch, because TFDS would pad images of other shapes.
      batch = builder.as_dataset(split=instruction).batch(count).get_single_element()
      content = tfds.as_numpy(batch)
    except (tf.errors.OpError, AssertionError) as error:  # TFDS asserts that a folder exists.
      if skip_damaged:
        content = _read_intact(builder, instruction)
      elif isinstance(error, tf.errors.InvalidArgumentError):
        tfds_files.refuse_example(builder, *_encoded(builder, instruction), error)
      else:
        tfds_files.refuse(builder, tfds_files.find_damage(builder, instruction), error)
    images[split], labels[split] = content['image'], content['label'].astype(np.int32)
  return Arrays(list(builder.info.features['label'].names), images, labels)


def _encoded(builder, instruction, skipped=None):
  """Returns (index, encoded example) of a split without known damage, and what decodes an image."""
  import tensorflow_datasets as tfds

  examples = builder.as_dataset(
    split=instruction,
    decoders={'image': tfds.decode.SkipDecoding()},
    read_config=tfds.ReadConfig(
      try_autocache=False,
      add_tfds_id=True,
      experimental_interleave_sort_fn=skipped and skipped.shorten,
    ),
  )
  return examples.enumerate(), lambda _, image: builder.info.features['image'].decode_example(image)


def _read_intact(builder, instruction):
  """Reads the images of a split one by one, without those that are damaged.

  Raises:
    UsageError: If none is intact, or damage is not the reason of the error.
  """
  import tensorflow as tf

  skipped = tfds_files.SkippedDamage(builder)
  skipped.add_files(tfds_files.find_damage(builder, instruction))
  examples, decode = _encoded(builder, instruction, skipped)
  images, labels = [], []
  try:
    for index, example in examples:
      try:
        image = decode(index, example['image']).numpy()
      except tfds_files.decoding_errors():
        skipped.add_example(example['tfds_id'].numpy())
      else:
        images.append(image)
        labels.append(example['label'].numpy())
  except tf.errors.OpError as error:
    tfds_files.refuse(builder, [], error)
  if not images:
    raise UsageError(
      f'no image of {instruction} in {builder.data_path} is intact: {tfds_files.MEND}'
    )
  return {'image': np.stack(images), 'label': np.array(labels)}
