"""Table 1: a 7-exit network on CIFAR-100, trained as MSDNet was, and with all techniques.

    python experiments/paper/table_1.py --train

HydraNets, which run 4 of 20 branches per image, stand beside it. Their branches are for CIFAR-100's
superclasses.
"""

import ablation
import published
import report
import runs
from etils import epath

from imta_jax import command_line

FOLDER = 'cifar100_exits=7'
HYDRANETS = {name: f'cifar100/hydranet-{name[-1]}' for name in published.HYDRANETS}
RUNS = [
  run
  for run in ablation.runs_of('configs/cifar100.py:exits=7', FOLDER)
  if run.name.endswith(('/none', '/GE', '/GE+ISC+OFA'))
] + [
  runs.Run(name, f'configs/cifar100.py:network={name.rpartition("/")[2]}')
  for name in HYDRANETS.values()
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
  hydranets = [
    report.row(name, chosen.accuracies(run, 0)[:, -1:], published.HYDRANETS[name])
    for name, run in HYDRANETS.items()
  ]
  return report.write_table(
    output,
    'Table 1: CIFAR-100, 7 exits, and HydraNets with one',
    [*rows.values(), *hydranets],
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
