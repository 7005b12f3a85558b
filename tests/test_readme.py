"""The README's example of the techniques in a model of one's own works as printed."""

import re
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp

README = Path(__file__).parents[1] / 'README.md'


def test_example_trains_a_model_of_ones_own():
  blocks = re.findall(r'```python\n(.*?)```', README.read_text(encoding='utf-8'), re.DOTALL)
  (code,) = (block for block in blocks if 'one_for_all_loss' in block)

  class Network(nn.Module):
    @nn.compact
    def __call__(self, x, labels):
      stages, heads = ([nn.Dense(8) for _ in range(3)] for _ in range(2))
      names = {
        'jnp': jnp,
        'stages': stages,
        'heads': heads,
        'num_classes': 4,
        'train': True,
        'x': x,
        'labels': labels,
      }
      exec(code, names)
      return names['loss']

  images, labels = jnp.ones((5, 6)), jnp.arange(5) % 4
  variables = Network().init(jax.random.key(0), images, labels)

  def loss_of(params):
    return Network().apply({**variables, 'params': params}, images, labels, mutable=True)[0]

  gradient = jax.grad(loss_of)(variables['params'])
  assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
  assert any(jnp.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient['Dense_0']))
