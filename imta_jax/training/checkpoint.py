"""Checkpoints of a phase: saved atomically in the background, and verified when restored."""

import contextlib
import dataclasses
import os
import shutil
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

from imta_jax.errors import UsageError, first_line
from imta_jax.training.packing import pack_like, unpack

_LATEST_KEPT = 2


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
    self._folder = epath.Path(folder if '://' in str(folder) else os.path.abspath(folder))
    self._accuracies: dict[int, float | None] = {}
    self._manager: Any = None  # Stays None in read-only mode.
    with self._opening():
      self._reader = ocp.Checkpointer(ocp.CompositeCheckpointHandler(**_item_handlers()))
      if not read_only:
        options = ocp.CheckpointManagerOptions(
          preservation_policy=_LatestAndBest(self._preference),
          cleanup_tmp_directories=True,  # Of runs that were killed while they saved.
        )
        self._manager = ocp.CheckpointManager(
          self._folder, options=options, item_handlers=_item_handlers()
        )

  def save(self, step: int, state: Any, validation_accuracy: float | None) -> None:
    """Saves a state in the background.

    Args:
      step: Step of the state. If this step already has a checkpoint, nothing is saved.
      state: A tree of arrays; what is packed is saved as the tree that it stands for.
      validation_accuracy: The accuracy that ranks checkpoints for 'best'; None if not evaluated.

    Raises:
      UsageError: If there is no room for it, or an earlier checkpoint could not be saved.
    """
    if step in self._all_steps():
      return
    # Copies, because the devices may reuse the memory of the state while it is written.
    state = jax.tree.map(lambda leaf: np.array(leaf, order='C'), unpack(jax.device_get(state)))
    self._check_room(sum(leaf.nbytes for leaf in jax.tree.leaves(state)))
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
      UsageError: If an accuracy cannot be read at the moment; in read-only mode, also if it is
        corrupt.
    """
    if order == 'last':
      return sorted(self._all_steps(), reverse=True)
    self._load_accuracies()
    return sorted(self._all_steps(), key=self._preference)

  def restore(self, like: Any, order: str = 'last') -> Any | None:
    """Restores the preferred checkpoint.

    A training skips corrupt checkpoints and moves them to `<phase>_corrupt/`. In read-only mode a
    corrupt checkpoint is an error, since falling back would silently change predictions.

    Args:
      like: A tree with the structure, shapes and types of the state.
      order: See `steps`.

    Returns:
      The state as NumPy arrays, packed as in `like`, or None if there is no intact checkpoint.

    Raises:
      UsageError: If a checkpoint has a different structure or cannot be read at the moment; in
        read-only mode, also if the preferred one is corrupt.
    """
    self.wait()
    packed = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), like)
    like = unpack(packed)
    for step in self.steps(order):
      is_intact, state = self._attempt(step, partial(self._read, like))
      if is_intact:
        return pack_like(packed, state)
    return None

  def wait(self) -> None:
    """Waits until all saves are on disk.

    Raises:
      UsageError: If one could not be saved.
    """
    if self._manager is not None:
      with self._saving():
        self._manager.wait_until_finished()

  def close(self) -> None:
    """Waits until all saves are on disk, and frees the resources of Orbax.

    Raises:
      UsageError: If one could not be saved.
    """
    self._reader.close()
    if self._manager is not None:
      with self._saving():
        self._manager.close()

  def __enter__(self) -> 'Checkpoints':
    return self

  def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
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
        f'{self._folder} cannot be opened ({first_line(error)}): check that it exists and is '
        'yours, and for a bucket also network and credentials'
      ) from error

  @contextlib.contextmanager
  def _saving(self) -> Iterator[None]:
    try:
      yield
    except jax.errors.JaxRuntimeError:  # Of the devices or another host.
      raise
    except (OSError, ValueError, RuntimeError) as error:  # Of the file system, and of TensorStore.
      raise UsageError(
        f'a checkpoint in {self._folder} could not be saved ({first_line(error)}), and earlier '
        'ones are kept: make room or correct permissions, then run the same command again'
      ) from error

  def _check_room(self, num_bytes: int) -> None:
    """Refuses a save that a full disk would end halfway, of which Orbax reports at length."""
    if '://' in str(self._folder):
      return
    free = shutil.disk_usage(self._folder).free
    if free < num_bytes:
      raise UsageError(
        f'{self._folder} has {free:,} bytes free, but a checkpoint takes {num_bytes:,}; earlier '
        'ones are kept: make room, then run the same command again'
      )

  def _all_steps(self) -> list[int]:
    if self._manager is not None:
      return list(self._manager.all_steps())
    return ocp.utils.checkpoint_steps(self._folder) if self._folder.exists() else []

  def _read(self, like: Any, path: epath.Path) -> Any:
    stored = _structure(_item_handlers()['state'].metadata(path / 'state'))
    expected = _structure(like)
    if not stored:
      raise ValueError('its metadata cannot be read')
    for name in sorted({*stored, *expected}):
      if stored.get(name) != expected.get(name):
        raise UsageError(
          f'checkpoint {path} does not fit the network of this config: its {name} is '
          f'{stored.get(name, "absent")}, expected {expected.get(name, "absent")}; choose another '
          '--workdir'
        )
    args = ocp.args.Composite(state=ocp.args.StandardRestore(like), record=ocp.args.JsonRestore())
    read = self._reader.restore(path, args=args)
    if read['record']['crc32'] != _checksum(read['state']):
      raise ValueError('its checksum does not match')
    return read['state']

  def _read_accuracy(self, path: epath.Path) -> float | None:
    args = ocp.args.Composite(record=ocp.args.JsonRestore())
    accuracy = self._reader.restore(path, args=args)['record']['validation_accuracy']
    return None if accuracy is None else float(accuracy)

  def _attempt(self, step: int, read: Callable[[epath.Path], Any]) -> tuple[bool, Any]:
    """Reads something of a checkpoint on all hosts, or moves the checkpoint aside for all of them.

    Returns:
      Whether it could be read, and what was read.

    Raises:
      UsageError: If a host cannot read it at the moment, or if it is corrupt in read-only mode.
    """
    path, content, error = self._folder / str(step), None, None
    try:
      content = read(path)
    except UsageError:
      raise
    except Exception as caught:
      error = caught
    is_momentary = isinstance(error, OSError) and not isinstance(error, FileNotFoundError)
    # Hosts must not go on from different steps.
    is_corrupt, is_momentary = (
      multihost_utils.process_allgather(np.array([error is not None, is_momentary]))
      .reshape(-1, 2)
      .any(axis=0)
    )
    if not is_corrupt:
      return True, content
    reason = 'on another host' if error is None else first_line(error)[:200]
    if is_momentary:
      raise UsageError(f'checkpoint {path} cannot be read ({reason}): try again') from error
    if self._manager is None:
      raise UsageError(
        f'checkpoint {path} is corrupt ({reason}): run the training command again, which goes on '
        'from an intact one'
      ) from error
    logging.warning('Skipping corrupt checkpoint %s (%s).', path, reason)
    self._move_aside(path)
    return False, None

  def _move_aside(self, path: epath.Path) -> None:
    """Moves a corrupt checkpoint to another folder, where it can be inspected."""
    aside = self._folder.parent / f'{self._folder.name}_corrupt'
    aside.mkdir(parents=True, exist_ok=True)
    if jax.process_index() == 0:
      path.rename(aside / f'{path.name}_{len(list(aside.iterdir()))}')
    if jax.process_count() > 1:
      multihost_utils.sync_global_devices('corrupt checkpoint moved')
    self._manager.reload()

  def _load_accuracies(self) -> None:
    """Loads the accuracies of checkpoints of earlier runs; skips corrupt ones."""
    for step in sorted(set(self._all_steps()) - set(self._accuracies)):
      is_intact, accuracy = self._attempt(step, self._read_accuracy)
      if is_intact:
        self._accuracies[step] = accuracy

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


def _item_handlers() -> dict[str, ocp.CheckpointHandler]:
  return {'state': ocp.StandardCheckpointHandler(), 'record': ocp.JsonCheckpointHandler()}


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
    total = zlib.crc32(np.asarray(leaf).tobytes(), total)
  return total
