"""The benchmarks' PyTorch network has our names, logits, gradients and losses, as recorded."""

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from imta_jax import models
from imta_jax.interop.torch import from_state_dict, to_state_dict
from imta_jax.techniques.one_for_all import one_for_all_loss

sys.path.insert(0, str(Path(__file__).parent))
import record_torch_peer as recorder


@pytest.fixture(scope='module')
def record():
  with np.load(recorder.RECORD) as arrays:
    return dict(arrays)


def create(**fields):
  return models.create('msdnet', num_classes=10, **{**recorder.FIELDS, **fields})


def close(actual, expected, least=0.0):
  tolerance = max(least, 1e-4 * np.abs(expected).max())
  np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance)


def check_gradients(gradients, model, record, prefix):
  """Checks gradients of parameters against the recorded samples."""
  prefix = f'{prefix}/gradients/'
  expected = {name[len(prefix) :]: x for name, x in record.items() if name.startswith(prefix)}
  actual = to_state_dict({'params': gradients}, model)
  assert set(actual) == set(expected)
  # Some are zero but for rounding, for instance those of biases in front of batch norms.
  rounding = 1e-5 * max(np.abs(x).max() for x in expected.values())
  for name, gradient in actual.items():
    close(recorder.sample(gradient), expected[name], rounding)


def test_the_record_is_of_this_code(record):
  assert record['checksum'] == recorder.checksum(), recorder.__doc__


@pytest.mark.parametrize('index', range(len(recorder.OPTIONS)))
def test_every_option_gives_the_published_names_and_shapes(index, record):
  model = create(**recorder.OPTIONS[index])
  side = {'cifar': 32, 'imagenet': 224}[model.stages[0].layers[0].stem]
  images = jax.ShapeDtypeStruct((1, side, side, 3), np.float32)
  variables = jax.eval_shape(model.init, jax.random.key(0), images)
  state = to_state_dict(jax.tree.map(lambda x: np.empty(x.shape, x.dtype), variables), model)
  expected = json.loads(str(record['shapes']))[index]
  assert {name: [*value.shape] for name, value in state.items()} == expected


@pytest.mark.slow
@pytest.mark.parametrize('kind', recorder.GRADIENT_EQUILIBRIUM)
def test_phase_one_has_our_logits_loss_and_gradients(kind, record):
  images, labels = recorder.draw_batch()
  model = create(gradient_equilibrium=kind)
  shapes = json.loads(str(record['shapes']))[0]
  variables = from_state_dict(recorder.draw_state(shapes), model)

  @jax.jit
  def run(variables):
    def loss_of(params):
      logits, _ = model.apply(
        {**variables, 'params': params}, images, train=True, mutable=['batch_stats']
      )
      entropy = optax.softmax_cross_entropy_with_integer_labels(
        logits, jnp.broadcast_to(labels, logits.shape[:-1])
      )
      return entropy.mean(axis=-1).sum(), logits

    return jax.value_and_grad(loss_of, has_aux=True)(variables['params'])

  (loss, logits), gradients = run(variables)
  close(logits, record[f'{kind}/logits'])
  close(loss, record[f'{kind}/loss'])
  check_gradients(gradients, model, record, kind)


@pytest.mark.slow
def test_phase_two_has_our_gradients_and_after_steps_of_sgd_our_losses(record):
  images, labels = recorder.draw_batch()
  state = recorder.draw_state(json.loads(str(record['phase_2/shapes'])))
  model = create(collaboration='network')
  variables = from_state_dict(state, model)
  teacher_model = create()
  prefix = 'net.'
  teacher = from_state_dict(
    {name[len(prefix) :]: x for name, x in state.items() if name.startswith(prefix)}, teacher_model
  )

  @jax.jit
  def embed(variables, teacher):
    embeddings = model.apply(variables, images, method='embed')
    return embeddings, teacher_model.apply(teacher, embeddings, method='classify')[-1]

  @jax.jit
  def run(trained, embeddings, teacher_logits):
    def loss_of(trained):
      logits, _ = model.apply(
        {**variables, 'params': trained},
        embeddings,
        train=True,
        mutable=['batch_stats'],
        method='classify',
      )
      return one_for_all_loss(logits, labels, teacher_logits, **recorder.OFA)

    return jax.value_and_grad(loss_of)(trained)

  trained = {
    name: tree for name, tree in variables['params'].items() if name.startswith('classifiers_')
  }
  sgd = optax.chain(
    optax.add_decayed_weights(recorder.SGD['weight_decay']),
    optax.sgd(recorder.SGD['learning_rate'], recorder.SGD['momentum'], recorder.SGD['nesterov']),
  )
  constants, sgd_state, losses = embed(variables, teacher), sgd.init(trained), []
  for number in range(recorder.STEPS):
    loss, gradients = run(trained, *constants)
    if not number:
      check_gradients(gradients, model, record, 'phase_2')
    updates, sgd_state = sgd.update(gradients, sgd_state, trained)
    trained = optax.apply_updates(trained, updates)
    losses.append(loss)
  close(losses, record['phase_2/losses'])
  assert losses[-1] < 0.99 * losses[0]
