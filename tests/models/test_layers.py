"""Layers that run together against the layers one by one."""

from functools import partial

import flax.linen as nn
import jax
import numpy as np
import pytest

from imta_jax.models.layers import ConvNorm, StatisticsExit, run_together, split_features

RANDOM = np.random.default_rng(0)
FINE = RANDOM.standard_normal((4, 7, 6, 5)).astype(np.float32)
COARSE = RANDOM.standard_normal((4, 4, 3, 2)).astype(np.float32)


class Layers(nn.Module):
  """Two layers that read one map, and a layer of stride 2 beside one of stride 1."""

  together: bool

  @nn.compact
  def __call__(self, fine, coarse, train):
    readers = [ConvNorm(features, 1, name=name) for features, name in ((3, 'a'), (4, 'b'))]
    pair = [ConvNorm(3, 3, stride=2, name='down'), ConvNorm(2, 3, name='normal')]
    if not self.together:
      inputs = (fine, fine, fine, coarse)
      return [layer(x, train) for layer, x in zip((*readers, *pair), inputs, strict=True)]
    read, paired = run_together(
      [[(layer, fine) for layer in readers], list(zip(pair, (fine, coarse), strict=True))], train
    )
    return [*split_features(readers, read), *split_features(pair, paired)]


@pytest.mark.parametrize('train', [False, True])
def test_layers_together_are_the_layers_one_by_one(train):
  shapes, expected = (
    jax.eval_shape(partial(Layers(together).init, train=train), jax.random.key(0), FINE, COARSE)
    for together in (True, False)
  )
  assert shapes == expected
  # Running statistics that differ from layer to layer.
  variables = jax.tree.map(lambda leaf: RANDOM.uniform(0.5, 1, leaf.shape).astype('f4'), shapes)
  one, other = (
    jax.jit(partial(Layers(together).apply, train=train, mutable=['batch_stats']))(
      variables, FINE, COARSE
    )
    for together in (False, True)
  )
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), one, other)


def test_an_exit_reads_normalised_means_and_standard_deviations():
  model = StatisticsExit()
  variables = model.init(jax.random.key(0), FINE)
  embedding, updated = model.apply(variables, FINE, train=True, mutable=['batch_stats'])
  x = FINE.astype(np.float64)
  statistics = np.concatenate([x.mean((1, 2)), np.sqrt(x.var((1, 2)) + 1e-5)], axis=-1)
  mean, var = statistics.mean(0), statistics.var(0)
  np.testing.assert_allclose(embedding, (statistics - mean) / np.sqrt(var + 1e-5), atol=2e-3)
  np.testing.assert_allclose(updated['batch_stats']['norm']['mean'], 0.1 * mean, rtol=1e-4)
  np.testing.assert_allclose(
    model.apply(variables, FINE), statistics / np.sqrt(1 + 1e-5), rtol=1e-4, atol=1e-6
  )


def test_the_gradient_of_an_exit_of_constant_maps_is_finite():
  model, maps = StatisticsExit(), np.ones((2, 4, 4, 3), np.float32)
  variables = model.init(jax.random.key(0), maps)
  gradient = jax.grad(lambda maps: (model.apply(variables, maps) ** 2).sum())(maps)
  assert np.isfinite(gradient).all()
