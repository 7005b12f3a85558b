"""What several tests need."""

import jax
import numpy as np
import pytest

from imta_jax.models.initial_values import initialize

# Tests compile much and run little.
jax.config.update('jax_disable_most_optimizations', True)


@pytest.fixture(scope='session')
def random_variables():
  """A function that gives a network variables of which none is special, as initial zeros are."""

  def draw(model, image_shape, seed=0):
    random = np.random.default_rng(seed)
    return jax.tree.map(
      lambda leaf: leaf + random.uniform(-0.2, 0.2, leaf.shape).astype(np.float32),
      initialize(model, seed, image_shape),
    )

  return draw
