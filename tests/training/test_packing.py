"""Packed trees: what they hold, and what their gradients are."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from imta_jax.training.packing import Packed, pack, pack_like, unpack

RANDOM = np.random.default_rng(0)
SHAPES = {
  'b': {'conv': {'kernel': (3, 3, 2, 5)}, 'norm': {'scale': (5,), 'bias': (5,)}},
  'a': {'dense': {'kernel': (4, 3), 'bias': (3,)}, 'point': {'kernel': (1, 1, 2, 3)}},
}
# Its keys are not sorted, as those are of trees that JAX returns.
TREE = {
  name: jax.tree.map(
    lambda shape: RANDOM.standard_normal(shape).astype(np.float32),
    shapes,
    is_leaf=lambda node: isinstance(node, tuple),
  )
  for name, shapes in SHAPES.items()
}


def assert_same(one, other):
  assert jax.tree.structure(one) == jax.tree.structure(other)
  jax.tree.map(np.testing.assert_array_equal, one, other)


def test_kernels_are_a_vector_and_all_else_is_another():
  packed = pack(TREE)
  assert {name: vector.shape for name, vector in packed.vectors.items()} == {
    'kernel': (4 * 3 + 2 * 3 + 3 * 3 * 2 * 5,),
    'other': (3 + 5 + 5,),
  }
  assert len(jax.tree.leaves(packed)) == 2


def test_the_tree_comes_back_on_the_host_and_in_a_step():
  packed = pack(TREE)
  assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(packed.tree))
  assert_same(packed.tree, TREE)
  assert_same(jax.device_get(jax.jit(lambda packed: packed.tree)(packed)), TREE)
  repacked = jax.jit(pack)(TREE)
  assert repacked.layout == packed.layout
  assert_same(repacked, packed)
  assert pack({}).tree == {}


def test_filters_lie_one_after_another():
  kernel = TREE['b']['conv']['kernel']
  (vector,) = pack({'kernel': kernel}).vectors.values()
  np.testing.assert_array_equal(vector[:18], kernel[..., 0].ravel())


def test_gradients_are_packed_by_joining_and_not_by_adding():
  def loss(packed):
    tree = packed.tree
    return sum((leaf**3).sum() for leaf in jax.tree.leaves(tree))

  packed = pack(TREE)
  gradient = jax.grad(loss)(packed)
  expected = jax.tree.map(lambda leaf: 3 * leaf**2, TREE)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), gradient.tree, expected)
  traced = str(jax.make_jaxpr(jax.grad(loss))(packed))
  assert 'concatenate' in traced and 'add_any' not in traced and 'pad' not in traced


def test_trees_with_packed_parts_are_unpacked_and_packed_again():
  packed = pack(TREE)
  state = {'count': np.int32(3), 'trace': (packed, np.zeros(2))}
  whole = unpack(state)
  assert_same(whole, {'count': np.int32(3), 'trace': (TREE, np.zeros(2))})
  again = pack_like(state, whole)
  assert isinstance(again['trace'][0], Packed)
  assert_same(again, state)


@pytest.mark.parametrize('decayed', ['kernel', 'other'])
def test_an_optimizer_tells_kernels_from_the_rest(decayed):
  mask = lambda params: jax.tree_util.tree_map_with_path(  # noqa: E731
    lambda path, _: path[-1].key == decayed, params
  )
  optimizer = optax.add_decayed_weights(0.5, mask)
  packed = pack(TREE)
  zeros = jax.tree.map(jnp.zeros_like, packed)
  updates, _ = optimizer.update(zeros, optimizer.init(packed), packed)
  for name, vector in updates.vectors.items():
    factor = 0.5 if name == decayed else 0.0
    np.testing.assert_array_equal(vector, factor * packed.vectors[name])
