"""Large data sets, which tf.data reads, decodes and crops while the devices compute."""

import collections
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from imta_jax import devices
from imta_jax.data import preprocess
from imta_jax.data.dataset import Batch, Dataset
from imta_jax.errors import UsageError

# Number of images in the shuffle buffer of a host, which also shuffles the files.
_SHUFFLE_BUFFER = 16_384
# Number of batches that are sent to the devices before they are needed.
_BATCHES_AHEAD = 2
# The axes over devices of what `draw_batch` reads.
SOURCE_AXES = {'image': 0, 'label': 0, 'start': None}


class StreamedDataset(Dataset):
  """A data set of encoded images of any size; each host reads its part of every split."""

  source_axes = SOURCE_AXES

  def __init__(self, builder: Any, splits: dict[str, tuple[str, int]], config: ConfigDict):
    self._builder, self._splits, self._config = builder, splits, config
    if len(config.dataset.mean) != 3 or len(config.dataset.std) != 3:
      raise UsageError('config.dataset.mean and std need 3 numbers each: streamed images are RGB')
    self.class_names = builder.info.features['label'].names
    self.image_shape = (config.dataset.image_size, config.dataset.image_size, 3)
    self.num_images = {name: count for name, (_, count) in splits.items()}
    # Every host must be able to fill its part of each batch.
    self.steps_per_epoch = (self.num_images['train'] // jax.process_count()) // (
      config.batch_size // jax.process_count()
    )
    self._steps_per_stack = config.steps_per_dispatch or 1
    self._send = jax.pmap(lambda batch: batch, axis_name=devices.AXIS)
    self._normalize = jax.pmap(self._normalize_batch, axis_name=devices.AXIS)

  def train_reader(self, first_step: int) -> Callable[[int], tuple[dict[str, jax.Array], int]]:
    size = self._steps_per_stack
    stacks = self._send_ahead(self._train_stacks(first_step))
    step, stack, position = first_step, None, size

    def read(most):
      nonlocal step, stack, position
      if position == size:
        stack, position = next(stacks), 0
      left_in_epoch = self.steps_per_epoch - step % self.steps_per_epoch
      num_steps = min(most, size - position, left_in_epoch)
      source = {**stack, 'start': np.int32(position)}
      step, position = step + num_steps, position + num_steps
      return source, num_steps

    return read

  def draw(self, source: dict[str, jax.Array], index: jax.Array, step: jax.Array) -> Batch:
    return draw_batch(self._config, source, index, step)

  def evaluation_batches(self, split: str) -> Iterator[Batch]:
    return map(self._normalize, self._send_ahead(self._evaluation_stream(split)))

  def _train_stacks(self, first_step):
    """Yields batches from a step on without end, stacked [local devices, step, image, …]."""
    batches = self._train_stream(first_step)
    while stack := list(itertools.islice(batches, self._steps_per_stack)):
      yield jax.tree.map(lambda *arrays: np.stack(arrays, axis=1), *stack)

  def _train_stream(self, first_step):
    epoch, position = divmod(first_step, self.steps_per_epoch)
    while True:
      yield from self._epoch(epoch, position).as_numpy_iterator()
      epoch, position = epoch + 1, 0

  def _epoch(self, epoch, position):
    """Returns this host's batches of an epoch from a position on, as a function of the seed."""
    import tensorflow as tf

    seed = int(np.random.SeedSequence([self._config.seed, epoch]).generate_state(1)[0])
    batch_size = self._config.batch_size // jax.process_count()
    examples = self._read('train', shuffle_seed=seed).shuffle(_SHUFFLE_BUFFER, seed=seed)
    examples = examples.take(self.steps_per_epoch * batch_size)
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

  def _evaluation_stream(self, split):
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
    largest_part = -(-self.num_images[split] // jax.process_count())
    num_batches = -(-largest_part // batch_size)
    examples = self._read(split).enumerate().map(decode, tf.data.AUTOTUNE)
    filler = jax.tree.map(lambda spec: tf.zeros(spec.shape, spec.dtype), examples.element_spec)
    filled = examples.concatenate(tf.data.Dataset.from_tensors(filler).repeat())
    return self._batch(filled.take(num_batches * batch_size), batch_size).as_numpy_iterator()

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

  def _send_ahead(self, batches: Iterable[dict[str, np.ndarray]]) -> Iterator[Batch]:
    """Yields batches on the devices, and sends the next ones ahead of time."""
    ahead = collections.deque()
    for batch in batches:
      ahead.append(self._send(batch))
      if len(ahead) > _BATCHES_AHEAD:
        yield ahead.popleft()
    yield from ahead

  def _normalize_batch(self, batch):
    return {**batch, 'image': _normalize(self._config, batch['image'])}


def draw_batch(
  config: ConfigDict, source: dict[str, jax.Array], index: jax.Array, step: jax.Array
) -> Batch:
  """Takes a batch of a device from a stack of batches, and normalises it.

  Args:
    config: A complete config.
    source: 'image' and 'label', each [step, image, …], and 'start', the first step to be read.
    index: How many steps after the first one.
    step: See `Dataset.draw`.

  Returns:
    The batch of this device.
  """
  del step
  at = source['start'] + index
  image, label = (
    jax.lax.dynamic_index_in_dim(source[name], at, keepdims=False) for name in ('image', 'label')
  )
  return {'image': _normalize(config, image), 'label': label}


def _normalize(config, images):
  return preprocess.normalize(images, config.dataset.mean, config.dataset.std)
