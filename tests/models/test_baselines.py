"""The networks that the paper compares with: names, places of exits, phases, and training."""

import jax
import numpy as np
import pytest

from imta_jax import config as config_lib
from imta_jax import runtime
from imta_jax.errors import UsageError
from imta_jax.models import baselines
from imta_jax.training import steps
from imta_jax.training.packing import unpack
from imta_jax.training.phases import Phase

SHAPE = (8, 8, 3)


def chosen(network, exits=1, stem='cifar'):
  """Returns the default config with a network."""
  config = config_lib.default()
  baselines.choose(config, network, exits, stem)
  config_lib.validate(config)
  return config


def test_msdnet_is_the_default_and_has_its_own_arguments():
  expected = {'network': 'msdnet', 'exits': 7, 'step': 4}
  for argument in (None, '', 'network=msdnet'):
    assert baselines.parse_argument(argument, exits=7, step=4).to_dict() == expected
  assert baselines.parse_argument('exits=5', exits=7).exits == 5


def test_other_networks_have_one_exit_unless_told_otherwise():
  for argument in ('network=resnet-20', 'network=resnet-20,exits=1'):
    arguments = baselines.parse_argument(argument, exits=7, step=4)
    assert arguments.to_dict() == {'network': 'resnet-20', 'exits': 1}
  assert baselines.parse_argument('exits=3,network=resnet-20', exits=7).exits == 3
  with pytest.raises(UsageError, match="'step' does not exist: choose one of exits, network"):
    baselines.parse_argument('network=resnet-20,step=6', step=4)


@pytest.mark.parametrize(
  ('network', 'stem', 'fields'),
  [
    ('resnet-110', 'cifar', {'name': 'resnet', 'depth': 110}),
    ('densenet-40', 'cifar', {'name': 'densenet', 'depth': 40, 'growth_rate': 12, 'bc': False}),
    ('densenet_bc-100', 'cifar', {'name': 'densenet', 'depth': 100, 'growth_rate': 12, 'bc': True}),
    ('hydranet-2', 'cifar', {'name': 'hydranet', 'blocks': 2, 'top_k': 4}),
    ('resnet-50', 'imagenet', {'name': 'resnet', 'depth': 50}),
    ('densenet-121', 'imagenet', {'name': 'densenet', 'growth_rate': 32, 'bc': True}),
    ('googlenet', 'imagenet', {'name': 'googlenet', 'auxiliary_exits': False}),
  ],
)
def test_a_name_gives_a_network_with_one_exit_and_one_phase(network, stem, fields):
  config = chosen(network, stem=stem)
  if fields['name'] in ('resnet', 'densenet'):
    fields = {'stem': stem, 'exits_after': (), **fields}
  model = config.model.to_dict()
  assert {name: model[name] for name in fields} == fields
  (phase,) = config.phases
  assert (phase.trained, phase.loss) == ('everything', 'cross_entropy')
  assert phase.gradient_equilibrium == 'off'
  assert config_lib.create_model(config, phase, 10).num_exits == 1


# 9, 18, 6 and 58 blocks or layers.
@pytest.mark.parametrize(
  ('network', 'stem', 'exits', 'exits_after'),
  [
    ('resnet-20', 'cifar', 3, (3, 6)),
    ('densenet_bc-40', 'cifar', 4, (4, 9, 13)),
    ('densenet-10', 'cifar', 6, (1, 2, 3, 4, 5)),
    ('densenet-121', 'imagenet', 2, (29,)),
  ],
)
def test_exits_come_after_equal_numbers_of_layers_and_keep_both_phases(
  network, stem, exits, exits_after
):
  config = chosen(network, exits, stem)
  assert config.model.exits_after == exits_after
  assert config_lib.to_dict(config.phases) == config_lib.to_dict(config_lib.default().phases)
  assert config_lib.create_model(config, config.phases[1], 10).num_exits == exits


def test_googlenet_has_its_auxiliary_exits_or_none():
  config = chosen('googlenet', 3, 'imagenet')
  assert len(config.phases) == 2
  assert config_lib.create_model(config, config.phases[1], 10).num_exits == 3


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    (
      ('vgg-16', 1, 'cifar'),
      "network is 'vgg-16': choose one of msdnet, resnet-DEPTH, densenet-DEPTH, densenet_bc-DEPTH",
    ),
    (('resnet-x', 1, 'cifar'), "network is 'resnet-x': choose one of .*resnet-DEPTH"),
    (('googlenet-22', 1, 'imagenet'), "network is 'googlenet-22': choose one of .*, googlenet$"),
    (('resnet-21', 1, 'cifar'), r"network is 'resnet-21': depth 21 .* use 6n \+ 2"),
    (('densenet-40', 1, 'imagenet'), "network is 'densenet-40': depth 40 .* 121, 169, 201"),
    (('resnet-20', 10, 'cifar'), 'exits is 10: resnet-20 can have 1 to 9$'),
    (('googlenet', 2, 'imagenet'), 'exits is 2: googlenet can have 1 or 3$'),
  ],
)
def test_a_mistake_is_named_with_what_to_write_instead(arguments, message):
  with pytest.raises(UsageError, match=f'^config argument {message}'):
    baselines.choose(config_lib.default(), *arguments)


@pytest.mark.slow
@pytest.mark.parametrize('network', ['resnet-8', 'densenet_bc-10'])
def test_both_phases_train_a_network_with_exits(network):
  config = chosen(network, exits=2)
  config.batch_size = 4 * jax.device_count()
  random = np.random.default_rng(0)
  lead = (jax.local_device_count(), 4)
  batch = {
    'image': random.standard_normal((*lead, *SHAPE), np.float32),
    'label': random.integers(0, 3, lead).astype(np.int32),
  }

  def take_a_step(index, predecessor):
    """Returns the network and the states before and after the first step of a phase."""
    phase = Phase(config, index, predecessor, num_classes=3, image_shape=SHAPE, steps_per_epoch=10)
    step = steps.on_devices(phase.train_step, (None, None, 0))
    after = step(runtime.replicate(phase.state), runtime.replicate(phase.teacher), batch)
    return phase.model, phase.state, after

  model, before, after = take_a_step(0, None)
  before, after = unpack(before), unpack(jax.device_get(after))
  for old, new in zip(
    jax.tree.leaves((before.trained, before.batch_stats)),
    jax.tree.leaves((after.trained, after.batch_stats)),
    strict=True,
  ):
    assert np.any(old != new)

  variables = {'params': after.trained, 'batch_stats': after.batch_stats}
  _, before, after = take_a_step(1, (model, variables))
  before, after = unpack(before), unpack(jax.device_get(after))
  assert set(after.trained) == {'classifiers_0', 'classifiers_1'}
  jax.tree.map(np.testing.assert_array_equal, after.frozen, before.frozen)
  for name, classifier in before.trained.items():
    assert np.any(after.trained[name]['dense']['kernel'] != classifier['dense']['kernel'])


def test_a_hydranet_has_a_branch_per_superclass_of_five_classes():
  groups = chosen('hydranet-1').model.groups
  assert np.bincount(groups).tolist() == [5] * 20
  # Of CIFAR-100's classes 0 to 4, apple, aquarium fish, baby, bear and beaver.
  assert groups[:5] == (4, 1, 14, 8, 0)
  # Maple, oak, palm, pine and willow trees.
  assert {groups[tree] for tree in (47, 52, 56, 59, 96)} == {17}
