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


@flax.struct.dataclass
class Packed:
  """A tree of nested dictionaries of arrays; arrays with the same last name form one vector.

  Attributes:
    vectors: {last name, as in 'kernel': the arrays of that name, one after another}.
    layout: (path, shape) of each array, in the order of the vectors.
  """

  vectors: Mapping[str, jax.Array]
  layout: Sequence[tuple[tuple[str, ...], tuple[int, ...]]] = flax.struct.field(pytree_node=False)

  @property
  def tree(self) -> Tree:
    """The tree. Its arrays are views on the host, and slices that their readers fuse in a step."""
    parts = {}
    for name, vector in self.vectors.items():
      sizes = [math.prod(shape) for path, shape in self.layout if path[-1] == name]
      if isinstance(vector, np.ndarray):
        parts[name] = iter(np.split(vector, np.cumsum(sizes)[:-1]))
      else:
        parts[name] = iter(jax.lax.split(vector, sizes))
    return unflatten_dict(
      {path: _from_flat(next(parts[path[-1]]), shape) for path, shape in self.layout}
    )


def pack(tree: Tree) -> Packed:
  """Packs a tree of nested dictionaries of arrays, on the host or inside a step."""
  arrays = dict(sorted(flatten_dict(tree).items()))
  on_host = all(isinstance(array, np.ndarray) for array in arrays.values())
  concatenate = np.concatenate if on_host else jnp.concatenate
  by_name = {}
  for path, array in arrays.items():
    by_name.setdefault(path[-1], []).append(_to_flat(array))
  return Packed(
    {name: concatenate(by_name[name]) for name in sorted(by_name)},
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
