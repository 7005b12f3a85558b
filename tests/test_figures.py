"""Figures are drawn wherever a program was started."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_a_notebooks_backend_does_no_harm(tmp_path):
  program = """
import sys
from etils import epath
from imta_jax.figures import new_figure, save_figure
save_figure(new_figure(2, 1), epath.Path(sys.argv[1]))
"""
  subprocess.run(
    [sys.executable, '-c', program, tmp_path / 'figure.png'],
    env={**os.environ, 'MPLBACKEND': 'unknown'},
    check=True,
    timeout=100,
  )
  assert (tmp_path / 'figure.png').read_bytes().startswith(b'\x89PNG')


def test_all_figures_are_made_in_one_place():
  using = [
    path.name
    for folder in ('imta_jax', 'experiments')
    for path in (ROOT / folder).rglob('*.py')
    if 'matplotlib.figure' in path.read_text(encoding='utf-8')
  ]
  assert using == ['figures.py']
