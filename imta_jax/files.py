"""Reads and writes whole files, local or in buckets; those read may be untrusted."""

import contextlib
import csv
import io
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from etils import epath

from imta_jax.errors import UsageError, first_line

_MAKE_ROOM = (
  'make room, correct its permissions or choose another place, then run the same command again'
)


def write_csv(path: epath.Path, rows: Sequence[Mapping[str, Any]]) -> None:
  """Writes rows with the same fields as a table."""
  table = io.StringIO()
  writer = csv.DictWriter(table, rows[0], lineterminator='\n')
  writer.writeheader()
  writer.writerows(rows)
  write_whole(path, table.getvalue().encode())


def read_whole(path: epath.Path, hint: str) -> bytes:
  """Reads an untrusted file.

  Args:
    path: The file.
    hint: What to do if it cannot be used, for the message.

  Raises:
    UsageError: If it cannot be read.
  """
  try:
    return path.read_bytes()
  except file_errors() as error:
    raise UsageError(f'{path} cannot be read ({reason_of(error)}): {hint}') from error


def write_whole(path: epath.Path, content: bytes) -> None:
  """Writes a file atomically: it is complete or absent.

  Raises:
    UsageError: If it cannot be written.
  """
  part = path.with_name(path.name + '.part')
  with accessing(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    part.write_bytes(content)
    part.replace(path)


@contextlib.contextmanager
def accessing(path: epath.Path, hint: str = _MAKE_ROOM) -> Iterator[None]:
  """Turns errors of the file system, as on a full disk, into errors of one line.

  Args:
    path: What is read or written.
    hint: What to do, for the message.

  Raises:
    UsageError: If the file system fails.
  """
  try:
    yield
  except file_errors() as error:
    raise UsageError(f'{path} cannot be read or written ({reason_of(error)}): {hint}') from error


def file_errors() -> tuple[type[Exception], ...]:
  """Returns the exceptions of file systems; buckets raise TensorFlow's, once it is imported."""
  tensorflow = sys.modules.get('tensorflow')
  return (OSError, tensorflow.errors.OpError) if tensorflow else (OSError,)


def reason_of(error: Exception) -> str:
  """Returns the message of a file system error, on one line."""
  return getattr(error, 'strerror', None) or first_line(error)


def size_and_time(path: epath.Path) -> tuple[int, int]:
  """Returns the size of a file in bytes and its time of modification in seconds.

  Unlike `epath.Path.stat`, which looks the owner up, it takes files of any owner.
  """
  if '://' in str(path):
    stat = path.stat()
    return stat.length, int(stat.mtime)
  stat = os.stat(path)
  return stat.st_size, int(stat.st_mtime)
