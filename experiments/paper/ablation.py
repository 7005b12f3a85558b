"""What each technique gives: the runs, rows and comparisons that Tables 2 and 3 share."""

from collections.abc import Mapping, Sequence

import report
from etils import epath
from runs import Run, Runs

# Fields that turn off the techniques of each phase.
PLAIN_FIRST = {'phases[0].gradient_equilibrium': 'off'}
PLAIN_SECOND = {'phases[1].loss': 'cross_entropy', 'phases[1].collaboration': 'off'}

# Name of a row: the run, and the phase (counted from 0) after which it is read.
_ROWS = {
  'none': ('none', 0),
  'GE': ('GE', 0),
  'ISC': ('ISC', 1),
  'OFA': ('OFA', 1),
  'GE + ISC + OFA': ('GE+ISC+OFA', 1),
  'none, longer': ('none', 1),
  'GE, longer': ('GE', 1),
  'partitioning': ('partitioning', 0),
  'partitioning, longer': ('partitioning', 1),
}
_COMPARISONS = (
  ('GE', 'none'),
  ('ISC', 'none'),
  ('OFA', 'none'),
  ('GE + ISC + OFA', 'none'),
  ('none, longer', 'none'),
  ('ISC', 'none, longer'),
  ('OFA', 'none, longer'),
  ('GE, longer', 'none, longer'),
  ('GE + ISC + OFA', 'GE, longer'),
  ('partitioning', 'none'),
  ('partitioning', 'GE'),
  ('partitioning, longer', 'GE, longer'),
)


def runs_of(config: str, folder: str) -> list[Run]:
  """Returns the runs for a network.

  Phase II of the rows without ISC and OFA is plain cross-entropy, which tells what longer training
  alone gives.

  Args:
    config: Config file with its argument.
    folder: What the names of the runs start with.
  """
  return [
    Run(f'{folder}/none', config, PLAIN_FIRST | PLAIN_SECOND),
    Run(f'{folder}/GE', config, PLAIN_SECOND),
    Run(
      f'{folder}/partitioning',
      config,
      PLAIN_FIRST | {'phases[0].shared_channels': 0.5} | PLAIN_SECOND,
    ),
    Run(
      f'{folder}/ISC',
      config,
      PLAIN_FIRST | {'phases[1].loss': 'cross_entropy'},
      f'{folder}/none',
    ),
    Run(
      f'{folder}/OFA', config, PLAIN_FIRST | {'phases[1].collaboration': 'off'}, f'{folder}/none'
    ),
    Run(f'{folder}/GE+ISC+OFA', config, {}, f'{folder}/GE'),
  ]


def write(
  runs: Runs, output: epath.Path, folder: str, title: str, paper: Mapping[str, Sequence[float]]
) -> str:
  """Writes the table, without rows whose runs are missing, and returns it as Markdown.

  Args:
    runs: The finished runs of `runs_of`.
    output: Where to write.
    folder: See `runs_of`.
    title: Heading of the table.
    paper: The paper's accuracies in %, by row.
  """
  rows = {
    name: report.row(name, runs.accuracies(f'{folder}/{run}', phase), paper.get(name))
    for name, (run, phase) in _ROWS.items()
    if runs.has(f'{folder}/{run}')
  }
  return report.write_table(
    output,
    title,
    list(rows.values()),
    [report.difference(rows[a], rows[b]) for a, b in _COMPARISONS if {a, b} <= rows.keys()],
    report.provenance(
      runs, {f'{folder}/{run}' for name, (run, _) in _ROWS.items() if name in rows}
    ),
  )
