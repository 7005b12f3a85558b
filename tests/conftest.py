"""What several tests need."""

import jax
import numpy as np
import pytest

from imta_jax.models.initial_values import initialize

# Tests compile much and run little.
jax.config.update('jax_disable_most_optimizations', True)


def pytest_collection_modifyitems(items):
  """Puts the file that takes longest first, beside which the others run."""
  items.sort(key=lambda item: item.path.name != 'test_train.py')


@pytest.fixture(scope='session', autouse=True)
def cache(tmp_path_factory):
  """Keeps what the package stores between runs out of the user's folders."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv('XDG_CACHE_HOME', str(tmp_path_factory.mktemp('cache')))
    yield


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
