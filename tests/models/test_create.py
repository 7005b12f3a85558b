"""Creating networks by name: defaults, and errors."""

import jax
import jax.numpy as jnp
import pytest

from imta_jax import models
from imta_jax.models.multi_exit import MultiExitNetwork


def test_defaults_are_the_papers():
  model = models.create('msdnet')
  assert isinstance(model, MultiExitNetwork)
  assert model.num_exits == 7
  assert model.num_classes == 100
  assert model.gradient_equilibrium == 'all'
  assert model.collaboration == 'off'
  assert model.stop_collaboration_gradient is True
  assert model.dtype == jnp.float32
  assert model.batch_norm_axis is None


@pytest.mark.parametrize(
  ('name', 'num_layers'),
  [
    ('resnet', 1 + 27),  # The stem, and ResNet-56's blocks.
    ('densenet', 1 + 48 + 2),  # The stem, DenseNet-BC-100's layers and its transitions.
    ('googlenet', 3 + 9 + 4),  # Convolutions, Inception modules and max pooling.
  ],
)
def test_the_other_networks_are_plain_by_default(name, num_layers):
  model = models.create(name)
  assert model.num_exits == 1
  assert len(model.stages[0].layers) == num_layers


def test_fields_reach_the_network():
  model = models.create(
    'msdnet',
    num_exits=2,
    num_classes=3,
    gradient_equilibrium='coarsest',
    collaboration='identity',
    stop_collaboration_gradient=False,
    dtype='bfloat16',
    batch_norm_axis='devices',
  )
  assert (model.num_exits, model.num_classes) == (2, 3)
  assert (model.gradient_equilibrium, model.collaboration) == ('coarsest', 'identity')
  assert model.stop_collaboration_gradient is False
  convolution = model.exits[0].convolutions[0]
  for module in (model, convolution):
    assert module.dtype == jnp.bfloat16
    assert module.batch_norm_axis == 'devices'


@pytest.mark.parametrize(
  ('name', 'fields', 'message'),
  [
    (
      'msdnt',
      {},
      "model 'msdnt' is unknown: choose one of msdnet, resnet, densenet, googlenet, hydranet, "
      'efficientnet_lite, vit',
    ),
    *(
      ('msdnet', {'dtype': dtype}, f"dtype '{dtype}' is unknown: choose one of float32, bfloat16")
      for dtype in ('float16', 'float17')
    ),
    ('msdnet', {'growth_rat': 6}, "model 'msdnet' has no field 'growth_rat': .*'growth_rate'.*"),
    ('msdnet', {'num_class': 6}, "model 'msdnet' has no field 'num_class': .*'num_classes'.*"),
    ('resnet', {'exit_after': 3}, "model 'resnet' has no field 'exit_after': .*'exits_after'.*"),
  ],
)
def test_a_mistake_is_named_with_what_to_write_instead(name, fields, message):
  with pytest.raises(ValueError, match=f'^{message}$'):
    models.create(name, **fields)


@pytest.mark.parametrize(
  ('field', 'value', 'message'),
  [
    (
      'gradient_equilibrium',
      'on',
      "gradient_equilibrium 'on' is unknown: choose one of all, coars",
    ),
    (
      'collaboration',
      'sum',
      "collaboration 'sum' is unknown: choose one of off, identity, network",
    ),
    ('shared_channels', 1.5, 'shared_channels 1.5 is out of range: it must be from 0 to 1'),
  ],
)
def test_a_value_of_a_technique_is_refused_where_it_is_used(field, value, message):
  model = models.create('resnet', depth=8, exits_after=(1,), **{field: value})
  with pytest.raises(ValueError, match=f'^{message}'):
    jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))


def test_a_field_like_no_other_gets_the_list_of_fields():
  with pytest.raises(ValueError, match='has no field .*: it has .*batch_norm_axis, .*exits_after'):
    models.create('resnet', qqq=1)
