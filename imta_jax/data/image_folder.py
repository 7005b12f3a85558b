"""Folders of images: a folder per class, in train/ and test/ or split here."""

import bisect
import collections
import dataclasses
import hashlib
import os
import textwrap
import unicodedata
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
from ml_collections import ConfigDict

from imta_jax.data.arrays import SPLITS, Arrays
from imta_jax.data.image_files import (
  ImageError,
  find_files,
  image_size_and_channels,
  is_image,
  list_folder,
  read_image,
)
from imta_jax.errors import UsageError

NAME = 'image_folder'
# What to do about files that cannot be read, for messages.
FIX_HINT = 'restore or remove such files'
# Expected shares of the images: of all for testing, of the others for validation.
_SHARES = {'test': 0.2, 'validation': 0.1}
# What the folders of the splits are called, in any letter case.
_SPLIT_OF_FOLDER = {
  **dict.fromkeys(('train', 'training', 'training_set'), 'train'),
  **dict.fromkeys(('val', 'valid', 'validation'), 'validation'),
  **dict.fromkeys(('test', 'testing', 'test_set'), 'test'),
}
# Number of images whose headers `survey` reads, and of bad files that an error names.
_SURVEYED, _NAMED = 1_000, 5


@dataclasses.dataclass(frozen=True)
class ImageFolder:
  """The files of a data set.

  Attributes:
    class_names: Names of the classes, sorted.
    paths: {split: [image]}, paths of image files.
    labels: {split: int32 [image]}.
    is_split_here: Whether test images were split off by a hash of their paths.
    ignored: {extension or folder: number} of what is no image of a class.
  """

  class_names: list[str]
  paths: dict[str, list[str]]
  labels: dict[str, np.ndarray]
  is_split_here: bool
  ignored: collections.Counter[str]

  def summary(self) -> str:
    """Returns the classes, the numbers of images and what was ignored, in one line."""
    names = textwrap.shorten(', '.join(self.class_names), 100, placeholder=' …')
    counts = ', '.join(f'{len(paths):,} {split}' for split, paths in self.paths.items())
    ignored = ', '.join(f'{count:,} × {kind}' for kind, count in self.ignored.items())
    return (
      f'{len(self.class_names)} classes ({names}); {counts} images'
      + (' (split by a hash of their paths)' if self.is_split_here else '')
      + (f'; ignored: {ignored}' if ignored else '')
    )


@dataclasses.dataclass(frozen=True)
class Survey:
  """Summary of the headers of the images.

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
  images; without both, images for testing do, too. See `_split_off`.

  Args:
    root: The folder.

  Returns:
    Its images.

  Raises:
    UsageError: If it does not have that structure, or a class has too few images.
  """
  if not os.path.isdir(root or ''):
    raise UsageError(
      f'image folder {root!r} does not exist: config.dataset.data_dir must be a folder with a '
      'folder per class'
    )
  folders, ignored = _split_folders(root)
  classes = {split: _find_classes(path, ignored) for split, path in folders.items()}
  class_names = sorted(classes['train'])
  for split, found in classes.items():
    unknown = sorted(found.keys() - classes['train'].keys())
    if unknown:
      raise UsageError(
        f'{folders[split]} has a class {unknown[0]!r} that the training images do not have'
      )
  shares = {split: share for split, share in _SHARES.items() if split not in classes}
  paths: dict[str, list[str]] = {split: [] for split in SPLITS}
  labels: dict[str, list[int]] = {split: [] for split in SPLITS}
  for label, name in enumerate(class_names):
    of_class = {split: found.get(name, []) for split, found in classes.items()}
    if len(of_class['train']) <= len(shares):
      raise UsageError(
        f'class {name!r} of {root} has {len(of_class["train"])} training image(s), too few to hold '
        'some out: add images'
      )
    of_class |= _split_off(of_class['train'], root, shares)
    for split in SPLITS:
      paths[split] += of_class[split]
      labels[split] += [label] * len(of_class[split])
  arrays = {split: np.array(values, np.int32) for split, values in labels.items()}
  return ImageFolder(class_names, paths, arrays, 'test' in shares, ignored)


def title(dataset: ConfigDict) -> str:
  """Name of a data set for people; of a folder of images, that of the folder."""
  return os.path.basename(dataset.data_dir.rstrip('/')) if dataset.name == NAME else dataset.name


def _split_folders(root):
  """Returns {split: folder}, {'train': root} without splits, and a count of what is not used."""
  folders: dict[str, str] = {}
  others: collections.Counter[str] = collections.Counter()
  names, files = list_folder(root)
  for name in names:
    split = _SPLIT_OF_FOLDER.get(name.lower())
    if split is None:
      others[f'{name}/'] += 1
    elif split in folders:
      raise UsageError(f'{folders[split]} and {name}/ are both for {split}: keep one of them')
    else:
      folders[split] = os.path.join(root, name)
  if not folders:
    return {'train': root}, collections.Counter()
  if 'train' not in folders:
    given = ', '.join(f'{os.path.basename(path)}/' for path in folders.values())
    raise UsageError(f'{root} has {given} but no train/: add it, or rename a class of this name')
  if 'test' not in folders and 'validation' in folders:
    folders['test'] = folders.pop('validation')
  return folders, others + collections.Counter(map(_extension, files))


def relative_name(path: str, root: str) -> str:
  """Returns the path of a file below a folder, written alike on all systems."""
  return unicodedata.normalize('NFC', os.path.relpath(path, root).replace(os.sep, '/'))


def _split_off(paths, root, shares):
  """Splits files by thresholds on a hash of their relative paths, a number from 0 to 1.

  So adding or removing a file moves no other one, with one exception: a part that would be empty
  takes the file with the nearest hash, which goes back when another file comes below the threshold.

      hashes a: 0.1, b: 0.25, c: 0.5; shares {'test': 0.2, 'validation': 0.1}; thresholds 0.2, 0.28
      → {'test': [a], 'validation': [b], 'train': [c]}

  Args:
    paths: The files, more than there are shares.
    root: What their paths are relative to.
    shares: {split: share in what the splits before it leave}.

  Returns:
    {split: files}, with a file or more each; 'train' has those that are left.
  """
  hashed = sorted((_hash(relative_name(path, root)), path) for path in paths)
  ordered = [path for _, path in hashed]
  parts, start, threshold = {}, 0, 0
  for index, (split, share) in enumerate(shares.items()):
    threshold += share * (1 - threshold)
    last_end = len(ordered) - (len(shares) - index)  # Leaves each later part a file.
    end = min(max(bisect.bisect(hashed, (threshold,)), start + 1), last_end)
    parts[split] = ordered[start:end]
    start = end
  return {**parts, 'train': ordered[start:]}


def _hash(name):
  digest = hashlib.sha256(name.encode(errors='surrogateescape')).digest()
  return int.from_bytes(digest[:8], 'big') / 2**64


def _find_classes(folder, ignored):
  """Returns {class: image files} of the folders in a folder, and counts what is no image."""
  classes: dict[str, list[str]] = collections.defaultdict(list)
  names, files = list_folder(folder)
  ignored.update(map(_extension, files))
  for name in names:
    path = os.path.join(folder, name)
    files = list(find_files(path))
    images = list(filter(is_image, files))
    others = collections.Counter(_extension(path) for path in files if not is_image(path))
    if not images:
      raise UsageError(
        f'class folder {path} has no images that can be read ({", ".join(others) or "empty"}): '
        'convert them to JPEG or PNG, or remove the folder'
      )
    classes[unicodedata.normalize('NFC', name)] += images
    ignored.update(others)
  if len(classes) < 2:
    raise UsageError(
      f'image folder {folder!r} has {len(classes)} folder(s) with images: it needs a folder per '
      'class, and two classes or more'
    )
  return classes


def _extension(path):
  return os.path.splitext(path)[1].lower() or 'no extension'


def survey(folder: ImageFolder) -> Survey:
  """Reads the headers of the images, or of a random part of them; leaves out those without one.

  Raises:
    UsageError: If none can be read; the message names files.
  """
  paths = [path for split in SPLITS for path in folder.paths[split]]
  if len(paths) > _SURVEYED:
    chosen = np.random.default_rng(0).choice(len(paths), _SURVEYED, replace=False)
    paths = [paths[index] for index in sorted(chosen)]
  headers, errors = _read_all(paths, image_size_and_channels)
  found = [header for header in headers if header is not None]
  if not found:
    _refuse(errors)
  sizes = {size for size, _ in found}
  return Survey(
    max(channels for _, channels in found),
    int(np.median([min(size) for size, _ in found])),
    len(sizes) == 1 and len(set(*sizes)) == 1,
  )


def read(folder: ImageFolder, image_shape: Sequence[int], crop: str) -> Arrays:
  """Reads all images into memory, as `image_files.read_image` does.

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
