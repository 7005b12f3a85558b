"""Reads encoded images through TFDS, for data sets that are streamed."""

import os
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from imta_jax.data import preprocess, tfds_sets
from imta_jax.data.dataset import shuffle_number
from imta_jax.data.streamed import steps_per_epoch

# Number of images in the shuffle buffer of a host, which also shuffles the files.
_SHUFFLE_BUFFER = 16_384


class TfdsReader:
  """Reads this host's part of a prepared data set; see `streamed.Reader`."""

  def __init__(self, builder: Any, splits: tfds_sets.Splits, config: ConfigDict):
    self._builder, self._splits, self._config = builder, splits, config
    self._steps_per_epoch = steps_per_epoch(splits['train'][1], config)

  def train_batches(self, phase: int, first_step: int) -> Iterator[dict[str, np.ndarray]]:
    batch_size = self._config.batch_size // jax.process_count()
    num_batches = self._steps_per_epoch
    epoch, position = divmod(first_step, num_batches)
    while True:
      number = [self._config.seed, shuffle_number(phase, epoch)]
      seed = int(np.random.SeedSequence(number).generate_state(1)[0])
      decode = self._random_crop(seed)
      yield from self._batches('train', decode, batch_size, num_batches, position, seed)
      epoch, position = epoch + 1, 0

  def evaluation_batches(self, split: str) -> Iterator[dict[str, np.ndarray]]:
    dataset = self._config.dataset
    batch_size = self._config.evaluation_batch_size // jax.process_count()
    # All hosts send the same number of batches; hosts with fewer images pad the last ones.
    largest_part = -(-self._splits[split][1] // jax.process_count())
    if split == 'validation' and dataset.augment_validation:
      decode = self._random_crop(self._config.seed)
    else:

      def decode(_, encoded):
        return preprocess.decode_center_crop(encoded, dataset.image_size)

    return self._batches(split, decode, batch_size, -(-largest_part // batch_size))

  def files(self, split: str) -> list[tuple[str, int]]:
    info = self._builder.info
    instructions = info.splits[self._splits[split][0]].file_instructions
    # TFDS records the size of all files together.
    return [(os.path.basename(file.filename), info.dataset_size) for file in instructions]

  def _batches(self, split, decode, batch_size, num_batches, position=0, seed=None):
    """Yields batches [local devices, batch per device, …]; an error names what is corrupt.

    Args:
      split: The split.
      decode: Maps the number of an example and its encoded image to the image.
      batch_size: Images per batch.
      num_batches: Batches of the epoch.
      position: Number of batches that are skipped, without decoding their images.
      seed: Shuffles the examples if given.
    """
    import tensorflow as tf

    tf.get_logger().setLevel('ERROR')  # TFDS numbers examples with a function that is deprecated.
    side = self._config.dataset.image_size

    def decode_example(index, example):
      return {
        'image': tf.ensure_shape(decode(index, example['image']), (side, side, 3)),
        'label': tf.cast(example['label'], tf.int32),
        'mask': True,  # False for padding.
      }

    try:
      examples = self._read(split, seed).enumerate().skip(position * batch_size)
      batches = _batch(examples.map(decode_example, tf.data.AUTOTUNE), batch_size)
      batches = batches.take(num_batches - position).prefetch(tf.data.AUTOTUNE)
      yield from batches.as_numpy_iterator()
    except (tf.errors.OpError, AssertionError) as error:  # TFDS asserts that a folder exists.
      tfds_sets.refuse(self._builder, self._part(split), error)

  def _part(self, split):
    """Returns the TFDS instruction for this host's part of a split."""
    import tensorflow_datasets as tfds

    return tfds.even_splits(self._splits[split][0], jax.process_count())[jax.process_index()]

  def _read(self, split, seed):
    """Returns this host's encoded examples of a split; their order depends only on the seed."""
    import tensorflow as tf
    import tensorflow_datasets as tfds

    examples = self._builder.as_dataset(
      split=self._part(split),
      decoders={'image': tfds.decode.SkipDecoding()},
      shuffle_files=seed is not None,
      read_config=tfds.ReadConfig(shuffle_seed=seed, try_autocache=False),
    )
    options = tf.data.Options()
    options.deterministic = True
    examples = examples.with_options(options)
    return examples if seed is None else examples.shuffle(_SHUFFLE_BUFFER, seed=seed)

  def _random_crop(self, seed):
    """Returns a function that decodes an image, with a seed that no other image of any host has."""
    import tensorflow as tf

    dataset = self._config.dataset

    def decode(index, encoded):
      number = index * jax.process_count() + jax.process_index()
      image_seed = tf.stack([tf.constant(seed, tf.int64), number])
      return preprocess.decode_random_crop(encoded, dataset.image_size, dataset.flip, image_seed)

    return decode


def _batch(examples, size):
  """Groups examples into batches [local devices, batch per device, …]; padding goes on for ever."""
  import tensorflow as tf

  filler = jax.tree.map(lambda spec: tf.zeros(spec.shape, spec.dtype), examples.element_spec)
  filled = examples.concatenate(tf.data.Dataset.from_tensors(filler).repeat())
  local = jax.local_device_count()
  return filled.batch(size // local, drop_remainder=True).batch(local, drop_remainder=True)
