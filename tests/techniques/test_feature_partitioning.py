"""Feature partitioning: which channels which exit trains."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imta_jax import models
from imta_jax.models.initial_values import initialize
from imta_jax.techniques.feature_partitioning import partition


@pytest.mark.parametrize(('share', 'shared'), [(0.0, 0), (0.5, 2), (0.3, 2), (1.0, 5)])
def test_only_the_first_channels_receive_a_gradient(share, shared):
  x = jnp.arange(10.0).reshape(2, 5)
  np.testing.assert_array_equal(partition(x, share), x)
  gradient = jax.grad(lambda x: (partition(x, share) ** 2).sum())(x)
  np.testing.assert_array_equal(gradient[:, :shared], 2 * x[:, :shared])
  np.testing.assert_array_equal(gradient[:, shared:], 0)


def gradients_of_the_first_map(exit, **fields):
  """Returns what an exit adds to the gradient of each channel of stage 1, and all logits."""
  model = models.create(
    'resnet', depth=8, exits_after=(1, 2), num_classes=4, gradient_equilibrium='off', **fields
  )
  images = np.random.default_rng(0).standard_normal((2, 8, 8, 3)).astype(np.float32)
  variables = initialize(model, 0, images.shape[1:])

  def logits(params):
    return model.apply({**variables, 'params': params}, images)

  gradient = jax.grad(lambda params: (logits(params)[exit - 1] ** 2).sum())(variables['params'])
  # Each bias of the block's last batch norm adds to one channel of the map.
  bias = gradient['stages_0']['layers_1']['conv_1']['norm']['bias']
  return bias, logits(variables['params'])


def test_later_exits_train_the_shared_channels_of_a_stage_and_its_own_exit_trains_all():
  own, logits = gradients_of_the_first_map(1, shared_channels=0.5)
  later, _ = gradients_of_the_first_map(3, shared_channels=0.5)
  without, expected_logits = gradients_of_the_first_map(3)
  np.testing.assert_array_equal(logits, expected_logits)
  assert np.all(own != 0)
  assert np.all(later[:8] != 0) and np.all(later[8:] == 0)
  assert np.all(without != 0)
