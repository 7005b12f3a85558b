"""Layers against those of Flax in double precision."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imta_jax.adaptive.engine.compiler import compiler_options
from imta_jax.models.layers import ConvNorm, batch_norm, run_together

MAPS = 3.0 + np.random.default_rng(0).standard_normal((4, 6, 6, 5)).astype(np.float32)
SCALE = np.linspace(-1, 2, 5, dtype=np.float32)
BIAS = np.linspace(1, -1, 5, dtype=np.float32)


@pytest.mark.parametrize('relu', [True, False])
def test_batch_norm_is_flaxs(relu):
  module = nn.BatchNorm(use_running_average=False, momentum=0.0)

  def flaxs(x, scale, bias):
    stats = {'mean': jnp.zeros(5), 'var': jnp.ones(5)}
    variables = {'params': {'scale': scale, 'bias': bias}, 'batch_stats': stats}
    y, updated = module.apply(variables, x, mutable=['batch_stats'])
    return nn.relu(y) if relu else y, updated['batch_stats']

  gradient = np.random.default_rng(1).standard_normal(MAPS.shape).astype(np.float32)
  with jax.enable_x64(True):
    operands = [array.astype(np.float64) for array in (MAPS, SCALE, BIAS)]
    expected, expected_pullback, stats = jax.vjp(flaxs, *operands, has_aux=True)
    expected_gradients = expected_pullback(gradient.astype(np.float64))
  (y, mean, var), pullback = jax.vjp(
    lambda x, scale, bias: batch_norm(x, scale, bias, relu, None), MAPS, SCALE, BIAS
  )
  np.testing.assert_allclose(y, expected, atol=1e-5)
  np.testing.assert_allclose(mean, stats['mean'], rtol=1e-5)
  np.testing.assert_allclose(var, stats['var'], rtol=1e-4)
  gradients = pullback((gradient, jnp.zeros(5), jnp.zeros(5)))
  for ours, theirs in zip(gradients, expected_gradients, strict=True):
    np.testing.assert_allclose(ours, theirs, atol=2e-4)


def test_batch_norm_over_devices_is_that_of_the_whole_batch():
  def loss(x, axis_name):
    y, *_ = batch_norm(x, SCALE, BIAS, True, axis_name)
    return (y**3).sum()

  whole = jax.grad(loss)(MAPS, None)
  parts = jax.vmap(jax.grad(lambda x: loss(x, 'parts')), axis_name='parts')(
    MAPS.reshape(2, 2, 6, 6, 5)
  )
  np.testing.assert_allclose(parts.reshape(MAPS.shape), whole, atol=2e-3)


def test_batch_statistics_of_many_pixels_are_exact():
  # Compiled as the training step is: one sum over all pixels would be off by some 5e-6.
  x = 1.0 + np.random.default_rng(0).standard_normal((64, 32, 32, 8)).astype(np.float32)
  batch_statistics = jax.jit(
    lambda x: batch_norm(x, jnp.ones(8), jnp.zeros(8), False, None)[1:],
    compiler_options=compiler_options(),
  )
  mean, var = batch_statistics(x)
  np.testing.assert_allclose(mean, x.mean((0, 1, 2), np.float64), rtol=1e-6)
  np.testing.assert_allclose(var, x.var((0, 1, 2), np.float64), rtol=2e-6)


def test_layers_together_are_the_layers_one_by_one():
  class Pair(nn.Module):
    together: bool

    @nn.compact
    def __call__(self, x, train):
      layers = [ConvNorm(features, 1, name=name) for features, name in ((3, 'a'), (4, 'b'))]
      if self.together:
        return tuple(run_together(layers, x, train))
      return tuple(layer(x, train) for layer in layers)

  variables = Pair(False).init(jax.random.key(0), MAPS, False)
  assert jax.tree.map(jnp.shape, variables) == jax.tree.map(
    jnp.shape, Pair(True).init(jax.random.key(0), MAPS, False)
  )
  for train in (False, True):
    one, other = (
      Pair(together).apply(variables, MAPS, train, mutable=['batch_stats'])
      for together in (False, True)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), one, other)
