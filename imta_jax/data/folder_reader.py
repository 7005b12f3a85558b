"""Reads image files with Pillow in threads, for folders of images that are streamed."""

import itertools
import math
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from imta_jax.data.dataset import shuffle_number
from imta_jax.data.image_files import ImageError, decode_rgb, random_crop, read_image
from imta_jax.data.image_folder import FIX_HINT, ImageFolder, relative_name
from imta_jax.data.streamed import in_groups, started_ahead, steps_per_epoch
from imta_jax.errors import UsageError

# Decoded training images are kept in memory up to this number of bytes per host: thousands of
# images of 300 × 400 pixels, whose epochs need not decode them again.
_MAX_KEPT = 2**31


class FolderReader:
  """Reads this host's part of a folder of images; see `streamed.Reader`."""

  def __init__(self, folder: ImageFolder, config: ConfigDict):
    self._folder, self._config = folder, config
    self._steps_per_epoch = steps_per_epoch(len(folder.paths['train']), config)
    self._pool = ThreadPoolExecutor(os.cpu_count())
    self._kept: dict[str, Image.Image] = {}
    self._room = _MAX_KEPT

  def train_batches(self, phase: int, first_step: int) -> Iterator[dict[str, np.ndarray]]:
    batch_size = self._config.batch_size // jax.process_count()
    images = self._train_images(phase, first_step, batch_size)
    return self._decode(images, 'train', batch_size, augments=True)

  def evaluation_batches(self, split: str) -> Iterator[dict[str, np.ndarray]]:
    batch_size = self._config.evaluation_batch_size // jax.process_count()
    augments = split == 'validation' and self._config.dataset.augment_validation
    own = range(jax.process_index(), len(self._folder.paths[split]), jax.process_count())
    # All hosts send the same number of batches; None stands for padding.
    num_batches = -(-len(self._folder.paths[split]) // (jax.process_count() * batch_size))
    padded = itertools.islice(
      itertools.chain(own, itertools.repeat(None)), num_batches * batch_size
    )
    images = ((index, [self._config.seed, index or 0]) for index in padded)
    return self._decode(images, split, batch_size, augments)

  def files(self, split: str) -> list[tuple]:
    root = self._config.dataset.data_dir

    def describe(path):
      try:
        with open(path, 'rb') as file:
          size = file.seek(0, os.SEEK_END)
          file.seek(size // 2)  # A sample of the pixels: uncompressed files have equal sizes.
          return relative_name(path, root), size, file.read(64)
      except OSError as error:
        raise UsageError(f'{path}: {error.strerror}: {FIX_HINT}') from error

    return list(self._pool.map(describe, self._folder.paths[split]))

  def _train_images(self, phase, first_step, batch_size):
    """Yields this host's training images from a step on: (index, seed of the crop)."""
    num_images = len(self._folder.paths['train'])
    epoch, position = divmod(first_step, self._steps_per_epoch)
    while True:
      seed = [self._config.seed, shuffle_number(phase, epoch)]
      order = np.random.default_rng(seed).permutation(num_images)
      own = order[jax.process_index() :: jax.process_count()]
      for index in own[position * batch_size : self._steps_per_epoch * batch_size]:
        yield int(index), [*seed, int(index)]
      epoch, position = epoch + 1, 0

  def _decode(
    self, images: Iterable, split: str, batch_size: int, augments: bool
  ) -> Iterator[dict[str, np.ndarray]]:
    """Yields batches of decoded images, while threads decode the next ones."""
    paths, labels = self._folder.paths[split], self._folder.labels[split]
    dataset = self._config.dataset
    side = dataset.image_size

    def decode(index, seed):
      if index is None:
        return np.zeros((side, side, 3), np.uint8)
      try:
        if augments:
          image, random = self._decoded(paths[index]), np.random.default_rng(seed)
          return random_crop(image, side, dataset.crop_area, dataset.flip, random)
        return read_image(paths[index], (side, side, 3), 'center')
      except ImageError as error:
        raise UsageError(f'{paths[index]}: {error}: {FIX_HINT}') from error

    def start(batch):
      indices = [index for index, _ in batch]
      return indices, [self._pool.submit(decode, *image) for image in batch]

    def finish(indices, futures):
      per_device = (jax.local_device_count(), -1)
      batch = {
        'image': np.stack([future.result() for future in futures]),
        'label': np.array([0 if i is None else labels[i] for i in indices], np.int32),
        'mask': np.array([i is not None for i in indices]),
      }
      return {name: array.reshape(*per_device, *array.shape[1:]) for name, array in batch.items()}

    for batch in started_ahead(map(start, in_groups(images, batch_size))):
      yield finish(*batch)

  def _decoded(self, path: str) -> Image.Image:
    """Returns an image of which the smallest crops still have the pixels that a network reads."""
    if path in self._kept:
      return self._kept[path]
    dataset = self._config.dataset
    image = decode_rgb(path, math.ceil(dataset.image_size / dataset.crop_area**0.5))
    num_bytes = 3 * image.width * image.height
    if num_bytes <= self._room:
      self._room -= num_bytes
      self._kept[path] = image
    return image
