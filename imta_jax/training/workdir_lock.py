"""Keeps two runs from training in one workdir at the same time.

On a disk, the lock is the operating system's, which drops it when the process ends in any way.
Buckets have none; there, the lock is a file that the run writes again every 20 seconds, and that
expires after a minute without.
"""

import contextlib
import datetime
import os
import socket
import threading
import time
from collections.abc import Iterator
from typing import NoReturn

import jax
from etils import epath

from imta_jax.errors import UsageError
from imta_jax.files import accessing, file_errors, write_whole

try:
  import fcntl
except ModuleNotFoundError:  # On Windows.
  fcntl = None  # type: ignore[assignment]

_SECONDS_BETWEEN_HEARTBEATS, _SECONDS_BETWEEN_LOOKS, _SECONDS_TO_EXPIRE = 20, 5, 60


@contextlib.contextmanager
def hold(workdir: epath.Path) -> Iterator[None]:
  """Holds the lock of a workdir; the first host does so for all.

  No lock is taken on file systems without locking, nor on Windows. In a bucket, two runs that start
  within a second are not told apart.

  Args:
    workdir: The run's folder, which is created if necessary.

  Raises:
    UsageError: If another run holds the lock, where the message names it, or if the lock cannot be
      read or written.
  """
  start = datetime.datetime.now().isoformat(' ', 'seconds')
  holder = f'process {os.getpid()} on {socket.gethostname()}, started at {start}'
  if jax.process_index():
    yield
    return
  with (_hold_in_bucket if '://' in os.fspath(workdir) else _hold_file)(workdir, holder):
    yield


@contextlib.contextmanager
def _hold_file(workdir, holder):
  path = workdir / '.lock'
  with accessing(path):
    workdir.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
  with os.fdopen(descriptor, 'r+') as file:
    try:
      if fcntl:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      _refuse(workdir, file.read())
    except OSError:
      pass  # The file system has no locks.
    with accessing(path):
      file.truncate(0)
      file.write(f'{holder}\n')
      file.flush()
    yield


@contextlib.contextmanager
def _hold_in_bucket(workdir, holder):
  path = workdir / '.lock'
  found = content = _read(path)
  if _is_alive(content):
    print(f'{workdir} was in use: waiting for its lock to expire or a heartbeat', flush=True)
  while _is_alive(content):
    time.sleep(_SECONDS_BETWEEN_LOOKS)
    content = _read(path)
    if content not in (found, ''):
      _refuse(workdir, content.partition(' ')[2])

  def beat():
    write_whole(path, f'{time.time():.0f} {holder}'.encode())

  def keep_beating():
    while not ended.wait(_SECONDS_BETWEEN_HEARTBEATS):
      with contextlib.suppress(UsageError):  # The network may be back for the next heartbeat.
        beat()

  beat()
  ended = threading.Event()
  keeper = threading.Thread(target=keep_beating, daemon=True)
  keeper.start()
  try:
    yield
  finally:
    ended.set()
    keeper.join()
    with contextlib.suppress(*file_errors()):
      path.unlink()


def _read(path):
  with accessing(path):
    return path.read_text() if path.exists() else ''


def _is_alive(content):
  return content != '' and time.time() < float(content.split()[0]) + _SECONDS_TO_EXPIRE


def _refuse(workdir: epath.Path, holder: str) -> NoReturn:
  raise UsageError(
    f'workdir {workdir} is in use by {holder.strip()}: wait for that run, stop it, or choose '
    'another --workdir'
  )
