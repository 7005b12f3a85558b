"""Feature partitioning: which channels which exit trains."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imta_jax.techniques.feature_partitioning import partition


@pytest.mark.parametrize(('share', 'shared'), [(0.0, 0), (0.5, 2), (0.3, 2), (1.0, 5)])
def test_only_the_first_channels_receive_a_gradient(share, shared):
  x = jnp.arange(10.0).reshape(2, 5)
  np.testing.assert_array_equal(partition(x, share), x)
  gradient = jax.grad(lambda x: (partition(x, share) ** 2).sum())(x)
  np.testing.assert_array_equal(gradient[:, :shared], 2 * x[:, :shared])
  np.testing.assert_array_equal(gradient[:, shared:], 0)


def gradients_of_the_first_map(model, random_variables, exit):
  """Returns what an exit adds to the gradient of stage 1's coarse map, and all logits."""
  images = np.random.default_rng(0).standard_normal((2, 7), np.float32)

  @jax.jit
  @partial(jax.grad, has_aux=True)
  def gradient(params):
    logits = model.apply({'params': params}, images)
    return (logits[exit - 1] ** 2).sum(), logits

  gradients, logits = gradient(random_variables(model, (7,))['params'])
  # Each bias adds to one channel of the map.
  return gradients['stages_0']['coarse']['bias'], logits


def test_later_exits_train_the_shared_channels_of_a_stage_and_its_own_exit_trains_all(
  random_variables, tiny_network
):
  fields = {'gradient_equilibrium': 'off'}
  plain, split = tiny_network(**fields), tiny_network(**fields, shared_channels=0.5)
  own, logits = gradients_of_the_first_map(split, random_variables, 1)
  later, _ = gradients_of_the_first_map(split, random_variables, 3)
  without, expected_logits = gradients_of_the_first_map(plain, random_variables, 3)
  np.testing.assert_array_equal(logits, expected_logits)
  assert np.all(own != 0)
  assert np.all(later[:2] != 0) and np.all(later[2:] == 0)
  assert np.all(without != 0)
