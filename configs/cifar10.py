"""MSDNet on CIFAR-10, and the networks it is compared with: Figure 2.

    python -m imta_jax.main --config=configs/cifar10.py            # 6 exits, depth 21
    python -m imta_jax.main --config=configs/cifar10.py:exits=8    # 8 exits, depth 36
    python -m imta_jax.main --config=configs/cifar10.py:network=densenet_bc-100

Other networks are those of configs/cifar100.py.

Not trained yet; the paper shows its accuracies in a figure only. Cost: 300 + 180
epochs of 703 steps; 89 million multiply-adds per image at the last of 6 exits.
Data: `tfds build cifar10`; otherwise the first run downloads it.
"""

from imta_jax import config as config_lib
from imta_jax.models import baselines


def get_config(argument=''):
  arguments = baselines.parse_argument(argument, exits=6)
  config = config_lib.default()
  config.dataset.update(name='cifar10', mean=(0.4914, 0.4824, 0.4467), std=(0.2471, 0.2435, 0.2616))
  if arguments.network != 'msdnet':
    baselines.choose(config, arguments.network, arguments.exits, 'cifar')
    return config
  config.model.num_exits = arguments.exits
  return config
