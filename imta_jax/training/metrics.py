"""Writes a phase's metrics to metrics.jsonl and optionally for TensorBoard."""

import contextlib
import importlib.util
import json
import os
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from imta_jax.errors import UsageError, first_line
from imta_jax.files import accessing, write_whole
from imta_jax.runtime import import_tensorflow

_SECONDS_BETWEEN_WRITES = 60


def has_tensorboard() -> bool:
  """Whether the packages that write for TensorBoard are installed."""
  return all(map(importlib.util.find_spec, ('clu', 'tensorboard', 'tensorflow')))


class Metrics:
  """Writes metrics on the first host; does nothing on the others.

  Each call of `write` adds a line to the JSON Lines file: 'step', 'phase', and a number per metric.
  A bucket gets several lines at once, since each addition sends the whole file there. TensorBoard's
  writer is created when it is first needed, because importing it takes seconds. A context manager
  that waits on exit until everything is on disk.
  """

  def __init__(
    self, path: epath.Path, phase: str, first_step: int, tensorboard_folder: epath.Path | None
  ):
    """Opens the metrics of a phase.

    Args:
      path: The JSON Lines file, shared by all phases.
      phase: Name of the phase.
      first_step: The step that the phase resumes from. Its lines for later steps, written by a run
        that was killed, are removed.
      tensorboard_folder: Folder for TensorBoard's files; None to write none.
    """
    self._path, self._phase, self._tensorboard_folder = path, phase, tensorboard_folder
    self._writer: Any = None
    self._lines: list[str] = []
    self._last_write = time.monotonic()
    self._seconds_between_writes = _SECONDS_BETWEEN_WRITES if '://' in os.fspath(path) else 0
    if jax.process_index() == 0 and path.exists():
      with accessing(path):
        lines = path.read_text().splitlines(keepends=True)
      kept = [line for line in lines if _is_kept(line, phase, first_step)]
      if kept != lines:
        write_whole(path, ''.join(kept).encode())

  def write(self, step: int, figures: Mapping[str, Any], prefix: str = '') -> None:
    """Writes the metrics of a step; arrays [exit] become one metric per exit.

    Raises:
      UsageError: If they cannot be written.
    """
    if jax.process_index() > 0:
      return
    scalars = {}
    for name, value in figures.items():
      if np.ndim(value):
        for number, item in enumerate(value, start=1):
          scalars[f'{prefix}{name}_exit_{number}'] = float(item)
      else:
        scalars[f'{prefix}{name}'] = float(value)
    self._lines.append(json.dumps({'step': step, 'phase': self._phase, **scalars}) + '\n')
    if time.monotonic() - self._last_write >= self._seconds_between_writes:
      self.flush()
    if self._tensorboard_folder is not None:
      with self._writing_tensorboard():
        self._tensorboard().write_scalars(step, scalars)

  def flush(self) -> None:
    """Writes all lines; to be called before their steps are saved, which are then not repeated.

    Raises:
      UsageError: If they cannot be written.
    """
    if self._lines:
      with accessing(self._path), self._path.open('a') as file:
        file.write(''.join(self._lines))  # TensorFlow's files, for buckets, have no `writelines`.
      self._lines, self._last_write = [], time.monotonic()

  def _tensorboard(self):
    if self._writer is None:
      import_tensorflow()
      from clu import metric_writers

      writer = metric_writers.SummaryWriter(str(self._tensorboard_folder))
      self._writer = metric_writers.AsyncWriter(writer)
    return self._writer

  @contextlib.contextmanager
  def _writing_tensorboard(self) -> Iterator[None]:
    try:
      yield
    except Exception as error:  # TensorFlow's, whose classes are not worth their import.
      reason = first_line(error).rpartition(';')[-1].strip()
      raise UsageError(
        f'{self._tensorboard_folder} cannot be written ({reason}): make room or set '
        'config.tensorboard to False, then run the same command again'
      ) from error

  def __enter__(self) -> 'Metrics':
    return self

  def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
    # What could not be written fails again here, where it must not hide the first error.
    with contextlib.suppress(UsageError) if kind else contextlib.nullcontext():
      self.close()

  def close(self) -> None:
    """Waits until everything is on disk.

    Raises:
      UsageError: If it cannot be written.
    """
    self.flush()
    if self._writer is not None:
      with self._writing_tensorboard():
        self._writer.close()


def _is_kept(line: str, phase: str, step: int) -> bool:
  """Whether a line is complete, and is of another phase or of a step that will not be repeated."""
  try:
    record = json.loads(line)
    return record['phase'] != phase or record['step'] <= step
  except (ValueError, KeyError, TypeError):  # Cut off when the run was killed, or not ours.
    return False
