"""The train state, and the optimizer that a config describes."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import numpy as np
import optax
from ml_collections import ConfigDict

from imta_jax.training.packing import Packed, pack

Tree = Any


class Weights(flax.struct.PyTreeNode):
  """The variables of a network as few arrays.

  Attributes:
    trained: Parameters that the phase trains.
    frozen: The other parameters; empty if everything is trained.
    batch_stats: Running statistics of batch norm.
  """

  trained: Packed
  frozen: Packed
  batch_stats: Packed

  @property
  def variables(self) -> dict[str, Tree]:
    """The variables that `model.apply` takes."""
    params = {**self.frozen.tree, **self.trained.tree}
    return {'params': params, 'batch_stats': self.batch_stats.tree}


class TrainState(flax.struct.PyTreeNode):
  """Everything that a training step changes; replicated over devices.

  Attributes:
    step: Number of steps taken in this phase, a scalar.
    trained: See `Weights`.
    frozen: See `Weights`.
    batch_stats: See `Weights`.
    opt_state: State of the optimizer, for `trained` only.
    totals: Sums over the steps since the last reset: 'steps', 'loss', 'gradient_norm' and
      'accuracy' [num_exits].
  """

  step: jax.Array | np.ndarray
  trained: Packed
  frozen: Packed
  batch_stats: Packed
  opt_state: Tree
  totals: Tree

  @property
  def weights(self) -> Weights:
    """The variables of the network."""
    return Weights(self.trained, self.frozen, self.batch_stats)


def create_state(
  variables: Mapping[str, Tree], phase: ConfigDict, optimizer: optax.GradientTransformation
) -> TrainState:
  """Creates the state before the first step of a phase.

  Args:
    variables: Variables of the network.
    phase: Config of the phase.
    optimizer: Optimizer of the phase.

  Returns:
    The state.
  """
  params = variables['params']
  chosen = pack({name: tree for name, tree in params.items() if is_trained(name, phase)})
  num_exits = sum(name.startswith('classifiers_') for name in params)
  return TrainState(
    step=np.zeros((), np.int32),
    trained=chosen,
    frozen=pack({name: tree for name, tree in params.items() if not is_trained(name, phase)}),
    batch_stats=pack(variables.get('batch_stats', {})),
    opt_state=optimizer.init(chosen),
    totals=empty_totals(num_exits),
  )


def is_trained(name: str, phase: ConfigDict) -> bool:
  """Whether a phase trains a module of the network: 'stages_0', 'exits_0', 'classifiers_0', …"""
  kind, _, index = name.partition('_')
  if kind == 'stages':
    return phase.trained == 'everything' and int(index) >= phase.frozen_stages
  return kind == 'classifiers' or phase.trained != 'last_layers'


def empty_totals(num_exits: int) -> Tree:
  """Returns the totals of zero steps, on the host."""
  scalars = {name: np.zeros((), np.float32) for name in ('steps', 'loss', 'gradient_norm')}
  return {**scalars, 'accuracy': np.zeros(num_exits, np.float32)}


def create_schedule(
  phase: ConfigDict, num_steps: int, steps_per_epoch: int, batch_size: int
) -> optax.Schedule:
  """Creates the learning rate schedule of a phase.

  Args:
    phase: Config of the phase.
    num_steps: Number of steps of the phase.
    steps_per_epoch: Steps per epoch.
    batch_size: Images per step.

  Returns:
    The learning rate as a function of the step.
  """
  rate = phase.learning_rate
  if phase.reference_batch_size:
    rate *= batch_size / phase.reference_batch_size
  warmup = round(phase.warmup_epochs * steps_per_epoch)
  if phase.schedule == 'cosine':
    main = optax.cosine_decay_schedule(rate, max(1, num_steps - warmup))
  else:
    # In short phases, several milestones round to the same step.
    drops = Counter(round(fraction * num_steps) - warmup for fraction in phase.milestones)
    factors = {step: 0.1**count for step, count in drops.items()}
    main = optax.piecewise_constant_schedule(rate, factors)
  return optax.join_schedules([optax.linear_schedule(0, rate, max(1, warmup)), main], [warmup])


def create_optimizer(phase: ConfigDict, schedule: optax.Schedule) -> optax.GradientTransformation:
  """Creates SGD with momentum; weight decay is added to the clipped gradient (an L2 penalty)."""
  decays_all = phase.decayed == 'everything'

  def mask(params):
    return jax.tree_util.tree_map_with_path(
      lambda path, _: decays_all or path[-1].key == 'kernel', params
    )

  largest = phase.max_gradient_norm
  return optax.chain(
    *([optax.clip_by_global_norm(largest)] if largest else []),
    optax.add_decayed_weights(phase.weight_decay, mask),
    optax.sgd(schedule, phase.momentum, nesterov=phase.nesterov),
  )
