"""A phase's metrics, for TensorBoard."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from imta_jax.import_tensorflow import import_tensorflow


class Metrics:
  """Writes metrics on the first host, nothing on the others.

  The writer is made when it is first needed: importing it takes seconds, which a run's first step
  does not wait for. A context manager; leaving it waits until everything is on disk.
  """

  def __init__(self, folder: epath.Path):
    self._folder, self._writer = folder, None

  def write(self, step: int, figures: Mapping[str, Any], prefix: str = '') -> None:
    """Writes figures of a step; arrays [exit] become a metric an exit."""
    if jax.process_index() > 0:
      return
    if self._writer is None:
      import_tensorflow()
      from clu import metric_writers

      self._writer = metric_writers.AsyncWriter(metric_writers.SummaryWriter(str(self._folder)))
    scalars = {}
    for name, value in figures.items():
      if np.ndim(value):
        for number, item in enumerate(value, start=1):
          scalars[f'{prefix}{name}_exit_{number}'] = float(item)
      else:
        scalars[f'{prefix}{name}'] = float(value)
    self._writer.write_scalars(step, scalars)

  def __enter__(self) -> 'Metrics':
    return self

  def __exit__(self, *_) -> None:
    if self._writer is not None:
      self._writer.close()
