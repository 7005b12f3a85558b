"""Finds image files, and decodes, crops and resizes them with Pillow."""

import contextlib
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps

from imta_jax.errors import UsageError

# Pillow supports more formats, but runs other programs to read some of them.
_FORMATS = ('BMP', 'GIF', 'JPEG', 'PNG', 'PPM', 'TIFF', 'WEBP')
EXTENSIONS = (
  *('.bmp', '.gif', '.pbm', '.pgm', '.png', '.pnm', '.ppm', '.tif', '.tiff', '.webp'),
  *('.jfif', '.jpe', '.jpeg', '.jpg'),
)
# What systems add to folders, besides hidden files.
_SYSTEM_NAMES = ('@eadir', '__macosx', 'desktop.ini', 'thumbs.db')

CROPS = ('none', 'center')
_MODES = {1: 'L', 3: 'RGB'}
_GREY_MODES = ('1', 'L', 'LA', 'I', 'F', 'I;16', 'I;16B', 'I;16L', 'I;16N')

# Decoding an image of this many pixels takes about 300 MB.
MAX_PIXELS = 2**26


class ImageError(ValueError):
  """Raised if an image cannot be read; the message says why, but does not name the file."""


def find_images(paths: Iterable[str]) -> Iterator[str]:
  """Finds image files.

  Args:
    paths: Files, with any extension, and folders, which are searched by `find_files`.

  Yields:
    Paths in the given order; the files of a folder are sorted by name.

  Raises:
    UsageError: If a folder cannot be read.
  """
  for path in paths:
    if os.path.isdir(path):
      yield from filter(is_image, find_files(path))
    else:
      yield path


def is_image(path: str) -> bool:
  """Whether a file has one of `EXTENSIONS`."""
  return path.lower().endswith(EXTENSIONS)


def find_files(folder: str) -> Iterator[str]:
  """Yields the visible files in a folder and its subfolders, sorted by name.

  Links to folders are followed, but no folder is searched twice, so that links in a circle end.

  Raises:
    UsageError: If a folder cannot be read.
  """
  seen = set(Path(os.path.realpath(folder)).parents)
  for place, folders, files in os.walk(folder, followlinks=True, onerror=_refuse):
    target = Path(os.path.realpath(place))
    if target in seen:
      folders.clear()
      continue
    seen.add(target)
    folders[:] = _visible(folders)
    yield from (os.path.join(place, name) for name in _visible(files))


def list_folder(folder: str) -> tuple[list[str], list[str]]:
  """Returns the names of the folders and of the files in a folder, without hidden and system ones.

  Raises:
    UsageError: If the folder cannot be read.
  """
  _, folders, files = next(os.walk(folder, onerror=_refuse))
  return _visible(folders), _visible(files)


def _visible(names):
  return sorted(n for n in names if not n.startswith('.') and n.lower() not in _SYSTEM_NAMES)


def _refuse(error: OSError) -> None:
  raise UsageError(f'{error.filename} cannot be read: {error.strerror}') from error


def read_image(
  file: str | BinaryIO, shape: Sequence[int], crop: str, max_pixels: int = MAX_PIXELS
) -> np.ndarray:
  """Reads an image, or the first frame of an animation, and applies its EXIF rotation.

  Transparent pixels are composited on white, and 16 bits per channel are scaled to 8.

  Args:
    file: A path, or an open file.
    shape: (height, width, channels) of the result; 1 channel is grey, 3 channels are RGB.
    crop: 'center' crops to the central square of 7/8 of the shorter side, like
      imta_jax.data.preprocess.decode_center_crop; 'none' keeps the whole image.
    max_pixels: Maximum number of pixels; larger images are refused before they are decoded.

  Returns:
    The image, uint8 of shape `shape`.

  Raises:
    ImageError: If the file is not an image, is corrupt or is too large.
    ValueError: If `crop` or the number of channels is unknown.
  """
  height, width, channels = shape
  if crop not in CROPS:
    raise ValueError(f'crop {crop!r} is unknown: choose one of {", ".join(CROPS)}')
  if channels not in _MODES:
    raise ValueError(f'{channels} channels cannot be read from image files: use 1 or 3')
  with _open(file, max_pixels) as image:
    image = _decode(image, _MODES[channels])
    if crop == 'center':
      image = image.crop(_central_square(*image.size))
    # Pillow antialiases when it shrinks, as TensorFlow does with antialias=True.
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(image).reshape(shape)


def decode_rgb(file: str | BinaryIO, shorter_side: int) -> Image.Image:
  """Decodes an image like `read_image` and shrinks it if its shorter side is longer than a number.

  Args:
    file: A path, or an open file.
    shorter_side: In pixels.

  Returns:
    The image in RGB.

  Raises:
    ImageError: If the file is not an image, is corrupt or is too large.
  """
  with _open(file, MAX_PIXELS) as image:
    scale = shorter_side / min(image.size)
    size = [math.ceil(scale * side) for side in image.size]
    image.draft(None, size)  # JPEGs are decoded at 1/2, 1/4 or 1/8 of their size, if that suffices.
    image = _decode(image, 'RGB')
    if scale < 1:
      image = ImageOps.contain(image, (max(size), max(size)), Image.Resampling.BILINEAR)
    return image


def random_crop(
  image: Image.Image, size: int, min_area: float, flip: bool, random: np.random.Generator
) -> np.ndarray:
  """Returns a random crop of an image, resized and possibly mirrored (Szegedy et al., 2015).

  Its aspect ratio is from 3/4 to 4/3, like that of imta_jax.data.preprocess.decode_random_crop.

  Args:
    image: An image in RGB.
    size: Side of the result in pixels.
    min_area: Minimum share of the image that the crop covers.
    flip: Whether to mirror half of the images.
    random: Draws the crop.

  Returns:
    [size, size, 3], uint8.
  """
  box = _random_box(image.width, image.height, min_area, random)
  image = image.resize((size, size), Image.Resampling.BILINEAR, box)
  if flip and random.random() < 0.5:
    image = ImageOps.mirror(image)
  return np.asarray(image)


def _random_box(width, height, min_area, random):
  """Draws (left, top, right, bottom), after ten misses the whole image."""
  for _ in range(10):
    area = width * height * random.uniform(min_area, 1)
    aspect = random.uniform(3 / 4, 4 / 3)
    box_width, box_height = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
    if 0 < box_width <= width and 0 < box_height <= height:
      left, top = random.integers((width - box_width + 1, height - box_height + 1))
      return left, top, left + box_width, top + box_height
  return 0, 0, width, height


def image_size_and_channels(file: str | BinaryIO) -> tuple[tuple[int, int], int]:
  """Reads ((width, height), channels) from the header of an image; grey images have 1 channel.

  Raises:
    ImageError: If the file is not an image or is too large.
  """
  with _open(file, MAX_PIXELS) as image:
    return image.size, 1 if image.mode in _GREY_MODES else 3


@contextlib.contextmanager
def _open(file, max_pixels):
  """Opens an image; whatever Pillow raises inside becomes an ImageError."""
  try:
    # Opening a pipe would wait forever.
    if isinstance(file, str) and os.path.exists(file) and not os.path.isfile(file):
      raise ImageError('not a regular file')
    with Image.open(file, formats=_FORMATS) as image:
      if image.width * image.height > max_pixels:
        size = f'{image.width} x {image.height}'
        raise ImageError(f'too large: {size} exceeds {max_pixels:,} pixels')
      # Nothing says which value is white. (Portable greymaps of mode I have values up to 65535.)
      if image.mode == 'F' or (image.mode == 'I' and image.format == 'TIFF'):
        kind = 'floating-point numbers' if image.mode == 'F' else '32-bit integers'
        raise ImageError(f'pixels are {kind}: save it with 8 or 16 bits per channel')
      yield image
  except ImageError:
    raise
  except Image.UnidentifiedImageError as error:
    raise ImageError(f'not an image: expected {", ".join(_FORMATS)}') from error
  except Exception as error:  # Pillow raises all kinds of exceptions for corrupt files.
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    raise ImageError(f'cannot be read: {reason or type(error).__name__}') from error


def _decode(image, mode):
  """Returns an image after its EXIF rotation, on white, in a mode of 8 bits per channel."""
  image = ImageOps.exif_transpose(image)
  if image.mode.startswith('I'):  # Converting to 8 bits clips, so values are scaled before.
    return image.convert('I').point(lambda value: value / 257 + 0.5).convert('L').convert(mode)
  if image.has_transparency_data:
    transparent = image.convert('RGBA')
    image = Image.new('RGB', image.size, 'white')
    image.paste(transparent, mask=transparent)
  return image.convert(mode)


def _central_square(width, height):
  """Returns (left, top, right, bottom)."""
  side = max(1, min(width, height) * 7 // 8)
  left, top = (width - side) // 2, (height - side) // 2
  return left, top, left + side, top + side
