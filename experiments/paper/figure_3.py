"""Figure 3: accuracy against average cost on CIFAR-100.

    python experiments/paper/figure_3.py --train

The kinds of networks are those of Figure 2.
"""

import curves

from imta_jax import command_line

COMPARISON = curves.Comparison(
  'cifar100',
  'exits',
  (4, 6, 8),
  {
    'ResNet': ('resnet-20', 'resnet-32', 'resnet-56', 'resnet-110'),
    'DenseNet-BC': tuple(f'densenet_bc-{depth}' for depth in (40, 52, 64, 76, 88, 100)),
  },
)
RUNS = COMPARISON.runs()


def main() -> None:
  """Runs the command line."""
  COMPARISON.main(__doc__, 'figure_3', 'Figure 3: CIFAR-100')


if __name__ == '__main__':
  command_line.run(main)
