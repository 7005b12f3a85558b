"""Decodes the images of all requests, in turns and in bounded memory."""

import asyncio
import contextlib
import io
import os
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import BinaryIO

import numpy as np

from imta_jax.data.image_files import ImageError, image_size_and_channels

# Each scan of a JPEG takes a few bytes and a pass over the whole image. libtiff has the same limit.
_MAX_SCANS = 100


class Decoder:
  """Decodes images in threads.

  The images of a request that are decoded at the same time have together at most `max_pixels`
  pixels, those of all requests twice as many. Images that wait are decoded in the order in which
  they came up, and a request brings up further images only as its earlier ones are done. So a small
  request waits for a few images of a large one, never for all of them.
  """

  def __init__(self, read: Callable[[BinaryIO], np.ndarray], max_pixels: int):
    """Starts the threads.

    Args:
      read: Decodes an open file.
      max_pixels: See the class; larger images are left to `read` to refuse.
    """
    self._read = read
    # Memory is handed out in units: every image takes one, the largest all of a request.
    self._units = max(2, os.cpu_count() or 1)
    self._pixels_per_unit = max_pixels / self._units
    self._room = _Room(2 * self._units)
    self._threads = ThreadPoolExecutor(2 * self._units)

  async def decode(self, contents: Sequence[bytes]) -> list[np.ndarray | BaseException]:
    """Decodes the images of a request.

    Args:
      contents: The files.

    Returns:
      [image], what `read` has returned or raised; an ImageError for a JPEG of too many scans.
    """
    room = _Room(self._units)
    return await asyncio.gather(
      *(self._decode(content, room) for content in contents), return_exceptions=True
    )

  def close(self) -> None:
    """Ends the threads."""
    self._threads.shutdown()

  async def _decode(self, content, room):
    run = asyncio.get_running_loop().run_in_executor
    async with room.take(1), self._room.take(1):
      units, image = await run(self._threads, self._read_if_small, content)
    if image is not None:
      return image
    async with room.take(units), self._room.take(units):
      return await run(self._threads, self._read, io.BytesIO(content))

  def _read_if_small(self, content):
    """How many units an image takes, and the image if that is a single one."""
    _check_scans(content)
    (width, height), _ = image_size_and_channels(io.BytesIO(content))
    units = min(self._units, 1 + int(width * height / self._pixels_per_unit))
    return units, self._read(io.BytesIO(content)) if units == 1 else None


def _check_scans(content):
  # Within a scan, a byte of zeros follows each 0xff.
  if content.startswith(b'\xff\xd8') and (count := content.count(b'\xff\xda')) > _MAX_SCANS:
    raise ImageError(f'{count} scans: at most {_MAX_SCANS} are decoded')


class _Room:
  """A number of units, which are given in the order in which they are asked for."""

  def __init__(self, units: int):
    self._free = asyncio.Semaphore(units)
    self._line = asyncio.Lock()

  @contextlib.asynccontextmanager
  async def take(self, units: int) -> AsyncIterator[None]:
    """Waits for units, which are given back at the end."""
    taken = 0
    try:
      async with self._line:
        while taken < units:
          await self._free.acquire()
          taken += 1
      yield
    finally:
      for _ in range(taken):
        self._free.release()
