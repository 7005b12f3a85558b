"""MSDNet on CIFAR-100, and the networks it is compared with: Tables 1 and 2, Figure 3.

    python -m imta_jax.main --config=configs/cifar100.py          # Table 1: 7 exits
    python -m imta_jax.main --config=configs/cifar100.py:exits=5  # Table 2; Figure 3: 4, 5, 6, 8
    python -m imta_jax.main --config=configs/cifar100.py:recipe=dfs
    python -m imta_jax.main --config=configs/cifar100.py:network=densenet_bc-100
    python -m imta_jax.main --config=configs/cifar100.py:network=resnet-62,exits=7

`recipe=dfs` trains phase I alone as Deep Feature Surgery (Gong et al., ECCV 2024), whose method
is `'--config.phases[0].shared_channels=0.5'`; experiments/paper/recipes.py tells the two apart.

Other networks are resnet-20, -32, … -110, densenet-40, -52, …, densenet_bc-40, -52, … -100 and
hydranet-1, … -9; see imta_jax/models/baselines.py. They have one exit and phase I alone unless
`exits` says otherwise: that places exits after equal numbers of blocks or layers and keeps both
phases. Then `'--config.model.exits_after=(4, 8, 14, 18, 24, 28)'` moves them, here as in the MSDNet
paper.

Top-1 accuracy on test images in %, by exit:

    paper, 7 exits (Table 1)   64.00  68.41  71.86  73.50  74.46  75.39  75.96
    paper, 5 exits (Table 2)   60.78  65.54  69.98  72.27  73.45
    ours, 5 exits              38.0   44.6   48.3   49.6   51.0

Ours are means of 3 seeds after 7.5 + 4.5 epochs instead of 300 + 180, on one H200; see
docs/results.md. There, a step of phase I takes 4.4 ms and one of phase II 1.2 ms in bfloat16: 18
minutes of steps for the full length, at 703 steps per epoch. The last of 7 exits costs 137 million
multiply-adds per image.
Data: `tfds build cifar100`; otherwise the first run downloads it.
"""

from imta_jax import config as config_lib
from imta_jax.errors import UsageError
from imta_jax.models import baselines


def get_config(argument=''):
  arguments = baselines.parse_argument(argument, exits=7, recipe='paper')
  config = config_lib.default()
  if arguments.network != 'msdnet':
    baselines.choose(config, arguments.network, arguments.exits, 'cifar')
    return config
  config.model.num_exits = arguments.exits
  if arguments.recipe == 'dfs':
    config.batch_size, config.phases = 500, config.phases[:1]
    config.phases[0].update(weight_decay=5e-4, milestones=(250 / 300, 280 / 300, 295 / 300))
  elif arguments.recipe != 'paper':
    raise UsageError(f'config argument recipe is {arguments.recipe!r}: choose paper or dfs')
  return config
