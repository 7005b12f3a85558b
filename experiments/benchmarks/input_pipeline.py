"""Measures images per second from encoded files to training batches: ours, and PyTorch's.

    TFDS_DATA_DIR=… python experiments/benchmarks/input_pipeline.py --config=configs/imagenet.py

Ours: the batches that training uses, decoded, cropped, flipped, and normalized on the device. With
as many --images per turn as the data set has, a turn crosses from one epoch to the next.

Peer, if PyTorch is installed: encoded images, already in memory, through Pillow (JPEG draft mode,
random resized crop, flip) in worker processes of torch's DataLoader. Its batches are uint8. The two
take turns and never run at the same time.
"""

import argparse
import io
import itertools
import os
import random
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

# Worker processes import this module: JAX and TensorFlow are imported where they are needed.


def main() -> None:
  """Runs the command line."""
  import common

  from imta_jax import config as config_lib
  from imta_jax.command_line import output_file, positive
  from imta_jax.data.pipeline import open_dataset
  from imta_jax.errors import UsageError

  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--config', default='configs/imagenet.py', help='default: %(default)s')
  parser.add_argument('--images', type=positive(int), default=4096, help='per turn; default: 4096')
  parser.add_argument('--batch_size', type=positive(int), default=64, help='default: 64')
  parser.add_argument('--repeats', type=positive(int), default=3, help='turns of each; default: 3')
  parser.add_argument('--output', type=output_file, help='JSON file for all figures')
  options = parser.parse_args()
  config = config_lib.load(options.config)
  if config.dataset.in_memory:
    raise UsageError(f'{options.config} keeps its images in memory: choose one that streams them')
  if 4 * options.batch_size > options.images:
    raise UsageError(f'--images={options.images} must be at least four batches')
  config.batch_size = options.batch_size

  cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
  open_dataset(config)  # Prepare the data set if necessary, or report what is wrong with it.
  rates = {'ours': []} | ({'peer': []} if common.is_installed('torch') else {})
  encoded = encoded_images(config)
  for _ in range(options.repeats):
    rates['ours'].append(ours(config, options.images))
    if 'peer' in rates:
      rates['peer'].append(peer(encoded, config, options.images, cores))
  print(f'{common.machine()}\n')
  rows = [
    (name, common.spread(values, 0), common.spread([x / cores for x in values], 0))
    for name, values in rates.items()
  ]
  print(common.table(('pipeline', 'images/s', 'images/s per core'), rows))
  figures = {'cores': cores, 'images_per_second': rates}
  common.write_json(options.output, {'machine': common.machine(), **figures})


def encoded_images(config: Any) -> list[bytes]:
  """Returns the encoded files of up to 1,000 training images."""
  import tensorflow_datasets as tfds

  dataset = config.dataset
  builder = tfds.builder(dataset.name, data_dir=dataset.data_dir)
  examples = builder.as_dataset(
    split=dataset.train_split, decoders={'image': tfds.decode.SkipDecoding()}
  )
  return [example['image'] for example in tfds.as_numpy(examples.take(1000))]


def ours(config: Any, num_images: int) -> float:
  """Measures images per second of the batches that training uses."""
  import jax

  from imta_jax.data.pipeline import open_dataset

  read = open_dataset(config).train_reader(phase=0, first_step=0)
  batches = (jax.block_until_ready(read(step)) for step in itertools.count())
  return _rate(batches, config.batch_size, num_images)


def peer(encoded: Sequence[bytes], config: Any, num_images: int, workers: int) -> float:
  """Measures images per second of worker processes that use Pillow."""
  from torch.utils.data import DataLoader

  loader = DataLoader(
    Crops(encoded, config.dataset.image_size, 2 * num_images),
    config.batch_size,
    num_workers=workers,
    collate_fn=np.stack,
    multiprocessing_context='spawn',
  )
  return _rate(iter(loader), config.batch_size, num_images)


def _rate(batches: Iterator[Any], batch_size: int, num_images: int) -> float:
  """Measures images per second, after skipping the first quarter of the images."""
  num_batches = num_images // batch_size
  for _ in range(num_batches // 4):
    next(batches)
  start = time.perf_counter()
  for _ in range(num_batches):
    next(batches)
  return num_batches * batch_size / (time.perf_counter() - start)


class Crops:
  """A data set for DataLoader: random crops of encoded images, repeated up to a length."""

  def __init__(self, encoded: Sequence[bytes], size: int, length: int):
    self._encoded, self._size, self._length = encoded, size, length

  def __len__(self) -> int:
    return self._length

  def __getitem__(self, index: int) -> np.ndarray:
    return random_crop(self._encoded[index % len(self._encoded)], self._size)


def random_crop(encoded: bytes, size: int) -> np.ndarray:
  """Crops a random part of an image: 8 to 100 % of its area, at aspect ratios from 3/4 to 4/3.

  Args:
    encoded: The content of the image file.
    size: Side of the result, in pixels.

  Returns:
    [size, size, 3], uint8, flipped horizontally with probability 0.5.
  """
  from PIL import Image

  with Image.open(io.BytesIO(encoded)) as image:
    full_width, full_height = image.size
    left, top, width, height = _random_box(full_width, full_height)
    # A JPEG is decoded at the smallest size (full, half, quarter, …) that suffices for the crop.
    reduction = min(width, height) / size
    if reduction > 1:
      image.draft('RGB', (int(full_width / reduction), int(full_height / reduction)))
    image = image.convert('RGB')
  x, y = image.width / full_width, image.height / full_height
  box = (left * x, top * y, (left + width) * x, (top + height) * y)
  image = image.resize((size, size), Image.Resampling.BILINEAR, box)
  if random.random() < 0.5:
    image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
  return np.asarray(image)


def _random_box(width, height):
  """Draws left, top, width and height of a crop; the whole image if none of ten draws fits."""
  for _ in range(10):
    area = width * height * random.uniform(0.08, 1)
    ratio = np.exp(random.uniform(np.log(3 / 4), np.log(4 / 3)))
    box_width, box_height = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
    if 0 < box_width <= width and 0 < box_height <= height:
      left, top = random.randint(0, width - box_width), random.randint(0, height - box_height)
      return left, top, box_width, box_height
  return 0, 0, width, height


if __name__ == '__main__':
  from imta_jax import command_line

  command_line.run(main)
