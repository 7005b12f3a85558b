"""The inference form of a network against the network in evaluation mode."""

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from imta_jax import models
from imta_jax.models.folding import fold_batch_norm, unfold_batch_norm


@pytest.mark.parametrize(
  ('name', 'fields'),
  [
    (
      'msdnet',
      {'num_exits': 2, 'scale_factors': (1, 2), 'bottleneck_factors': (1, 2), 'stem': 'imagenet'},
    ),
    ('efficientnet_lite', {'exits_after': (2,)}),
    pytest.param('hydranet', {'groups': (0, 1, 1, 0, 2), 'top_k': 2}, marks=pytest.mark.slow),
    pytest.param('resnet', {'depth': 8, 'exits_after': (1,)}, marks=pytest.mark.slow),
    pytest.param('densenet', {'depth': 22}, marks=pytest.mark.slow),
  ],
)
def test_a_folded_network_gives_the_same_logits(name, fields, random_variables):
  model = models.create(name, num_classes=5, collaboration='network', **fields)
  images = np.random.default_rng(0).standard_normal((3, 64, 64, 3), np.float32)
  variables = random_variables(model, images.shape[1:])
  folded = fold_batch_norm(variables)
  run = jax.jit(model.apply)
  tolerance = 1e-5 if name == 'msdnet' else 1e-3  # Deep networks of random values amplify rounding.
  expected = run(variables, images)
  np.testing.assert_allclose(run(folded, images), expected, atol=tolerance * np.abs(expected).max())
  names = flatten_dict(folded['params'])
  for *module, kind, _ in names:
    assert kind != 'norm' or (*module, 'conv', 'kernel') not in names
  unfolded = unfold_batch_norm(folded, variables)
  assert flatten_dict(unfolded).keys() == flatten_dict(variables).keys()
  np.testing.assert_allclose(
    run(unfolded, images), expected, atol=tolerance * np.abs(expected).max()
  )
