"""Tables and figures of trained runs beside the paper's numbers."""

import dataclasses
import shlex
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import scipy.stats
from etils import epath
from runs import Runs

from imta_jax.evaluate import save_figure
from imta_jax.files import write_csv, write_whole
from imta_jax.training import workdir as layout

_DIFFERENCES = (
  'Differences in percentage points, with 95 % intervals over seeds. *reproduces*: it lies '
  "on the paper's side of zero; *opposite*: on the other side; *unclear*: it contains zero."
)


@dataclasses.dataclass(frozen=True)
class Row:
  """A row of a table.

  Attributes:
    name: What was trained.
    ours: Accuracies in %, [seed, exit].
    paper: The paper's accuracies in %, [exit], or None.
  """

  name: str
  ours: np.ndarray
  paper: Sequence[float] | None


def row(name: str, ours: np.ndarray, paper: Sequence[float] | None) -> Row:
  """Returns a row; without the paper's numbers if our network has another number of exits."""
  comparable = paper is not None and len(paper) == ours.shape[1]
  return Row(name, ours, paper if comparable else None)


@dataclasses.dataclass(frozen=True)
class Difference:
  """What a row gains over another, with the same seeds in both.

  Attributes:
    name: For example 'GE - none'.
    mean: Percentage points, averaged over seeds: per exit, and last the average over exits.
    margin: Half the width of the 95 % interval of each mean; NaN for a single seed.
    paper: The paper's difference in the same places, or None.
  """

  name: str
  mean: np.ndarray
  margin: np.ndarray
  paper: np.ndarray | None

  def verdicts(self) -> list[str]:
    """Returns whether the sign of each of the paper's differences is reproduced.

    Returns:
      'reproduces' or 'opposite' if the interval lies on one side of zero, otherwise 'unclear'.
    """
    if self.paper is None:
      return [''] * len(self.mean)
    significant = np.abs(self.mean) > self.margin
    same = np.sign(self.mean) == np.sign(self.paper)
    return [
      ('reproduces' if same else 'opposite') if clear else 'unclear'
      for clear, same in zip(significant, same, strict=True)
    ]


def difference(one: Row, other: Row) -> Difference:
  """Compares two rows, seed by seed (Student's t for the interval)."""
  gains = _with_average(one.ours - other.ours)
  num_seeds = len(gains)
  with np.errstate(invalid='ignore'):
    error = gains.std(axis=0, ddof=1) / np.sqrt(num_seeds) if num_seeds > 1 else np.nan
  paper = None
  if one.paper is not None and other.paper is not None:
    paper = _with_average(np.subtract(one.paper, other.paper))
  return Difference(
    f'{one.name} - {other.name}',
    gains.mean(axis=0),
    np.broadcast_to(scipy.stats.t.ppf(0.975, num_seeds - 1) * error, gains.shape[1:]),
    paper,
  )


def _with_average(values):
  return np.concatenate([values, values.mean(axis=-1, keepdims=True)], axis=-1)


def write_table(
  folder: epath.Path,
  title: str,
  rows: Sequence[Row],
  differences: Sequence[Difference],
  about: str,
) -> str:
  """Writes table.csv, differences.csv and README.md.

  Args:
    folder: Where to write.
    title: Heading of README.md.
    rows: The table.
    differences: What follows from its rows.
    about: How the runs were made; see `provenance`.

  Returns:
    The content of README.md.
  """
  num_exits = max(row.ours.shape[1] for row in rows)
  exits = [f'exit {number}' for number in range(1, num_exits + 1)]
  lines = [f'# {title}', '', 'Top-1 accuracy on test images in %, mean ± standard deviation.', '']
  lines += _markdown(['', *exits], (line for row in rows for line in _lines(row, num_exits)))
  if differences:
    lines += ['', _DIFFERENCES, '']
    lines += _markdown(['', *exits, 'average'], map(_line, differences))
  text = '\n'.join([*lines, '', about])
  write_whole(folder / 'README.md', text.encode())
  write_csv(folder / 'table.csv', [record for row in rows for record in _records(row)])
  if differences:
    write_csv(
      folder / 'differences.csv',
      [record for difference in differences for record in _difference_records(difference)],
    )
  return text


def _lines(row, num_exits):
  """The lines of a row: the paper's, ours, and the difference."""
  mean, empty = row.ours.mean(axis=0), [''] * (num_exits - row.ours.shape[1])
  if row.paper is not None:
    yield [f'{row.name}, paper', *(f'{value:.2f}' for value in row.paper), *empty]
  cells = [f'{value:.2f}' for value in mean]
  if len(row.ours) > 1:
    spread = row.ours.std(axis=0, ddof=1)
    cells = [f'{cell} ± {value:.2f}' for cell, value in zip(cells, spread, strict=True)]
  yield [f'{row.name}, ours', *cells, *empty]
  if row.paper is not None:
    yield ['difference', *(f'{value:+.2f}' for value in mean - row.paper), *empty]


def _line(difference):
  cells = []
  places = zip(difference.mean, difference.margin, difference.verdicts(), strict=True)
  for index, (mean, margin, verdict) in enumerate(places):
    cell = f'{mean:+.2f}' + ('' if np.isnan(margin) else f' ± {margin:.2f}')
    if verdict:
      cell += f' (paper {difference.paper[index]:+.2f}: {verdict})'
    cells.append(cell)
  return [difference.name, *cells]


def _markdown(heading, rows: Iterable[Sequence[str]]):
  yield f'| {" | ".join(heading)} |'
  yield '| --- ' * len(heading) + '|'
  for row in rows:
    yield f'| {" | ".join(row)} |'


def _records(row):
  for index, of_seeds in enumerate(row.ours.T):
    yield {
      'row': row.name,
      'exit': index + 1,
      'paper': '' if row.paper is None else row.paper[index],
      'mean': round(of_seeds.mean(), 4),
      'standard_deviation': round(of_seeds.std(ddof=1), 4) if len(of_seeds) > 1 else '',
      'seeds': ' '.join(f'{value:.4g}' for value in of_seeds),
    }


def _difference_records(difference):
  places = zip(difference.mean, difference.margin, difference.verdicts(), strict=True)
  for index, (mean, margin, verdict) in enumerate(places):
    yield {
      'difference': difference.name,
      'exit': 'average' if index == len(difference.mean) - 1 else index + 1,
      'mean': round(mean, 4),
      'margin': '' if np.isnan(margin) else round(margin, 4),
      'paper': '' if difference.paper is None else round(difference.paper[index], 4),
      'verdict': verdict,
    }


def write_figure(
  output: epath.Path,
  name: str,
  title: str,
  figure: Any,
  records: Sequence[dict[str, object]],
  about: str,
) -> str:
  """Writes a figure as PNG, the points in it as CSV, and README.md.

  Args:
    output: Where to write.
    name: Name of the files.
    title: Heading of README.md.
    figure: What was drawn.
    records: One record per point, all with the same fields.
    about: How the runs were made; see `provenance`.

  Returns:
    The path of the PNG file.
  """
  save_figure(figure, output / f'{name}.png')
  write_csv(output / f'{name}.csv', records)
  write_whole(output / 'README.md', f'# {title}\n\n![{title}]({name}.png)\n\n{about}'.encode())
  return str(output / f'{name}.png')


def provenance(runs: Runs, names: Iterable[str]) -> str:
  """Says how runs were made: command, length, time, device and versions."""
  names = list(names)
  program = shlex.join(['python', *sys.argv])
  seconds = sum(
    runs.training_seconds(name, seed) for name in names for seed in range(runs.num_seeds)
  )
  environments = {
    f'{each["devices"]} (jax {each["jax"]}, flax {each["flax"]}, Python {each["python"]})': None
    for name in names
    for seed in range(runs.num_seeds)
    for each in layout.load_environments(runs.workdir(name, seed))
  }
  return (
    f"Made by `{program}`: {runs.num_seeds} seed(s), {runs.scale:g} of the length of the paper's "
    f'trainings. The training steps of all runs took {seconds / 3600:.1f} hours on '
    f'{" and ".join(environments) or "unknown devices"}. The configs are in '
    '[configs/](configs).\n'
  )
