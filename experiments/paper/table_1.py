"""Table 1: a 7-exit network on CIFAR-100, trained as MSDNet was, and with all techniques.

python experiments/paper/table_1.py --train
"""

import ablation
import published
import report
import runs
from etils import epath

from imta_jax import command_line

FOLDER = 'cifar100_exits=7'
RUNS = [
  run
  for run in ablation.runs_of('configs/cifar100.py:exits=7', FOLDER)
  if run.name.endswith(('/none', '/GE', '/GE+ISC+OFA'))
]


def write(chosen: runs.Runs, output: epath.Path) -> str:
  """Writes the table, and returns it as Markdown."""
  ours = {
    'MSDNet': chosen.accuracies(f'{FOLDER}/none', 0),
    'MSDNet, longer': chosen.accuracies(f'{FOLDER}/none', 1),
    'GE + ISC + OFA': chosen.accuracies(f'{FOLDER}/GE+ISC+OFA', 1),
  }
  rows = {
    name: report.row(name, accuracies, published.TABLE_1.get(name))
    for name, accuracies in ours.items()
  }
  return report.write_table(
    output,
    'Table 1: CIFAR-100, 7 exits',
    list(rows.values()),
    [
      report.difference(rows['GE + ISC + OFA'], rows['MSDNet']),
      report.difference(rows['GE + ISC + OFA'], rows['MSDNet, longer']),
    ],
    report.provenance(chosen, [run.name for run in RUNS]),
  )


def main() -> None:
  """Runs the command line."""
  runs.main(__doc__, 'table_1', RUNS, write)


if __name__ == '__main__':
  command_line.run(main)
