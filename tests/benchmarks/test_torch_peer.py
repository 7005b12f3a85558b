"""The PyTorch network of the benchmarks has our names, logits, gradients and losses."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from imta_jax import models
from imta_jax.interop.torch import to_state_dict
from imta_jax.models.initial_values import initialize
from imta_jax.techniques.one_for_all import one_for_all_loss

torch = pytest.importorskip('torch')
sys.path.insert(0, str(Path(__file__).parents[2] / 'experiments' / 'benchmarks'))
import torch_peer  # noqa: E402

FIELDS = {
  'num_exits': 3,
  'base': 1,
  'step': 1,
  'step_mode': 'even',
  'channels': 4,
  'growth_rate': 4,
  'scale_factors': (1, 2),
  'bottleneck_factors': (1, 2),
  'prune': 'max',
  'reduction': 0.5,
  'bottleneck': True,
  'stem': 'cifar',
}
OFA = {'alpha': 0.1, 'temperature': 3.0, 'class_reduction': 'sum'}


@pytest.mark.parametrize(
  'changes',
  [
    {},
    {'step_mode': 'lin_grow', 'step': 2, 'growth_rate': 5},
    {'prune': 'min', 'num_exits': 4},
    {'bottleneck': False, 'reduction': 0},
    {'stem': 'imagenet', 'scale_factors': (1, 2, 4, 4), 'bottleneck_factors': (1, 2, 4, 4)},
  ],
)
def test_every_option_gives_the_published_names_and_shapes(changes):
  fields = {**FIELDS, **changes}
  model = models.create('msdnet', num_classes=10, **fields)
  side = {'cifar': 16, 'imagenet': 224}[fields['stem']]
  torch_peer.load(
    torch_peer.msdnet(10, 'all', **fields),
    to_state_dict(initialize(model, 0, (side, side, 3)), model),
  )


@pytest.fixture(scope='module')
def batch():
  random = np.random.default_rng(0)
  images = random.standard_normal((8, 16, 16, 3), np.float32)
  labels = random.integers(10, size=8)
  tensors = torch.from_numpy(images.transpose(0, 3, 1, 2).copy()), torch.from_numpy(labels)
  return images, labels, tensors


def close(actual, expected):
  tolerance = 1e-6 + 1e-4 * np.abs(expected).max()
  np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize('gradient_equilibrium', ['all', 'coarsest'])
def test_phase_one_has_our_logits_loss_and_gradients(gradient_equilibrium, batch, random_variables):
  images, labels, tensors = batch
  model = models.create(
    'msdnet', num_classes=10, gradient_equilibrium=gradient_equilibrium, **FIELDS
  )
  variables = random_variables(model, images.shape[1:])

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
  network = torch_peer.msdnet(10, gradient_equilibrium, **FIELDS)
  torch_peer.load(network, to_state_dict(variables, model))
  with torch.no_grad():
    close(network.train()(tensors[0]).numpy(), logits)
  peers_loss = torch_peer.loss_of_phase_one(network, *tensors)
  peers_loss.backward()
  close(peers_loss.item(), loss)
  expected = to_state_dict({'params': gradients}, model)
  peers = {name: parameter.grad.numpy() for name, parameter in network.named_parameters()}
  assert set(peers) == set(expected)
  for name, gradient in peers.items():
    close(gradient, expected[name])


def test_phase_two_has_our_loss_and_gradients_and_leaves_the_backbone(batch, random_variables):
  images, labels, tensors = batch
  teacher_model = models.create('msdnet', num_classes=10, **FIELDS)
  teacher = random_variables(teacher_model, images.shape[1:])
  model = models.create('msdnet', num_classes=10, collaboration='network', **FIELDS)
  variables = random_variables(model, images.shape[1:])
  backbone = {name for name in teacher['params'] if not name.startswith('classifiers_')}
  for (
    kind,
    trees,
  ) in variables.items():  # Random values depend on the tree's structure, which differs.
    trees.update({name: teacher[kind][name] for name in backbone & set(trees)})
  trained = {name: tree for name, tree in variables['params'].items() if name not in backbone}

  @jax.jit
  def run(variables, trained, teacher):
    embeddings = model.apply(variables, images, method='embed')
    teacher_logits = teacher_model.apply(teacher, embeddings, method='classify')[-1]

    def loss_of(trained):
      params = {**variables['params'], **trained}
      logits, _ = model.apply(
        {**variables, 'params': params},
        embeddings,
        train=True,
        mutable=['batch_stats'],
        method='classify',
      )
      return one_for_all_loss(logits, labels, teacher_logits, **OFA)

    return jax.value_and_grad(loss_of)(trained)

  loss, gradients = run(variables, trained, teacher)
  network = torch_peer.PhaseTwoNetwork(torch_peer.msdnet(10, 'all', **FIELDS))
  state = to_state_dict(teacher, teacher_model)
  state = {f'net.{name}': value for name, value in state.items()}
  torch_peer.load(network, state | to_state_dict(variables, model))
  before = {name: value.clone() for name, value in network.net.state_dict().items()}
  peers_loss = torch_peer.loss_of_phase_two(network.train(), *tensors, **OFA)
  peers_loss.backward()
  close(peers_loss.item(), loss)
  expected = to_state_dict({'params': gradients}, model)
  peers = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
  assert set(peers) == set(expected)
  for name, gradient in peers.items():
    close(gradient.numpy(), expected[name])
  step = torch_peer.TrainingStep(
    network,
    lambda *args: torch_peer.loss_of_phase_two(*args, **OFA),
    learning_rate=1e-3,
    momentum=0.9,
  )
  losses = [step(*tensors).item() for _ in range(5)]
  assert losses[-1] < losses[0]
  assert all(torch.equal(value, before[name]) for name, value in network.net.state_dict().items())
