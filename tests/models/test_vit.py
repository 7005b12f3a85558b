"""ViT: tokens, initial values, exits that read the class token, and images that do not fit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imta_jax import models
from imta_jax.models.initial_values import initialize
from imta_jax.models.vit import Embed

SHAPE = (32, 48, 3)


def create(**fields):
  return models.create('vit', **({'size': 'ti', 'num_classes': 5, 'exits_after': (2, 4)} | fields))


@pytest.fixture(scope='module')
def variables():
  return initialize(create(), 0, SHAPE)


def test_tokens_are_the_class_token_and_a_convolution_over_patches(random_variables):
  variables = random_variables(create(), SHAPE)['params']['stages_0']['layers_0']
  images = np.random.default_rng(0).standard_normal((2, *SHAPE), np.float32)
  tokens = Embed(192, jnp.float32).apply({'params': variables}, images)
  assert tokens.shape == (2, 1 + 2 * 3, 192)
  convolved = jax.lax.conv_general_dilated(
    images,
    variables['patches']['kernel'],
    (16, 16),
    'VALID',
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
  )
  patches = convolved.reshape(2, 6, 192) + variables['patches']['bias']
  np.testing.assert_allclose(tokens[:, 1:], patches + variables['positions'][:, 1:], atol=1e-4)
  class_token = variables['class_token'] + variables['positions'][:, :1]
  np.testing.assert_allclose(tokens[:, :1], np.repeat(class_token, 2, axis=0), rtol=1e-6)


def test_initial_values_follow_their_rules(variables):
  embed = variables['params']['stages_0']['layers_0']
  for name in ('class_token', 'positions'):
    assert abs(embed[name].std() / 0.02 - 1) < 0.2
  init = create().init(jax.random.key(0), jnp.zeros((1, *SHAPE)))
  for ours, theirs in zip(jax.tree.leaves(variables), jax.tree.leaves(init), strict=True):
    assert ours.shape == theirs.shape
    assert abs(ours.std() - theirs.std()) <= 0.2 * theirs.std()
    assert abs(ours.mean() - theirs.mean()) < 0.05


def test_every_exit_has_a_norm_and_a_classifier(variables):
  params = variables['params']
  assert [len(params[f'stages_{index}']) for index in range(3)] == [3, 2, 8]
  for index in range(3):
    assert params[f'exits_{index}']['layers_0']['scale'].shape == (192,)
    assert params[f'classifiers_{index}']['dense']['kernel'].shape == (192, 5)
  assert 'batch_stats' not in variables


def test_bfloat16_changes_logits_little(variables):
  images = np.random.default_rng(0).standard_normal((4, *SHAPE), np.float32)
  exact = jax.jit(create().apply)(variables, images)
  rounded = jax.jit(create(dtype='bfloat16').apply)(variables, images)
  assert rounded.dtype == jnp.float32
  np.testing.assert_allclose(rounded, exact, atol=0.05 * np.abs(exact).max())
  assert np.abs(rounded - exact).max() > 0


def test_images_that_are_not_made_of_patches_are_refused():
  with pytest.raises(ValueError, match='images of 32×40 pixels are not made of patches of 16×16'):
    jax.eval_shape(create().init, jax.random.key(0), jnp.zeros((1, 32, 40, 3)))
