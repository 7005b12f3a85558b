"""Restores trained networks from workdirs; variables also from exports and pretrained weights."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import optax
from etils import epath
from flax.traverse_util import unflatten_dict
from ml_collections import ConfigDict

from imta_jax import config as config_lib
from imta_jax.adaptive import exported
from imta_jax.adaptive.cost import ExitCost, exit_costs
from imta_jax.errors import UsageError
from imta_jax.interop import pretrained
from imta_jax.models.multi_exit import MultiExitNetwork
from imta_jax.training import checkpoint, phases, steps, train_state
from imta_jax.training import workdir as layout


@dataclasses.dataclass(frozen=True)
class TrainedNetwork:
  """The network of a phase, with its chosen state.

  Attributes:
    name: Name of the phase.
    model: The network.
    weights: Its variables, on the host.
    predict: The mapped evaluation step; see `steps.make_predict_step`.
    costs: The cost up to each exit, [exit].
  """

  name: str
  model: MultiExitNetwork
  weights: train_state.Weights
  predict: Callable
  costs: list[ExitCost]


def restore_network(workdir: epath.Path, index: int) -> TrainedNetwork:
  """Restores the network of a phase from its checkpoints.

  Args:
    workdir: The run's folder.
    index: Index of the phase, counted from 0.

  Returns:
    The network with its chosen state.

  Raises:
    UsageError: If the folder is not a workdir, or there is no intact checkpoint.
  """
  config = layout.load_config(workdir)
  phase, name, image_shape = (
    config.phases[index],
    layout.phase_name(index),
    config_lib.image_shape(config),
  )
  model = config_lib.create_model(config, phase, len(layout.load_class_names(workdir)))
  variables = phases.initial_variables(model, config.seed, image_shape)
  # Only the structure of the optimizer's state matters.
  optimizer = train_state.create_optimizer(phase, optax.constant_schedule(0.0))
  like = train_state.create_state(variables, phase, optimizer)
  folder = layout.checkpoint_folder(workdir, name)
  with checkpoint.Checkpoints(folder, read_only=True) as checkpoints:
    chosen = chosen_state(checkpoints, like, phase, name, workdir)
  costs = exit_costs(model, image_shape, variables)
  step = steps.make_predict_step(model)
  predict = steps.on_devices(step, (None, 0), cuda_graphs=config.cuda_graphs)
  return TrainedNetwork(name, model, chosen.weights, predict, costs)


def chosen_state(
  checkpoints: checkpoint.Checkpoints,
  like: train_state.TrainState,
  phase: ConfigDict,
  name: str,
  workdir: epath.Path,
) -> train_state.TrainState:
  """Restores the state that the config of a phase chooses: the best or the last one.

  Raises:
    UsageError: If there is no intact checkpoint.
  """
  chosen = checkpoints.restore(like, phase.chosen_state)
  if chosen is None:
    raise UsageError(
      f'{name} has no intact checkpoint in {workdir}: run the training command again'
    )
  return chosen


def load_variables(
  source: str, model: MultiExitNetwork, image_shape: tuple[int, int, int]
) -> Mapping[str, Any]:
  """Loads the variables of a trained network.

  Args:
    source: The workdir of a run, whose last phase counts; an export; or pretrained weights, see
      `pretrained.load_weights`.
    model: The network to which pretrained weights are converted; not read otherwise.
    image_shape: (height, width, channels) of its images.

  Returns:
    {'params': …, 'batch_stats': …}, float32.

  Raises:
    UsageError: If the source is none of these, is corrupt, or has weights of another network.
  """
  if pretrained.is_weights(source):
    return pretrained.load_weights(source, model, image_shape)
  path = epath.Path(source)
  if not (path / exported.MANIFEST).exists():
    last = len(layout.load_config(path).phases) - 1
    return restore_network(path, last).weights.variables
  try:
    manifest, _, weights, *_ = exported.read_export(source)
  except ValueError as error:
    raise UsageError(str(error)) from error
  names = manifest.get('variables', [])
  if list(map(len, names)) != list(map(len, weights)):
    raise UsageError(f'{source} does not name all of its variables: export it again')
  return unflatten_dict(dict(zip(sum(names, []), sum(weights, []), strict=True)), sep='/')
