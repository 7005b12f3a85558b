"""Starts a network from one that was trained before, on other classes or images."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict

from imta_jax import networks
from imta_jax import workdir as layout
from imta_jax.adaptive.engine import MANIFEST
from imta_jax.adaptive.engine.exported import read_export
from imta_jax.errors import UsageError
from imta_jax.models.initial_values import transplant


def start_from(folder: str, fresh: Mapping[str, Any]) -> dict[str, Any]:
  """Takes the variables of a trained network whose names and shapes agree with a new one's.

  Args:
    folder: The workdir of a run, whose last phase counts, or an export.
    fresh: Initial variables of the new network.

  Returns:
    Variables with the structure of `fresh`.

  Raises:
    UsageError: If the folder is neither, or nothing agrees.
  """
  donor = _load_variables(folder)
  flat_donor, flat_fresh = flatten_dict(donor), flatten_dict(fresh)
  if not any(
    name in flat_donor and np.shape(flat_donor[name]) == np.shape(leaf)
    for name, leaf in flat_fresh.items()
  ):
    raise UsageError(
      f'config.init_from is {folder}, whose network has no layer in common with this one: give '
      'config.model the fields of that network'
    )
  return transplant(donor, fresh)


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
