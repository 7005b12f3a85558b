"""What every network with exits has in common."""

import jax
import numpy as np
import pytest

from imta_jax import models
from imta_jax.models.initial_values import initialize


@pytest.mark.slow
@pytest.mark.parametrize('train', [True, False])  # As phases with batch_norm='evaluation'.
def test_rematerialization_keeps_less_and_changes_nothing(train):
  images = np.random.default_rng(0).standard_normal((32, 16, 16, 3)).astype(np.float32)
  kept, gradients = [], []
  for remat in (False, True):
    model = models.create(
      'msdnet',
      num_exits=2,
      base=3,
      channels=4,
      growth_rate=4,
      scale_factors=(1, 2),
      bottleneck_factors=(1, 2),
      num_classes=5,
      remat=remat,
    )
    variables = initialize(model, 0, images.shape[1:])

    def loss(params, model=model, stats=variables['batch_stats']):
      logits, updated = model.apply(
        {'params': params, 'batch_stats': stats}, images, train, mutable=['batch_stats']
      )
      return (logits**2).sum(), updated

    pullback = jax.eval_shape(
      lambda p, loss=loss: jax.vjp(loss, p, has_aux=True)[1], variables['params']
    )
    kept.append(sum(leaf.size for leaf in jax.tree.leaves(pullback)))
    gradients.append(jax.jit(jax.grad(loss, has_aux=True))(variables['params']))
  assert kept[1] < 0.5 * kept[0]
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), *gradients)
