"""Costs by the paper's rule, against counts written out by hand."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from imta_jax.adaptive.cost import ExitCost, count_madds, exit_costs
from imta_jax.models.layers import ConvNorm
from imta_jax.models.multi_exit import MultiExitNetwork

IMAGES = jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32)
VECTORS = jax.ShapeDtypeStruct((4, 6), jnp.float32)


def count(module, x=IMAGES):
  """Multiply-adds of a Flax module."""
  variables = jax.eval_shape(module.init, jax.random.key(0), x)
  return count_madds(module.apply, variables, x)


@pytest.mark.parametrize(
  ('options', 'expected'),
  [
    ({}, 8 * 8 * 5 * 9 * 3),
    ({'use_bias': False}, 8 * 8 * 5 * 9 * 3),  # A convolution's bias is free.
    ({'strides': 2}, 4 * 4 * 5 * 9 * 3),
    ({'padding': 'VALID'}, 6 * 6 * 5 * 9 * 3),
    ({'dtype': jnp.bfloat16}, 8 * 8 * 5 * 9 * 3),
  ],
)
def test_a_convolution_costs_its_multiply_adds_without_bias(options, expected):
  assert count(nn.Conv(5, (3, 3), **options)) == expected


def test_a_grouped_convolution_reads_its_group_alone():
  assert count(nn.Conv(6, (3, 3), feature_group_count=3)) == 8 * 8 * 6 * 9 * 1


@pytest.mark.parametrize(
  ('side', 'stride', 'expected'),
  [(1, 1, 64 * 5 * 3), (3, 1, 64 * 5 * 27), (3, 2, 16 * 5 * 27), (7, 2, 16 * 5 * 147)],
)
def test_our_convolution_costs_the_same_in_whatever_form(side, stride, expected):
  for use_bias in (False, True):
    assert count(ConvNorm(5, side, stride, relu=False, use_bias=use_bias)) == expected


def test_a_dense_layer_costs_weights_and_biases():
  assert count(nn.Dense(5), VECTORS) == 4 * (6 * 5 + 5)
  assert count(nn.Dense(5, use_bias=False), VECTORS) == 4 * 6 * 5
  assert count(nn.Dense(5, dtype=jnp.bfloat16), VECTORS) == 4 * (6 * 5 + 5)


def test_a_matrix_product_written_out_is_a_dense_layer():
  kernel, bias = jnp.zeros((6, 5)), jnp.zeros(5)
  assert count_madds(lambda x: x @ kernel + bias, VECTORS) == 4 * (6 * 5 + 5)
  assert count_madds(lambda x: jnp.einsum('ni,io->no', x, kernel) + bias, VECTORS) == 4 * 35


def test_relu_costs_one_an_element():
  assert count_madds(nn.relu, IMAGES) == 8 * 8 * 3
  assert count_madds(lambda x: jnp.maximum(x, 0), IMAGES) == 8 * 8 * 3


@pytest.mark.parametrize('pool', [nn.avg_pool, nn.max_pool])
def test_pooling_costs_its_kernel_area_an_output_element(pool):
  assert count_madds(lambda x: pool(x, (2, 2), (2, 2)), IMAGES) == 4 * 4 * 3 * 4
  assert count_madds(lambda x: pool(x, (3, 3), (1, 1), 'SAME'), IMAGES) == 8 * 8 * 3 * 9


def test_a_scan_costs_its_body_every_time():
  kernel = jnp.zeros((6, 6))

  def body(x, _):
    return nn.relu(x @ kernel), None

  run = lambda x: jax.lax.scan(body, x, None, length=7)[0]  # noqa: E731
  assert count_madds(run, VECTORS) == 7 * 4 * (6 * 6 + 6)


def test_computation_inside_other_computation_is_counted():
  inside = jax.jit(jax.checkpoint(nn.relu))
  assert count_madds(jax.jit(lambda x: inside(inside(x))), VECTORS) == 2 * 4 * 6


def test_the_whole_batch_is_counted():
  batch = jax.ShapeDtypeStruct((10, 8, 8, 3), jnp.float32)
  conv = nn.Conv(5, (3, 3))
  assert count(conv, batch) == 10 * count(conv)


@pytest.mark.parametrize(
  'function',
  [
    lambda x: jnp.concatenate([x, x], axis=-1),
    lambda x: x.reshape(1, -1),
    lambda x: x + x,
    lambda x: jnp.maximum(x, 1.0),
    nn.softmax,
  ],
)
def test_what_the_rule_does_not_name_is_free(function):
  assert count_madds(function, IMAGES) == 0


def test_batch_norm_is_free():
  assert count(nn.BatchNorm(use_running_average=True)) == 0


class OwnStage(nn.Module):
  """A stage that is not ours."""

  features: int
  norm: bool = False

  @nn.compact
  def __call__(self, features, train=False):
    (x,) = features
    x = nn.Conv(self.features, (3, 3), strides=2, use_bias=False)(x)
    if self.norm:
      x = nn.BatchNorm(use_running_average=not train)(x)
    return (nn.relu(x),)


class OwnExit(nn.Module):
  """An exit that is not ours."""

  @nn.compact
  def __call__(self, x, train=False):
    return nn.avg_pool(x, x.shape[1:3]).reshape(len(x), -1)


def own_network(norm=False, **fields):
  """Two exits, on maps of 4×4×4 and 2×2×6; five classes."""
  return MultiExitNetwork(
    [OwnStage(4, norm), OwnStage(6, norm)], [OwnExit(), OwnExit()], 5, **fields
  )


# Convolution, ReLU, pooling, dense layer.
FIRST_MADDS = 4 * 4 * 4 * 27 + 4 * 4 * 4 + 4 * 16 + (4 * 5 + 5)
SECOND_MADDS = 2 * 2 * 6 * 36 + 2 * 2 * 6 + 6 * 4 + (6 * 5 + 5)
FIRST_PARAMS = 27 * 4 + (4 * 5 + 5)
SECOND_PARAMS = 36 * 6 + (6 * 5 + 5)


def test_exits_of_a_network_of_ones_own_cost_all_up_to_them():
  assert exit_costs(own_network(), (8, 8, 3)) == [
    ExitCost(FIRST_MADDS, FIRST_PARAMS),
    ExitCost(FIRST_MADDS + SECOND_MADDS, FIRST_PARAMS + SECOND_PARAMS),
  ]


def test_batch_norm_in_a_network_adds_parameters_alone():
  assert exit_costs(own_network(norm=True), (8, 8, 3)) == [
    ExitCost(FIRST_MADDS, FIRST_PARAMS + 2 * 4),
    ExitCost(FIRST_MADDS + SECOND_MADDS, FIRST_PARAMS + SECOND_PARAMS + 2 * 4 + 2 * 6),
  ]


def test_costs_do_not_depend_on_gradient_equilibrium_or_precision():
  plain = exit_costs(own_network(gradient_equilibrium='off'), (8, 8, 3))
  assert exit_costs(own_network(gradient_equilibrium='all'), (8, 8, 3)) == plain
  assert exit_costs(own_network(dtype=jnp.bfloat16), (8, 8, 3)) == plain


def test_collaboration_costs_its_transfer_network():
  first, second = exit_costs(own_network(collaboration='network'), (8, 8, 3))
  assert first == ExitCost(FIRST_MADDS, FIRST_PARAMS)
  # Dense layer from 5 logits to 6, ReLU, and 6 more inputs of the last layer; batch norm is free.
  extra_madds = (5 * 6 + 6) + 6 + 6 * 5
  extra_params = (5 * 6 + 6) + 2 * 6 + 6 * 5
  assert second == ExitCost(
    FIRST_MADDS + SECOND_MADDS + extra_madds, FIRST_PARAMS + SECOND_PARAMS + extra_params
  )


def test_identity_collaboration_is_free():
  plain = exit_costs(own_network(), (8, 8, 3))
  assert exit_costs(own_network(collaboration='identity'), (8, 8, 3)) == plain
