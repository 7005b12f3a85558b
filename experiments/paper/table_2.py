"""Table 2: what GE, ISC and OFA each give a 5-exit network on CIFAR-100.

    python experiments/paper/table_2.py --train

Besides the paper's five rows there are phase II with plain cross-entropy, which tells what longer
training alone gives, and feature partitioning (Deep Feature Surgery) in the place of GE. All runs of
a seed have the same initial weights and batches.
"""

from runs import Run

CONFIG = 'configs/cifar100.py:exits=5'
PLAIN_FIRST = {'phases[0].gradient_equilibrium': 'off'}
PLAIN_SECOND = {'phases[1].loss': 'cross_entropy', 'phases[1].collaboration': 'off'}
RUNS = [
  Run('none', CONFIG, PLAIN_FIRST | PLAIN_SECOND),
  Run('GE', CONFIG, PLAIN_SECOND),
  Run('partitioning', CONFIG, PLAIN_FIRST | {'phases[0].shared_channels': 0.5} | PLAIN_SECOND),
  Run('ISC', CONFIG, PLAIN_FIRST | {'phases[1].loss': 'cross_entropy'}, 'none'),
  Run('OFA', CONFIG, PLAIN_FIRST | {'phases[1].collaboration': 'off'}, 'none'),
  Run('GE+ISC+OFA', CONFIG, {}, 'GE'),
]
