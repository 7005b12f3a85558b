"""MSDNet: its structure, and its costs to the last digit of the paper's."""

import math
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imta_jax import models
from imta_jax.adaptive.cost import exit_costs

SMALL = {
  'num_exits': 3,
  'step_mode': 'even',
  'channels': 4,
  'growth_rate': 4,
  'scale_factors': (1, 2),
  'bottleneck_factors': (1, 2),
  'num_classes': 5,
}
CIFAR, IMAGENET = (32, 32, 3), (224, 224, 3)
NETWORKS = {
  'cifar100_7exit_lin_grow': ({}, CIFAR),
  'cifar10_6exit_lin_grow': ({'num_exits': 6, 'num_classes': 10}, CIFAR),
  'cifar100_7exit_even_base4_step2': ({'step_mode': 'even', 'base': 4, 'step': 2}, CIFAR),
  'imagenet_5exit_even_base4_step4': (
    {
      'num_exits': 5,
      'step_mode': 'even',
      'base': 4,
      'step': 4,
      'channels': 32,
      'growth_rate': 16,
      'scale_factors': (1, 2, 4, 4),
      'bottleneck_factors': (1, 2, 4, 4),
      'stem': 'imagenet',
      'num_classes': 1000,
    },
    IMAGENET,
  ),
}


@cache
def costs_in_millions(network):
  """Returns (multiply-adds, parameters) of every exit, in millions."""
  fields, image_shape = NETWORKS[network]
  costs = exit_costs(models.create('msdnet', **fields), image_shape)
  return [cost.madds / 1e6 for cost in costs], [cost.params / 1e6 for cost in costs]


def assert_digits(actual, printed):
  """Checks that numbers round to the printed decimals, given in one string."""
  printed = printed.split()
  assert [f'{a:.{len(p.split(".")[1])}f}' for a, p in zip(actual, printed, strict=True)] == printed


# {network: (multiply-adds, parameters)}, in millions, as published.
PUBLISHED_COSTS = {
  'cifar100_7exit_lin_grow': (
    '6.860 14.350 27.291 48.449 76.433 108.851 137.281',
    '0.2997 0.6497 1.1114 1.7272 2.3850 3.0522 3.9667',
  ),
  'cifar10_6exit_lin_grow': (
    '6.848 14.327 27.257 46.514 67.369 89.022',
    '0.2881 0.6265 1.0766 1.5597 2.0514 2.7827',
  ),
  'cifar100_7exit_even_base4_step2': (
    '15.14 25.51 37.10 46.33 57.34 66.96 75.94',
    '0.434 0.877 1.275 1.696 2.178 2.603 3.068',
  ),
  'imagenet_5exit_even_base4_step4': (
    '339.90 685.46 1008.16 1254.47 1360.53',
    '4.239 8.772 13.073 16.748 23.958',
  ),
}


@pytest.mark.parametrize(
  'network',
  [
    'cifar100_7exit_lin_grow',
    *(pytest.param(name, marks=pytest.mark.slow) for name in list(PUBLISHED_COSTS)[1:]),
  ],
)
def test_costs_are_those_of_the_published_networks(network):
  for actual, printed in zip(costs_in_millions(network), PUBLISHED_COSTS[network], strict=True):
    assert_digits(actual, printed)


def test_default_network_is_that_of_table_1():
  madds, params = costs_in_millions('cifar100_7exit_lin_grow')
  assert_digits(madds, '6.86 14.35 27.29 48.45 76.43 108.9 137.3')
  assert_digits(params, '0.30 0.65 1.11 1.73 2.38 3.05 4.0')


def trace_maps(model, image_shape):
  """Returns (side, channels) of every map after each stage, without computing them."""

  def run(model, images):
    features, logits, by_stage = model.start(images), None, []
    for index in range(model.num_exits):
      features, logits = model.run_stage(index, features, logits)
      by_stage.append(features)
    return by_stage

  images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
  init = partial(model.init_with_output, method=run)
  by_stage, _ = jax.eval_shape(init, jax.random.key(0), images)
  return [[(x.shape[1], x.shape[3]) for x in features] for features in by_stage]


def maps_by_rule(
  num_exits, base, step, step_mode, channels, growth_rate, factors, prune, reduction, side
):
  """Expected `trace_maps`: scale s has c * f_s channels, where c grows by g per layer."""
  depths = [base] + [step if step_mode == 'even' else step * i + 1 for i in range(1, num_exits)]
  total, scales, c, n, stages = sum(depths), len(factors), channels, 0, []
  for depth in depths:
    for _ in range(depth):
      n += 1
      if prune == 'max':
        interval = math.ceil(total / scales)
        reads = scales - math.floor(max(0, n - 2) / interval)
        writes = scales - math.floor((n - 1) / interval)
        transition = writes < reads
      else:
        writes = min(scales, total - n + 1)
        transition = n in (math.floor(total / 3), math.floor(2 * total / 3))
      c += growth_rate
      if transition and reduction > 0:
        c = math.floor(reduction * c)
    stages.append([(side // 2**s, c * factors[s]) for s in range(scales - writes, scales)])
  return stages


@pytest.mark.parametrize(
  ('num_exits', 'base', 'step', 'step_mode', 'prune', 'reduction'),
  [
    (4, 1, 1, 'lin_grow', 'max', 0.7),
    (3, 2, 2, 'lin_grow', 'min', 0.7),
    (3, 2, 1, 'even', 'max', 0),
    (2, 4, 3, 'even', 'min', 0),
  ],
)
def test_maps_follow_the_rule(num_exits, base, step, step_mode, prune, reduction):
  model = models.create(
    'msdnet',
    num_exits=num_exits,
    base=base,
    step=step,
    step_mode=step_mode,
    channels=6,
    growth_rate=4,
    prune=prune,
    reduction=reduction,
    bottleneck=False,
  )
  expected = maps_by_rule(
    num_exits, base, step, step_mode, 6, 4, (1, 2, 4), prune, reduction, side=32
  )
  assert trace_maps(model, CIFAR) == expected


def test_maps_of_the_imagenet_stem_start_at_a_quarter_of_the_resolution():
  fields = {**SMALL, 'scale_factors': (1, 2, 4, 4), 'bottleneck_factors': (1, 2, 4, 4)}
  model = models.create('msdnet', **fields, stem='imagenet')
  expected = maps_by_rule(3, 1, 1, 'even', 4, 4, (1, 2, 4, 4), 'max', 0.5, side=56)
  assert trace_maps(model, IMAGENET) == expected
  assert expected[0] == [(56, 8), (28, 16), (14, 32), (7, 32)]


def shapes(image_shape=(16, 16, 3), **fields):
  """Returns the shapes of the logits and, by name, of the parameters."""
  model = models.create('msdnet', **{**SMALL, **fields})
  logits, variables = jax.eval_shape(
    model.init_with_output, jax.random.key(0), jax.ShapeDtypeStruct((2, *image_shape), jnp.float32)
  )
  leaves = jax.tree_util.tree_leaves_with_path(variables['params'])
  names = (jax.tree_util.keystr(path, simple=True, separator='/') for path, _ in leaves)
  return logits.shape, dict(zip(names, (leaf.shape for _, leaf in leaves), strict=True))


def test_logits_are_exit_by_image_by_class():
  assert shapes()[0] == (3, 2, 5)
  imagenet, _ = shapes((64, 64, 3), stem='imagenet', num_classes=7)
  assert imagenet == (3, 2, 7)


def test_stems_are_a_small_convolution_without_and_a_large_one_with_bias():
  for stem, side in (('cifar', 3), ('imagenet', 7)):
    _, params = shapes((64, 64, 3), stem=stem)
    assert params['stages_0/layers_0/scale_0/conv/kernel'] == (side, side, 3, 4)
    assert params['stages_0/layers_0/scale_1/conv/kernel'] == (3, 3, 4, 8)
    biases = [name for name in params if name.endswith('conv/bias')]
    assert biases == (['stages_0/layers_0/scale_0/conv/bias'] if stem == 'imagenet' else [])


def test_exits_are_128_wide_on_cifar_and_as_wide_as_what_they_read_on_imagenet():
  _, cifar = shapes()
  _, imagenet = shapes((64, 64, 3), stem='imagenet')
  # Exit 1 reads (4 + 4) * 2 channels; the exits' two convolutions differ in what they read.
  for params, width in ((cifar, 128), (imagenet, 16)):
    assert params['exits_0/convolutions_0/conv/kernel'] == (3, 3, 16, width)
    assert params['exits_0/convolutions_1/conv/kernel'] == (3, 3, width, width)
    assert params['classifiers_0/dense/kernel'] == (width, 5)


def test_bottlenecks_bound_the_input_of_the_convolutions_behind_them():
  _, params = shapes(channels=20)
  # The first layer reads 20 and 40 channels. Scale 1 gains 4 * 2, half of it from either scale.
  branches = {
    'normal_0': (20, 1 * 4, 4),
    'down_1': (20, 1 * 4, 4),
    'normal_1': (40, 2 * 4, 4),
  }
  for branch, (inputs, width, outputs) in branches.items():
    name = f'stages_0/layers_1/{branch}'
    assert params[f'{name}/bottleneck/conv/kernel'] == (1, 1, inputs, width)
    assert params[f'{name}/conv/conv/kernel'] == (3, 3, width, outputs)


def test_a_bottleneck_is_never_wider_than_what_it_reads():
  _, params = shapes(bottleneck_factors=(50, 1))
  assert params['stages_0/layers_1/normal_0/bottleneck/conv/kernel'] == (1, 1, 4, 4)
  assert params['stages_0/layers_1/normal_1/bottleneck/conv/kernel'] == (1, 1, 8, 4)


def test_without_bottlenecks_there_is_the_convolution_alone():
  _, params = shapes(channels=20, bottleneck=False, bottleneck_factors=())
  assert not [name for name in params if 'bottleneck' in name]
  assert params['stages_0/layers_1/normal_0/conv/conv/kernel'] == (3, 3, 20, 4)
  assert params['stages_0/layers_1/down_1/conv/conv/kernel'] == (3, 3, 20, 4)
  assert params['stages_0/layers_1/normal_1/conv/conv/kernel'] == (3, 3, 40, 4)


def test_reduction_zero_has_no_transitions():
  transitions = [name for name in shapes()[1] if '/map_' in name]
  assert transitions
  assert not [name for name in shapes(reduction=0)[1] if '/map_' in name]


def test_bfloat16_keeps_variables_and_logits_in_float32():
  model = models.create('msdnet', **SMALL, dtype='bfloat16', collaboration='network')
  images = jax.ShapeDtypeStruct((2, 16, 16, 3), jnp.float32)
  logits, variables = jax.eval_shape(model.init_with_output, jax.random.key(0), images)
  assert logits.dtype == jnp.float32
  assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {np.dtype('float32')}
  _, updated = jax.eval_shape(
    partial(model.apply, train=True, mutable=['batch_stats']), variables, images
  )
  assert {leaf.dtype for leaf in jax.tree.leaves(updated)} == {np.dtype('float32')}
  embeddings = jax.eval_shape(partial(model.apply, method='embed'), variables, images)
  assert {embedding.dtype for embedding in embeddings} == {jnp.dtype('bfloat16')}


def test_stages_run_one_at_a_time_give_what_the_whole_gives(random_variables):
  model = models.create(
    'msdnet', **{**SMALL, 'num_exits': 2}, bottleneck=False, collaboration='network'
  )
  variables = random_variables(model, (16, 16, 3))
  images = np.random.default_rng(0).standard_normal((2, 16, 16, 3), np.float32)

  @jax.jit
  def run(variables, images):
    features, logits, by_stage = model.apply(variables, images, method='start'), None, []
    for index in range(model.num_exits):
      features, logits = model.apply(variables, index, features, logits, method='run_stage')
      by_stage.append(logits)
    return jnp.stack(by_stage), model.apply(variables, images)

  by_stage, whole = run(variables, images)
  assert np.abs(whole).max() > 0.1
  np.testing.assert_allclose(by_stage, whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'step_mode': 'odd'}, "step_mode 'odd' is unknown: choose one of even, lin_grow"),
    ({'prune': 'none'}, "prune 'none' is unknown: choose one of max, min"),
    ({'stem': 'mnist'}, "stem 'mnist' is unknown: choose one of cifar, imagenet"),
    ({'num_exits': 0}, 'num_exits 0 is out of range: it must be 1 or more'),
    (
      {'growth_rate': 1, 'scale_factors': (1, 1, 1)},
      'growth_rate 1 is too small: .* use 2 or more',
    ),
    ({'reduction': -0.5}, 'reduction -0.5 is out of range: it must be between 0 and 1'),
    ({'bottleneck_factors': (1, 2)}, r'bottleneck_factors \(1, 2\) must have the length of .*4\)'),
  ],
)
def test_a_bad_field_is_refused(fields, message):
  with pytest.raises(ValueError, match=f'^{message}$'):
    models.create('msdnet', **fields)


def test_images_too_small_for_the_exits_are_refused():
  with pytest.raises(ValueError, match='1×1, too small to pool by 2: use larger images'):
    shapes((8, 8, 3))
