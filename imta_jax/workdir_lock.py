"""Keeps two runs from training in one workdir at the same time."""

import contextlib
import datetime
import fcntl
import os
import socket
from collections.abc import Iterator

import jax
from etils import epath

from imta_jax.errors import UsageError
from imta_jax.workdir import accessing


@contextlib.contextmanager
def hold(workdir: epath.Path) -> Iterator[None]:
  """Holds the lock of a workdir; the first host does so for all.

  The lock is the operating system's, which drops it when the process ends, however it ends. Buckets
  and file systems without locks have none, so that runs there are not told apart.

  Args:
    workdir: The run's folder, which is created if necessary.

  Raises:
    UsageError: If another run holds the lock; the message names it.
  """
  if jax.process_index() or '://' in os.fspath(workdir):
    yield
    return
  path = workdir / '.lock'
  with accessing(path):
    workdir.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
  with os.fdopen(descriptor, 'r+') as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
      raise UsageError(
        f'workdir {workdir} is in use by {file.read().strip()}: wait for that run, stop it, or '
        'choose another --workdir'
      ) from error
    except OSError:
      pass  # The file system has no locks.
    start = datetime.datetime.now().isoformat(' ', 'seconds')
    with accessing(path):
      file.truncate(0)
      file.write(f'process {os.getpid()} on {socket.gethostname()}, started at {start}\n')
      file.flush()
    yield
