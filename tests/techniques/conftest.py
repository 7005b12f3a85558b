"""A network of two maps and three exits that is quick to compile."""

import flax.linen as nn
import jax.numpy as jnp
import pytest

from imta_jax.models.multi_exit import MultiExitNetwork


class TinyStage(nn.Module):
  """Maps a fine and a coarse map of vectors to the next; the coarse one also reads the fine one."""

  @nn.compact
  def __call__(self, features, train):
    fine, coarse = features[0], features[-1]
    return (
      nn.tanh(nn.Dense(5, name='fine')(fine)),
      nn.tanh(nn.Dense(4, name='coarse')(jnp.concatenate([fine, coarse], axis=-1))),
    )


class TinyExit(nn.Module):
  """Maps the coarse map to an embedding."""

  @nn.compact
  def __call__(self, x, train):
    return nn.tanh(nn.Dense(6)(x))


@pytest.fixture(scope='session')
def tiny_network():
  """A function that creates the network; it reads images of shape (numbers,)."""

  def create(**fields):
    stages, exits = ([module() for _ in range(3)] for module in (TinyStage, TinyExit))
    return MultiExitNetwork(stages, exits, num_classes=5, **fields)

  return create
