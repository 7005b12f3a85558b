"""Batch norm of several maps against that of Flax in double precision."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imta_jax.adaptive.compiler import compiler_options
from imta_jax.models.batch_norm import MOMENTUM, batch_norm, normalize

RANDOM = np.random.default_rng(0)
# Two maps of different size and width.
MAPS = (
  3.0 + RANDOM.standard_normal((4, 6, 6, 5)).astype(np.float32),
  2.0 * RANDOM.standard_normal((4, 3, 3, 2)).astype(np.float32) - 1.0,
)
SCALE = np.linspace(-1, 2, 7, dtype=np.float32)
BIAS = np.linspace(1, -1, 7, dtype=np.float32)


@pytest.mark.parametrize('relu', [True, False])
def test_batch_norm_is_flaxs_for_each_map(relu):
  module = nn.BatchNorm(use_running_average=False, momentum=0.0)

  def flaxs(maps, scale, bias):
    results, means, variances = [], [], []
    of_maps = jnp.split(scale, [5]), jnp.split(bias, [5])
    for x, own_scale, own_bias in zip(maps, *of_maps, strict=True):
      width = x.shape[-1]
      stats = {'mean': jnp.zeros(width), 'var': jnp.ones(width)}
      variables = {'params': {'scale': own_scale, 'bias': own_bias}, 'batch_stats': stats}
      y, updated = module.apply(variables, x, mutable=['batch_stats'])
      results.append(nn.relu(y) if relu else y)
      means.append(updated['batch_stats']['mean'])
      variances.append(updated['batch_stats']['var'])
    return tuple(results), (jnp.concatenate(means), jnp.concatenate(variances))

  random = np.random.default_rng(1)
  gradient = tuple(random.standard_normal(x.shape).astype(np.float32) for x in MAPS)
  with jax.enable_x64(True):
    operands = jax.tree.map(np.float64, (MAPS, SCALE, BIAS))
    expected, expected_pullback, (mean, var) = jax.vjp(flaxs, *operands, has_aux=True)
    expected_gradients = expected_pullback(jax.tree.map(np.float64, gradient))
  (results, added_mean, added_var), pullback = jax.vjp(
    lambda maps, scale, bias: batch_norm(maps, scale, bias, relu, None), MAPS, SCALE, BIAS
  )
  for ours, theirs in zip(results, expected, strict=True):
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
  np.testing.assert_allclose(added_mean, (1 - MOMENTUM) * mean, rtol=1e-5)
  np.testing.assert_allclose(added_var, (1 - MOMENTUM) * var, rtol=1e-4)
  gradients = pullback((gradient, jnp.ones(7), jnp.ones(7)))  # Statistics have no gradient.
  jax.tree.map(
    lambda ours, theirs: np.testing.assert_allclose(ours, theirs, atol=2e-4),
    gradients,
    expected_gradients,
  )


def test_given_statistics_are_applied():
  mean, var = np.linspace(-1, 1, 7, dtype=np.float32), np.linspace(0.1, 3, 7, dtype=np.float32)
  results = normalize(MAPS, mean, var, SCALE, BIAS, True)
  for x, y, part in zip(MAPS, results, (slice(5), slice(5, 7)), strict=True):
    expected = (x - mean[part]) / np.sqrt(var[part] + 1e-5) * SCALE[part] + BIAS[part]
    np.testing.assert_allclose(y, np.maximum(expected, 0), atol=1e-5)


@pytest.mark.parametrize('relu', [True, False])
def test_gradients_with_given_statistics_are_exact(relu):
  random = np.random.default_rng(1)
  mean, var = random.normal(size=7).astype(np.float32), np.linspace(0.1, 3, 7, dtype=np.float32)
  gradient = tuple(random.standard_normal(x.shape).astype(np.float32) for x in MAPS)

  def plain(maps, mean, var, scale, bias):
    results = []
    for x, part in zip(maps, (slice(5), slice(5, 7)), strict=True):
      y = (x - mean[part]) / jnp.sqrt(var[part] + 1e-5) * scale[part] + bias[part]
      results.append(nn.relu(y) if relu else y)
    return tuple(results)

  with jax.enable_x64(True):
    operands = jax.tree.map(np.float64, (MAPS, mean, var, SCALE, BIAS))
    expected = jax.vjp(plain, *operands)[1](jax.tree.map(np.float64, gradient))
  pullback = jax.vjp(lambda *operands: normalize(*operands, relu), MAPS, mean, var, SCALE, BIAS)[1]
  jax.tree.map(
    lambda ours, theirs: np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-3),
    pullback(gradient),
    expected,
  )


def test_types_do_not_depend_on_x64():
  operands = jax.tree.map(jnp.asarray, (MAPS, SCALE, BIAS))
  expected = batch_norm(*operands, True, None)
  with jax.enable_x64(True):
    results = batch_norm(*operands, True, None)
  jax.tree.map(np.testing.assert_array_equal, results, expected)
  assert {leaf.dtype.name for leaf in jax.tree.leaves(results)} == {'float32'}


def test_statistics_over_devices_are_those_of_the_whole_batch_in_one_exchange():
  def loss(maps, axis_name):
    results, *_ = batch_norm(maps, SCALE, BIAS, True, axis_name)
    return sum((y**3).sum() for y in results)

  def of_parts(maps):
    return jax.vmap(jax.grad(lambda maps: loss(maps, 'parts')), axis_name='parts')(maps)

  whole = jax.grad(loss)(MAPS, None)
  halves = tuple(x.reshape(2, 2, *x.shape[1:]) for x in MAPS)
  for parts, expected in zip(of_parts(halves), whole, strict=True):
    np.testing.assert_allclose(parts.reshape(expected.shape), expected, atol=2e-3)

  traced = jax.make_jaxpr(lambda maps: jax.grad(loss)(maps, 'parts'), axis_env=[('parts', 2)])(MAPS)
  assert str(traced).count('psum') == 2  # One in the forward and one in the backward pass.


def test_batch_statistics_of_many_pixels_are_exact():
  # Compiled as the training step is: one sum over all pixels would be off by some 5e-6.
  x = 1.0 + np.random.default_rng(0).standard_normal((64, 32, 32, 8)).astype(np.float32)
  added = jax.jit(
    lambda x: batch_norm((x,), jnp.ones(8), jnp.zeros(8), False, None)[1:],
    compiler_options=compiler_options(),
  )
  mean, var = (array / (1 - MOMENTUM) for array in added(x))
  np.testing.assert_allclose(mean, x.mean((0, 1, 2), np.float64), rtol=1e-6)
  np.testing.assert_allclose(var, x.var((0, 1, 2), np.float64), rtol=2e-6)
