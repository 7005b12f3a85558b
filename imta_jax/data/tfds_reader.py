"""Reads encoded images through TFDS, for data sets that are streamed."""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from imta_jax.data import preprocess
from imta_jax.data.streamed import steps_per_epoch

# Number of images in the shuffle buffer of a host, which also shuffles the files.
_SHUFFLE_BUFFER = 16_384


class TfdsReader:
  """Reads this host's part of a prepared data set; see `streamed.Reader`."""

  def __init__(self, builder: Any, splits: dict[str, tuple[str, int]], config: ConfigDict):
    """Opens the data set.

    Args:
      builder: Its TFDS builder.
      splits: {split: (TFDS instruction, number of images)}.
      config: A complete config.
    """
    self._builder, self._splits, self._config = builder, splits, config
    self._steps_per_epoch = steps_per_epoch(splits['train'][1], config)

  def train_batches(self, first_step: int) -> Iterator[dict[str, np.ndarray]]:
    epoch, position = divmod(first_step, self._steps_per_epoch)
    while True:
      yield from self._epoch(epoch, position).as_numpy_iterator()
      epoch, position = epoch + 1, 0

  def evaluation_batches(self, split: str) -> Iterator[dict[str, np.ndarray]]:
    import tensorflow as tf

    dataset, batch_size = self._config.dataset, self._config.evaluation_batch_size
    batch_size //= jax.process_count()
    augments = split == 'validation' and dataset.augment_validation

    def decode(index, example):
      if augments:
        image_seed = self._image_seed(self._config.seed, index)
        image = preprocess.decode_random_crop(
          example['image'], dataset.image_size, dataset.flip, image_seed
        )
      else:
        image = preprocess.decode_center_crop(example['image'], dataset.image_size)
      return {'image': image, 'label': tf.cast(example['label'], tf.int32), 'mask': True}

    # All hosts send the same number of batches; hosts with fewer images pad the last ones.
    largest_part = -(-self._splits[split][1] // jax.process_count())
    num_batches = -(-largest_part // batch_size)
    examples = self._read(split).enumerate().map(decode, tf.data.AUTOTUNE)
    filler = jax.tree.map(lambda spec: tf.zeros(spec.shape, spec.dtype), examples.element_spec)
    filled = examples.concatenate(tf.data.Dataset.from_tensors(filler).repeat())
    return self._batch(filled.take(num_batches * batch_size), batch_size).as_numpy_iterator()

  def _epoch(self, epoch, position):
    """Returns this host's batches of an epoch from a position on, as a function of the seed."""
    import tensorflow as tf

    seed = int(np.random.SeedSequence([self._config.seed, epoch]).generate_state(1)[0])
    batch_size = self._config.batch_size // jax.process_count()
    examples = self._read('train', shuffle_seed=seed).shuffle(_SHUFFLE_BUFFER, seed=seed)
    examples = examples.take(self._steps_per_epoch * batch_size)
    # Skipped images are not decoded.
    examples = examples.enumerate().skip(position * batch_size)

    def decode(index, example):
      image_seed = self._image_seed(seed, index)
      dataset = self._config.dataset
      image = preprocess.decode_random_crop(
        example['image'], dataset.image_size, dataset.flip, image_seed
      )
      return {'image': image, 'label': tf.cast(example['label'], tf.int32)}

    return self._batch(examples.map(decode, tf.data.AUTOTUNE), batch_size)

  def _read(self, split, shuffle_seed=None):
    """Returns this host's encoded examples of a split; their order depends only on the seed."""
    import tensorflow as tf
    import tensorflow_datasets as tfds

    part = tfds.even_splits(self._splits[split][0], jax.process_count())[jax.process_index()]
    examples = self._builder.as_dataset(
      split=part,
      decoders={'image': tfds.decode.SkipDecoding()},
      shuffle_files=shuffle_seed is not None,
      read_config=tfds.ReadConfig(shuffle_seed=shuffle_seed, try_autocache=False),
    )
    options = tf.data.Options()
    options.deterministic = True
    return examples.with_options(options)

  def _image_seed(self, seed, index):
    """Returns a seed that is unique to an image across all hosts."""
    import tensorflow as tf

    return tf.stack(
      [tf.constant(seed, tf.int64), index * jax.process_count() + jax.process_index()]
    )

  def _batch(self, examples, batch_size):
    """Groups examples into batches [local devices, batch per device, …]."""
    import tensorflow as tf

    local = jax.local_device_count()
    batches = examples.batch(batch_size // local, drop_remainder=True)
    return batches.batch(local, drop_remainder=True).prefetch(tf.data.AUTOTUNE)
