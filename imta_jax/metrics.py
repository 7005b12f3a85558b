"""Writes a phase's metrics to metrics.jsonl and optionally for TensorBoard."""

import contextlib
import importlib.util
import json
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from imta_jax.errors import UsageError
from imta_jax.import_tensorflow import import_tensorflow
from imta_jax.workdir import accessing, write_whole


def has_tensorboard() -> bool:
  """Whether the packages that write for TensorBoard are installed."""
  return all(map(importlib.util.find_spec, ('clu', 'tensorboard', 'tensorflow')))


class Metrics:
  """Writes metrics on the first host; does nothing on the others.

  Each call of `write` adds a line to the JSON Lines file: 'step', 'phase', and a number per metric.
  TensorBoard's writer is created when it is first needed, because importing it takes seconds. A
  context manager that waits on exit until everything is on disk.
  """

  def __init__(
    self, path: epath.Path, phase: str, first_step: int, tensorboard_folder: epath.Path | None
  ):
    """Opens the metrics of a phase.

    Args:
      path: The JSON Lines file, shared by all phases.
      phase: Name of the phase.
      first_step: The step that the phase resumes from. Lines for later steps, written by a run that
        was killed, are removed.
      tensorboard_folder: Folder for TensorBoard's files; None to write none.
    """
    self._path, self._phase, self._tensorboard_folder = path, phase, tensorboard_folder
    self._writer = None
    if jax.process_index() == 0 and path.exists():
      lines = path.read_text().splitlines(keepends=True)
      kept = [line for line in lines if _is_before(line, phase, first_step)]
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
    with accessing(self._path), self._path.open('a') as file:
      file.write(json.dumps({'step': step, 'phase': self._phase, **scalars}) + '\n')
    if self._tensorboard_folder is not None:
      with self._writing_tensorboard():
        self._tensorboard().write_scalars(step, scalars)

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
      reason = str(error).strip().splitlines()[0].rpartition(';')[-1].strip()
      raise UsageError(
        f'{self._tensorboard_folder} cannot be written ({reason}): make room or set '
        'config.tensorboard to False, then run the same command again'
      ) from error

  def __enter__(self) -> 'Metrics':
    return self

  def __exit__(self, kind: type[BaseException] | None, *_) -> None:
    # What could not be written fails again here, where it must not hide the first error.
    with contextlib.suppress(UsageError) if kind else contextlib.nullcontext():
      self.close()

  def close(self) -> None:
    """Waits until everything is on disk.

    Raises:
      UsageError: If it cannot be written.
    """
    if self._writer is not None:
      with self._writing_tensorboard():
        self._writer.close()


def _is_before(line: str, phase: str, step: int) -> bool:
  """Whether a line is complete and its step will not be repeated."""
  try:
    record = json.loads(line)
  except ValueError:  # Cut off when the run was killed.
    return False
  if record['phase'] == phase:
    return record['step'] <= step
  return (len(record['phase']), record['phase']) < (len(phase), phase)  # phase_9 before phase_10.
