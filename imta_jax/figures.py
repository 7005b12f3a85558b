"""Figures as PNG files, drawn by Matplotlib without a display."""

import io
import os
from typing import Any

from etils import epath

from imta_jax.files import write_whole


def new_figure(width: float, height: float) -> Any:
  """Returns an empty `matplotlib.figure.Figure`, whose sides are in inches."""
  # A notebook hands its backend on, which Matplotlib refuses at its import if it is not installed.
  os.environ.pop('MPLBACKEND', None)
  from matplotlib.figure import Figure

  return Figure(figsize=(width, height), layout='constrained')


def save_figure(figure: Any, path: epath.Path) -> None:
  """Writes a figure to a PNG file.

  Raises:
    UsageError: If it cannot be written.
  """
  content = io.BytesIO()
  figure.savefig(content, format='png', dpi=150)
  write_whole(path, content.getvalue())
