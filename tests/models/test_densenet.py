"""DenseNet: known sizes, the rule of a layer, exits after layers, and training."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imta_jax import models
from imta_jax.adaptive.cost import exit_costs
from imta_jax.models.densenet import DenseLayer, Transition
from imta_jax.models.layers import ConvNorm, NormRelu

IMAGENET = {'growth_rate': 32, 'stem': 'imagenet'}
# The smallest networks of three layers.
TINY = {'depth': 7, 'growth_rate': 4, 'bc': False, 'num_classes': 3}
TINY_BC = {'depth': 10, 'growth_rate': 4, 'num_classes': 3}


def trace(image_shape=(32, 32, 3), **fields):
  """Returns the shapes of the logits and of the parameters."""
  model = models.create('densenet', **fields)
  images = jax.ShapeDtypeStruct((2, *image_shape), jnp.float32)
  logits, variables = jax.eval_shape(model.init_with_output, jax.random.key(0), images)
  return logits.shape, variables['params']


def count(params):
  return sum(leaf.size for leaf in jax.tree.leaves(params))


# Parameters and billions of multiply-adds of torchvision, which counts neither ReLU nor pooling.
@pytest.mark.parametrize(
  ('depth', 'num_params', 'billions'),
  [
    (121, 7_978_856, 2.834),
    pytest.param(169, 14_149_480, 3.36, marks=pytest.mark.slow),
    pytest.param(201, 20_013_928, 4.291, marks=pytest.mark.slow),
  ],
)
def test_imagenet_networks_have_the_known_size(depth, num_params, billions):
  model = models.create('densenet', depth=depth, num_classes=1000, **IMAGENET)
  (cost,) = exit_costs(model, (224, 224, 3))
  assert cost.params == num_params
  assert billions < cost.madds / 1e9 < 1.01 * billions


# The sizes that the DenseNet paper gives, in millions.
@pytest.mark.parametrize(
  ('depth', 'growth_rate', 'bc', 'millions'),
  [
    (40, 12, False, 1.0),
    pytest.param(100, 12, False, 7.0, marks=pytest.mark.slow),
    pytest.param(100, 12, True, 0.8, marks=pytest.mark.slow),
  ],
)
def test_cifar_networks_have_the_published_number_of_parameters(depth, growth_rate, bc, millions):
  shape, params = trace(depth=depth, growth_rate=growth_rate, bc=bc, num_classes=10)
  assert shape == (1, 2, 10)
  assert round(count(params) / 1e6, 1) == millions


def test_densenet_is_counted_by_hand():
  # Depth 7: one layer per block, growth rate 4.
  _, params = trace(**TINY)
  layers = sum(2 * width + 9 * width * 4 for width in (16, 20, 24))
  transitions = sum(2 * width + width * width for width in (20, 24))
  assert count(params) == 27 * 16 + layers + transitions + 2 * 28 + (28 * 3 + 3)


def test_densenet_bc_is_counted_by_hand():
  # Depth 10: one layer per block. Widths before each layer: 8, (8 + 4) / 2 and (6 + 4) / 2.
  _, params = trace(**TINY_BC)
  layers = sum(2 * width + width * 16 + 2 * 16 + 9 * 16 * 4 for width in (8, 6, 5))
  transitions = 2 * 12 + 12 * 6 + 2 * 10 + 10 * 5
  assert count(params) == 27 * 8 + layers + transitions + 2 * 9 + (9 * 3 + 3)


def test_multiply_adds_are_counted_by_hand():
  (cost,) = exit_costs(models.create('densenet', **TINY), (8, 8, 3))
  pixels = (64, 16, 4)
  layers = sum(p * (width + 9 * width * 4) for p, width in zip(pixels, (16, 20, 24), strict=True))
  # ReLU, convolution, and pooling, whose windows together are the map.
  transitions = sum(
    p * (width + width * width + width) for p, width in zip(pixels, (20, 24), strict=False)
  )
  last = 4 * (28 + 28) + (28 * 3 + 3)
  assert cost.madds == 64 * 27 * 16 + layers + transitions + last


class Reference(nn.Module):
  """Batch norm, ReLU and convolution, once or twice, in Flax's own layers."""

  convolutions: tuple[tuple[int, int], ...]

  @nn.compact
  def __call__(self, x, train):
    for features, side in self.convolutions:
      x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9, epsilon=1e-5)(x))
      x = nn.Conv(features, (side, side), padding=side // 2, use_bias=False)(x)
    return x


def apply_both(layer, reference, norms, kernels, train):
  """Applies a layer and Flax's layers with the same variables; maps layer names to theirs."""
  random = np.random.default_rng(0)
  x = random.standard_normal((4, 6, 6, 5), np.float32)
  variables = jax.tree.map(
    lambda leaf: random.uniform(0.5, 1.5, leaf.shape).astype(np.float32),
    jax.eval_shape(partial(reference.init, train=False), jax.random.key(0), x),
  )
  ours = {'params': {}, 'batch_stats': {}}
  for index, path in enumerate(norms):
    for kind in ours:
      tree = {'norm': variables[kind][f'BatchNorm_{index}']}
      ours[kind].setdefault(path, {}).update(tree)
  for index, (name, inner) in enumerate(kernels):
    kernel = {'kernel': variables['params'][f'Conv_{index}']['kernel']}
    ours['params'].setdefault(name, {}).update({inner: kernel} if inner else kernel)
  expected, state = reference.apply(variables, x, train, mutable=['batch_stats'])
  actual, our_state = layer.apply(ours, x, train, mutable=['batch_stats'])
  for index, path in enumerate(norms):
    jax.tree.map(
      partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6),
      dict(our_state['batch_stats'][path]['norm']),
      dict(state['batch_stats'][f'BatchNorm_{index}']),
    )
  return x, np.asarray(actual), np.asarray(expected)


@pytest.mark.parametrize('train', [False, True])
@pytest.mark.parametrize('bottleneck', [False, True])
def test_a_layer_appends_what_it_computes_from_its_normalised_input(bottleneck, train):
  layer = DenseLayer(3, bottleneck, jnp.float32, None)
  if bottleneck:
    reference = Reference(((12, 1), (3, 3)))
    names = ['norm_relu', 'bottleneck'], [('bottleneck', 'conv'), ('conv', None)]
  else:
    reference, names = Reference(((3, 3),)), (['norm_relu'], [('conv', None)])
  x, actual, expected = apply_both(layer, reference, *names, train)
  np.testing.assert_array_equal(actual[..., :5], x)
  np.testing.assert_allclose(actual[..., 5:], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('train', [False, True])
def test_a_transition_averages_a_convolution_of_its_normalised_input(train):
  layer = Transition(2, jnp.float32, None)
  reference = Reference(((2, 1),))
  _, actual, expected = apply_both(layer, reference, ['norm_relu'], [('conv', None)], train)
  blocks = expected.reshape(4, 3, 2, 3, 2, 2)
  np.testing.assert_allclose(actual, blocks.mean(axis=(2, 4)), rtol=1e-4, atol=1e-4)


def test_exits_branch_off_after_the_named_layers():
  # Two layers per block: the third is the first of the second block, behind a transition.
  shape, params = trace(depth=16, growth_rate=4, exits_after=(2, 3), num_classes=10)
  assert shape == (3, 2, 10)
  # The stem and two layers; a transition and a layer; a layer, a transition and two layers.
  assert [len(params[f'stages_{index}']) for index in range(3)] == [3, 2, 4]
  for index, width in ((0, 8 + 2 * 4), (1, 8 + 4)):
    norm, *convolutions = (params[f'exits_{index}'][f'convolutions_{i}'] for i in range(3))
    assert norm['norm']['scale'].shape == (width,)
    assert [layer['conv']['kernel'].shape for layer in convolutions] == [
      (3, 3, width, 128),
      (3, 3, 128, 128),
    ]
    assert params[f'classifiers_{index}']['dense']['kernel'].shape == (128, 10)
  assert list(params['exits_2']) == ['convolutions_0']


def test_the_order_of_exits_and_naming_the_last_layer_change_nothing():
  assert trace(**TINY_BC, exits_after=(2, 1)) == trace(**TINY_BC, exits_after=(1, 2, 3))


def test_behind_the_last_exit_lies_the_plain_network():
  _, params = trace(depth=22, exits_after=(1, 6, 7))
  _, plain = trace(depth=22)
  kept = {
    name: tree
    for name, tree in params.items()
    if name.startswith('stages_') or name in ('exits_3', 'classifiers_3')
  }
  assert count(kept) == count(plain)
  assert 'classifiers_4' not in params


def test_every_batch_norm_averages_over_devices():
  axes = {}

  def note(call, args, kwargs, context):
    if isinstance(context.module, ConvNorm | NormRelu):
      axes[context.module.path] = context.module.batch_norm_axis
    return call(*args, **kwargs)

  model = models.create('densenet', exits_after=(1,), batch_norm_axis='devices', **TINY_BC)
  with nn.intercept_methods(note):
    jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32))
  # Two in each of three layers, one in each of two transitions, three and one in the exits.
  assert list(axes.values()) == ['devices'] * 12


def test_the_type_of_the_computation_reaches_every_layer():
  for fields in (TINY, {**TINY_BC, 'stem': 'cifar'}):
    model = models.create('densenet', dtype='bfloat16', exits_after=(1,), **fields)
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    embeddings = jax.eval_shape(partial(model.apply, method='embed'), variables, images)
    assert [x.dtype for x in embeddings] == [jnp.bfloat16] * 2
    assert {x.dtype for x in jax.tree.leaves(variables)} == {jnp.dtype('float32')}


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'depth': 41}, r'depth 41 is not one of the CIFAR DenseNet-BCs: use 6n \+ 4'),
    ({'depth': 4}, 'depth 4 is not one of the CIFAR DenseNet-BCs'),
    ({'depth': 41, 'bc': False}, r'depth 41 is not one of the CIFAR DenseNets: use 3n \+ 4'),
    ({'depth': 100, 'stem': 'imagenet'}, 'depth 100 with bc True .* one of 121, 169, 201$'),
    ({'depth': 121, 'bc': False, 'stem': 'imagenet'}, 'depth 121 with bc False .* use bc True'),
    ({'stem': 'mnist'}, "stem 'mnist' is unknown: use 'cifar' or 'imagenet'"),
    ({'growth_rate': 0}, 'growth_rate 0 is out of range: it must be 1 or more'),
    ({'exits_after': (3, 49)}, r'exits_after \(3, 49\) must be different layers from 1 to 48$'),
  ],
)
def test_a_bad_field_is_refused(fields, message):
  with pytest.raises(ValueError, match=f'^{message}'):
    models.create('densenet', **fields)
