"""The devices of all hosts as one axis."""

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# Name of the mapped axis over devices, used by data, steps and batch norm.
AXIS = 'batch'


def numbers() -> np.ndarray:
  """Returns the index of each local device among all devices, [local devices], for pmap."""
  local = jax.local_device_count()
  return jax.process_index() * local + np.arange(local, dtype=np.int32)


def replicated() -> NamedSharding:
  """The sharding of arrays that every device has: that of pmap's results with `out_axes=None`.

  A pmapped function that takes its own results and other arrays of this sharding is compiled once.
  """
  return NamedSharding(Mesh(np.asarray(jax.devices()), (AXIS,)), PartitionSpec())


def replicate(tree: Any) -> Any:
  """Copies a tree of arrays to every device.

  Args:
    tree: Arrays on the host or on one device, the same on every host.

  Returns:
    The same tree, replicated over all devices.
  """
  return jax.device_put(tree, replicated())
