"""Checkpoints of a phase: saved atomically in the background, and verified when restored."""

import contextlib
import dataclasses
import gc
import os
import sys
import zlib
from collections.abc import Iterator, Sequence
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


class Checkpoints:
  """The checkpoints in a folder: the latest two, and the best by validation accuracy.

  A context manager that waits on exit until all saves are on disk.
  """

  def __init__(self, folder: epath.Path, read_only: bool = False):
    """Opens the folder, and creates it unless `read_only` is set."""
    # Orbax needs absolute paths; paths with a scheme, such as gs://, are absolute.
    folder = epath.Path(folder if '://' in str(folder) else os.path.abspath(folder))
    self._folder, self._read_only = folder, read_only
    self._accuracies: dict[int, float | None] = {}
    # Orbax logs a warning for read-only folders.
    with _silent() if read_only else contextlib.nullcontext():
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
    """
    if step in self._manager.all_steps():
      return
    # Copies, because the devices may reuse the memory of the state while it is written.
    state = jax.tree.map(lambda leaf: np.array(leaf, order='C'), unpack(jax.device_get(state)))
    self._accuracies[step] = validation_accuracy
    record = {'crc32': _checksum(state), 'validation_accuracy': validation_accuracy}
    self._manager.save(
      step,
      args=ocp.args.Composite(state=ocp.args.StandardSave(state), record=ocp.args.JsonSave(record)),
    )

  def steps(self, order: str) -> list[int]:
    """Returns the steps of all checkpoints, the preferred one first.

    Args:
      order: 'last': latest first. 'best': highest validation accuracy first, and earliest first
        if equal; checkpoints without an accuracy come last.
    """
    steps = sorted(self._manager.all_steps(), reverse=True)
    return steps if order == 'last' else sorted(steps, key=self._preference)

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
      try:
        with _quiet():
          return pack_like(packed, self._read(step, like))
      except UsageError:
        raise
      except Exception as error:
        path = self._folder / str(step)
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:100]
        if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
          raise UsageError(f'checkpoint {path} cannot be read ({reason}): try again') from error
        if self._read_only:
          raise UsageError(
            f'checkpoint {path} is damaged ({reason}): run the training command again, which goes '
            'on from an intact one'
          ) from error
        logging.warning('Checkpoint %s is damaged and passed over (%s).', path, reason)
        self._set_aside(step)
    return None

  def wait(self) -> None:
    """Waits until all saves are on disk."""
    self._manager.wait_until_finished()

  def close(self) -> None:
    """Waits until all saves are on disk, and frees the resources of Orbax."""
    self._manager.close()

  def __enter__(self) -> 'Checkpoints':
    return self

  def __exit__(self, *_) -> None:
    self.close()

  def _read(self, step: int, like: Any) -> Any:
    stored = _structure(self._manager.item_metadata(step)['state'])
    expected = _structure(like)
    if not stored:
      raise ValueError('its metadata cannot be read')
    for name in sorted({*stored, *expected}):
      if stored.get(name) != expected.get(name):
        raise UsageError(
          f'checkpoint {self._folder / str(step)} was written by another version of this program: '
          f'its {name} is {stored.get(name, "absent")}, expected {expected.get(name, "absent")}; '
          'choose another --workdir'
        )
    read = self._manager.restore(
      step,
      args=ocp.args.Composite(state=ocp.args.StandardRestore(like), record=ocp.args.JsonRestore()),
    )
    if read['record']['crc32'] != _checksum(read['state']):
      raise ValueError('its checksum does not match')
    return read['state']

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

  def _preference(self, step: int) -> tuple[bool, float, int]:
    """A sort key that puts the best checkpoint first."""
    if step not in self._accuracies:
      try:
        args = ocp.args.Composite(record=ocp.args.JsonRestore())
        record = self._manager.restore(step, args=args)['record']
        self._accuracies[step] = record['validation_accuracy']
      except Exception:  # Damaged; restoring the state will report it.
        self._accuracies[step] = None
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
def _quiet() -> Iterator[None]:
  """Suppresses the tracebacks of reads that Orbax abandons after one of them has failed."""
  hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
  try:
    yield
  finally:
    gc.collect()
    sys.unraisablehook = hook
