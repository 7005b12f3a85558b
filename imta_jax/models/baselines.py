"""The networks that the paper compares with, by name.

'resnet-110', 'densenet-40' and 'densenet_bc-100' on CIFAR; 'hydranet-1' to 'hydranet-9' on
CIFAR-100; 'resnet-50', 'densenet-121' and 'googlenet' on ImageNet. The paper compares with four
ResNets and six DenseNets on CIFAR and does not give their depths and growth rates, so any depth can
be chosen. The growth rates are those of the DenseNet paper: 12 on CIFAR, 32 on ImageNet.
DenseNet-BCs with 40 to 100 layers then cost 0.7 to 2.9 × 10^8 multiply-adds.

The MSDNet paper compares with two networks with exits: 'resnet-62' with exits after the 4th and the
8th of each 10 blocks, and 'densenet-52' with exits after the 6th and the 12th of each 16 layers.
Each costs about 1.3 × 10^8 multiply-adds there. Without exits, 'densenet-52' costs 1.29 × 10^8 if
growth_rate is 6, and 4.6 × 10^8 if it is 12.

A HydraNet has a branch per group of classes: the superclasses of CIFAR-100, unless
`--config.model.groups` gives those that experiments/class_groups.py finds, as the publication does.
"""

import re
from typing import Any

from ml_collections import ConfigDict

from imta_jax import config as config_lib
from imta_jax import models
from imta_jax.errors import UsageError
from imta_jax.models.densenet import num_layers
from imta_jax.models.resnet import num_blocks

# The superclass of each class of CIFAR-100.
_SUPERCLASSES = (
  *(4, 1, 14, 8, 0, 6, 7, 7, 18, 3, 3, 14, 9, 18, 7, 11, 3, 9, 7, 11),
  *(6, 11, 5, 10, 7, 6, 13, 15, 3, 15, 0, 11, 1, 10, 12, 14, 16, 9, 11, 5),
  *(5, 19, 8, 8, 15, 13, 14, 17, 18, 10, 16, 4, 17, 4, 2, 0, 17, 4, 18, 17),
  *(10, 3, 2, 12, 12, 16, 12, 1, 9, 19, 2, 10, 0, 1, 16, 12, 9, 13, 15, 13),
  *(16, 19, 2, 4, 6, 19, 5, 5, 8, 19, 18, 1, 2, 15, 6, 0, 17, 8, 14, 13),
)

# Fields of config.model; DEPTH stands for a number.
_NETWORKS: dict[str, dict[str, dict[str, Any]]] = {
  'cifar': {
    'resnet-DEPTH': {'name': 'resnet'},
    'densenet-DEPTH': {'name': 'densenet', 'growth_rate': 12, 'bc': False},
    'densenet_bc-DEPTH': {'name': 'densenet', 'growth_rate': 12, 'bc': True},
    'hydranet-DEPTH': {'name': 'hydranet', 'groups': _SUPERCLASSES, 'top_k': 4},
  },
  'imagenet': {
    'resnet-DEPTH': {'name': 'resnet'},
    'densenet-DEPTH': {'name': 'densenet', 'growth_rate': 32, 'bc': True},
    'googlenet': {'name': 'googlenet'},
  },
}


def parse_argument(argument: str | None, **defaults: Any) -> ConfigDict:
  """Reads a config file's argument that can name a network: 'network=resnet-110,exits=5'.

  Args and errors are those of config.parse_argument. The defaults are MSDNet's, which is the
  default of `network`; the other networks have `exits` alone, 1 by default.
  """
  given = dict(part.partition('=')[::2] for part in (argument or '').split(','))
  if given.get('network', 'msdnet') != 'msdnet':
    defaults = {'exits': 1}
  return config_lib.parse_argument(argument, network='msdnet', **defaults)


def choose(config: ConfigDict, network: str, exits: int, stem: str) -> None:
  """Sets the model and the phases of a config for a network that the paper compares with.

  Exits are placed after equal numbers of blocks or layers. A network with one exit is trained by
  phase I alone.

  Args:
    config: A config with the phases of MSDNet, which is changed.
    network: The name of the network.
    exits: Number of exits.
    stem: 'cifar' or 'imagenet'.

  Raises:
    UsageError: If there is no such network, or it cannot have so many exits.
  """
  fields = _model_fields(network, exits, stem)
  config.model = ConfigDict({**models.defaults(fields['name']), **fields})
  if exits == 1:
    config.phases = config.phases[:1]
    config.phases[0].gradient_equilibrium = 'off'


def _model_fields(network, exits, stem):
  """Returns the fields of config.model."""
  networks = _NETWORKS[stem]
  fields = networks.get(re.sub(r'-\d+$', '-DEPTH', network))
  if fields is None:
    choices = ', '.join(('msdnet', *networks))
    raise UsageError(f'config argument network is {network!r}: choose one of {choices}')
  if network == 'googlenet':
    _check_exits(network, exits, (1, 3), '1 or 3')
    return {**fields, 'auxiliary_exits': exits == 3}
  depth = int(network.rpartition('-')[2])
  if fields['name'] == 'hydranet':
    _check_exits(network, exits, (1,), '1')
    return {**fields, 'blocks': depth}
  try:
    if fields['name'] == 'resnet':
      places = num_blocks(depth, stem)
    else:
      places = num_layers(depth, fields['bc'], stem)
  except ValueError as error:
    raise UsageError(f'config argument network is {network!r}: {error}') from None
  _check_exits(network, exits, range(1, places + 1), f'1 to {places}')
  exits_after = tuple(places * exit // exits for exit in range(1, exits))
  return {**fields, 'depth': depth, 'stem': stem, 'exits_after': exits_after}


def _check_exits(network, exits, possible, words):
  if exits not in possible:
    raise UsageError(f'config argument exits is {exits}: {network} can have {words}')
