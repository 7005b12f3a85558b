"""The devices of all hosts as one axis."""

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# The name of the mapped axis over devices, in data, steps and batch norm alike.
AXIS = 'batch'


def numbers() -> np.ndarray:
  """[local devices]: the index of each local device among all devices, an argument for pmap."""
  local = jax.local_device_count()
  return jax.process_index() * local + np.arange(local, dtype=np.int32)


def replicate(tree: Any) -> Any:
  """Puts a tree of arrays, which must be the same on every host, on every device.

  It has the sharding of results with `out_axes=None` of pmap, so that a pmapped function that takes
  either is compiled once.

  Args:
    tree: Arrays on the host or on one device.

  Returns:
    The same tree, replicated over all devices.
  """
  mesh = Mesh(np.asarray(jax.devices()), (AXIS,))
  return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))
