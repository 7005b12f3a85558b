"""Starts a network from one that was trained before, on other classes or images."""

import textwrap
from collections.abc import Mapping
from typing import Any

from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict

from imta_jax.adaptive.engine import MANIFEST
from imta_jax.adaptive.engine.exported import read_export
from imta_jax.errors import UsageError
from imta_jax.models.initial_values import transplant
from imta_jax.training import networks
from imta_jax.training import workdir as layout


def start_from(folder: str, fresh: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
  """Takes the variables of a trained network whose names and shapes agree with a new one's.

  Classifiers of networks with and without ISC have the rows of the embedding in common.

  Args:
    folder: The workdir of a run, whose last phase counts, or an export.
    fresh: Initial variables of the new network.

  Returns:
    Variables with the structure of `fresh`, and what was loaded: 'loaded 118 of 124 arrays; new:
    params/classifiers_0/dense/kernel (128, 10), …; unused: 4 of the trained network'.

  Raises:
    UsageError: If the folder is neither, or nothing agrees.
  """
  donor = _load_variables(folder)
  variables = transplant(donor, fresh)
  flat_donor, flat, flat_fresh = (flatten_dict(v, sep='/') for v in (donor, variables, fresh))
  new = [f'{name} {leaf.shape}' for name, leaf in flat_fresh.items() if flat[name] is leaf]
  if len(new) == len(flat_fresh):
    raise UsageError(
      f'config.init_from is {folder}, whose network has no layer in common with this one: give '
      'config.model the fields of that network'
    )
  names = textwrap.shorten(', '.join(new) or 'none', 400, placeholder=' …')
  unused = len(flat_donor.keys() - flat.keys())
  loaded = len(flat) - len(new)
  return variables, (
    f'loaded {loaded} of {len(flat)} arrays; new: {names}; unused: {unused} of the trained network'
  )


def _load_variables(folder):
  path = epath.Path(folder)
  if (path / MANIFEST).exists():
    return _load_export(folder)
  config = layout.load_config(path)
  dataset, class_names = config.dataset, layout.load_class_names(path)
  image_shape = (dataset.image_size, dataset.image_size, len(dataset.mean))
  last = len(config.phases) - 1
  network = networks.restore_network(config, path, last, len(class_names), image_shape)
  return network.weights.variables


def _load_export(folder):
  try:
    manifest, _, weights, _ = read_export(folder)
  except ValueError as error:
    raise UsageError(str(error)) from error
  if 'variables' not in manifest:
    raise UsageError(
      f'config.init_from is {folder}, an export without the names of its variables: export it again'
    )
  names = manifest['variables']
  if list(map(len, names)) != list(map(len, weights)):
    raise UsageError(
      f'config.init_from is {folder}, whose manifest does not name all of its weights'
    )
  return unflatten_dict(dict(zip(sum(names, []), sum(weights, []), strict=True)), sep='/')
