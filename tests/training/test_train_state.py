"""The train state: learning rates, the optimizer, and what is trained."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from imta_jax import config as config_lib
from imta_jax.training import phases, train_state
from imta_jax.training.packing import pack


def make_phase(**fields):
  phase = config_lib.phase_one()
  phase.update(fields)
  return phase


def rates(schedule, at):
  return [float(schedule(step)) for step in at]


def assert_same(one, other):
  jax.tree.map(np.testing.assert_array_equal, one, other)


def test_milestones_that_round_to_the_same_step_all_count():
  phase = make_phase(learning_rate=0.1, milestones=(0.5, 0.75))  # 1.5 and 2.25 of 3 steps.
  schedule = train_state.create_schedule(phase, num_steps=3, steps_per_epoch=3, batch_size=64)
  np.testing.assert_allclose(rates(schedule, [0, 1, 2]), [0.1, 0.1, 0.001], rtol=1e-5)


def test_the_papers_drops_come_after_150_and_225_epochs():
  phase = config_lib.default().phases[0]
  schedule = train_state.create_schedule(phase, 300 * 703, 703, 64)
  at = [150 * 703 - 1, 150 * 703, 225 * 703 - 1, 225 * 703]
  np.testing.assert_allclose(rates(schedule, at), [0.1, 0.01, 0.01, 0.001], rtol=1e-5)


@pytest.mark.parametrize('kind', ['multistep', 'cosine'])
def test_warm_up_rises_in_a_line_and_hands_over_to_the_schedule(kind):
  phase = make_phase(learning_rate=0.4, schedule=kind, warmup_epochs=2.0)
  schedule = train_state.create_schedule(phase, 200, 10, 64)
  at = np.arange(20)
  np.testing.assert_allclose(rates(schedule, at), 0.4 * at / 20, rtol=1e-5)
  after = np.array([20, 60, 99, 100, 149, 150, 199])
  if kind == 'cosine':
    expected = 0.2 * (1 + np.cos(np.pi * (after - 20) / 180))
  else:  # Drops are fractions of the whole phase, warm-up included.
    expected = [0.4, 0.4, 0.4, 0.04, 0.04, 0.004, 0.004]
  np.testing.assert_allclose(rates(schedule, after), expected, rtol=1e-4, atol=1e-8)


def test_the_rate_scales_with_the_batch():
  phase = make_phase(learning_rate=0.1, warmup_epochs=1.0)
  at = range(0, 100, 7)
  plain = rates(train_state.create_schedule(phase, 100, 10, 256), at)
  phase.reference_batch_size = 64
  scaled = rates(train_state.create_schedule(phase, 100, 10, 256), at)
  np.testing.assert_allclose(scaled, 4 * np.array(plain), rtol=1e-5)


@pytest.mark.parametrize(('nesterov', 'clipped'), [(True, None), (False, 2.5)])
def test_the_optimizer_is_sgd_with_momentum_weight_decay_and_clipped_gradients(nesterov, clipped):
  phase = make_phase(learning_rate=0.1, momentum=0.9, nesterov=nesterov, weight_decay=0.01)
  phase.max_gradient_norm = clipped
  schedule = train_state.create_schedule(phase, 4, 2, 64)
  optimizer = train_state.create_optimizer(phase, schedule)
  random = np.random.default_rng(0)
  params = {
    'conv': {'kernel': random.normal(size=(3, 2)).astype(np.float32)},
    'norm': {'scale': random.normal(size=2).astype(np.float32)},
  }
  expected = jax.tree.map(np.float64, params)
  momentum = jax.tree.map(np.zeros_like, expected)
  state, norms = optimizer.init(params), []
  for rate in (0.1, 0.1, 0.01, 0.001):
    gradient = jax.tree.map(lambda p: random.normal(size=p.shape).astype(np.float32), params)
    updates, state = optimizer.update(gradient, state, params)
    params = optax.apply_updates(params, updates)

    norms.append(math.sqrt(sum(np.square(g).sum() for g in jax.tree.leaves(gradient))))
    if clipped:
      gradient = jax.tree.map(lambda g, n=norms[-1]: g * min(1, clipped / n), gradient)
    penalized = jax.tree.map(lambda g, p: g + 0.01 * p, gradient, expected)
    momentum = jax.tree.map(lambda m, g: 0.9 * m + g, momentum, penalized)
    step = jax.tree.map(lambda m, g: g + 0.9 * m if nesterov else m, momentum, penalized)
    expected = jax.tree.map(lambda p, s, rate=rate: p - rate * s, expected, step)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), params, expected)
  assert min(norms) < 2.5 < max(norms)


def test_kernels_alone_decay_where_asked():
  params = {
    'conv': {'kernel': jnp.ones((3, 2)), 'bias': jnp.ones(2)},
    'norm': {'scale': jnp.ones(2), 'bias': jnp.ones(2)},
  }
  for decayed in ('kernels', 'everything'):
    phase = make_phase(decayed=decayed, weight_decay=0.5, momentum=0.0, learning_rate=1.0)
    optimizer = train_state.create_optimizer(phase, optax.constant_schedule(1.0))
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    rest = 0.0 if decayed == 'kernels' else -0.5
    assert_same(updates['conv']['kernel'], jnp.full((3, 2), -0.5))
    assert_same(updates['conv']['bias'], jnp.full(2, rest))
    assert_same(updates['norm'], {'scale': jnp.full(2, rest), 'bias': jnp.full(2, rest)})


def test_everything_is_trained_or_the_classifiers_alone():
  random = np.random.default_rng(0)
  classifiers = [f'classifiers_{index}' for index in range(2)]
  variables = {
    'params': {
      name: {'dense': {'kernel': random.normal(size=(3, 2)), 'bias': random.normal(size=2)}}
      for name in ('stages_0', 'exits_0', *classifiers)
    },
    'batch_stats': {'stages_0': {'norm': {'mean': random.normal(size=4)}}},
  }
  optimizer = optax.sgd(0.1, momentum=0.9)
  everything = train_state.create_state(variables, config_lib.phase_one(), optimizer)
  assert everything.frozen.tree == {}
  assert everything.trained.tree.keys() == variables['params'].keys()

  state = train_state.create_state(variables, config_lib.phase_two(), optimizer)
  assert set(state.trained.tree) == set(classifiers)
  assert set(state.frozen.tree) == {'stages_0', 'exits_0'}
  assert jax.tree.structure(state.opt_state[0].trace) == jax.tree.structure(state.trained)
  for made in (everything, state):
    assert int(made.step) == 0
    assert_same(made.weights.variables, variables)
    assert jax.tree.all(jax.tree.map(lambda total: not np.any(total), made.totals))
    assert made.totals['accuracy'].shape == (2,)


@pytest.mark.parametrize(
  ('fields', 'frozen'),
  [
    ({'trained': 'exits'}, {'stages_0', 'stages_1'}),
    ({'frozen_stages': 1}, {'stages_0'}),
    ({'trained': 'exits', 'frozen_stages': 1}, {'stages_0', 'stages_1'}),
  ],
)
def test_stages_can_be_frozen(fields, frozen):
  phase = config_lib.phase_one()
  phase.update(fields)
  names = [f'{kind}_{index}' for kind in ('stages', 'exits', 'classifiers') for index in range(2)]
  variables = {'params': {name: {'bias': np.zeros(1, np.float32)} for name in names}}
  state = train_state.create_state(variables, phase, optax.sgd(0.1))
  assert set(state.frozen.tree) == frozen
  assert set(state.trained.tree) == set(names) - frozen


def test_a_step_takes_and_returns_few_arrays():
  config = config_lib.default()
  config.model.num_exits = 2
  for phase in config.phases:
    model = config_lib.create_model(config, phase, num_classes=3)
    variables = phases.initial_variables(model, 0, (32, 32, 3))
    optimizer = train_state.create_optimizer(phase, optax.constant_schedule(0.1))
    state = train_state.create_state(variables, phase, optimizer)
    teacher, source = pack(variables), 6
    assert 2 * len(jax.tree.leaves(state)) + len(jax.tree.leaves(teacher)) + source <= 50
