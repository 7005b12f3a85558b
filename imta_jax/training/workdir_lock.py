"""Keeps two runs from training in one workdir at the same time.

On a disk, the lock is the operating system's, which drops it when the process ends in any way.
Buckets have none; there, the lock is a file that the run writes again every half minute, and that
expires without.
"""

import contextlib
import datetime
import fcntl
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

_SECONDS_BETWEEN_HEARTBEATS, _SECONDS_TO_EXPIRE = 30, 120


@contextlib.contextmanager
def hold(workdir: epath.Path) -> Iterator[None]:
  """Holds the lock of a workdir; the first host does so for all.

  No lock is taken on file systems without locking. In a bucket, two runs that start within a second
  are not told apart.

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
  with accessing(path):
    heartbeat, _, other = path.read_text().partition(' ') if path.exists() else ('0', '', '')
  seconds_left = float(heartbeat) + _SECONDS_TO_EXPIRE - time.time()
  if seconds_left > 0:
    _refuse(workdir, f'{other} (if it was killed, the lock expires in {seconds_left:.0f} s)')

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


def _refuse(workdir: epath.Path, holder: str) -> NoReturn:
  raise UsageError(
    f'workdir {workdir} is in use by {holder.strip()}: wait for that run, stop it, or choose '
    'another --workdir'
  )
