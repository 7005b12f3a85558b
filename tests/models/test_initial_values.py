"""Initial values drawn on the host, and values copied from one phase's network to the next."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from imta_jax import models
from imta_jax.models.initial_values import initialize, transplant
from imta_jax.models.layers import ConvNorm
from imta_jax.techniques.inline_collaboration import CollaborativeClassifier

IMAGE_SHAPE = (16, 16, 3)


def create(**fields):
  return models.create(
    'msdnet',
    **{
      'num_exits': 3,
      'step_mode': 'even',
      'channels': 8,
      'growth_rate': 4,
      'scale_factors': (1, 2),
      'bottleneck_factors': (1, 2),
      'num_classes': 5,
      **fields,
    },
  )


@pytest.fixture(scope='module')
def variables():
  return initialize(create(collaboration='network'), 0, IMAGE_SHAPE)


def assert_deviation(values, expected):
  """Checks zero mean and a standard deviation, within five standard errors."""
  assert abs(values.mean()) < 5 * expected / np.sqrt(values.size)
  assert abs(values.std() / expected - 1) < 5 / np.sqrt(2 * values.size)


def test_variables_are_those_that_the_networks_own_init_makes(variables):
  images = jax.ShapeDtypeStruct((1, *IMAGE_SHAPE), jnp.float32)
  expected = jax.eval_shape(create(collaboration='network').init, jax.random.key(0), images)
  assert jax.tree.structure(variables) == jax.tree.structure(expected)
  jax.tree.map(
    lambda ours, theirs: np.testing.assert_equal(ours.shape, theirs.shape), variables, expected
  )
  for leaf in jax.tree.leaves(variables):
    assert isinstance(leaf, np.ndarray) and leaf.dtype == np.float32


def test_every_variable_follows_its_rule(variables):
  kinds = set()
  for name, values in flatten_dict(variables, sep='/').items():
    kind = name.rsplit('/', 1)[-1]
    kinds.add((kind, values.ndim))
    if kind == 'kernel' and values.ndim == 4:
      height, width, _, outputs = values.shape
      assert_deviation(values, np.sqrt(2 / (height * width * outputs)))
    elif kind == 'kernel':
      limit = 1 / np.sqrt(values.shape[0])
      assert 0.9 * limit < np.abs(values).max() <= limit
      assert_deviation(values, limit / np.sqrt(3))
    else:
      np.testing.assert_array_equal(values, {'scale': 1, 'var': 1, 'bias': 0, 'mean': 0}[kind])
  assert kinds == {
    ('kernel', 4),
    ('kernel', 2),
    ('scale', 1),
    ('bias', 1),
    ('mean', 1),
    ('var', 1),
  }


def test_the_modules_own_initializers_draw_alike():
  key = jax.random.key(0)
  convolution = jax.jit(ConvNorm(64, 3).init)(key, np.zeros((1, 4, 4, 32), np.float32))
  assert_deviation(np.asarray(convolution['params']['conv']['kernel']), np.sqrt(2 / (9 * 64)))
  classifier = CollaborativeClassifier(40, 'network')
  dense = jax.jit(classifier.init)(key, np.zeros((1, 50), 'f4'), np.zeros((1, 40), 'f4'))['params']
  for name, inputs in (('dense', 100), ('transfer_dense', 40)):
    kernel = np.asarray(dense[name]['kernel'])
    assert kernel.shape[0] == inputs
    assert 0.9 / np.sqrt(inputs) < np.abs(kernel).max() <= 1 / np.sqrt(inputs)
    assert_deviation(kernel, 1 / np.sqrt(3 * inputs))


def test_the_seed_alone_decides(variables):
  again = initialize(create(collaboration='network'), 0, IMAGE_SHAPE)
  jax.tree.map(np.testing.assert_array_equal, variables, again)
  other = flatten_dict(initialize(create(collaboration='network'), 1, IMAGE_SHAPE), sep='/')
  kernels = {name: x for name, x in flatten_dict(variables, sep='/').items() if 'kernel' in name}
  assert all(np.abs(values - other[name]).max() > 0 for name, values in kernels.items())
  assert len({values.tobytes() for values in kernels.values()}) == len(kernels)


def test_values_of_a_layer_do_not_depend_on_other_layers(variables):
  ours = flatten_dict(variables)
  others = flatten_dict(initialize(create(num_exits=5, reduction=0), 0, IMAGE_SHAPE))
  shared = [
    name
    for name, values in others.items()
    if name[-1] == 'kernel' and name in ours and ours[name].shape == values.shape
  ]
  assert len(shared) > 10 and len(shared) < len(others)
  for name in shared:
    np.testing.assert_array_equal(ours[name], others[name])


class Odd(nn.Module):
  @nn.compact
  def __call__(self, x):
    return x * self.param('gain', nn.initializers.ones, (3,))


def test_a_variable_without_a_rule_is_named():
  with pytest.raises(ValueError, match=r"^variable 'params/gain' of shape \(3,\) has no rule"):
    initialize(Odd(), 0, (3,))


def test_transplant_copies_what_agrees_and_keeps_what_is_new(random_variables, variables):
  donor = random_variables(create(), IMAGE_SHAPE, seed=5)
  grown = transplant(donor, variables)
  assert jax.tree.structure(grown) == jax.tree.structure(variables)
  donor_leaves, fresh_leaves = flatten_dict(donor), flatten_dict(variables)
  kinds = set()
  for name, values in flatten_dict(grown).items():
    if name not in donor_leaves:
      kinds.add('new')
      assert name[-2].startswith('transfer_')
      np.testing.assert_array_equal(values, fresh_leaves[name])
    elif donor_leaves[name].shape == values.shape:
      kinds.add('same')
      np.testing.assert_array_equal(values, donor_leaves[name])
    else:
      kinds.add('grown')
      rows = donor_leaves[name].shape[0]
      assert name[-2:] == ('dense', 'kernel') and values.shape == (2 * rows, 5)
      np.testing.assert_array_equal(values[:rows], donor_leaves[name])
      np.testing.assert_array_equal(values[rows:], 0)
  assert kinds == {'new', 'same', 'grown'}


def test_a_layer_of_another_width_starts_afresh(random_variables):
  donor = random_variables(create(), IMAGE_SHAPE, seed=5)
  fresh = initialize(create(num_classes=7), 0, IMAGE_SHAPE)
  grown = transplant(donor, fresh)
  dense, expected = (tree['params']['classifiers_1']['dense'] for tree in (grown, fresh))
  jax.tree.map(np.testing.assert_array_equal, dense, expected)


def test_phase_two_starts_with_phase_ones_logits(random_variables, variables):
  first, second = create(num_exits=2), create(num_exits=2, collaboration='network')
  donor = random_variables(first, IMAGE_SHAPE, seed=5)
  grown = transplant(donor, initialize(second, 0, IMAGE_SHAPE))
  images = np.random.default_rng(0).standard_normal((2, *IMAGE_SHAPE), np.float32)
  before, after = jax.jit(
    lambda donor, grown, images: (first.apply(donor, images), second.apply(grown, images))
  )(donor, grown, images)
  assert np.abs(before).max() > 0.1
  np.testing.assert_allclose(after, before, rtol=1e-6, atol=1e-6)
