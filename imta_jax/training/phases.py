"""Sets up a training phase: its network, optimizer, initial state, teacher and steps."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import optax
from ml_collections import ConfigDict

from imta_jax.models.initial_values import transplant
from imta_jax.models.multi_exit import MultiExitNetwork
from imta_jax.training import networks, steps, train_state
from imta_jax.training import workdir as layout
from imta_jax.training.pretrained import start_from


@dataclasses.dataclass(frozen=True)
class Phase:
  """A phase that is ready for its first step.

  Attributes:
    name: Its name in folders and output.
    config: Its entry in config.phases.
    model: Its network.
    num_steps: The number of training steps.
    schedule: The learning rate of each step.
    state: The state before the first step.
    teacher: Variables of the teacher if it is the network of the previous phase; otherwise empty.
    loaded: What was loaded from config.init_from; see `pretrained.start_from`.
    train_step: See `steps.make_train_step`.
    predict_step: See `steps.make_predict_step`.
  """

  name: str
  config: ConfigDict
  model: MultiExitNetwork
  num_steps: int
  schedule: optax.Schedule
  state: train_state.TrainState
  teacher: Mapping[str, Any]
  loaded: str
  train_step: Callable
  predict_step: Callable


def set_up_phase(
  config: ConfigDict,
  index: int,
  predecessor: tuple[MultiExitNetwork, Mapping[str, Any]] | None,
  *,
  num_classes: int,
  image_shape: tuple[int, int, int],
  steps_per_epoch: int,
) -> Phase:
  """Sets up a phase.

  Its network starts from the variables that it shares with the network of the previous phase; that
  of the first phase from config.init_from, if that is set.

  Args:
    config: A complete config; see imta_jax.config.
    index: Index of the phase, counted from 0.
    predecessor: Network and variables of the previous phase; None for the first phase.
    num_classes: Number of classes of the data set.
    image_shape: (height, width, channels) of the images.
    steps_per_epoch: Training steps per epoch.

  Returns:
    The phase. Its arrays are on the host or the default device, not yet replicated.

  Raises:
    UsageError: If a field of config.model is wrong, the network does not fit the images, or
      config.init_from has nothing in common with it.
  """
  phase = config.phases[index]
  model = networks.create_model(config, phase, num_classes)
  variables, loaded = networks.initial_variables(model, config.seed, image_shape), ''
  if predecessor is not None:
    variables = transplant(predecessor[1], variables)
  elif config.init_from is not None:
    variables, loaded = start_from(config.init_from, variables)
  num_steps = phase.steps or max(1, round(phase.epochs * steps_per_epoch))
  schedule = train_state.create_schedule(phase, num_steps, steps_per_epoch, config.batch_size)
  optimizer = train_state.create_optimizer(phase, schedule)
  teacher_model, teacher = _teacher(phase, predecessor)
  return Phase(
    name=layout.phase_name(index),
    config=phase,
    model=model,
    num_steps=num_steps,
    schedule=schedule,
    state=train_state.create_state(variables, phase.trained, optimizer),
    teacher=teacher,
    loaded=loaded,
    train_step=steps.make_train_step(model, teacher_model, phase, optimizer),
    predict_step=steps.make_predict_step(model),
  )


def _teacher(
  phase: ConfigDict, predecessor: tuple[MultiExitNetwork, Mapping[str, Any]] | None
) -> tuple[MultiExitNetwork | None, Mapping[str, Any]]:
  """Returns the teacher's network and variables if it is the previous phase's network."""
  if phase.loss != 'one_for_all' or phase.teacher != 'frozen':
    return None, {}
  model, variables = predecessor
  if phase.trained == 'last_layers':  # The student has the same backbone.
    variables = {
      kind: {name: tree for name, tree in trees.items() if name.startswith('classifiers_')}
      for kind, trees in variables.items()
    }
  return model, variables
