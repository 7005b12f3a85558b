"""Checkpoints of the paper's published code: equal results, and round trips."""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from imta_jax import models
from imta_jax.errors import UsageError
from imta_jax.interop.torch import from_state_dict, load_checkpoint, to_state_dict
from imta_jax.techniques.one_for_all import one_for_all_loss

DATA = Path(__file__).parents[1] / 'data'


def create(**fields):
  return models.create(
    'msdnet',
    **{
      'num_exits': 3,
      'step_mode': 'lin_grow',
      'base': 1,
      'step': 1,
      'channels': 8,
      'growth_rate': 4,
      'num_classes': 10,
      **fields,
    },
  )


def load(name):
  with np.load(DATA / f'{name}.npz') as arrays:
    return dict(arrays)


@pytest.fixture(scope='module')
def phase_one():
  """A state dict, and the results of the published code for it."""
  return load('msdnet_ge_3exit_state'), load('msdnet_ge_3exit')


@pytest.fixture(scope='module')
def phase_two():
  """The same for a phase II network."""
  return load('msdnet_ge_3exit_imta_state'), load('msdnet_ge_3exit_imta')


def without_prefix(state):
  return {name.removeprefix('module.'): value for name, value in state.items()}


def test_phase_one_evaluates_to_the_published_embeddings_and_logits(phase_one):
  state, reference = phase_one
  model = create()

  @jax.jit
  def run(variables, images):
    embeddings = model.apply(variables, images, method='embed')
    return embeddings, model.apply(variables, embeddings, method='classify')

  embeddings, logits = run(from_state_dict(state, model), reference['images'])
  for index, embedding in enumerate(embeddings):
    np.testing.assert_allclose(embedding, reference[f'embedding_{index}'], atol=1e-5)
  np.testing.assert_allclose(logits, reference['logits_eval'], atol=1e-5)
  assert len(embeddings) == 3


@pytest.fixture(scope='module')
def training(phase_one):
  """Loss, logits and gradients of a training step, computed with Flax."""
  state, reference = phase_one
  model = create(gradient_equilibrium='coarsest')
  variables = from_state_dict(state, model)

  @jax.jit
  def run(variables, images, labels):
    def loss(params):
      logits, _ = model.apply(
        {**variables, 'params': params}, images, train=True, mutable=['batch_stats']
      )
      labels_by_exit = jnp.broadcast_to(labels, logits.shape[:-1])
      entropy = optax.softmax_cross_entropy_with_integer_labels(logits, labels_by_exit)
      return entropy.mean(axis=-1).sum(), logits

    return jax.value_and_grad(loss, has_aux=True)(variables['params'])

  (loss, logits), gradients = run(variables, reference['images'], reference['labels'])
  return loss, logits, to_state_dict({'params': gradients}, model)


def test_training_gives_the_published_logits_and_loss(training, phase_one):
  loss, logits, _ = training
  _, reference = phase_one
  np.testing.assert_allclose(logits, reference['logits_train'], atol=2e-5)
  np.testing.assert_allclose(loss, reference['loss_train'], rtol=1e-5)


def test_training_gives_all_the_published_gradients(training, phase_one):
  _, _, gradients = training
  expected = subset(phase_one[1], 'grad/')
  assert len(expected) == 162
  assert_close(gradients, expected)


def subset(reference, prefix):
  return {
    name.removeprefix(prefix): value for name, value in reference.items() if name.startswith(prefix)
  }


def assert_close(gradients, expected):
  """Checks gradients to 1e-4 of the largest gradient of the same parameter."""
  assert set(gradients) == set(expected)
  for name, gradient in gradients.items():
    largest = np.abs(expected[name]).max()
    assert largest > 1e-5, name
    tolerance = 1e-4 * largest
    np.testing.assert_allclose(gradient, expected[name], rtol=0, atol=tolerance, err_msg=name)


@pytest.fixture(scope='module')
def distilled(phase_two):
  """Variables, embeddings and logits of phase II."""
  state, reference = phase_two
  model = create(collaboration='network')
  variables = from_state_dict(state, model)

  @jax.jit
  def run(variables, images):
    embeddings = model.apply(variables, images, method='embed')
    return embeddings, model.apply(variables, embeddings, method='classify')

  return variables, *run(variables, reference['images'])


def test_phase_two_evaluates_to_the_published_logits(distilled, phase_two):
  _, _, logits = distilled
  np.testing.assert_allclose(logits, phase_two[1]['logits_eval'], atol=1e-5)


@pytest.mark.parametrize(
  ('temperature', 'gamma', 'kind', 'stop'),
  [(3, 0.9, 'grad_', False), (3, 0.9, 'grad_stopped_', True), (1, 0.1, 'grad_stopped_', True)],
)
def test_distillation_gives_the_published_loss_and_gradients(
  distilled, phase_two, temperature, gamma, kind, stop
):
  variables, embeddings, _ = distilled
  _, reference = phase_two
  model = create(collaboration='network', stop_collaboration_gradient=stop)
  trained = {
    name: tree for name, tree in variables['params'].items() if name.startswith('classifiers_')
  }

  @jax.jit
  @jax.value_and_grad
  def run(params):
    stats = variables['batch_stats']
    logits = model.apply({'params': params, 'batch_stats': stats}, embeddings, method='classify')
    return one_for_all_loss(
      logits,
      reference['labels'],
      reference['teacher_logits_eval'],
      alpha=1 - gamma,
      temperature=temperature,
      class_reduction='mean',
    )

  loss, gradients = run(trained)
  options = f'T{temperature}_gamma{gamma}'
  np.testing.assert_allclose(loss, reference[f'loss_{options}'], rtol=1e-5)
  expected = subset(reference, f'{kind}{options}/')
  assert len(expected) == 14
  assert_close(to_state_dict({'params': gradients}, model), expected)


@pytest.mark.parametrize('phase', ['phase_one', 'phase_two'])
def test_a_state_makes_an_exact_round_trip_but_for_what_has_no_counterpart(request, phase):
  state, _ = request.getfixturevalue(phase)
  model = create(collaboration='network' if phase == 'phase_two' else 'off')
  kept = {
    name: value
    for name, value in without_prefix(state).items()
    if not name.endswith('num_batches_tracked')
    and not (name.startswith('net.classifier.') and '.linear.' in name)
  }
  back = to_state_dict(from_state_dict(state, model), model)
  assert set(back) == set(kept)
  for name, value in kept.items():
    np.testing.assert_array_equal(back[name], value)


@pytest.mark.parametrize(
  'fields',
  [
    {'collaboration': 'network', 'bottleneck': False},
    {'prune': 'min', 'reduction': 0, 'step_mode': 'even'},
  ],
)
def test_our_variables_make_an_exact_round_trip(random_variables, fields):
  model = create(**fields)
  variables = random_variables(model, (32, 32, 3))
  back = from_state_dict(to_state_dict(variables, model), model)
  assert jax.tree.structure(back) == jax.tree.structure(variables)
  jax.tree.map(np.testing.assert_array_equal, back, variables)


def test_the_imagenet_stem_has_its_bias_and_place(random_variables):
  model = create(stem='imagenet', num_exits=2, scale_factors=(1, 2, 4))
  variables = random_variables(model, (224, 224, 3))
  state = to_state_dict(variables, model)
  assert state['blocks.0.0.layers.0.0.weight'].shape == (8, 3, 7, 7)
  bias = variables['params']['stages_0']['layers_0']['scale_0']['conv']['bias']
  np.testing.assert_array_equal(state['blocks.0.0.layers.0.0.bias'], bias)
  assert state['blocks.0.0.layers.0.1.running_mean'].shape == (8,)
  assert state['blocks.0.0.layers.1.net.0.weight'].shape == (16, 8, 3, 3)
  jax.tree.map(np.testing.assert_array_equal, from_state_dict(state, model), variables)


@pytest.mark.parametrize(
  ('phase', 'prefix'),
  [('phase_one', 'net.'), ('phase_one', 'module._orig_mod.'), ('phase_two', '_orig_mod.')],
)
def test_a_prefix_of_all_names_changes_nothing(request, phase, prefix):
  state = without_prefix(request.getfixturevalue(phase)[0])
  model = create(collaboration='network' if phase == 'phase_two' else 'off')
  jax.tree.map(
    np.testing.assert_array_equal,
    from_state_dict({f'{prefix}{name}': value for name, value in state.items()}, model),
    from_state_dict(state, model),
  )


def test_a_part_of_the_variables_gives_a_part_of_the_state(random_variables):
  model = create()
  params = random_variables(model, (32, 32, 3))['params']
  state = to_state_dict({'params': {'classifiers_1': params['classifiers_1']}}, model)
  assert set(state) == {'classifier.1.linear.weight', 'classifier.1.linear.bias'}
  kernel = params['classifiers_1']['dense']['kernel']
  np.testing.assert_array_equal(state['classifier.1.linear.weight'], kernel.T)


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'num_exits': 4}, r"it lacks 'blocks\..*'"),
    ({'num_classes': 100}, r"'classifier\.0\.linear\.weight' has shape"),
    ({'bottleneck': False}, r"it also has 'blocks\..*'"),
    ({'collaboration': 'network'}, r"it lacks 'net\.blocks\..*'"),
  ],
)
def test_a_checkpoint_of_another_network_is_refused_by_a_name(phase_one, fields, message):
  with pytest.raises(UsageError, match=rf'^the checkpoint does not match the network: {message}'):
    from_state_dict(phase_one[0], create(**fields))


@pytest.mark.parametrize(
  ('model', 'message'),
  [
    (create(collaboration='identity'), "has no network with collaboration 'identity'"),
    (models.create('resnet', depth=8), 'only MSDNets can be converted'),
  ],
)
def test_a_network_that_the_published_code_lacks_is_refused(model, message):
  with pytest.raises(UsageError, match=message):
    from_state_dict({}, model)


NAME = 'classifier.1.linear.weight'


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (lambda value: value.astype(complex), 'of type complex128, which is no array of finite'),
    (lambda value: value.astype(int), 'of type int64, which is no array of finite'),
    (lambda value: value.astype(object), 'of type object, which is no array of finite'),
    (lambda value: np.where(value == value.max(), np.nan, value), 'no array of finite'),
    (lambda value: value * 1e300, 'no array of finite'),
    (lambda value: value[..., np.newaxis], 'has shape'),
    (lambda value: value.T, 'has shape'),
    (lambda value: np.broadcast_to(np.float64(1), (10**7, 10**7)), 'has shape'),
  ],
)
def test_arrays_that_are_no_weights_are_refused_by_name(phase_one, change, message):
  state = without_prefix(phase_one[0])
  state[NAME] = change(state[NAME].astype(np.float64))
  with pytest.raises(UsageError, match=f"^the checkpoint .*'{NAME}' .*{message}"):
    from_state_dict(state, create())


def test_other_floating_point_numbers_become_float32(phase_one):
  state = without_prefix(phase_one[0])
  expected = from_state_dict(state, create())
  for dtype in (np.float64, np.float16, jnp.bfloat16):
    converted = from_state_dict({name: v.astype(dtype) for name, v in state.items()}, create())
    for actual, value in zip(jax.tree.leaves(converted), jax.tree.leaves(expected), strict=True):
      assert actual.dtype == np.float32
      np.testing.assert_array_equal(actual, value.astype(dtype).astype(np.float32))


def test_a_surplus_name_is_given_beside_the_missing_one(phase_one):
  state = without_prefix(phase_one[0])
  renamed = {name.replace(NAME, 'head.weight'): value for name, value in state.items()}
  with pytest.raises(UsageError, match=f"it lacks '{NAME}' and also has 'head.weight'; fix"):
    from_state_dict(renamed, create())
  # A prefix that only some names have is not dropped.
  with pytest.raises(UsageError, match=r"it lacks 'blocks\..* and also has 'module\.blocks"):
    from_state_dict({**phase_one[0], NAME: state[NAME]}, create())


@pytest.mark.parametrize('is_zip', [True, False])
@pytest.mark.parametrize('phase', ['phase_one', 'phase_two'])
@pytest.mark.parametrize('key', ['state_dict', 'model', None])
def test_checkpoint_files_of_both_formats_are_read(
  torch_save, tmp_path, request, is_zip, phase, key
):
  state, _ = request.getfixturevalue(phase)
  path = tmp_path / 'model_best.pth.tar'
  others = {
    'epoch': 299,
    'best_accuracy': np.float64(31),
    'args': argparse.Namespace(data=Path('data'), rate=np.float32(0.1)),
    'optimizer': {'state': {0: {'momentum_buffer': np.ones(3, np.float32)}}},
  }
  torch_save(state if key is None else {**others, key: state}, path, is_zip)
  model = create(collaboration='network' if phase == 'phase_two' else 'off')
  loaded = load_checkpoint(path, model)
  jax.tree.map(np.testing.assert_array_equal, loaded, from_state_dict(state, model))


def test_a_file_that_is_no_checkpoint_is_refused_in_one_line(tmp_path):
  path = tmp_path / 'notes.txt'
  path.write_text('not a checkpoint\n')
  with pytest.raises(UsageError, match='notes.txt is not a checkpoint') as caught:
    load_checkpoint(path, create())
  assert '\n' not in str(caught.value)


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (lambda value: value.astype(np.complex64), 'of type complex64'),
    (lambda value: value / np.float32(0), 'no array of finite'),
    (lambda value: 'sparse', "it lacks 'classifier"),
  ],
)
@pytest.mark.filterwarnings('ignore:divide by zero:RuntimeWarning')
def test_tensors_that_are_no_weights_are_refused_by_name(
  torch_save, tmp_path, phase_one, change, message
):
  state = without_prefix(phase_one[0])
  path = tmp_path / 'state.pth'
  torch_save({**state, NAME: change(state[NAME])}, path)
  with pytest.raises(UsageError, match=message) as caught:
    load_checkpoint(path, create())
  assert NAME in str(caught.value) and '\n' not in str(caught.value)


@pytest.mark.parametrize('content', [3, {'state_dict': 3}, {1: None}])
def test_a_file_without_tensors_is_refused(torch_save, tmp_path, content):
  path = tmp_path / 'state.pth'
  torch_save(content, path)
  with pytest.raises(
    UsageError, match='state.pth has no tensors under state_dict, .* are '
  ) as error:
    load_checkpoint(path, create())
  if content == {'state_dict': 3}:
    assert "whose keys are 'state_dict': save a state_dict" in str(error.value)


def test_entries_that_are_no_tensors_are_passed_over(torch_save, tmp_path, phase_one):
  path = tmp_path / 'state.pth'
  torch_save({**phase_one[0], 'epoch': 3, 4: np.ones(2), 'names': ['a']}, path)
  jax.tree.map(
    np.testing.assert_array_equal,
    load_checkpoint(path, create()),
    from_state_dict(phase_one[0], create()),
  )
