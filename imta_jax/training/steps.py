"""The training and evaluation steps that run on every device."""

import functools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from imta_jax.adaptive.compiler import compiler_options
from imta_jax.data.dataset import Batch
from imta_jax.errors import UsageError
from imta_jax.models.batch_norm import MOMENTUM
from imta_jax.models.multi_exit import AUXILIARY, MultiExitNetwork
from imta_jax.runtime import AXIS
from imta_jax.techniques.one_for_all import cross_entropy, one_for_all_loss
from imta_jax.training.packing import pack, unpack
from imta_jax.training.train_state import TrainState, Tree, Weights


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
    A function (state, variables of the teacher, batch) → state, for `on_devices`: it takes the
    batch of one device and averages over the mapped axis.
  """
  train = _train_last_layers if phase.trained == 'last_layers' else _train_all_exits
  return partial(train, model, teacher_model, phase, optimizer)


def _train_all_exits(model, teacher_model, phase, optimizer, state, teacher, batch):
  """A step of everything, or of the exits and those stages that are not frozen."""
  images, frozen = batch['image'], unpack(state.frozen)
  teacher_logits = None
  if teacher_model is not None:
    teacher_logits = teacher_model.apply(unpack(teacher), images)[-1]
  train, frozen_stages = phase.batch_norm == 'training', 0
  if phase.frozen_batch_norm == 'evaluation':
    frozen_stages = model.num_exits if phase.trained == 'exits' else phase.frozen_stages
  momentum = _momentum(state, lambda name: train and not _is_stage_before(name, frozen_stages))
  stats = _given_stats(state, momentum)

  def forward(params):
    variables = {'params': {**frozen, **params}, 'batch_stats': stats}
    mutable = ['batch_stats', AUXILIARY]
    return model.apply(variables, images, train, frozen_stages, mutable=mutable)

  losses = _differentiate(model, phase, forward, state, stats, batch['label'], teacher_logits)
  return _update(model, optimizer, state, *losses, momentum=momentum)


def _train_last_layers(model, teacher_model, phase, optimizer, state, teacher, batch):
  """A step of the classifiers, on embeddings of the frozen backbone, which a teacher shares."""
  images, frozen = batch['image'], unpack(state.frozen)
  train_frozen = phase.frozen_batch_norm == 'training'
  momentum = _momentum(state, lambda name: train_frozen)
  stats = _given_stats(state, momentum)
  variables = {'params': {**frozen, **state.trained.tree}, 'batch_stats': stats}
  if train_frozen:
    embeddings, updated = model.apply(
      variables, images, train=True, mutable=['batch_stats'], method='embed'
    )
    stats = updated['batch_stats']
  else:
    embeddings = model.apply(variables, images, method='embed')
  teacher_logits = (
    teacher_model and (teacher_model.apply(unpack(teacher), embeddings, method='classify')[-1])
  )

  def forward(params):
    variables = {'params': {**frozen, **params}, 'batch_stats': stats}
    mutable = ['batch_stats', AUXILIARY]
    return model.apply(variables, embeddings, train=True, mutable=mutable, method='classify')

  losses = _differentiate(model, phase, forward, state, stats, batch['label'], teacher_logits)
  return _update(model, optimizer, state, *losses, momentum=momentum)


def _is_stage_before(name, index):
  kind, _, number = name.partition('_')
  return kind == 'stages' and int(number) < index


def _momentum(state, adds):
  """Returns the factors of the old running statistics: MOMENTUM in modules for which `adds` holds.

  A network that is given zeros there returns what the batch adds to the running averages. A new
  average is MOMENTUM times the old one plus that; the sum is one kernel, not hundreds. Other
  modules are given the old statistics and return the new ones: the factor of the old ones is 0.

  Returns:
    Packed vectors like those of the statistics, or numbers if they are the same everywhere.
  """
  stats = state.batch_stats
  factors = {name: MOMENTUM * adds(name) for name in stats.tree}
  if len({*factors.values()}) <= 1:
    return stats.replace(vectors=dict.fromkeys(stats.vectors, max(factors.values(), default=0.0)))
  return pack(
    {
      name: jax.tree.map(lambda leaf, f=factors[name]: np.full(leaf.shape, f, np.float32), tree)
      for name, tree in stats.tree.items()
    }
  )


def _given_stats(state, momentum):
  """Returns what a network is given as running statistics; see `_momentum`."""
  return jax.tree.map(
    lambda old, factor: jnp.where(factor == 0, old, 0), state.batch_stats, momentum
  ).tree


def _differentiate(model, phase, forward, state, stats, labels, teacher_logits):
  """Returns gradient, loss, accuracy [exit] and batch statistics of this device's images."""

  def loss_fn(trained):
    logits, updated = forward(_cast_kernels(trained, model.dtype).tree)
    loss = _loss(phase, logits, labels, teacher_logits)
    loss += _auxiliary_loss(updated.get(AUXILIARY, {}), labels, model.num_classes)
    return loss, (logits, updated.get('batch_stats', stats))

  grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
  (loss, (logits, stats)), gradient = grad_fn(state.trained)
  return gradient, loss, (logits.argmax(-1) == labels).mean(-1), pack(stats)


def _update(model, optimizer, state, gradient, loss, accuracy, stats, *, momentum):
  """Returns the state after a step; averages over devices keep it the same on every device."""
  gradient, loss, accuracy = jax.lax.pmean((gradient, loss, accuracy), AXIS)
  if model.batch_norm_axis is None:
    stats = jax.lax.pmean(stats, AXIS)
  stats = jax.tree.map(
    lambda old, factor, new: jnp.where(factor == 0, new, factor * old + new),
    state.batch_stats,
    momentum,
    stats,
  )
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


def _cast_kernels(packed, dtype):
  """Casts all kernels together, instead of each one where it is read."""
  vectors = {
    name: vector.astype(dtype) if name == 'kernel' else vector
    for name, vector in packed.vectors.items()
  }
  return packed.replace(vectors=vectors)


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
  return cross_entropy(logits, labels).sum()


def _auxiliary_loss(sown, labels, num_classes):
  """Returns the mean negative log-likelihood of the labels, summed over what a network has sown."""
  loss: jax.Array | float = 0.0
  for path, likelihoods in jax.tree_util.tree_leaves_with_path(sown):
    if likelihoods.shape[-1] != num_classes:
      name = jax.tree_util.keystr(path[:-1], simple=True, separator='/')
      raise UsageError(
        f'config.model gives {name} {likelihoods.shape[-1]} classes, but the data set has '
        f'{num_classes}: correct the field of config.model that lists classes'
      )
    loss -= jnp.take_along_axis(likelihoods, labels[:, jnp.newaxis], axis=-1).mean()
  return loss


def make_train_loop(
  train_step: Callable[[TrainState, Tree, Batch], TrainState],
  draw: Callable[[Any, jax.Array], Batch],
  *,
  dtype: Any,
  one_step: bool = False,
) -> Callable[[TrainState, Tree, Any, jax.Array], tuple[TrainState, jax.Array]]:
  """Makes a function that takes several training steps, between which the host does nothing.

  Args:
    train_step: See `make_train_step`.
    draw: See `Dataset.draw`.
    dtype: What the network computes in; frozen kernels are cast to it once for all steps.
    one_step: Whether the function always takes a single step, without a loop. On CPUs, XLA computes
      convolutions in a loop many times slower.

  Returns:
    A function (state, variables of the teacher, source of the batches, number of steps) → (state,
    its step), for `on_devices`. The number of steps is an array, so that any number is the same
    program. The step is returned so that callers can block on it.
  """

  def run(state, teacher, source, num_steps):
    packed, frozen = state.frozen, _cast_kernels(state.frozen, dtype).tree
    teacher = unpack(teacher)

    def body(_, state):
      state = state.replace(frozen=frozen)
      return train_step(state, teacher, draw(source, state.step)).replace(frozen=None)

    state = state.replace(frozen=None)
    state = body(0, state) if one_step else jax.lax.fori_loop(0, num_steps, body, state)
    return state.replace(frozen=packed), state.step

  return run


def make_predict_step(
  model: MultiExitNetwork,
) -> Callable[[Weights, Batch], tuple[jax.Array, jax.Array, jax.Array]]:
  """Makes the evaluation step.

  Args:
    model: The network.

  Returns:
    A function (weights, batch) → logits [num_exits, image, num_classes], labels [image] and mask
    [image], for `on_devices`: it takes the batch of one device and returns the results of all
    devices and hosts.
  """

  def step(weights, batch):
    logits = model.apply(weights.variables, batch['image'])
    logits = jax.lax.all_gather(logits, AXIS, axis=1, tiled=True)
    labels, mask = jax.lax.all_gather((batch['label'], batch['mask']), AXIS, tiled=True)
    return logits, labels, mask

  return step


def on_devices(
  step: Callable,
  in_axes: Sequence[Any],
  *,
  donated: Sequence[int] = (),
  devices: Sequence[jax.Device] | None = None,
  cuda_graphs: str = 'partial',
) -> Callable:
  """Maps a step over the devices of all hosts.

  Args:
    step: A function of arrays whose results are the same on every device.
    in_axes: For each argument None, if it is replicated and has no axis over devices; or 0, if its
      leading axis is over local devices; or a tree of these.
    donated: Indices of arguments whose memory the results take, so that they cannot be used again.
      Ignored with several hosts, where donating replicated arrays has failed.
    devices: Devices to compile for, which need not be present. Default: the devices of all hosts.
    cuda_graphs: See config.cuda_graphs.

  Returns:
    The pmapped function. Its results are replicated and have no axis over devices.
  """
  mapped = jax.pmap(
    step,
    axis_name=AXIS,
    in_axes=tuple(in_axes),
    out_axes=None,
    devices=devices,
    donate_argnums=tuple(donated) if jax.process_count() == 1 else (),
  )
  # pmap takes no compiler options, so the step is compiled ahead of time. With several hosts, the
  # compiled program would not accept the arrays of one host, so the options are left out.
  options = {**compiler_options(cuda_graphs, jax.device_count()), **_step_options()}
  if not options or devices is not None or jax.process_count() > 1:
    return mapped
  programs = {}

  @functools.wraps(mapped)  # Keeps the attribute `lower`.
  def run(*arguments):
    shapes = tuple(leaf.shape for leaf in jax.tree.leaves(arguments))
    if shapes not in programs:
      programs[shapes] = mapped.lower(*arguments).compile(compiler_options=options)
    return programs[shapes](*arguments)

  return run


def _step_options():
  """Compiler options for steps alone: on CPUs LLVM's first level compiles a fifth faster.

  Its third level makes no faster steps, because their time goes to matrix products and memory.
  """
  if jax.default_backend() != 'cpu' or jax.config.read('jax_disable_most_optimizations'):
    return {}
  return {'xla_backend_optimization_level': 1}
