"""Table 3: what GE, ISC and OFA each give a 5-exit network on ImageNet.

    python experiments/paper/table_3.py --train --seeds=1

The rows are those of Table 2.
"""

from functools import partial

import ablation
import published
import runs

from imta_jax import command_line

FOLDER = 'imagenet_step=4'
RUNS = ablation.runs_of('configs/imagenet.py:step=4', FOLDER)


def main() -> None:
  """Runs the command line."""
  title = 'Table 3: ImageNet, 5 exits'
  write = partial(ablation.write, folder=FOLDER, title=title, paper=published.TABLE_3)
  runs.main(__doc__, 'table_3', RUNS, write)


if __name__ == '__main__':
  command_line.run(main)
