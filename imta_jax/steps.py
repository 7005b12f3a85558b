"""The train state, and the training and evaluation steps that run on every device."""

import functools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from imta_jax.adaptive.engine.compiler import compiler_options
from imta_jax.data.dataset import Batch
from imta_jax.devices import AXIS
from imta_jax.models.multi_exit import MultiExitNetwork
from imta_jax.techniques.one_for_all import one_for_all_loss

Tree = Any


@flax.struct.dataclass
class TrainState:
  """Everything that a training step changes; replicated over devices.

  Attributes:
    step: Number of steps taken in this phase, a scalar.
    trained: Parameters that the phase trains.
    frozen: The other parameters; empty if everything is trained.
    batch_stats: Running statistics of batch norm.
    opt_state: State of the optimizer, for `trained` only.
    totals: Sums over the steps since the last reset: 'steps', 'loss', 'gradient_norm' and
      'accuracy' [num_exits].
  """

  step: jax.Array
  trained: Tree
  frozen: Tree
  batch_stats: Tree
  opt_state: Tree
  totals: Tree

  @property
  def variables(self) -> dict[str, Tree]:
    """The variables that `model.apply` takes."""
    return {'params': {**self.frozen, **self.trained}, 'batch_stats': self.batch_stats}


def create_state(
  variables: dict[str, Tree], trained: str, optimizer: optax.GradientTransformation
) -> TrainState:
  """Creates the state before the first step of a phase.

  Args:
    variables: Variables of the network.
    trained: 'everything' or 'last_layers'.
    optimizer: Optimizer of the phase.

  Returns:
    The state.
  """
  params = variables['params']
  is_trained = {name: trained == 'everything' or name.startswith('classifiers_') for name in params}
  chosen = {name: tree for name, tree in params.items() if is_trained[name]}
  num_exits = sum(name.startswith('classifiers_') for name in params)
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    trained=chosen,
    frozen={name: tree for name, tree in params.items() if not is_trained[name]},
    batch_stats=variables.get('batch_stats', {}),
    # Under jit this compiles one program; otherwise one for each of hundreds of arrays.
    opt_state=jax.jit(optimizer.init)(chosen),
    totals=empty_totals(num_exits),
  )


def empty_totals(num_exits: int) -> Tree:
  """Returns the totals of zero steps."""
  zero = jnp.zeros((), jnp.float32)
  accuracy = jnp.zeros(num_exits, jnp.float32)
  return {'steps': zero, 'loss': zero, 'gradient_norm': zero, 'accuracy': accuracy}


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
    milestones = {round(fraction * num_steps) - warmup: 0.1 for fraction in phase.milestones}
    main = optax.piecewise_constant_schedule(rate, milestones)
  return optax.join_schedules([optax.linear_schedule(0, rate, max(1, warmup)), main], [warmup])


def create_optimizer(phase: ConfigDict, schedule: optax.Schedule) -> optax.GradientTransformation:
  """Creates SGD with momentum; weight decay is added to the gradient, like an L2 penalty."""
  decays_all = phase.decayed == 'everything'

  def mask(params):
    return jax.tree_util.tree_map_with_path(
      lambda path, _: decays_all or path[-1].key == 'kernel', params
    )

  return optax.chain(
    optax.add_decayed_weights(phase.weight_decay, mask),
    optax.sgd(schedule, phase.momentum, nesterov=phase.nesterov),
  )


def make_train_step(
  model: MultiExitNetwork,
  teacher_model: MultiExitNetwork | None,
  phase: ConfigDict,
  optimizer: optax.GradientTransformation,
) -> Callable[[TrainState, Tree, Batch], TrainState]:
  """Makes the training step.

  Args:
    model: The network of this phase.
    teacher_model: The network of the previous phase if its last exit is the teacher; otherwise
      None.
    phase: Config of the phase.
    optimizer: Optimizer of the phase.

  Returns:
    A function (state, teacher variables, batch) → state, for `on_devices`: it takes the batch of
    one device and averages over the mapped axis.
  """
  return partial(_train_step, model, teacher_model, phase, optimizer)


def _train_step(model, teacher_model, phase, optimizer, state, teacher, batch):
  images, labels = batch['image'], batch['label']
  stats = state.batch_stats
  embeddings = None
  if phase.trained == 'last_layers':
    embeddings, stats = _embed_frozen(model, phase, state, images)

  teacher_logits = None
  if teacher_model is not None:
    teacher_logits = _run_teacher(teacher_model, teacher, images, embeddings)

  def loss_fn(trained):
    variables = {'params': {**state.frozen, **trained}, 'batch_stats': stats}
    inputs, method = (images, '__call__') if embeddings is None else (embeddings, 'classify')
    logits, updated = model.apply(
      variables, inputs, train=True, mutable=['batch_stats'], method=method
    )
    loss = _loss(phase, logits, labels, teacher_logits)
    return loss, (logits, updated.get('batch_stats', stats))

  grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
  (loss, (logits, stats)), gradient = grad_fn(state.trained)
  accuracy = (logits.argmax(-1) == labels).mean(-1)
  # Averaging over devices keeps the state the same on every device.
  gradient, stats, loss, accuracy = jax.lax.pmean((gradient, stats, loss, accuracy), AXIS)
  updates, opt_state = optimizer.update(gradient, state.opt_state, state.trained)
  sums = {
    'steps': 1,
    'loss': loss,
    'gradient_norm': optax.tree.norm(gradient),
    'accuracy': accuracy,
  }
  return TrainState(
    step=state.step + 1,
    trained=optax.apply_updates(state.trained, updates),
    frozen=state.frozen,
    batch_stats=stats,
    opt_state=opt_state,
    totals=jax.tree.map(jnp.add, state.totals, sums),
  )


def _embed_frozen(model, phase, state, images):
  """Returns the embeddings of the frozen backbone and the updated batch statistics."""
  if phase.frozen_batch_norm == 'evaluation':
    return model.apply(state.variables, images, method='embed'), state.batch_stats
  embeddings, updated = model.apply(
    state.variables, images, train=True, mutable=['batch_stats'], method='embed'
  )
  return embeddings, updated['batch_stats']


def _run_teacher(teacher_model, teacher, images, embeddings):
  """Returns the logits of the teacher's last exit; a shared backbone is not run again."""
  if embeddings is None:
    return teacher_model.apply(teacher, images)[-1]
  return teacher_model.apply(teacher, embeddings, method='classify')[-1]


def _loss(phase, logits, labels, teacher_logits):
  if phase.loss == 'one_for_all':
    return one_for_all_loss(
      logits,
      labels,
      logits[-1] if teacher_logits is None else teacher_logits,
      alpha=phase.alpha,
      temperature=phase.temperature,
      class_reduction=phase.class_reduction,
    )
  labels = jnp.broadcast_to(labels, logits.shape[:-1])
  return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(-1).sum()


def make_predict_step(
  model: MultiExitNetwork,
) -> Callable[[dict[str, Tree], Batch], tuple[jax.Array, jax.Array, jax.Array]]:
  """Makes the evaluation step.

  Args:
    model: The network.

  Returns:
    A function (variables, batch) → logits [num_exits, image, num_classes], labels [image] and mask
    [image], for `on_devices`: it takes the batch of one device and returns the results of all
    devices and hosts.
  """

  def step(variables, batch):
    logits = model.apply(variables, batch['image'])
    logits = jax.lax.all_gather(logits, AXIS, axis=1, tiled=True)
    labels, mask = jax.lax.all_gather((batch['label'], batch['mask']), AXIS, tiled=True)
    return logits, labels, mask

  return step


def on_devices(
  step: Callable, num_replicated: int, devices: Sequence[jax.Device] | None = None
) -> Callable:
  """Maps a step over the devices of all hosts.

  Args:
    step: A function (…, batch) → results that are the same on every device.
    num_replicated: Number of arguments before the batch; they are replicated.
    devices: Devices to compile for, which need not be present. Default: the devices of all hosts.

  Returns:
    The pmapped function. Its batch has a leading axis over local devices; its other arguments and
    its results are replicated and have no such axis.
  """
  in_axes = (*(None,) * num_replicated, 0)
  step = jax.pmap(step, axis_name=AXIS, in_axes=in_axes, out_axes=None, devices=devices)
  # pmap takes no compiler options, so the step is compiled ahead of time. With several hosts, the
  # compiled program would not accept the arrays of one host, so the options are left out.
  options = compiler_options()
  if not options or devices is not None or jax.process_count() > 1:
    return step
  programs = {}

  @functools.wraps(step)  # Keeps the attribute `lower`.
  def run(*arguments):
    shapes = tuple(array.shape for array in arguments[-1].values())
    if shapes not in programs:
      programs[shapes] = step.lower(*arguments).compile(compiler_options=options)
    return programs[shapes](*arguments)

  return run
