"""Files, local or in buckets."""

import os

from etils import epath


def size_and_time(path: epath.Path) -> tuple[int, int]:
  """Returns the size of a file in bytes and its time of modification in seconds.

  Unlike `epath.Path.stat`, which looks the owner up, it takes files of any owner.
  """
  if '://' in str(path):
    stat = path.stat()
    return stat.length, int(stat.mtime)
  stat = os.stat(path)
  return stat.st_size, int(stat.st_mtime)
