"""GoogLeNet: its known size, the Inception module, pooling, and the auxiliary exits."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imta_jax import models
from imta_jax.adaptive.cost import count_madds, exit_costs
from imta_jax.models.googlenet import Inception, MaxPool
from imta_jax.models.layers import ConvNorm

SHAPE = (224, 224, 3)


def test_the_plain_network_has_the_known_size():
  model = models.create('googlenet', num_classes=1000)
  assert model.num_exits == 1
  (cost,) = exit_costs(model, SHAPE)
  assert cost.params == 6_624_904
  # Multiply-adds of torchvision, which counts neither ReLU nor pooling.
  assert 1.498 < cost.madds / 1e9 < 1.02 * 1.498


def test_the_last_max_pooling_is_the_narrow_one():
  (stage,) = models.create('googlenet').stages
  windows = [layer.window for layer in stage.layers if isinstance(layer, MaxPool)]
  assert windows == [3, 3, 3, 2]


@pytest.mark.slow
def test_auxiliary_exits_have_the_known_size():
  model = models.create('googlenet', auxiliary_exits=True, num_classes=1000)
  first, second, last = exit_costs(model, SHAPE)
  assert last.params == 13_004_888  # As in torchvision.
  (plain,) = exit_costs(models.create('googlenet', num_classes=1000), SHAPE)
  assert (last.params - plain.params) % 2 == 0
  # Each reads a map of 14×14 pixels: pooling to 4×4, 1×1 convolution, two dense layers, ReLU.
  of_exits = sum(
    16 * width * 25 + 16 * (width + 1) * 128 + (2048 + 1) * 1024 + 1024 + (1024 + 1) * 1000
    for width in (512, 528)
  )
  assert last.madds - plain.madds == of_exits
  assert first.madds < second.madds < last.madds


def test_auxiliary_exits_read_the_third_and_the_sixth_module():
  model = models.create('googlenet', auxiliary_exits=True, num_classes=10, dtype='bfloat16')
  images = jax.ShapeDtypeStruct((2, 96, 96, 3), jnp.float32)
  logits, variables = jax.eval_shape(model.init_with_output, jax.random.key(0), images)
  assert logits.shape == (3, 2, 10)
  embeddings = jax.eval_shape(partial(model.apply, method='embed'), variables, images)
  assert [x.shape for x in embeddings] == [(2, 1024)] * 3
  assert {x.dtype for x in embeddings} == {jnp.dtype('bfloat16')}
  modules = [
    sum('direct' in layer for layer in variables['params'][f'stages_{index}'].values())
    for index in range(3)
  ]
  assert modules == [3, 3, 3]
  for index, width in enumerate((512, 528)):
    kernel = variables['params'][f'exits_{index}']['conv_norm']['conv']['kernel']
    assert kernel.shape == (1, 1, width, 128)


class BranchByBranch(nn.Module):
  """Inception(4, (2, 3), (5, 6), 7), each layer on its own."""

  @nn.compact
  def __call__(self, x, train):
    def conv_norm(features, side, name, y):
      return ConvNorm(features, side, name=name)(y, train)

    return jnp.concatenate(
      [
        conv_norm(4, 1, 'direct', x),
        conv_norm(5, 3, 'wide_0', conv_norm(2, 1, 'reduce_0', x)),
        conv_norm(6, 3, 'wide_1', conv_norm(3, 1, 'reduce_1', x)),
        conv_norm(7, 1, 'pooled', nn.max_pool(x, (3, 3), padding=((1, 1), (1, 1)))),
      ],
      axis=-1,
    )


def test_an_inception_module_is_its_branches_side_by_side():
  random = np.random.default_rng(0)
  x = random.standard_normal((2, 5, 4, 3)).astype(np.float32)
  module, branches = Inception(4, (2, 3), (5, 6), 7, ConvNorm), BranchByBranch()
  shapes = jax.eval_shape(lambda key: branches.init(key, x, False), jax.random.key(0))
  assert jax.eval_shape(lambda key: module.init(key, x, False), jax.random.key(0)) == shapes
  variables = jax.tree.map(lambda leaf: random.uniform(0.5, 2, leaf.shape).astype('f4'), shapes)
  actual, expected = (
    network.apply(variables, x, True, mutable=['batch_stats']) for network in (module, branches)
  )
  jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), actual, expected)


def test_an_inception_module_is_counted_by_hand():
  x = jax.ShapeDtypeStruct((1, 6, 6, 3), jnp.float32)
  module = Inception(4, (2, 3), (5, 6), 7, ConvNorm)
  variables = jax.eval_shape(lambda key, x: module.init(key, x, False), jax.random.key(0), x)
  madds = count_madds(lambda variables, x: module.apply(variables, x, False), variables, x)
  convolutions = 3 * (4 + 2 + 3 + 7) + 9 * (2 * 5 + 3 * 6)
  relu, pooling = 4 + 2 + 3 + 5 + 6 + 7, 9 * 3
  assert madds == 36 * (convolutions + relu + pooling)


@pytest.mark.parametrize(
  ('window', 'side', 'expected'),
  [(3, 6, [2, 4, 5]), (3, 7, [2, 4, 6]), (2, 7, [1, 3, 5, 6])],
)
def test_max_pooling_starts_at_the_first_pixel_and_leaves_out_none(window, side, expected):
  rows = jnp.broadcast_to(jnp.arange(side, dtype=jnp.float32)[:, None], (side, side))
  pooled = MaxPool(window)(rows[None, ..., None], False)[0, ..., 0]
  assert pooled.shape == (len(expected), len(expected))
  np.testing.assert_array_equal(pooled[:, 0], expected)


def test_images_too_small_for_auxiliary_exits_are_refused():
  model = models.create('googlenet', auxiliary_exits=True)
  message = 'the map of an auxiliary exit is 4×4, too small .*use larger images or auxiliary_exits'
  with pytest.raises(ValueError, match=f'^{message}'):
    jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 78, 78, 3)))
  jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 79, 79, 3)))
