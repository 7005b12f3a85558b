"""Reads whole data sets through TFDS, for those that are kept in memory."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from imta_jax.data import tfds_files
from imta_jax.data.arrays import Arrays


def read(builder: Any, splits: Mapping[str, tuple[str, int]]) -> Arrays:
  """Reads a prepared data set.

  Args:
    builder: The TFDS builder of the data set.
    splits: {split: (TFDS instruction, number of images)}.

  Returns:
    The arrays.

  Raises:
    UsageError: If the data set is corrupt; the message names the file.
  """
  import tensorflow as tf
  import tensorflow_datasets as tfds

  decode = builder.info.features['image'].decode_example
  images, labels = {}, {}
  for split, (instruction, count) in splits.items():
    try:
      # As one batch, because TFDS would pad images of other shapes.
      batch = builder.as_dataset(split=instruction).batch(count).get_single_element()
    except tf.errors.InvalidArgumentError as error:
      encoded = builder.as_dataset(
        split=instruction,
        decoders={'image': tfds.decode.SkipDecoding()},
        read_config=tfds.ReadConfig(try_autocache=False, add_tfds_id=True),
      )
      tfds_files.refuse_example(builder, encoded.enumerate(), lambda _, image: decode(image), error)
    except (tf.errors.OpError, AssertionError) as error:  # TFDS asserts that a folder exists.
      tfds_files.refuse_files(builder, instruction, error)
    content = tfds.as_numpy(batch)
    images[split], labels[split] = content['image'], content['label'].astype(np.int32)
  return Arrays(list(builder.info.features['label'].names), images, labels)
