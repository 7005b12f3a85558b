"""Image files as a network reads them: found, decoded, cropped and resized, by Pillow alone."""

import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps

# Pillow knows more formats, some of which start other programs.
_FORMATS = ('BMP', 'GIF', 'JPEG', 'PNG', 'PPM', 'TIFF', 'WEBP')
EXTENSIONS = ('.bmp', '.gif', '.jpeg', '.jpg', '.pgm', '.png', '.ppm', '.tif', '.tiff', '.webp')

CROPS = ('none', 'center')
_MODES = {1: 'L', 3: 'RGB'}

# An image of this many pixels takes some 300 MB while it is decoded.
MAX_PIXELS = 2**26

# What Pillow warns of is refused here, or does no harm.
warnings.simplefilter('error', Image.DecompressionBombWarning)
warnings.filterwarnings('ignore', category=UserWarning, module='PIL')


class ImageError(ValueError):
  """An image that cannot be read; its message says why, but not which."""


def find_images(paths: Iterable[str]) -> Iterator[str]:
  """Image files, as they are named or found in folders.

  Args:
    paths: Files, which are taken whatever their name, and folders, which are searched with all
      folders in them for `EXTENSIONS`.

  Yields:
    Paths, in the order given; those of a folder sorted by name.
  """
  for path in paths:
    if not os.path.isdir(path):
      yield path
      continue
    for folder, folders, files in os.walk(path):
      folders.sort()
      for file in sorted(files):
        if file.lower().endswith(EXTENSIONS):
          yield os.path.join(folder, file)


def read_image(
  file: str | BinaryIO, shape: Sequence[int], crop: str, max_pixels: int = MAX_PIXELS
) -> np.ndarray:
  """Reads an image, turned upright as its EXIF data says; of an animation the first picture.

  Args:
    file: A path, or an open file.
    shape: (height, width, channels) of the result; 1 channel is grey, 3 are red, green and blue.
    crop: 'center' takes what imta_jax.data.preprocess.decode_center_crop takes, the central square
      of 7/8 of the shorter side; 'none' takes all.
    max_pixels: Images of more are refused before they are decoded.

  Returns:
    `shape`, uint8.

  Raises:
    ImageError: If it is no image, damaged, or too large.
    ValueError: If `crop` or the number of channels is unknown.
  """
  height, width, channels = shape
  if crop not in CROPS:
    raise ValueError(f'crop {crop!r} is unknown: take one of {", ".join(CROPS)}')
  if channels not in _MODES:
    raise ValueError(f'{channels} channels cannot be read from image files: take 1 or 3')
  try:
    with Image.open(file, formats=_FORMATS) as image:
      if image.width * image.height > max_pixels:
        raise ImageError(_too_large(f'{image.width} x {image.height}', max_pixels))
      image = _with_mode(ImageOps.exif_transpose(image), _MODES[channels])
      if crop == 'center':
        image = image.crop(_central_square(*image.size))
      # With Pillow it blurs what it shrinks, as TensorFlow does with antialias=True.
      image = image.resize((width, height), Image.Resampling.BILINEAR)
      return np.asarray(image).reshape(shape)
  except ImageError:
    raise
  except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
    raise ImageError(_too_large('it', max_pixels)) from error
  except Image.UnidentifiedImageError as error:
    raise ImageError(f'no image that can be read: expected {", ".join(_FORMATS)}') from error
  except Exception as error:  # Damaged files make Pillow raise exceptions of any kind.
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    raise ImageError(f'cannot be read: {reason or type(error).__name__}') from error


def _too_large(size, max_pixels):
  return f'too large: {size} exceeds {max_pixels:,} pixels'


def _with_mode(image, mode):
  if image.mode.startswith('I;16'):  # Pillow would cut off what exceeds 255.
    image = image.point(lambda value: value / 257, 'L')
  return image.convert(mode)


def _central_square(width, height):
  """(left, top, right, bottom)."""
  side = max(1, min(width, height) * 7 // 8)
  left, top = (width - side) // 2, (height - side) // 2
  return left, top, left + side, top + side
