"""A phase's checkpoints: saved in the background, whole or not at all, and verified when read."""

import contextlib
import gc
import sys
import zlib
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

_LATEST_KEPT = 2
_BEST_KEPT = 1


class Checkpoints:
  """The checkpoints in a folder: the latest few, and the best by validation accuracy."""

  def __init__(self, folder: epath.Path, read_only: bool = False):
    """Opens a folder, making it where it may write."""

    def accuracy(metrics):
      return metrics['validation_accuracy']

    self._folder = folder
    self._manager = ocp.CheckpointManager(
      folder,
      options=ocp.CheckpointManagerOptions(
        best_fn=accuracy,
        preservation_policy=AnyPreservationPolicy(
          [
            LatestN(_LATEST_KEPT),
            BestN(get_metric_fn=accuracy, n=_BEST_KEPT, keep_checkpoints_without_metrics=False),
          ]
        ),
        read_only=read_only,
        create=not read_only,
      ),
      item_names=('state', 'checksum'),
    )
    self._read_only = read_only

  def save(self, step: int, state: Any, validation_accuracy: float | None) -> None:
    """Saves a state, in the background.

    Args:
      step: Its step; a checkpoint of this step that exists is kept.
      state: A tree of arrays.
      validation_accuracy: What 'best' compares; None for a state that was not evaluated.
    """
    if step in self._manager.all_steps():
      return
    state = jax.device_get(state)
    self._manager.save(
      step,
      args=ocp.args.Composite(
        state=ocp.args.StandardSave(state), checksum=ocp.args.JsonSave({'crc32': _checksum(state)})
      ),
      metrics=None if validation_accuracy is None else {'validation_accuracy': validation_accuracy},
    )

  def steps(self, order: str) -> list[int]:
    """The steps of the checkpoints there are, the preferred one first.

    Args:
      order: 'last': latest first. 'best': by validation accuracy, the earliest of equals first;
        those without one after them.
    """
    steps = sorted(self._manager.all_steps(), reverse=True)
    if order == 'last':
      return steps
    metrics = {step: self._manager.metrics(step) for step in steps}
    return sorted(
      steps, key=lambda s: (-metrics[s]['validation_accuracy'], s) if metrics[s] else (0, -s)
    )

  def restore(self, like: Any, order: str = 'last') -> Any | None:
    """Reads the preferred checkpoint; passes over, and removes, those that are damaged.

    Args:
      like: A tree of the state's structure, shapes and types.
      order: See `steps`.

    Returns:
      The state as NumPy arrays, or None if there is no whole checkpoint.
    """
    like = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), like)
    for step in self.steps(order):
      try:
        with _quiet():
          read = self._manager.restore(
            step,
            args=ocp.args.Composite(
              state=ocp.args.StandardRestore(like), checksum=ocp.args.JsonRestore()
            ),
          )
        if read['checksum']['crc32'] != _checksum(read['state']):
          raise ValueError('its checksum does not fit')
        return read['state']
      except Exception as error:
        reason = str(error).strip().splitlines()[0][:100]
        logging.warning(
          'Checkpoint %s is damaged and passed over (%s).', self._folder / str(step), reason
        )
        if not self._read_only:
          self._manager.delete(step)
    return None

  def wait(self) -> None:
    """Waits until everything saved is on disk."""
    self._manager.wait_until_finished()

  def close(self) -> None:
    """Waits, and frees what the manager holds."""
    self._manager.close()


def _checksum(tree: Any) -> int:
  total = 0
  for leaf in jax.tree.leaves(tree):
    total = zlib.crc32(np.ascontiguousarray(leaf), total)
  return total


@contextlib.contextmanager
def _quiet():
  """Silences the tracebacks of reads that Orbax abandons when one of them fails."""
  hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
  try:
    yield
  finally:
    gc.collect()
    sys.unraisablehook = hook
