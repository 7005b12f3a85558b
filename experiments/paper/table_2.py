"""Table 2: what GE, ISC and OFA each give a 5-exit network on CIFAR-100.

    python experiments/paper/table_2.py --train

Besides the paper's five rows there are rows with phase II in plain cross-entropy ("longer"), which
tell what longer training alone gives, and feature partitioning (Deep Feature Surgery) in the place
of GE. All runs of a seed have the same initial weights and batches.
"""

from functools import partial

import ablation
import published
import runs

from imta_jax import command_line

FOLDER = 'cifar100_exits=5'
RUNS = ablation.runs_of('configs/cifar100.py:exits=5', FOLDER)


def main() -> None:
  """Runs the command line."""
  title = 'Table 2: CIFAR-100, 5 exits'
  write = partial(ablation.write, folder=FOLDER, title=title, paper=published.TABLE_2)
  runs.main(__doc__, 'table_2', RUNS, write)


if __name__ == '__main__':
  command_line.run(main)
