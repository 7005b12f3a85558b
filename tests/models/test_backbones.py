"""Networks with pretrained weights: published sizes, and stages run one by one."""

import jax
import numpy as np
import pytest

from imta_jax import models
from imta_jax.adaptive.cost import exit_costs
from imta_jax.models.backbones import BACKBONES

# Millions of parameters and multiply-adds. Those of EfficientNet-Lite are published with the
# elements of batch norm and ReLU6, which are 2 to 4 % more.
PUBLISHED = [
  ('resnet', {'depth': 18, 'stem': 'imagenet'}, 224, 11.69, 1_820),
  ('resnet', {'depth': 34, 'stem': 'imagenet'}, 224, 21.80, 3_670),
  ('resnet', {'depth': 50, 'stem': 'imagenet'}, 224, 25.56, 4_100),
  ('resnet', {'depth': 101, 'stem': 'imagenet'}, 224, 44.55, 7_820),
  ('vit', {'size': 'ti'}, 224, 5.72, 1_260),
  ('vit', {'size': 's'}, 224, 22.05, 4_610),
  ('vit', {'size': 'b'}, 224, 86.57, 17_580),
  ('efficientnet_lite', {'variant': 0}, 224, 4.65, 407),
  ('efficientnet_lite', {'variant': 1}, 240, 5.42, 631),
  ('efficientnet_lite', {'variant': 2}, 260, 6.09, 899),
  ('efficientnet_lite', {'variant': 3}, 280, 8.20, 1_440),
  ('efficientnet_lite', {'variant': 4}, 300, 13.01, 2_640),
]


@pytest.mark.parametrize(('name', 'fields', 'side', 'params', 'madds'), PUBLISHED)
def test_a_backbone_has_its_published_size(name, fields, side, params, madds):
  model = models.create(name, num_classes=1000, **fields)
  (cost,) = exit_costs(model, (side, side, 3))
  assert round(cost.params / 1e6, 2) == params
  if name == 'efficientnet_lite':
    assert 1.02 < madds / (cost.madds / 1e6) < 1.045
  else:
    assert abs(cost.madds / 1e6 - madds) < 6


@pytest.mark.parametrize(
  ('name', 'fields', 'message'),
  [
    ('vit', {'size': 'l'}, "size 'l' does not exist: choose one of ti, s, b"),
    ('vit', {'exits_after': (13,)}, r'exits_after \(13,\) must be different blocks from 1 to 12'),
    ('efficientnet_lite', {'variant': 5}, 'variant 5 does not exist: choose one of 0 to 4'),
    ('efficientnet_lite', {'exits_after': (17,)}, r'exits_after \(17,\) must be .* from 1 to 16'),
    ('resnet', {'depth': 152, 'stem': 'imagenet'}, 'choose one of 18, 34, 50, 101$'),
  ],
)
def test_a_bad_field_is_refused(name, fields, message):
  with pytest.raises(ValueError, match=message):
    models.create(name, **fields)


@pytest.mark.parametrize('name', ['vit', 'efficientnet_lite'])
def test_stage_by_stage_is_the_whole_network(name, random_variables):
  fields = {'size': 'ti'} if name == 'vit' else {}
  model = models.create(name, exits_after=(3, 6), num_classes=5, collaboration='network', **fields)
  variables = random_variables(model, (32, 32, 3))
  images = np.random.default_rng(0).standard_normal((2, 32, 32, 3), np.float32)
  expected = jax.jit(model.apply)(variables, images)

  @jax.jit
  def staged(variables, images):
    features, logits, all_logits = model.apply(variables, images, method='start'), None, []
    for index in range(model.num_exits):
      features, logits = model.apply(variables, index, features, logits, method='run_stage')
      all_logits.append(logits)
    return all_logits

  for exit_logits, whole in zip(staged(variables, images), expected, strict=True):
    np.testing.assert_allclose(exit_logits, whole, rtol=1e-4, atol=1e-4)
  assert np.abs(expected[0] - expected[2]).max() > 1e-3


@pytest.mark.parametrize('name', BACKBONES)
def test_the_costs_of_exits_grow_evenly(name):
  """Each exit costs from 1.2 to 2 times the one before; the first one less than half of all."""
  backbone = BACKBONES[name]
  model = models.create(backbone.architecture, **backbone.fields)
  madds = np.array([c.madds for c in exit_costs(model, (backbone.image_size,) * 2 + (3,))])
  ratios = madds[1:] / madds[:-1]
  assert 4 <= len(madds) <= 5
  assert ratios.min() > 1.2 and ratios.max() < 2.1, (madds, ratios)
  assert madds[0] < 0.4 * madds[-1]
