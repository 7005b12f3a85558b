"""Computes accuracy against average cost (budgeted batch classification), as in Figures 2 to 5.

    python experiments/budget_sweep.py runs/mnist5k
    python experiments/budget_sweep.py runs/cifar100-exits=4 runs/cifar100-exits=8 --output=figure

The program is imta_jax.sweep.
"""

from imta_jax.sweep import run

if __name__ == '__main__':
  run()
