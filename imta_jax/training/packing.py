"""Trees of many small arrays as a few long vectors.

A step that takes and returns hundreds of small arrays spends its time on starting kernels: one or
more to update each array, and more to exchange each one between devices. Packed, they need a few.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

Tree = Any


class Packed(flax.struct.PyTreeNode):
  """A tree of nested dictionaries of arrays as vectors.

  Attributes:
    vectors: The arrays one after another: those named 'kernel' in 'kernel', which a step may cast
      and an optimizer may decay, and the others in 'other'.
    layout: (path, shape) of each array, in the order of the vectors.
  """

  vectors: Mapping[str, jax.Array | np.ndarray]
  layout: Sequence[tuple[tuple[str, ...], tuple[int, ...]]] = flax.struct.field(pytree_node=False)

  @property
  def tree(self) -> Tree:
    """The tree. Its arrays are views on the host, and slices that their readers fuse in a step."""
    parts = {}
    for name, vector in self.vectors.items():
      sizes = [math.prod(shape) for path, shape in self.layout if _vector_of(path) == name]
      if isinstance(vector, np.ndarray):
        parts[name] = iter(np.split(vector, np.cumsum(sizes)[:-1]))
      else:
        parts[name] = iter(_split(vector, sizes))
    return unflatten_dict(
      {path: _from_flat(next(parts[_vector_of(path)]), shape) for path, shape in self.layout}
    )


def _split(vector, sizes):
  # XLA for TPUs would bring the whole vector into the shape of a filter, padded to many times its
  # size, and slice that.
  return jax.lax.platform_dependent(
    jax.lax.split(vector, sizes), tpu=jax.lax.optimization_barrier, default=lambda parts: parts
  )


def pack(tree: Tree) -> Packed:
  """Packs a tree of nested dictionaries of arrays, on the host or inside a step."""
  arrays = dict(sorted(flatten_dict(tree).items()))
  on_host = all(isinstance(array, np.ndarray) for array in arrays.values())
  concatenate = np.concatenate if on_host else jnp.concatenate
  flat: dict[str, list[Any]] = {}
  for path, array in arrays.items():
    flat.setdefault(_vector_of(path), []).append(_to_flat(array))
  return Packed(
    {name: concatenate(flat[name]) for name in sorted(flat)},
    tuple((path, array.shape) for path, array in arrays.items()),
  )


def unpack(tree: Tree) -> Tree:
  """Replaces every `Packed` of a tree by the tree that it holds."""
  return jax.tree.map(
    lambda leaf: leaf.tree if _is_packed(leaf) else leaf, tree, is_leaf=_is_packed
  )


def pack_like(like: Tree, tree: Tree) -> Tree:
  """Packs the parts of a tree that are packed in `like`: the inverse of `unpack`."""
  return jax.tree.map(
    lambda leaf, part: pack(part) if _is_packed(leaf) else part, like, tree, is_leaf=_is_packed
  )


def _vector_of(path):
  return 'kernel' if path[-1] == 'kernel' else 'other'


def _is_packed(node):
  return isinstance(node, Packed)


# Kernels of convolutions lie in memory as GPUs read them and write their gradients: a filter after
# the other, each [height, width, inputs].
def _to_flat(array):
  return (array.transpose(3, 0, 1, 2) if _is_filter(array.shape) else array).reshape(-1)


def _from_flat(flat, shape):
  if _is_filter(shape):
    return flat.reshape(shape[3], *shape[:3]).transpose(1, 2, 3, 0)
  return flat.reshape(shape)


def _is_filter(shape):
  return len(shape) == 4 and shape[:2] != (1, 1)
