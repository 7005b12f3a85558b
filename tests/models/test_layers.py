"""Layers that run together against the layers one by one."""

from functools import partial

import flax.linen as nn
import jax
import numpy as np
import pytest

from imta_jax.models.layers import ConvNorm, run_together, split_features

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
