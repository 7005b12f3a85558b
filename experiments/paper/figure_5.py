"""Figure 5: accuracy against average cost on ImageNet.

    python experiments/paper/figure_5.py --train --seeds=1

The kinds of networks are those of Figure 2, and GoogLeNet.
"""

import curves

from imta_jax import command_line

COMPARISON = curves.Comparison(
  'imagenet',
  'step',
  (4, 6, 7),
  {
    'ResNet': ('resnet-18', 'resnet-34', 'resnet-50'),
    'DenseNet': ('densenet-121', 'densenet-169', 'densenet-201'),
    'GoogLeNet': ('googlenet',),
  },
)
RUNS = COMPARISON.runs()


def main() -> None:
  """Runs the command line."""
  COMPARISON.main(__doc__, 'figure_5', 'Figure 5: ImageNet')


if __name__ == '__main__':
  command_line.run(main)
