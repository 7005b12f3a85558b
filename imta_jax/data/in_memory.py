"""Small data sets, which are kept in the memory of every device and batched there."""

import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from imta_jax import runtime
from imta_jax.data import preprocess
from imta_jax.data.arrays import Arrays
from imta_jax.data.dataset import Batch, Dataset, check_labels, shuffle_number
from imta_jax.errors import UsageError

# The axes over devices of what `draw_batch` reads.
SOURCE_AXES = (None, None, None, 0)


def check(shape: Sequence[int | None], dataset: ConfigDict) -> None:
  """Checks that images of a shape, with None for sizes that vary, match the data set's config.

  Raises:
    UsageError: If they do not.
  """
  side = dataset.image_size
  if tuple(shape[:2]) != (side, side):
    raise UsageError(
      f'config.dataset.image_size is {side}, but images of {dataset.name} are {tuple(shape)}: '
      'fix the size, or set config.dataset.in_memory to False to resize them'
    )
  if {len(dataset.mean), len(dataset.std)} != {shape[2]}:
    raise UsageError(
      f'config.dataset.mean and std have {len(dataset.mean)} and {len(dataset.std)} numbers, but '
      f'images of {dataset.name} have {shape[2]} channels: give one number per channel'
    )


class InMemoryDataset(Dataset):
  """A data set of images of one shape that fits in the memory of a device.

  Attributes:
    arrays: The data set.
  """

  source_axes = SOURCE_AXES

  def __init__(self, arrays: Arrays, config: ConfigDict):
    self.arrays, self._config = arrays, config
    self.class_names = arrays.class_names
    _, height, width, channels = arrays.images['train'].shape
    self.image_shape = (height, width, channels)
    check(self.image_shape, config.dataset)
    for split, labels in arrays.labels.items():
      check_labels(labels, len(arrays.class_names), f'the {split} split of {config.dataset.name}')
    self.num_images = {split: len(labels) for split, labels in arrays.labels.items()}
    self.steps_per_epoch = self.num_images['train'] // config.batch_size
    self._plan_epoch = jax.jit(
      partial(plan_epoch, config, self.num_images['train']), out_shardings=runtime.replicated()
    )
    self._prepare = jax.pmap(
      partial(_prepare, config),
      axis_name=runtime.AXIS,
      in_axes=(0, None, 0),
      static_broadcasted_argnums=3,
    )

  def train_reader(self, phase: int, first_step: int) -> Callable[[int], tuple[jax.Array, ...]]:
    images, labels = runtime.replicate((self.arrays.images['train'], self.arrays.labels['train']))

    @lru_cache(maxsize=1)
    def plan(epoch):
      return self._plan_epoch(np.int32(shuffle_number(phase, epoch)))

    def read(step):
      return images, labels, plan(step // self.steps_per_epoch), runtime.device_numbers()

    return read

  def draw(self, source: tuple[jax.Array, ...], step: jax.Array) -> Batch:
    return draw_batch(self._config, source, step)

  def evaluation_batches(self, split: str) -> Iterator[Batch]:
    images, labels = self.arrays.images[split], self.arrays.labels[split]
    batch_size = self._config.evaluation_batch_size
    augments = split == 'validation' and self._config.dataset.augment_validation
    for start in range(0, len(labels), batch_size):
      part = slice(start, start + batch_size)
      num_padded = batch_size - len(labels[part])
      batch = {
        'image': np.pad(images[part], ((0, num_padded), (0, 0), (0, 0), (0, 0))),
        'label': np.pad(labels[part], (0, num_padded)),
        'mask': np.arange(batch_size) < len(labels[part]),
      }
      batch = {
        name: array.reshape(jax.device_count(), -1, *array.shape[1:])[runtime.device_numbers()]
        for name, array in batch.items()
      }
      yield self._prepare(runtime.device_numbers(), np.int32(start), batch, augments)

  def fingerprint(self) -> int:
    checksum = zlib.crc32(repr(list(self.class_names)).encode())
    for arrays in (self.arrays.images, self.arrays.labels):
      for _, array in sorted(arrays.items()):
        checksum = zlib.crc32(np.ascontiguousarray(array).data, checksum)
    return checksum


def draw_batch(config: ConfigDict, source: tuple[jax.Array, ...], step: jax.Array) -> Batch:
  """Draws this device's part of a training batch; see `Dataset.draw`.

  Args:
    config: A complete config.
    source: Training images, their labels, the plan of the epoch of the step, and the index of this
      device.
    step: The number of the step, counted from 0.
  """
  images, labels, plan, device = source
  per_device = config.batch_size // jax.lax.axis_size(runtime.AXIS)
  position = step % (len(plan[0]) // config.batch_size)
  start = position * config.batch_size + device * per_device
  indices, corners, mirrored = (
    jax.lax.dynamic_slice_in_dim(array, start, per_device) for array in plan
  )
  image = preprocess.crop_and_flip(images[indices], corners, mirrored, config.dataset.padding)
  image = preprocess.normalize(image, config.dataset.mean, config.dataset.std)
  return {'image': image, 'label': labels[indices]}


def plan_epoch(
  config: ConfigDict, num_images: int, number: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Draws all that is random in an epoch, so that its steps only read their parts.

  Args:
    config: A complete config.
    num_images: Number of training images.
    number: From `shuffle_number`.

  Returns:
    For the images of all batches, one after another: which training image it is [image], the corner
    of its crop [image, 2] and whether it is mirrored [image].
  """
  key = jax.random.fold_in(jax.random.key(config.seed), number)
  order_key, augment_key = jax.random.split(key)
  num_steps = num_images // config.batch_size
  order = jax.random.permutation(order_key, num_images)[: num_steps * config.batch_size]
  # A key per image of the global batch, so that images do not depend on the number of devices.
  keys = jax.vmap(partial(jax.random.fold_in, augment_key))(jnp.arange(num_steps))
  keys = jax.vmap(partial(_keys_of_images, count=config.batch_size, first=0))(keys).reshape(-1)
  return order, *preprocess.draw_crops(keys, config.dataset.padding, config.dataset.flip)


def _keys_of_images(key, first, count):
  return jax.vmap(partial(jax.random.fold_in, key))(first + jnp.arange(count))


def _prepare(config, device, start, batch, augments):
  """Normalizes an evaluation batch on its device."""
  image, dataset = batch['image'], config.dataset
  if augments:
    key = jax.random.fold_in(jax.random.key(config.seed), start)
    keys = _keys_of_images(key, device * len(image), len(image))
    crops = preprocess.draw_crops(keys, dataset.padding, dataset.flip)
    image = preprocess.crop_and_flip(image, *crops, dataset.padding)
  return {**batch, 'image': preprocess.normalize(image, dataset.mean, dataset.std)}
