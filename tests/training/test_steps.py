"""Steps: updates, and the variables that a step changes."""

import jax
import numpy as np
import optax
import pytest

from imta_jax import config as config_lib
from imta_jax import models, runtime
from imta_jax.models.convolution import convolve
from imta_jax.models.initial_values import initialize
from imta_jax.techniques.one_for_all import cross_entropy, one_for_all_loss
from imta_jax.training import steps, train_state
from imta_jax.training.packing import pack, unpack

SHAPE = (8, 8, 1)
NUM_EXITS = 2
NUM_CLASSES = 3
IMAGES_A_DEVICE = 4


def make_phase(phase=config_lib.phase_one, **fields):
  phase = phase()
  phase.update(fields)
  return phase


def make_model(**fields):
  return models.create(
    'msdnet',
    num_exits=NUM_EXITS,
    base=1,
    step=1,
    step_mode='even',
    channels=2,
    growth_rate=2,
    scale_factors=(1,),
    bottleneck_factors=(1,),
    num_classes=NUM_CLASSES,
    **{'batch_norm_axis': runtime.AXIS, **fields},
  )


def make_batch(seed=0):
  """Returns a batch [local devices, images per device, …]."""
  random = np.random.default_rng(seed)
  lead = (jax.local_device_count(), IMAGES_A_DEVICE)
  return {
    'image': random.normal(size=(*lead, *SHAPE)).astype(np.float32),
    'label': random.integers(0, NUM_CLASSES, lead).astype(np.int32),
  }


def flat(batch):
  """Returns the batch of all local devices, without the axis over devices."""
  return {name: array.reshape(-1, *array.shape[2:]) for name, array in batch.items()}


def train_mode_logits(model, variables, inputs, method='__call__'):
  """Returns logits with the statistics of the batch, for a model without batch_norm_axis."""
  return model.apply(variables, inputs, train=True, mutable=['batch_stats'], method=method)[0]


def assert_same(one, other):
  jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.fixture(scope='module')
def phase_one_steps():
  """States of phase I before the first step, after one step and after two."""
  model = make_model()
  phase = make_phase(learning_rate=0.1, momentum=0.0, weight_decay=0.0, max_gradient_norm=0.5)
  optimizer = train_state.create_optimizer(phase, optax.constant_schedule(0.1))
  step = steps.on_devices(steps.make_train_step(model, None, phase, optimizer), (None, None, 0))
  state = train_state.create_state(initialize(model, 0, SHAPE), phase, optimizer)
  states = [runtime.replicate(state)]
  for seed in range(2):
    states.append(step(states[-1], {}, make_batch(seed)))
  return unpack(jax.device_get(states))


def test_a_step_follows_the_clipped_gradient_of_the_summed_cross_entropy(phase_one_steps):
  before, after, _ = phase_one_steps
  model, batch = make_model(batch_norm_axis=None), flat(make_batch())

  def loss_of(params):
    variables = {'params': params, 'batch_stats': before.batch_stats}
    logits = train_mode_logits(model, variables, batch['image'])
    losses = [
      optax.softmax_cross_entropy_with_integer_labels(exit_logits, batch['label'])
      for exit_logits in logits
    ]
    return sum(loss.mean() for loss in losses), logits

  (loss, logits), gradient = jax.jit(jax.value_and_grad(loss_of, has_aux=True))(before.trained)
  np.testing.assert_allclose(after.totals['loss'], loss, rtol=1e-5)
  accuracy = [(exit_logits.argmax(-1) == batch['label']).mean() for exit_logits in logits]
  np.testing.assert_allclose(after.totals['accuracy'], accuracy, rtol=1e-6)
  norm = optax.tree.norm(gradient)
  assert norm > 0.5
  np.testing.assert_allclose(after.totals['gradient_norm'], norm, rtol=1e-4)
  clipped = jax.tree.map(lambda g: g * 0.5 / norm, gradient)
  jax.tree.map(
    lambda new, old, g: np.testing.assert_allclose(new, old - 0.1 * g, rtol=1e-3, atol=1e-5),
    after.trained,
    before.trained,
    clipped,
  )


def test_steps_count_and_totals_add_up(phase_one_steps):
  before, one, two = phase_one_steps
  assert [int(state.step) for state in (before, one, two)] == [0, 1, 2]
  assert [float(state.totals['steps']) for state in (before, one, two)] == [0, 1, 2]
  for name in ('loss', 'gradient_norm'):
    assert 0 < one.totals[name] < two.totals[name]
  assert np.all(two.totals['accuracy'] >= one.totals['accuracy'])
  assert np.all(two.totals['accuracy'] <= 2)


def test_batch_statistics_move_a_tenth_towards_the_batch(phase_one_steps):
  before, one, _ = phase_one_steps
  stats = one.batch_stats['stages_0']['layers_0']['scale_0']['norm']
  kernel = before.trained['stages_0']['layers_0']['scale_0']['conv']['kernel']
  out = jax.lax.conv_general_dilated(
    flat(make_batch())['image'],
    kernel,
    (1, 1),
    ((1, 1), (1, 1)),
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
  )
  np.testing.assert_allclose(stats['mean'], 0.1 * out.mean((0, 1, 2)), rtol=1e-3, atol=1e-6)
  np.testing.assert_allclose(stats['var'], 0.9 + 0.1 * out.var((0, 1, 2)), rtol=1e-3)


@pytest.mark.parametrize('axis', [None, runtime.AXIS])
def test_running_statistics_are_the_same_on_all_devices(axis):
  """Whether batch norm averages over devices or not."""
  model, phase = make_model(batch_norm_axis=axis), make_phase()
  optimizer = train_state.create_optimizer(phase, optax.constant_schedule(0.1))
  step = steps.make_train_step(model, None, phase, optimizer)
  state = train_state.create_state(initialize(model, 0, SHAPE), phase, optimizer)
  parts = jax.tree.map(lambda *arrays: np.concatenate(arrays), make_batch(0), make_batch(1))
  step = jax.jit(jax.vmap(step, in_axes=(None, None, 0), axis_name=runtime.AXIS))
  after = step(state, {}, parts)
  for one, other in (jax.tree.map(np.asarray, leaf) for leaf in jax.tree.leaves(after.weights)):
    np.testing.assert_array_equal(one, other)
  # The first convolution sees the images themselves.
  stats = jax.tree.map(lambda leaf: leaf[0], after.batch_stats).tree
  var = stats['stages_0']['layers_0']['scale_0']['norm']['var']
  kernel = state.trained.tree['stages_0']['layers_0']['scale_0']['conv']['kernel']
  maps = convolve(flat(parts)['image'], kernel, 1, 1)
  of_parts = np.stack(
    [part.var((0, 1, 2)) for part in np.split(np.asarray(maps), len(parts['image']))]
  )
  expected = maps.var((0, 1, 2)) if axis else of_parts.mean(0)
  assert np.abs(maps.var((0, 1, 2)) - of_parts.mean(0)).max() > 1e-3
  np.testing.assert_allclose(var, 0.9 + 0.1 * expected, rtol=1e-4)


@pytest.mark.parametrize(
  ('fields', 'updated'),
  [
    ({'frozen_stages': 1}, {'stages_1', 'exits_0', 'exits_1'}),
    ({'trained': 'exits'}, {'exits_0', 'exits_1'}),
    ({'trained': 'exits', 'frozen_batch_norm': 'training'}, None),
    ({'batch_norm': 'evaluation'}, set()),
  ],
)
def test_batch_norm_of_frozen_stages_is_evaluated(fields, updated):
  """Gradients, statistics and parameters are those of a network whose layers are in these modes."""
  phase = make_phase(momentum=0.0, weight_decay=0.0, **fields)
  model, optimizer = make_model(), train_state.create_optimizer(phase, lambda step: 0.1)
  variables = initialize(model, 0, SHAPE)
  # Statistics unlike those of new layers, so that a lost one is seen.
  stats = jax.tree.map(lambda leaf: leaf + np.float32(0.5), variables['batch_stats'])
  variables['batch_stats'] = stats
  before = runtime.replicate(train_state.create_state(variables, phase, optimizer))
  step = steps.on_devices(steps.make_train_step(model, None, phase, optimizer), (None, None, 0))
  batch = make_batch()
  after = unpack(jax.device_get(step(before, {}, batch)))
  updated = set(stats) if updated is None else updated
  reference = make_model(batch_norm_axis=None)
  train = phase.batch_norm == 'training'
  frozen = len([name for name in stats if name.startswith('stages_') and name not in updated])

  @jax.jit
  def expected(images, labels):
    logits, new = reference.apply(variables, images, train, frozen, mutable=['batch_stats'])
    return cross_entropy(logits, labels).sum(), new.get('batch_stats', stats)

  loss, new = expected(flat(batch)['image'], flat(batch)['label'])
  np.testing.assert_allclose(after.totals['loss'], loss, rtol=1e-4)
  for name, tree in stats.items():
    moved = [np.any(a != b) for a, b in zip(*map(jax.tree.leaves, (tree, new[name])), strict=True)]
    assert all(moved) if name in updated else not any(moved)
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5),
      after.batch_stats[name],
      dict(new[name]),
    )


def backbone(tree):
  return {name: part for name, part in tree.items() if not name.startswith('classifiers_')}


@pytest.fixture(scope='module', params=['evaluation', 'training'])
def phase_two_step(request):
  """Mode of frozen batch norm, teacher, batch, and the states before and after one step."""
  phase = make_phase(
    config_lib.phase_two, frozen_batch_norm=request.param, alpha=0.3, temperature=2.0
  )
  model, teacher_model = make_model(collaboration='network'), make_model()
  variables, teacher = initialize(model, 1, SHAPE), initialize(teacher_model, 2, SHAPE)
  teacher = {  # As train.py gives it: the classifiers alone; the backbone is the student's.
    'params': {n: t for n, t in teacher['params'].items() if n.startswith('classifiers_')}
  }
  optimizer = train_state.create_optimizer(phase, optax.constant_schedule(0.1))
  step = steps.on_devices(
    steps.make_train_step(model, teacher_model, phase, optimizer), (None, None, 0)
  )
  before = runtime.replicate(train_state.create_state(variables, phase, optimizer))
  batch = make_batch()
  after = unpack(jax.device_get(step(before, runtime.replicate(teacher), batch)))
  before = unpack(jax.device_get(before))
  return request.param, teacher, batch, before, after


def test_phase_two_trains_the_classifiers_alone(phase_two_step):
  _, _, _, before, after = phase_two_step
  assert_same(after.frozen, before.frozen)
  for name, classifier in before.trained.items():
    for layer in ('dense', 'transfer_dense'):
      if layer in classifier:
        assert np.any(after.trained[name][layer]['kernel'] != classifier[layer]['kernel'])
  assert 'transfer_dense' not in before.trained['classifiers_0']
  assert 'transfer_dense' in before.trained['classifiers_1']


def test_statistics_of_the_frozen_backbone_move_only_in_training_mode(phase_two_step):
  mode, _, _, before, after = phase_two_step
  if mode == 'evaluation':
    assert_same(backbone(after.batch_stats), backbone(before.batch_stats))
  else:
    for old, new in zip(
      jax.tree.leaves(backbone(before.batch_stats)),
      jax.tree.leaves(backbone(after.batch_stats)),
      strict=True,
    ):
      assert np.any(old != new)
  transfer = [state.batch_stats['classifiers_1']['transfer_norm'] for state in (before, after)]
  assert np.any(transfer[0]['mean'] != transfer[1]['mean'])
  assert np.any(transfer[0]['var'] != transfer[1]['var'])


def test_phase_two_minimises_one_for_all_with_the_teachers_last_exit(phase_two_step):
  mode, teacher, batch, before, after = phase_two_step
  batch = flat(batch)
  model = make_model(collaboration='network', batch_norm_axis=None)
  teacher_model = make_model(batch_norm_axis=None)
  shared = {
    'params': {**before.frozen, **teacher['params']},
    'batch_stats': backbone(before.batch_stats),
  }
  params = {**before.frozen, **before.trained}
  variables = {'params': params, 'batch_stats': before.batch_stats}

  @jax.jit
  def expected(images):
    if mode == 'evaluation':
      teacher_logits = teacher_model.apply(shared, images)[-1]
      embeddings = model.apply(variables, images, method='embed')
      logits = train_mode_logits(model, variables, embeddings, 'classify')
    else:
      teacher_logits = train_mode_logits(teacher_model, shared, images)[-1]
      logits = train_mode_logits(model, variables, images)
    return one_for_all_loss(
      logits, batch['label'], teacher_logits, alpha=0.3, temperature=2.0, class_reduction='sum'
    )

  np.testing.assert_allclose(after.totals['loss'], expected(batch['image']), rtol=1e-4)


def test_a_loop_takes_the_steps_one_by_one():
  """Any number of steps at once leads to the same state, bit for bit."""
  phase = make_phase(trained='last_layers', learning_rate=0.1)
  model = make_model()
  optimizer = train_state.create_optimizer(phase, optax.constant_schedule(0.1))
  step = steps.make_train_step(model, None, phase, optimizer)
  batches = [make_batch(seed) for seed in range(3)]
  source = jax.tree.map(lambda *arrays: np.stack(arrays, axis=1), *batches)

  def draw(source, step):
    return jax.tree.map(lambda array: jax.lax.dynamic_index_in_dim(array, step, 0, False), source)

  def make_loop(one_step):
    loop = steps.make_train_loop(step, draw, dtype=model.dtype, one_step=one_step)
    return steps.on_devices(loop, (None, None, 0, None), donated=(0,))

  def run(loop, counts):
    state = train_state.create_state(initialize(model, 0, SHAPE), phase, optimizer)
    state = runtime.replicate(state)
    for count in counts:
      state, number = loop(state, pack({}), source, np.int32(count))
    assert int(number) == int(state.step) == sum(counts)
    return unpack(jax.device_get(state))

  loop = make_loop(one_step=False)
  at_once = run(loop, [3])
  assert_same(at_once, run(loop, [1, 1, 1]))
  assert_same(at_once, run(loop, [2, 1]))
  # A program without a loop may round otherwise.
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4),
    at_once,
    run(make_loop(one_step=True), [1, 1, 1]),
  )


def test_frozen_parameters_are_kept_in_float32_while_steps_compute_in_bfloat16():
  phase, model = make_phase(config_lib.phase_two), make_model(dtype='bfloat16')
  optimizer = train_state.create_optimizer(phase, optax.constant_schedule(0.1))
  step = steps.make_train_step(model, None, phase, optimizer)
  loop = steps.make_train_loop(step, lambda source, step: source, dtype=model.dtype)
  before = train_state.create_state(initialize(model, 0, SHAPE), phase, optimizer)
  after, _ = steps.on_devices(loop, (None, None, 0, None))(
    runtime.replicate(before), pack({}), make_batch(), np.int32(2)
  )
  assert_same(unpack(jax.device_get(after.frozen)), unpack(jax.device_get(before.frozen)))
  assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves((after.trained, after.frozen)))


def test_predictions_are_the_models_in_the_order_of_the_images():
  model = make_model(collaboration='network')
  variables = initialize(model, 0, SHAPE)
  batch = make_batch()
  batch['mask'] = np.arange(batch['label'].size).reshape(batch['label'].shape) % 3 != 0
  predict = steps.on_devices(steps.make_predict_step(model), (None, 0))
  weights = train_state.create_state(variables, config_lib.phase_two(), optax.sgd(0.1)).weights
  logits, labels, mask = predict(runtime.replicate(weights), batch)
  expected = jax.jit(model.apply)(variables, flat(batch)['image'])
  assert logits.shape == (NUM_EXITS, batch['label'].size, NUM_CLASSES)
  assert logits.dtype == np.float32
  np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-6)
  assert_same(labels, flat(batch)['label'])
  assert_same(mask, flat(batch)['mask'])
