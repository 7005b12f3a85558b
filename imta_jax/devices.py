"""The devices of all hosts as one axis."""

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# The name of the mapped axis over devices, in data, steps and batch norm alike.
AXIS = 'batch'


def numbers() -> np.ndarray:
  """[local devices]: the number of each local device among all of them, an argument for pmap."""
  local = jax.local_device_count()
  return jax.process_index() * local + np.arange(local, dtype=np.int32)


def replicate(tree: Any) -> Any:
  """Puts a tree of arrays, the same on every host, on every device.

  It lies there as pmap gives out what has `out_axes=None`, so a pmapped function that takes both is
  compiled once.

  Args:
    tree: Arrays of the host or a device.

  Returns:
    The same tree, on all devices.
  """
  mesh = Mesh(np.asarray(jax.devices()), (AXIS,))
  return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))
