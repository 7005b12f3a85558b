"""Folders of images: a folder per class, in train/ and test/ or split here."""

import dataclasses
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np

from imta_jax.data.arrays import SPLITS, Arrays
from imta_jax.data.image_files import ImageError, find_images, image_size_and_channels, read_image
from imta_jax.errors import UsageError

NAME = 'image_folder'
# What to do about files that cannot be read, for messages.
FIX_HINT = 'restore or remove such files'
# Seed of the split of a folder that has none.
SPLIT_SEED = 0
# Shares of the images of each class: of all for testing, of the others for validation.
_TEST_SHARE, _VALIDATION_SHARE = 0.2, 0.1
_TRAIN = 'train'
_VALIDATION_NAMES, _TEST_NAMES = ('val', 'valid', 'validation'), ('test',)
# Number of images whose headers `survey` reads, and of bad files that an error names.
_SURVEYED, _NAMED = 1_000, 5


@dataclasses.dataclass(frozen=True)
class ImageFolder:
  """The files of a data set.

  Attributes:
    class_names: Names of the classes, sorted.
    paths: {split: [image]}, paths of image files.
    labels: {split: int32 [image]}.
    is_split_here: Whether test images were split off by SPLIT_SEED.
  """

  class_names: list[str]
  paths: dict[str, list[str]]
  labels: dict[str, np.ndarray]
  is_split_here: bool


@dataclasses.dataclass(frozen=True)
class Survey:
  """What the headers of the images say.

  Attributes:
    channels: 3 if any image has colours, otherwise 1.
    shorter_side: Median of the shorter sides, in pixels.
    is_uniform: Whether all images are squares of the same size.
  """

  channels: int
  shorter_side: int
  is_uniform: bool


def scan(root: str) -> ImageFolder:
  """Finds the images and classes of a folder.

  The folder has a folder per class, or train/ and optionally test/ and val/ with a folder per class
  each. Images for validation come from val/ if there is test/ as well, otherwise from the training
  images; without both, images for testing do, too. Classes are split in equal shares.

  Args:
    root: The folder.

  Returns:
    Its images.

  Raises:
    UsageError: If it does not have that structure, or a class has too few images.
  """
  if not os.path.isdir(root):
    raise UsageError(f'image folder {root!r} does not exist: give a folder with a folder per class')
  has_train = os.path.isdir(os.path.join(root, _TRAIN))
  train = _find_classes(os.path.join(root, _TRAIN) if has_train else root)
  class_names = sorted(train)
  given = {}
  if has_train:
    for split, names in (('validation', _VALIDATION_NAMES), ('test', _TEST_NAMES)):
      folders = [path for name in names if os.path.isdir(path := os.path.join(root, name))]
      if folders:
        given[split] = _of_known_classes(folders[0], class_names)
    if 'test' not in given and 'validation' in given:
      given['test'] = given.pop('validation')
  splits = {split: given.get(split, {name: [] for name in class_names}) for split in SPLITS}
  random = np.random.default_rng(SPLIT_SEED)
  for name in class_names:
    remaining = [train[name][index] for index in random.permutation(len(train[name]))]
    for split, share in (('test', _TEST_SHARE), ('validation', _VALIDATION_SHARE)):
      if split not in given:
        count = max(1, round(share * len(remaining)))
        splits[split][name], remaining = remaining[:count], remaining[count:]
    if not remaining:
      raise UsageError(
        f'class {name!r} of {root} has {len(train[name])} training image(s), too few to hold some '
        'out: add images'
      )
    splits['train'][name] = remaining
  return ImageFolder(
    class_names,
    {split: [path for name in class_names for path in splits[split][name]] for split in SPLITS},
    {
      split: np.repeat(
        np.arange(len(class_names), dtype=np.int32),
        [len(splits[split][name]) for name in class_names],
      )
      for split in SPLITS
    },
    'test' not in given,
  )


def _find_classes(folder: str) -> dict[str, list[str]]:
  """Returns {class: image files} of the folders in a folder that have images."""
  with os.scandir(folder) as entries:
    names = sorted(e.name for e in entries if e.is_dir() and not e.name.startswith('.'))
  classes = {name: list(find_images([os.path.join(folder, name)])) for name in names}
  classes = {name: paths for name, paths in classes.items() if paths}
  if len(classes) < 2:
    raise UsageError(
      f'image folder {folder!r} has {len(classes)} folder(s) with images: it needs a folder per '
      'class, and two classes or more'
    )
  return classes


def _of_known_classes(folder, class_names):
  found = _find_classes(folder)
  unknown = sorted(set(found) - set(class_names))
  if unknown:
    raise UsageError(f'{folder} has a class {unknown[0]!r} that the training images do not have')
  return {name: found.get(name, []) for name in class_names}


def survey(folder: ImageFolder) -> Survey:
  """Reads the headers of the images, or of a random part of them; leaves out those without one.

  Raises:
    UsageError: If none can be read; the message names files.
  """
  headers, errors = _read_headers(folder)
  found = [header for header in headers if header is not None]
  if not found:
    _refuse(errors)
  sizes = {size for size, _ in found}
  return Survey(
    max(channels for _, channels in found),
    int(np.median([min(size) for size, _ in found])),
    len(sizes) == 1 and len(set(*sizes)) == 1,
  )


def check_headers(folder: ImageFolder) -> None:
  """Checks the headers that `survey` reads.

  Raises:
    UsageError: If some files have none; the message names them.
  """
  _, errors = _read_headers(folder)
  if errors:
    _refuse(errors)


def read(folder: ImageFolder, image_shape: Sequence[int], crop: str) -> Arrays:
  """Reads all images into memory.

  Args:
    folder: The files.
    image_shape: (height, width, channels) to which they are brought.
    crop: See `image_files.read_image`.

  Returns:
    The arrays.

  Raises:
    UsageError: If images cannot be read; the message names files.
  """
  read_one = partial(read_image, shape=image_shape, crop=crop)
  images = {}
  for split, paths in folder.paths.items():
    found, errors = _read_all(paths, read_one)
    if errors:
      _refuse(errors)
    images[split] = np.stack(found)
  return Arrays(folder.class_names, images, folder.labels)


def _read_headers(folder):
  paths = [path for split in SPLITS for path in folder.paths[split]]
  if len(paths) > _SURVEYED:
    chosen = np.random.default_rng(SPLIT_SEED).choice(len(paths), _SURVEYED, replace=False)
    paths = [paths[index] for index in sorted(chosen)]
  return _read_all(paths, image_size_and_channels)


def _read_all(paths, read_one):
  """Calls read_one(path) for all files in threads; Pillow decodes without the interpreter lock.

  Returns:
    What it returned, None for files that cannot be read, and a line for each of these.
  """

  def attempt(path):
    try:
      return read_one(path), None
    except ImageError as error:
      return None, f'{path}: {error}'

  with ThreadPoolExecutor(os.cpu_count()) as pool:
    results, errors = zip(*pool.map(attempt, paths), strict=True)
  return results, [error for error in errors if error]


def _refuse(errors):
  more = f'; and {len(errors) - _NAMED} more' if len(errors) > _NAMED else ''
  raise UsageError(
    f'{len(errors)} image(s) cannot be read: {"; ".join(errors[:_NAMED])}{more}: ' + FIX_HINT
  )
