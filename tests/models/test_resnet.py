"""ResNet: known sizes, exits after blocks, and shortcuts."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imta_jax import models
from imta_jax.models.layers import ConvNorm
from imta_jax.models.resnet import Block


def trace(image_shape=(32, 32, 3), **fields):
  """Returns the shapes of the logits and of the parameters."""
  model = models.create('resnet', **fields)
  images = jax.ShapeDtypeStruct((2, *image_shape), jnp.float32)
  logits, variables = jax.eval_shape(model.init_with_output, jax.random.key(0), images)
  return logits.shape, variables['params']


def count(params):
  return sum(leaf.size for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize(
  ('depth', 'num_params'), [(18, 11_689_512), (34, 21_797_672), (50, 25_557_032), (101, 44_549_160)]
)
def test_imagenet_networks_have_the_known_number_of_parameters(depth, num_params):
  shape, params = trace((224, 224, 3), depth=depth, stem='imagenet', num_classes=1000)
  assert shape == (1, 2, 1000)
  assert count(params) == num_params


@pytest.mark.parametrize(('depth', 'millions'), [(20, 0.27), (56, 0.85)])
def test_cifar_networks_have_the_published_number_of_parameters(depth, millions):
  shape, params = trace(depth=depth, num_classes=10)
  assert shape == (1, 2, 10)
  digits = len(str(millions).split('.')[1])
  assert round(count(params) / 1e6, digits) == millions


def test_exits_branch_off_after_the_named_blocks():
  shape, params = trace(depth=20, exits_after=(2, 5), num_classes=10)
  assert shape == (3, 2, 10)
  # Nine blocks, and the stem before the first.
  assert [len(params[f'stages_{index}']) for index in range(3)] == [3, 3, 4]
  for index, width in ((0, 16), (1, 32)):
    exit_params = params[f'exits_{index}']
    assert exit_params['convolutions_0']['conv']['kernel'].shape == (3, 3, width, 128)
    assert exit_params['convolutions_1']['conv']['kernel'].shape == (3, 3, 128, 128)
    assert params[f'classifiers_{index}']['dense']['kernel'].shape == (128, 10)
  assert 'exits_2' not in params
  assert params['classifiers_2']['dense']['kernel'].shape == (64, 10)


def test_the_order_of_exits_and_naming_the_last_block_change_nothing():
  assert trace(depth=20, exits_after=(5, 2)) == trace(depth=20, exits_after=(2, 5, 9))


def test_behind_the_last_exit_lies_the_plain_network():
  _, params = trace(depth=20, exits_after=(1, 3, 8))
  _, plain = trace(depth=20)
  kept = {
    name: tree
    for name, tree in params.items()
    if name.startswith('stages_') or name == 'classifiers_3'
  }
  assert count(kept) == count(plain)
  assert 'classifiers_4' not in params


@pytest.mark.parametrize('projects', [False, True])
def test_a_block_whose_convolutions_are_zero_is_its_shortcut(projects):
  x = np.random.default_rng(0).standard_normal((2, 6, 6, 3), np.float32)
  block = Block(5, 2, False, projects, ConvNorm)
  shapes = jax.eval_shape(partial(block.init, train=False), jax.random.key(0), x)
  variables = jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), shapes)
  for name in ('conv_0', 'conv_1'):
    variables['params'][name] = jax.tree.map(np.zeros_like, variables['params'][name])
  variables['batch_stats'] = jax.tree.map(np.zeros_like, variables['batch_stats'])
  y = block.apply(variables, x, False)
  subsampled = x[:, ::2, ::2]
  if projects:
    # A 1×1 convolution of ones, batch norm with mean and variance 0, scale and bias 1.
    expected = subsampled.sum(axis=-1, keepdims=True) / np.sqrt(1e-5) + 1
    expected = np.broadcast_to(expected, (2, 3, 3, 5))
  else:
    expected = np.concatenate([subsampled, np.zeros((2, 3, 3, 2))], axis=-1)
  np.testing.assert_allclose(y, np.maximum(expected, 0), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'depth': 21}, r'depth 21 is not one of the CIFAR ResNets: use 6n \+ 2'),
    ({'depth': 2}, 'depth 2 is not one of the CIFAR ResNets'),
    (
      {'depth': 20, 'stem': 'imagenet'},
      'depth 20 is not .* ImageNet .*choose one of 18, 34, 50, 101$',
    ),
    ({'stem': 'mnist'}, "stem 'mnist' is unknown: use 'cifar' or 'imagenet'"),
    ({'depth': 20, 'exits_after': (0,)}, r'exits_after \(0,\) must be .* from 1 to 9$'),
    ({'depth': 20, 'exits_after': (3, 3)}, r'exits_after \(3, 3\) must be different blocks'),
  ],
)
def test_a_bad_field_is_refused(fields, message):
  with pytest.raises(ValueError, match=f'^{message}'):
    models.create('resnet', **fields)
