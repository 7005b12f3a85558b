"""Inline Subnetwork Collaboration: outputs against NumPy, and gradients."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imta_jax.techniques.inline_collaboration import CollaborativeClassifier

BATCH, WIDTH, NUM_CLASSES = 4, 6, 3


def draw(*shape, seed=0):
  return np.random.default_rng(seed).standard_normal(shape, np.float32)


def draw_variables(collaboration):
  """Returns variables of a classifier that is not the first."""
  random = np.random.default_rng(7)
  shapes = jax.eval_shape(
    CollaborativeClassifier(NUM_CLASSES, collaboration).init,
    jax.random.key(0),
    jnp.zeros((BATCH, WIDTH)),
    jnp.zeros((BATCH, NUM_CLASSES)),
  )
  return jax.tree.map(lambda leaf: random.uniform(0.2, 1.0, leaf.shape).astype('f4') - 0.1, shapes)


def transfer(variables, previous, mean, var):
  """The small network of the published code: dense, batch norm, ReLU."""
  params = variables['params']
  x = previous @ params['transfer_dense']['kernel'] + params['transfer_dense']['bias']
  norm = params['transfer_norm']
  x = (x - mean(x)) / np.sqrt(var(x) + 1e-5) * norm['scale'] + norm['bias']
  return np.maximum(x, 0)


def test_off_is_a_dense_layer_that_ignores_the_previous_logits():
  embedding, previous = draw(BATCH, WIDTH), draw(BATCH, NUM_CLASSES, seed=1)
  variables = draw_variables('off')
  assert set(variables['params']) == {'dense'}
  dense = variables['params']['dense']
  logits = CollaborativeClassifier(NUM_CLASSES).apply(variables, embedding, previous)
  np.testing.assert_allclose(logits, embedding @ dense['kernel'] + dense['bias'], rtol=1e-5)


def test_identity_adds_the_previous_logits():
  embedding, previous = draw(BATCH, WIDTH), draw(BATCH, NUM_CLASSES, seed=1)
  variables = draw_variables('identity')
  assert set(variables['params']) == {'dense'}
  dense = variables['params']['dense']
  logits = CollaborativeClassifier(NUM_CLASSES, 'identity').apply(variables, embedding, previous)
  expected = embedding @ dense['kernel'] + dense['bias'] + previous
  np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-6)


def test_network_concatenates_dense_norm_relu_of_the_previous_logits():
  embedding, previous = draw(BATCH, WIDTH), draw(BATCH, NUM_CLASSES, seed=1)
  variables = draw_variables('network')
  stats = variables['batch_stats']['transfer_norm']
  transferred = transfer(variables, previous, lambda _: stats['mean'], lambda _: stats['var'])
  assert 0 < (transferred > 0).mean() < 1  # ReLU matters.
  dense = variables['params']['dense']
  assert dense['kernel'].shape == (2 * WIDTH, NUM_CLASSES)
  expected = np.concatenate([embedding, transferred], axis=1) @ dense['kernel'] + dense['bias']
  logits = CollaborativeClassifier(NUM_CLASSES, 'network').apply(variables, embedding, previous)
  np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-6)


def test_network_uses_and_records_the_batch_statistics_in_training():
  embedding, previous = draw(BATCH, WIDTH), draw(BATCH, NUM_CLASSES, seed=1)
  variables = draw_variables('network')
  transferred = transfer(variables, previous, lambda x: x.mean(axis=0), lambda x: x.var(axis=0))
  dense = variables['params']['dense']
  expected = np.concatenate([embedding, transferred], axis=1) @ dense['kernel'] + dense['bias']
  logits, updates = CollaborativeClassifier(NUM_CLASSES, 'network').apply(
    variables, embedding, previous, train=True, mutable=['batch_stats']
  )
  np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)
  params, old = variables['params'], variables['batch_stats']['transfer_norm']
  x = previous @ params['transfer_dense']['kernel'] + params['transfer_dense']['bias']
  recorded = updates['batch_stats']['transfer_norm']
  np.testing.assert_allclose(recorded['mean'], 0.9 * old['mean'] + 0.1 * x.mean(0), rtol=1e-5)
  np.testing.assert_allclose(recorded['var'], 0.9 * old['var'] + 0.1 * x.var(0), rtol=1e-4)


def test_batch_norm_axis_makes_the_statistics_those_of_all_devices_together():
  embedding, previous = draw(BATCH, WIDTH), draw(BATCH, NUM_CLASSES, seed=1)
  variables = draw_variables('network')

  def run(axis, embedding, previous):
    classifier = CollaborativeClassifier(NUM_CLASSES, 'network', batch_norm_axis=axis)
    return classifier.apply(variables, embedding, previous, train=True, mutable=['batch_stats'])[0]

  halves = embedding.reshape(2, 2, WIDTH), previous.reshape(2, 2, NUM_CLASSES)
  together = jax.jit(jax.vmap(partial(run, 'devices'), axis_name='devices'))(*halves)
  expected = jax.jit(partial(run, None))(embedding, previous)
  np.testing.assert_allclose(together.reshape(BATCH, -1), expected, rtol=1e-4, atol=1e-5)
  apart = jax.jit(jax.vmap(partial(run, None)))(*halves)
  assert np.abs(apart.reshape(BATCH, -1) - expected).max() > 1e-2


@pytest.mark.parametrize('collaboration', ['identity', 'network'])
def test_the_first_exit_has_no_transfer_and_gives_a_dense_layers_logits(collaboration):
  embedding = draw(BATCH, WIDTH)
  classifier = CollaborativeClassifier(NUM_CLASSES, collaboration)
  logits, variables = jax.jit(classifier.init_with_output)(jax.random.key(0), embedding)
  assert jax.tree.map(jnp.shape, variables) == {
    'params': {'dense': {'kernel': (WIDTH, NUM_CLASSES), 'bias': (NUM_CLASSES,)}}
  }
  np.testing.assert_allclose(logits, embedding @ variables['params']['dense']['kernel'], rtol=1e-5)


@pytest.mark.parametrize('collaboration', ['identity', 'network'])
def test_logits_and_parameters_are_float32_when_it_computes_in_bfloat16(collaboration):
  classifier = CollaborativeClassifier(NUM_CLASSES, collaboration, dtype=jnp.bfloat16)
  arguments = draw(BATCH, WIDTH), draw(BATCH, NUM_CLASSES, seed=1)
  logits, variables = jax.eval_shape(classifier.init_with_output, jax.random.key(0), *arguments)
  assert logits.dtype == jnp.float32
  assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {np.dtype('float32')}
  computed = draw_variables(collaboration)
  exact = CollaborativeClassifier(NUM_CLASSES, collaboration).apply(computed, *arguments)
  logits = classifier.apply(computed, *arguments)
  np.testing.assert_allclose(logits, exact, atol=0.1)
  assert np.all(logits != logits.astype(jnp.bfloat16))  # Rounded, they could tie.


def test_an_unknown_collaboration_is_refused():
  with pytest.raises(ValueError, match="^collaboration 'sum' is unknown: .*off, identity, network"):
    CollaborativeClassifier(NUM_CLASSES, 'sum').init(jax.random.key(0), np.zeros((BATCH, WIDTH)))


@pytest.mark.parametrize('stops', [True, False])
@pytest.mark.parametrize('collaboration', ['identity', 'network'])
def test_a_later_exit_trains_an_earlier_ones_classifier_in_the_published_code_alone(
  random_variables, tiny_network, collaboration, stops
):
  model = tiny_network(collaboration=collaboration, stop_collaboration_gradient=stops)
  variables = random_variables(model, (7,))
  embeddings = [draw(BATCH, 6, seed=seed) for seed in range(3)]

  @jax.jit
  @jax.grad
  def gradient_of_second_exit(params):
    logits = model.apply({**variables, 'params': params}, embeddings, method='classify')
    return (logits[1] ** 2).sum()

  gradient = gradient_of_second_exit(variables['params'])
  for leaf in jax.tree.leaves(gradient['classifiers_0']):
    assert np.abs(leaf).max() == 0 if stops else np.abs(leaf).max() > 1e-3
  for leaf in jax.tree.leaves(gradient['classifiers_1']):
    assert np.abs(leaf).max() > 0


class OwnNetwork(nn.Module):
  """A user's own network with two exits."""

  collaboration: str

  @nn.compact
  def __call__(self, x):
    x = nn.tanh(nn.Dense(5, name='one')(x))
    first = CollaborativeClassifier(NUM_CLASSES, self.collaboration, name='exit_1')(x)
    x = nn.tanh(nn.Dense(4, name='two')(x))
    second = CollaborativeClassifier(NUM_CLASSES, self.collaboration, name='exit_2')(x, first)
    return first, second


def test_it_serves_a_network_of_ones_own(random_variables):
  x = draw(BATCH, WIDTH)
  network = OwnNetwork('network')
  variables = random_variables(network, (WIDTH,))
  assert set(variables['params']['exit_1']) == {'dense'}
  assert set(variables['params']['exit_2']) == {'dense', 'transfer_dense', 'transfer_norm'}

  @jax.jit
  @jax.grad
  def gradient_of_second_exit(params):
    first, second = network.apply({**variables, 'params': params}, x)
    assert first.shape == second.shape == (BATCH, NUM_CLASSES)
    return (second**2).sum()

  gradient = gradient_of_second_exit(variables['params'])
  np.testing.assert_array_equal(gradient['exit_1']['dense']['kernel'], 0)
  assert np.abs(gradient['one']['kernel']).max() > 0
  assert np.abs(gradient['exit_2']['transfer_dense']['kernel']).max() > 0
