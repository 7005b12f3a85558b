"""Writes images of a data set as PNG files, in a folder per class.

    python experiments/write_images.py --config=configs/mnist5k.py digits
    python experiments/write_images.py --config=configs/cifar100.py --per_class=2 pictures

The files can be classified by `python -m imta_jax.predict` and `imta_jax.serve`, and their folder
can be trained on with configs/image_folder.py.
"""

import argparse
from collections.abc import Sequence

import numpy as np
from etils import epath
from PIL import Image

from imta_jax import command_line, files
from imta_jax.data import prepare
from imta_jax.data.arrays import SPLITS


def main(arguments: Sequence[str] | None = None) -> None:
  """Runs the command line.

  Raises:
    UsageError: If the config or the data set is wrong, or the folder is not empty or cannot be
      written.
  """
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--config', required=True, help='config file, as in training')
  parser.add_argument('folder', help='folder to write; must be empty or absent')
  parser.add_argument(
    '--split', choices=SPLITS, default='test', help='which images; default: %(default)s'
  )
  parser.add_argument(
    '--per_class',
    type=command_line.positive(int),
    default=20,
    help='the first images of each class; default: %(default)s',
  )
  options = parser.parse_args(arguments)
  folder = epath.Path(options.folder)
  _, dataset = prepare.open_for(options.config, folder)
  images, labels = dataset.arrays.images[options.split], dataset.arrays.labels[options.split]
  with files.accessing(folder, prepare.FIX_HINT):
    count = write(folder, images, labels, dataset.class_names, options.per_class)
  print(f'{count:,} images of {len(dataset.class_names)} classes in {folder}')


def write(
  folder: epath.Path,
  images: np.ndarray,
  labels: np.ndarray,
  class_names: Sequence[str],
  per_class: int,
) -> int:
  """Writes the first images of each class.

  Args:
    folder: Where the folders of the classes are made.
    images: uint8 [image, height, width, channels].
    labels: [image].
    class_names: [class].
    per_class: The largest number of images of a class.

  Returns:
    The number of images.
  """
  count = 0
  for label, name in enumerate(class_names):
    of_class = folder / name
    of_class.mkdir(parents=True)
    for number, index in enumerate(np.flatnonzero(labels == label)[:per_class]):
      pixels = images[index]
      image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
      image.save(of_class / f'{number}.png')
      count += 1
  return count


if __name__ == '__main__':
  command_line.run(main)
