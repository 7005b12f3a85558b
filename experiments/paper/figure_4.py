"""Figure 4: accuracy against average cost on CIFAR-100 with GE, ISC and OFA added one by one.

    python experiments/paper/figure_4.py --train

The runs are those of Table 2.
"""

from functools import partial

import curves
import runs
import table_2
from curves import Curve

from imta_jax import command_line

CURVES = [
  Curve(name, f'{table_2.FOLDER}/{run}', phase, color)
  for name, run, phase, color in (
    ('MSDNet', 'none', 0, 'red'),
    ('GE', 'GE', 0, 'tab:blue'),
    ('ISC', 'ISC', 1, 'tab:green'),
    ('OFA', 'OFA', 1, 'tab:orange'),
    ('GE + ISC + OFA', 'GE+ISC+OFA', 1, 'black'),
  )
]
RUNS = [run for run in table_2.RUNS if run.name in {curve.run for curve in CURVES}]


def main() -> None:
  """Runs the command line."""
  title = 'Figure 4: CIFAR-100, 5 exits'
  write = partial(curves.write, name='figure_4', title=title, curves=CURVES)
  runs.main(__doc__, 'figure_4', RUNS, write)


if __name__ == '__main__':
  command_line.run(main)
