"""HydraNet: published sizes, gate and combiner by their formulas, and branches that are skipped."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from imta_jax import config as config_lib
from imta_jax import models, runtime
from imta_jax.adaptive.cost import count_madds, exit_costs
from imta_jax.errors import UsageError
from imta_jax.models.hydranet import Branch
from imta_jax.models.initial_values import initialize
from imta_jax.models.layers import ConvNorm
from imta_jax.training import steps, train_state

SHAPE = (8, 8, 3)
GROUPS = (0, 1, 2, 0, 1, 2)
TOP_K = 2
IMAGES = np.random.default_rng(0).standard_normal((12, *SHAPE), np.float32)
LABELS = (np.arange(12) % len(GROUPS)).astype(np.int32)


def create(**fields):
  return models.create('hydranet', num_classes=6, **{'groups': GROUPS, 'top_k': TOP_K, **fields})


@pytest.fixture(scope='module')
def variables(random_variables):
  """Variables with which each branch is chosen by some images, but not by all."""
  variables = random_variables(create(), SHAPE)
  dense = variables['params']['exits_0']['scores']
  features = np.asarray(parts(variables)[0])
  dense['kernel'] = np.random.default_rng(4).standard_normal((64, 3), np.float32)
  dense['bias'] = -features.mean(axis=0) @ dense['kernel']
  chosen = choose(variables)
  assert all(0 < (chosen == branch).sum() < 12 for branch in range(3))
  return variables


def of_branch(variables, index):
  """The variables of one branch, or of the gate if index is None."""
  trees = {kind: tree['exits_0'] for kind, tree in variables.items()}
  if index is None:
    return {kind: tree['gate'] for kind, tree in trees.items()}
  return {
    kind: jax.tree.map(lambda leaf: leaf[index], tree['branches']) for kind, tree in trees.items()
  }


@jax.jit
def parts(variables):
  """The features of the gate and of all branches, [image, width], each computed by itself."""
  stem = create().stages[0]
  (x,) = stem.apply({kind: tree['stages_0'] for kind, tree in variables.items()}, (IMAGES,))
  branch = Branch(64, 1, ConvNorm)
  return [branch.apply(of_branch(variables, index), x) for index in (None, 0, 1, 2)]


def gate_scores(variables, features):
  dense = variables['params']['exits_0']['scores']
  return np.asarray(features) @ dense['kernel'] + dense['bias']


def choose(variables):
  return np.argsort(-gate_scores(variables, parts(variables)[0]), axis=1)[:, :TOP_K]


# Table 1 of the IMTA paper: d, million parameters, million multiplications and additions.
TABLE_1 = [
  (1, 1.28, 52),
  (2, 2.86, 118),
  *(
    pytest.param(*row, marks=pytest.mark.slow)
    for row in ((3, 4.43, 184), (4, 6.01, 251), (5, 7.59, 317), (6, 9.17, 383))
  ),
  *(pytest.param(*row, marks=pytest.mark.slow) for row in ((7, 10.74, 449), (9, 13.90, 581))),
]


@pytest.mark.parametrize(('blocks', 'params', 'operations'), TABLE_1)
def test_the_networks_of_table_1_have_the_published_sizes(blocks, params, operations):
  model = models.create('hydranet', blocks=blocks, groups=[label // 5 for label in range(100)])
  (cost,) = exit_costs(model, (32, 32, 3))
  assert round(cost.params / 1e6, 2) == params
  # The stem, the gate and four branches: two convolutions a block, the first in each group of
  # blocks with half the inputs, or from 3 channels for the first of all.
  convolutions = 7 * blocks * 2 * 9 * 64 * 64 * 8 * 8 - 6 * 9 * 32 * 64 * 8 * 8 + 27 * 16 * 32 * 32
  dense = 5 * 64 * 64 + 64 * 20 + 64 * 100
  assert int(2 * (convolutions + dense) / 1e6) == operations
  relus = (1 + 2 * blocks) * 16 * 32**2 + 2 * blocks * (32 * 16**2 + 5 * 64 * 8**2) + 5 * 64
  pooling, biases = 5 * 64 * 8 * 8, 5 * 64 + 20 + 100
  assert cost.madds == convolutions + dense + relus + pooling + biases


@pytest.mark.slow
def test_an_image_pays_for_its_branches_alone():
  costs = [exit_costs(create(top_k=top_k), SHAPE)[0] for top_k in (1, 2, 3)]
  x = jax.ShapeDtypeStruct((1, 4, 4, 32), jnp.float32)
  branch = Branch(64, 1, ConvNorm)
  shapes = jax.eval_shape(branch.init, jax.random.key(0), x)
  of_branch = count_madds(branch.apply, shapes, x)
  assert of_branch > 0
  assert [cost.madds - costs[0].madds for cost in costs] == [0, of_branch, 2 * of_branch]
  assert len({cost.params for cost in costs}) == 1


def test_a_branch_pools_its_map_before_a_dense_layer():
  """If all convolutions are zero, blocks are shortcuts, of which the first skips pixels."""
  x = np.random.default_rng(1).standard_normal((2, 4, 4, 3), np.float32)
  branch = Branch(5, 2, ConvNorm)
  shapes = jax.eval_shape(branch.init, jax.random.key(0), x)
  variables = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes)
  dense = {
    'kernel': np.random.default_rng(2).standard_normal((5, 5), np.float32),
    'bias': np.random.default_rng(3).standard_normal(5, np.float32),
  }
  variables['params']['Dense_0'] = dense
  pooled = np.pad(np.maximum(x[:, ::2, ::2], 0).mean((1, 2)), ((0, 0), (0, 2)))
  expected = np.maximum(pooled @ dense['kernel'] + dense['bias'], 0)
  np.testing.assert_allclose(branch.apply(variables, x), expected, rtol=1e-5, atol=1e-6)


def test_the_gate_weights_the_branches_that_it_scores_highest(variables):
  """The masked computation, image by image, is what the network computes with skipped branches."""
  gate, *features = map(np.asarray, parts(variables))
  scores = gate_scores(variables, gate)
  combined = np.zeros_like(gate)
  for image, row in enumerate(scores):
    chosen = sorted(range(3), key=lambda branch: -row[branch])[:TOP_K]
    weights = {branch: np.exp(row[branch]) for branch in chosen}
    for branch, weight in weights.items():
      combined[image] += weight / sum(weights.values()) * features[branch][image]
  dense = variables['params']['classifiers_0']['dense']
  logits = jax.jit(create().apply)(variables, IMAGES)
  assert logits.shape == (1, 12, 6) and logits.dtype == jnp.float32
  np.testing.assert_allclose(
    logits[0], combined @ dense['kernel'] + dense['bias'], rtol=1e-4, atol=1e-5
  )


def test_a_branch_runs_only_for_the_images_that_chose_it(variables):
  """A branch that computes NaN spoils the logits of these alone."""
  run, poisoned = jax.jit(create().apply), jax.tree.map(np.array, variables)
  poisoned['params']['exits_0']['branches']['Dense_0']['bias'][1] = np.nan
  expected, logits = run(variables, IMAGES)[0], run(poisoned, IMAGES)[0]
  chose = (choose(variables) == 1).any(axis=1)
  assert np.isnan(logits[chose]).all()
  np.testing.assert_array_equal(logits[~chose], expected[~chose])


@pytest.mark.slow
def test_a_network_is_exported_for_batches_of_any_size(variables):
  from jax import export

  (batch,) = export.symbolic_shape('batch')
  images = jax.ShapeDtypeStruct((batch, *SHAPE), np.float32)
  run = export.export(jax.jit(partial(create().apply, variables)))(images).call
  expected = jax.jit(create().apply)(variables, IMAGES)
  for count in (1, 12):
    np.testing.assert_allclose(run(IMAGES[:count]), expected[:, :count], rtol=1e-4, atol=1e-5)


def test_all_branches_start_with_values_of_their_own():
  drawn = initialize(create(), 0, SHAPE)['params']['exits_0']['branches']
  kernel, dense = drawn['Block_0']['conv_0']['conv']['kernel'], drawn['Dense_0']['kernel']
  assert kernel.shape == (3, 3, 3, 32, 64) and dense.shape == (3, 64, 64)
  for branch in range(3):
    np.testing.assert_allclose(kernel[branch].std(), np.sqrt(2 / (9 * 64)), rtol=0.02)
    assert 0.99 / 8 < np.abs(dense[branch]).max() <= 1 / 8
    for values in (kernel, dense):
      assert abs(np.corrcoef(values[branch].ravel(), values[branch - 1].ravel())[0, 1]) < 0.05


@jax.jit
def run_in_training(params, batch_stats):
  """Returns the logits and the log-probability that the gate gives to the group of each class."""
  variables = {'params': params, 'batch_stats': batch_stats}
  logits, updated = create().apply(
    variables, IMAGES, train=True, mutable=['batch_stats', 'auxiliary']
  )
  (of_gate,) = updated['auxiliary']['exits_0']['group']
  return logits[0], of_gate


@pytest.fixture(scope='module')
def training():
  """The states before and after a training step on the images, without momentum."""
  model, phase = create(batch_norm_axis=runtime.AXIS), config_lib.phase_one()
  phase.update(momentum=0.0, nesterov=False, weight_decay=0.0)
  optimizer = train_state.create_optimizer(phase, optax.constant_schedule(0.1))
  step = steps.make_train_step(model, None, phase, optimizer)
  step = jax.jit(jax.vmap(step, (None, None, 0), None, axis_name=runtime.AXIS))
  batch = {'image': IMAGES[np.newaxis], 'label': LABELS[np.newaxis]}
  before = train_state.create_state(initialize(model, 0, SHAPE), phase, optimizer)
  return before, step(before, {}, batch)


@pytest.fixture(scope='module')
def gradient(training):
  """The gradient of the loss by its formula; the test of a step compares it with the step's."""
  before, _ = training

  def loss_of(params):
    logits, of_gate = run_in_training(params, before.batch_stats.tree)
    likelihoods = jax.nn.log_softmax(logits) + of_gate
    return -likelihoods[np.arange(12), LABELS].mean()

  return jax.jit(jax.value_and_grad(loss_of))(before.trained.tree)


def test_the_gate_names_the_group_of_each_class(variables):
  """Classes of a group share its probability, and those of all groups sum to 1."""
  _, of_gate = run_in_training(variables['params'], variables['batch_stats'])
  np.testing.assert_array_equal(of_gate[:, :3], of_gate[:, 3:])
  np.testing.assert_allclose(np.exp(of_gate[:, :3]).sum(axis=1), 1, rtol=1e-5)
  assert np.ptp(of_gate, axis=1).min() > 0


@pytest.mark.slow
def test_a_step_follows_the_classification_and_the_gate(training, gradient):
  before, after = training
  loss, gradient = gradient
  np.testing.assert_allclose(after.totals['loss'], loss, rtol=1e-5)
  jax.tree.map(
    lambda new, old, g: np.testing.assert_allclose(new, old - 0.1 * g, rtol=1e-3, atol=1e-5),
    after.trained.tree,
    before.trained.tree,
    gradient,
  )


@pytest.mark.slow
def test_gradients_reach_the_gate_the_stem_and_the_branches(gradient):
  _, gradient = gradient
  for leaf in jax.tree.leaves(gradient):
    assert np.abs(leaf).max() > 0
  for leaf in jax.tree.leaves(gradient['exits_0']['branches']):
    assert (np.abs(leaf.reshape(3, -1)).max(axis=1) > 0).all()


def test_groups_of_another_data_set_are_refused():
  model = models.create('hydranet', num_classes=4, groups=GROUPS, top_k=1)
  optimizer = optax.sgd(0.1)
  step = steps.make_train_step(model, None, config_lib.phase_one(), optimizer)
  state = train_state.create_state(initialize(model, 0, SHAPE), config_lib.phase_one(), optimizer)
  message = '^config.model gives exits_0/group 6 classes, but the data set has 4: correct'
  with pytest.raises(UsageError, match=message):
    jax.eval_shape(
      jax.vmap(step, in_axes=(None, None, 0), axis_name=runtime.AXIS),
      state,
      {},
      {'image': IMAGES[np.newaxis], 'label': LABELS[np.newaxis]},
    )


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'blocks': 0}, 'blocks 0 is out of range: it must be 1 or more'),
    ({'groups': ()}, r'groups \(\) must be a group per class, .*: experiments/class_groups.py'),
    ({'groups': (0, 2)}, r'groups \(0, 2\) must be a group per class, counted from 0 without gaps'),
    ({'top_k': 0}, 'top_k 0 is out of range: it must be from 1 to 3 branches'),
    ({'top_k': 4}, 'top_k 4 is out of range: it must be from 1 to 3 branches'),
  ],
)
def test_a_bad_field_is_refused(fields, message):
  with pytest.raises(ValueError, match=f'^{message}'):
    create(**fields)
