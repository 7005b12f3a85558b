"""Checkpoints of a phase: saved atomically in the background, and verified when restored."""

import contextlib
import dataclasses
import gc
import logging as std_logging
import os
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint.checkpoint_managers import PreservationPolicy

from imta_jax.errors import UsageError
from imta_jax.packing import pack_like, unpack

_LATEST_KEPT = 2
_QUIET_TO_THE_END: list[contextlib.ExitStack] = []


class Checkpoints:
  """The checkpoints in a folder: the latest two, and the best by validation accuracy.

  A context manager that waits on exit until all saves are on disk.
  """

  def __init__(self, folder: epath.Path, read_only: bool = False):
    """Opens the folder, and creates it unless `read_only` is set.

    Raises:
      UsageError: If it cannot be opened.
    """
    # Orbax needs absolute paths; paths with a scheme, such as gs://, are absolute.
    folder = epath.Path(folder if '://' in str(folder) else os.path.abspath(folder))
    self._folder, self._read_only = folder, read_only
    self._accuracies: dict[int, float | None] = {}
    self._quiet = contextlib.ExitStack()
    self._quiet.enter_context(_errors_once())
    # Orbax logs a warning for read-only folders.
    with self._opening(), _silent() if read_only else contextlib.nullcontext():
      self._manager = ocp.CheckpointManager(
        folder,
        options=ocp.CheckpointManagerOptions(
          preservation_policy=_LatestAndBest(self._preference),
          read_only=read_only,
          create=not read_only,
        ),
        item_handlers={
          'state': ocp.StandardCheckpointHandler(),
          'record': ocp.JsonCheckpointHandler(),
        },
      )

  def save(self, step: int, state: Any, validation_accuracy: float | None) -> None:
    """Saves a state in the background.

    Args:
      step: Step of the state. If this step already has a checkpoint, nothing is saved.
      state: A tree of arrays; what is packed is saved as the tree that it stands for.
      validation_accuracy: The accuracy that ranks checkpoints for 'best'; None if not evaluated.

    Raises:
      UsageError: If an earlier checkpoint could not be saved, or this one cannot.
    """
    if step in self._manager.all_steps():
      return
    # Copies, because the devices may reuse the memory of the state while it is written.
    state = jax.tree.map(lambda leaf: np.array(leaf, order='C'), unpack(jax.device_get(state)))
    self._load_accuracies()  # The policy of what is kept needs them.
    self._accuracies[step] = validation_accuracy
    record = {'crc32': _checksum(state), 'validation_accuracy': validation_accuracy}
    args = ocp.args.Composite(state=ocp.args.StandardSave(state), record=ocp.args.JsonSave(record))
    with self._saving():
      self._manager.save(step, args=args)

  def steps(self, order: str) -> list[int]:
    """Returns the steps of all checkpoints, the preferred one first.

    Args:
      order: 'last': latest first. 'best': highest validation accuracy first, and earliest first
        if equal; checkpoints without an accuracy come last.

    Raises:
      UsageError: If an accuracy cannot be read at the moment; where checkpoints are only read, also
        if it is damaged.
    """
    steps = sorted(self._manager.all_steps(), reverse=True)
    if order == 'last':
      return steps
    self._load_accuracies()
    return sorted(self._manager.all_steps(), key=self._preference)

  def restore(self, like: Any, order: str = 'last') -> Any | None:
    """Restores the preferred checkpoint.

    A training passes over damaged ones and moves them aside. Where checkpoints are only read, the
    preferred one is what is asked for, so that another one would silently give other answers.

    Args:
      like: A tree with the structure, shapes and types of the state.
      order: See `steps`.

    Returns:
      The state as NumPy arrays, packed as in `like`, or None if there is no intact checkpoint.

    Raises:
      UsageError: If a checkpoint has a different structure or cannot be read at the moment; where
        checkpoints are only read, also if the preferred one is damaged.
    """
    self.wait()
    packed = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), like)
    like = unpack(packed)
    for step in self.steps(order):
      is_intact, state = self._attempt(step, partial(self._read, step, like))
      if is_intact:
        return pack_like(packed, state)
    return None

  def wait(self) -> None:
    """Waits until all saves are on disk.

    Raises:
      UsageError: If one could not be saved.
    """
    with self._saving():
      self._manager.wait_until_finished()

  def close(self) -> None:
    """Waits until all saves are on disk, and frees the resources of Orbax.

    Raises:
      UsageError: If one could not be saved.
    """
    with self._saving():
      self._manager.close()
    self._quiet.close()

  def __enter__(self) -> 'Checkpoints':
    return self

  def __exit__(self, kind: type[BaseException] | None, *_) -> None:
    if kind and issubclass(kind, jax.errors.JaxRuntimeError) and jax.process_count() > 1:
      return  # Another host may have ended, for which Orbax would wait.
    # A save that has failed fails again here, where it must not hide the first error.
    with contextlib.suppress(UsageError) if kind else contextlib.nullcontext():
      self.close()

  @contextlib.contextmanager
  def _opening(self) -> Iterator[None]:
    try:
      yield
    except ImportError as error:  # Orbax opens buckets with it.
      raise UsageError(
        f"{self._folder} is in a bucket: pip install 'imta_jax[gcs]', or google-cloud-storage"
      ) from error
    except Exception as error:  # Of the file system, of TensorFlow and of Google's libraries.
      raise UsageError(
        f'{self._folder} cannot be opened ({_reason(error)}): check that it exists and is yours, '
        'and for a bucket also network and credentials'
      ) from error

  @contextlib.contextmanager
  def _saving(self) -> Iterator[None]:
    try:
      yield
    except jax.errors.JaxRuntimeError:  # Of the devices or another host.
      raise
    except (OSError, ValueError, RuntimeError) as error:  # Of the file system, and of TensorStore.
      # The operations that were abandoned report for as long as the process lives.
      _QUIET_TO_THE_END.append(self._quiet.pop_all())
      raise UsageError(
        f'a checkpoint in {self._folder} could not be saved ({_reason(error)}), and earlier ones '
        'are kept: make room or correct permissions, then run the same command again'
      ) from error

  def _read(self, step: int, like: Any) -> Any:
    # The manager would take what it saved to a bucket for unfinished, on all hosts but the first.
    handler = ocp.StandardCheckpointHandler()
    stored = _structure(handler.metadata(self._folder / str(step) / 'state'))
    expected = _structure(like)
    if not stored:
      raise ValueError('its metadata cannot be read')
    for name in sorted({*stored, *expected}):
      if stored.get(name) != expected.get(name):
        raise UsageError(
          f'checkpoint {self._folder / str(step)} does not fit the network of this config: its '
          f'{name} is {stored.get(name, "absent")}, expected {expected.get(name, "absent")}; '
          'choose another --workdir'
        )
    read = self._manager.restore(
      step,
      args=ocp.args.Composite(state=ocp.args.StandardRestore(like), record=ocp.args.JsonRestore()),
    )
    if read['record']['crc32'] != _checksum(read['state']):
      raise ValueError('its checksum does not match')
    return read['state']

  def _attempt(self, step: int, read: Callable[[], Any]) -> tuple[bool, Any]:
    """Reads something of a checkpoint on all hosts, or passes over the checkpoint on all of them.

    Returns:
      Whether it could be read, and what was read.

    Raises:
      UsageError: If a host cannot read it at the moment, or it is damaged and checkpoints are only
        read.
    """
    content = error = None
    try:
      content = read()
    except UsageError:
      raise
    except Exception as caught:
      error = caught
    is_momentary = isinstance(error, OSError) and not isinstance(error, FileNotFoundError)
    # Hosts must not go on from different steps.
    is_damaged, is_momentary = (
      multihost_utils.process_allgather(np.array([error is not None, is_momentary]))
      .reshape(-1, 2)
      .any(axis=0)
    )
    if not is_damaged:
      return True, content
    path = self._folder / str(step)
    reason = 'on another host' if error is None else _reason(error)
    if is_momentary:
      raise UsageError(f'checkpoint {path} cannot be read ({reason}): try again') from error
    if self._read_only:
      raise UsageError(
        f'checkpoint {path} is damaged ({reason}): run the training command again, which goes '
        'on from an intact one'
      ) from error
    logging.warning('Checkpoint %s is damaged and passed over (%s).', path, reason)
    self._set_aside(step)
    return False, None

  def _set_aside(self, step: int) -> None:
    """Moves a damaged checkpoint to another folder, where it can be inspected."""
    aside = self._folder.parent / f'{self._folder.name}_damaged'
    aside.mkdir(parents=True, exist_ok=True)
    if jax.process_index() == 0:
      number = len(list(aside.iterdir()))
      (self._folder / str(step)).rename(aside / f'{step}_{number}')
    if jax.process_count() > 1:
      multihost_utils.sync_global_devices('damaged checkpoint set aside')
    self._manager.reload()

  def _load_accuracies(self) -> None:
    """Loads the accuracies of checkpoints of earlier runs; passes over damaged ones."""
    for step in sorted(set(self._manager.all_steps()) - set(self._accuracies)):
      is_intact, accuracy = self._attempt(step, partial(self._read_accuracy, step))
      if is_intact:
        self._accuracies[step] = accuracy

  def _read_accuracy(self, step: int) -> float | None:
    args = ocp.args.Composite(record=ocp.args.JsonRestore())
    accuracy = self._manager.restore(step, args=args)['record']['validation_accuracy']
    return None if accuracy is None else float(accuracy)

  def _preference(self, step: int) -> tuple[bool, float, int]:
    """A sort key that puts the best checkpoint first, once the accuracies are loaded."""
    accuracy = self._accuracies[step]
    return (True, 0.0, -step) if accuracy is None else (False, -accuracy, step)


@dataclasses.dataclass(frozen=True)
class _LatestAndBest(PreservationPolicy):
  """Keeps the latest checkpoints and the preferred one."""

  preference: Any

  def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
    del context
    steps = [checkpoint.step for checkpoint in checkpoints]
    kept = {*sorted(steps)[-_LATEST_KEPT:], *sorted(steps, key=self.preference)[:1]}
    return [step in kept for step in steps]


def _structure(tree: Any) -> dict[str, str]:
  """Returns the type and shape of each leaf by name."""
  leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
  return {
    jax.tree_util.keystr(path, simple=True, separator='/'): f'{np.dtype(leaf.dtype)}{leaf.shape}'
    for path, leaf in leaves
  }


def _reason(error: Exception) -> str:
  """Returns what is wrong, on one line."""
  if isinstance(error, OSError) and error.strerror:
    return error.strerror
  # TensorStore's messages go from the general to the cause, and end with all that it knows.
  words = ' '.join(str(error).partition(' [')[0].split()) or type(error).__name__
  return ': '.join(words.split(': ')[-2:])[:200]


def _checksum(tree: Any) -> int:
  total = 0
  for leaf in jax.tree.leaves(tree):
    total = zlib.crc32(np.ascontiguousarray(leaf), total)
  return total


@contextlib.contextmanager
def _silent() -> Iterator[None]:
  """Suppresses warnings."""
  verbosity = logging.get_verbosity()
  logging.set_verbosity(logging.ERROR)
  try:
    yield
  finally:
    logging.set_verbosity(verbosity)


@contextlib.contextmanager
def _errors_once() -> Iterator[None]:
  """Keeps Orbax from printing what it also raises, and what became of operations it abandoned."""

  def is_news(record):
    return record.levelno < std_logging.ERROR or 'orbax' not in record.pathname

  def report(unraisable):
    if 'Event loop is closed' not in str(unraisable.exc_value):
      hook(unraisable)

  hook, sys.unraisablehook = sys.unraisablehook, report
  logging.get_absl_logger().addFilter(is_news)
  try:
    yield
  finally:
    gc.collect()
    sys.unraisablehook = hook
    logging.get_absl_logger().removeFilter(is_news)
