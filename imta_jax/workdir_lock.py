"""Keeps two runs from training in one workdir at the same time.

On a disk, the lock is the operating system's, which drops it when the process ends in any way.
Buckets have none. There, a run writes an object again and again, each time on the condition that no
other run has written it since; an object that stays the same for a minute was left by a killed run.
"""

import contextlib
import datetime
import fcntl
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from typing import NoReturn

import jax
from etils import epath

from imta_jax.errors import UsageError
from imta_jax.preemption import end_at_once
from imta_jax.workdir import accessing, reason_of

# Seconds between signs of life, between looks for them, and without any for a run that was killed.
_BETWEEN_SIGNS, _BETWEEN_LOOKS, _UNTIL_KILLED = 20, 5, 60
# Seconds in which a request has to succeed.
_PATIENCE = 20


@contextlib.contextmanager
def hold(workdir: epath.Path) -> Iterator[None]:
  """Holds the lock of a workdir; the first host does so for all.

  File systems without locks and buckets other than Google's have none, so that runs there are not
  told apart.

  Args:
    workdir: The run's folder, which is created if necessary.

  Raises:
    UsageError: If another run holds the lock, where the message names it, or if the lock cannot be
      read or written.
  """
  start = datetime.datetime.now().isoformat(' ', 'seconds')
  holder = f'process {os.getpid()} on {socket.gethostname()}, started at {start}'
  scheme, is_remote, _ = os.fspath(workdir).partition('://')
  if jax.process_index() or (is_remote and scheme != 'gs'):
    yield
    return
  with (_hold_object if is_remote else _hold_file)(workdir, holder):
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
def _hold_object(workdir, holder):
  lock = _ObjectLock(workdir, holder)
  with lock.accessing():
    lock.acquire()
  ended = threading.Event()
  keeper = threading.Thread(target=lock.keep, args=(ended,), daemon=True)
  keeper.start()
  try:
    yield
  finally:
    ended.set()
    keeper.join()
    with contextlib.suppress(UsageError), lock.accessing():
      lock.release()


class _ObjectLock:
  """An object of a bucket that a run keeps writing; its generation changes with each write."""

  def __init__(self, workdir: epath.Path, holder: str):
    try:
      from google.api_core import exceptions
      from google.auth.exceptions import GoogleAuthError
      from google.cloud import storage
    except ImportError as error:
      raise UsageError(
        f"{workdir} is in a bucket: pip install 'imta_jax[gcs]', or google-cloud-storage"
      ) from error
    self._workdir, self._holder = workdir, holder
    self._content = f'{holder}\n{uuid.uuid4()}\n'
    self._generation = 0
    self._errors = (exceptions.GoogleAPIError, GoogleAuthError, OSError, ValueError)
    self._is_changed, self._is_gone = exceptions.PreconditionFailed, exceptions.NotFound
    self._patience = {
      'timeout': _PATIENCE,
      'retry': storage.retry.DEFAULT_RETRY.with_timeout(_PATIENCE),
    }
    with self.accessing():
      bucket, _, folder = os.fspath(workdir).removeprefix('gs://').partition('/')
      self._bucket = storage.Client().bucket(bucket)
      self._name = f'{folder}/.lock'.lstrip('/')

  @contextlib.contextmanager
  def accessing(self) -> Iterator[None]:
    """Says in one line that the bucket cannot be reached."""
    try:
      yield
    except UsageError:  # Also a ValueError.
      raise
    except self._errors as error:
      raise UsageError(
        f'{self._workdir}/.lock cannot be read or written ({reason_of(error)}): check permissions, '
        'network and credentials, then run the same command again'
      ) from error

  def acquire(self) -> None:
    """Takes the lock, after a minute if a killed run has left it.

    Raises:
      UsageError: If another run holds it.
    """
    self._generation, content = self._read()
    if self._generation:
      print(
        f'{self._workdir} is in use by {_name(content)}, unless that run was killed: waiting '
        f'{_UNTIL_KILLED} s for a sign of life.',
        flush=True,
      )
    deadline = time.monotonic() + _UNTIL_KILLED
    while self._generation and time.monotonic() < deadline:
      time.sleep(_BETWEEN_LOOKS)
      generation, content = self._read()
      if generation not in (0, self._generation):
        _refuse(self._workdir, content)
      self._generation = generation
    if not self._write():
      _refuse(self._workdir, self._read()[1])

  def keep(self, ended: threading.Event) -> None:
    """Gives signs of life until the run has ended; ends the process if another run has the lock."""
    while not ended.wait(_BETWEEN_SIGNS):
      try:
        if self._write():
          continue
        _, content = self._read()
      except self._errors:
        continue  # The network may be back for the next sign.
      other = _name(content) or 'another run'
      end_at_once(f'stopped: {other} has taken over workdir {self._workdir}', 1)

  def release(self) -> None:
    """Deletes the lock, unless another run has taken it over."""
    blob = self._bucket.blob(self._name)
    with contextlib.suppress(self._is_changed):
      blob.delete(if_generation_match=self._generation, **self._patience)

  def _read(self) -> tuple[int, str]:
    """Returns the generation of the object and its content; 0 if there is none."""
    while (blob := self._bucket.get_blob(self._name, **self._patience)) is not None:
      with contextlib.suppress(self._is_gone):  # It may be written between the two requests.
        return blob.generation, blob.download_as_text(**self._patience)
    return 0, ''

  def _write(self) -> bool:
    """Gives a sign of life, and returns whether no other run has the lock."""
    blob = self._bucket.blob(self._name)
    condition = {'if_generation_match': self._generation}
    try:
      blob.upload_from_string(self._content, **condition, **self._patience)
      self._generation = blob.generation
    except self._is_changed:
      generation, content = self._read()
      # Repeated after an answer was lost, a write finds itself; a deleted lock is written again.
      if content not in (self._content, ''):
        return False
      self._generation = generation
    return True


def _name(content: str) -> str:
  return content.partition('\n')[0].strip()


def _refuse(workdir: epath.Path, content: str) -> NoReturn:
  raise UsageError(
    f'workdir {workdir} is in use by {_name(content)}: wait for that run, stop it, or choose '
    'another --workdir'
  )
