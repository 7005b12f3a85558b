"""The setup of a phase: its initial state, its teacher, and the fields of the config."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imta_jax import config as config_lib
from imta_jax import runtime
from imta_jax.errors import UsageError
from imta_jax.models.initial_values import initialize
from imta_jax.techniques.one_for_all import one_for_all_loss
from imta_jax.training import steps
from imta_jax.training.packing import pack
from imta_jax.training.phases import Phase

SHAPE = (8, 8, 1)
NUM_CLASSES = 3


def make_config():
  config = config_lib.default()
  config.seed = 3
  config.batch_size = 2 * jax.device_count()
  config.model.update(
    num_exits=2,
    step_mode='even',
    base=1,
    step=1,
    channels=2,
    growth_rate=2,
    scale_factors=(1,),
    bottleneck_factors=(1,),
  )
  config.phases[1].update(alpha=0.3, temperature=2.0, steps=7)
  return config


def set_up(config, index, predecessor=None, donor=None):
  return Phase(
    config,
    index,
    predecessor,
    donor,
    num_classes=NUM_CLASSES,
    image_shape=SHAPE,
    steps_per_epoch=10,
  )


@pytest.fixture(scope='module')
def predecessor(random_variables):
  """Network and variables of a finished phase I."""
  model = set_up(make_config(), 0).model
  return model, random_variables(model, SHAPE)


@pytest.fixture(scope='module')
def phase_two(predecessor):
  return set_up(make_config(), 1, predecessor)


def test_phase_one_starts_from_the_initial_values_of_the_seed():
  phase = set_up(make_config(), 0)
  jax.tree.map(
    np.testing.assert_array_equal, phase.state.weights.variables, initialize(phase.model, 3, SHAPE)
  )
  assert phase.teacher == {}
  assert phase.name == 'phase_1'


def test_phase_two_starts_from_phase_one_although_phase_one_had_another_start(
  predecessor, phase_two
):
  donor = jax.tree.map(np.zeros_like, predecessor[1])
  phase = set_up(make_config(), 1, predecessor, donor)
  jax.tree.map(
    np.testing.assert_array_equal, phase.state.weights.variables, phase_two.state.weights.variables
  )
  assert not phase.loaded


def test_exits_give_the_logits_of_phase_one_before_the_first_step(predecessor, phase_two):
  images = np.random.default_rng(0).normal(size=(5, *SHAPE)).astype(np.float32)
  model, variables = predecessor
  logits = jax.jit(model.apply)(variables, images)
  own = jax.jit(phase_two.model.apply)(phase_two.state.weights.variables, images)
  np.testing.assert_allclose(own, logits, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
  'trained', ['last_layers', pytest.param('everything', marks=pytest.mark.slow)]
)
def test_the_frozen_teacher_is_the_last_exit_of_the_previous_phase(trained, predecessor):
  config = make_config()
  config.phases[1].trained, config.global_batch_norm = trained, False
  phase = set_up(config, 1, predecessor)
  model, variables = predecessor
  random = np.random.default_rng(1)
  lead = (jax.local_device_count(), 2)
  batch = {
    'image': random.normal(size=(*lead, *SHAPE)).astype(np.float32),
    'label': random.integers(NUM_CLASSES, size=lead).astype(np.int32),
  }
  # The student's own last layers differ from the teacher's.
  state = phase.state.replace(trained=jax.tree.map(lambda leaf: 1.5 * leaf, phase.state.trained))
  step = steps.on_devices(phase.train_step, (None, None, 0))
  after = step(*runtime.replicate((state, pack(phase.teacher))), batch)

  images, labels = (array.reshape(-1, *array.shape[2:]) for array in batch.values())
  student, of_student = phase.model, state.weights.variables
  train = {'train': True, 'mutable': ['batch_stats']}
  if trained == 'everything':
    logits, _ = student.apply(of_student, images, **train)
  else:
    embeddings = student.apply(of_student, images, method='embed')
    logits, _ = student.apply(of_student, embeddings, method='classify', **train)
  teacher_logits = model.clone(batch_norm_axis=None).apply(variables, images)[-1]
  expected = one_for_all_loss(logits, labels, teacher_logits, alpha=0.3, temperature=2.0)
  np.testing.assert_allclose(after.totals['loss'], expected, rtol=1e-4)
  if trained == 'last_layers':
    assert set(phase.teacher['params']) == {f'classifiers_{index}' for index in range(2)}


@pytest.mark.parametrize(
  'fields', [{'trained': 'exits'}, {'trained': 'last_layers'}, {'frozen_stages': 2}]
)
def test_a_first_phase_does_not_freeze_random_layers(predecessor, fields):
  config, (_, variables) = make_config(), predecessor
  config.phases[0].update(fields)
  params = variables['params']
  part = {name: tree for name, tree in params.items() if name != 'stages_1'}
  for donor in (None, lambda *_: {**variables, 'params': part}):
    first = 'stages_1' if donor else '(stages|exits)_0'
    with pytest.raises(UsageError, match=rf'^config.phases\[0\] does not train {first}, which has'):
      set_up(config, 0, donor=donor)
  phase = set_up(config, 0, donor=lambda *_: variables)
  jax.tree.map(
    np.testing.assert_array_equal, phase.state.frozen.tree['stages_1'], params['stages_1']
  )


def test_an_online_teacher_needs_no_variables(predecessor):
  config = make_config()
  config.phases[1].teacher = 'online'
  assert set_up(config, 1, predecessor).teacher == {}


def test_a_phase_that_trains_everything_has_a_whole_teacher(predecessor):
  config = make_config()
  config.phases[1].trained = 'everything'
  phase = set_up(config, 1, predecessor)
  jax.tree.map(np.testing.assert_array_equal, phase.teacher, predecessor[1])
  assert phase.state.frozen.tree == {}


@pytest.mark.parametrize(
  ('fields', 'num_steps'), [({'steps': 7}, 7), ({'epochs': 2.5}, 25), ({'epochs': 0.01}, 1)]
)
def test_the_length_is_given_in_steps_or_epochs(fields, num_steps):
  config = make_config()
  config.phases[0].update(fields)
  assert set_up(config, 0).num_steps == num_steps


def test_the_schedule_is_that_of_the_phase_and_its_length(predecessor):
  config = make_config()
  config.phases[1].update(learning_rate=0.4, steps=20, milestones=(0.5,))
  config.phases[1].reference_batch_size = 2 * config.batch_size
  schedule = set_up(config, 1, predecessor).schedule
  np.testing.assert_allclose([schedule(step) for step in (0, 9, 10, 19)], [0.2, 0.2, 0.02, 0.02])


def test_the_network_has_the_techniques_of_its_phase(predecessor, phase_two):
  config = make_config()
  config.phases[0].gradient_equilibrium = 'coarsest'
  config.phases[1].update(
    gradient_equilibrium='off',
    collaboration='identity',
    stop_collaboration_gradient=False,
    shared_channels=0.5,
  )
  config.model.dtype = 'bfloat16'
  config.global_batch_norm = False
  first, second = set_up(config, 0).model, set_up(config, 1, predecessor).model
  assert (first.gradient_equilibrium, first.collaboration) == ('coarsest', 'off')
  assert (second.gradient_equilibrium, second.collaboration) == ('off', 'identity')
  assert (first.shared_channels, second.shared_channels) == (1.0, 0.5)
  assert first.stop_collaboration_gradient and not second.stop_collaboration_gradient
  assert first.dtype == jnp.bfloat16
  assert (first.batch_norm_axis, phase_two.model.batch_norm_axis) == (None, runtime.AXIS)
