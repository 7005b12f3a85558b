"""Decodes the images of all requests in turns."""

import asyncio
import io
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import BinaryIO

import numpy as np


class Decoder:
  """Decodes images in a thread per CPU core.

  A request queues further images only as its earlier ones are done, so that a small request waits
  for a few images of a large one, never for all of them.
  """

  def __init__(self, read: Callable[[BinaryIO], np.ndarray]):
    """Creates the threads.

    Args:
      read: Decodes an open file.
    """
    self._read = read
    self._num_threads = os.cpu_count() or 1
    self._threads = ThreadPoolExecutor(self._num_threads)

  async def decode(self, contents: Sequence[bytes]) -> list[np.ndarray | BaseException]:
    """Decodes the images of a request.

    Args:
      contents: The files.

    Returns:
      [image], what `read` has returned or raised.
    """
    turns, loop = asyncio.Semaphore(self._num_threads), asyncio.get_running_loop()

    async def decode(content):
      async with turns:
        return await loop.run_in_executor(self._threads, self._read, io.BytesIO(content))

    return await asyncio.gather(*map(decode, contents), return_exceptions=True)

  def close(self) -> None:
    """Ends the threads."""
    self._threads.shutdown()
