"""A run's networks: created from a config, or restored from a workdir."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import optax
from etils import epath
from ml_collections import ConfigDict

from imta_jax import evaluate, models, runtime
from imta_jax.adaptive.calibration import fit_temperatures
from imta_jax.adaptive.cost import ExitCost, exit_costs
from imta_jax.adaptive.engine import (
  DEFAULT_RULE,
  AdaptiveClassifier,
  CalibrationSet,
  OperatingPoint,
)
from imta_jax.adaptive.policy import (
  BUDGET_PARAMETERS,
  budget_sweep,
  cheapest_as_accurate,
  optimal_sweep,
  scores_and_correctness,
)
from imta_jax.data.dataset import Dataset
from imta_jax.errors import UsageError, first_line
from imta_jax.models.initial_values import initialize
from imta_jax.models.multi_exit import MultiExitNetwork
from imta_jax.training import checkpoint, steps, train_state
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


def create_model(config: ConfigDict, phase: ConfigDict, num_classes: int) -> MultiExitNetwork:
  """Creates the network of a phase.

  Raises:
    UsageError: If a field of config.model is wrong.
  """
  fields = {name: value for name, value in config.model.items() if name != 'name'}
  try:
    return models.create(
      config.model.name,
      num_classes=num_classes,
      gradient_equilibrium=phase.gradient_equilibrium,
      shared_channels=phase.shared_channels,
      collaboration=phase.collaboration,
      stop_collaboration_gradient=phase.stop_collaboration_gradient,
      batch_norm_axis=runtime.AXIS if config.global_batch_norm else None,
      **fields,
    )
  except (TypeError, ValueError) as error:
    raise UsageError(f'config.model: {error}') from error


def initial_variables(
  model: MultiExitNetwork, seed: int, image_shape: tuple[int, int, int]
) -> Mapping[str, Any]:
  """Draws the initial variables of a network.

  Raises:
    UsageError: If the network does not fit the images.
  """
  try:
    return initialize(model, seed, image_shape)
  except (ValueError, ZeroDivisionError) as error:
    raise UsageError(
      f'config.model does not fit images of {image_shape}: {first_line(error)}'
    ) from error


def restore_network(
  config: ConfigDict,
  workdir: epath.Path,
  index: int,
  num_classes: int,
  image_shape: tuple[int, int, int],
) -> TrainedNetwork:
  """Restores the network of a phase from its checkpoints.

  Args:
    config: Config of the run.
    workdir: The run's folder.
    index: Index of the phase, counted from 0.
    num_classes: Number of classes of the data set.
    image_shape: (height, width, channels) of the images.

  Returns:
    The network with its chosen state.

  Raises:
    UsageError: If there is no intact checkpoint.
  """
  phase, name = config.phases[index], layout.phase_name(index)
  model = create_model(config, phase, num_classes)
  variables = initial_variables(model, config.seed, image_shape)
  # Only the structure of the optimizer's state matters.
  optimizer = train_state.create_optimizer(phase, optax.constant_schedule(0.0))
  like = train_state.create_state(variables, phase.trained, optimizer)
  folder = layout.checkpoint_folder(workdir, name)
  with checkpoint.Checkpoints(folder, read_only=True) as checkpoints:
    chosen = chosen_state(checkpoints, like, phase, name, workdir)
  costs = exit_costs(model, image_shape, variables)
  predict = steps.on_devices(steps.make_predict_step(model), (None, 0))
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


def predict_splits(network: TrainedNetwork, dataset: Dataset) -> dict[str, evaluate.Predictions]:
  """Runs a network on the validation and test images."""
  weights = runtime.replicate(network.weights)
  return {
    split: evaluate.predict(network.predict, weights, dataset.evaluation_batches(split))
    for split in evaluate.SPLITS
  }


def load_classifier(
  workdir: epath.PathLike, phase: int = -1, rule: str = DEFAULT_RULE, sweep: str = 'geometric'
) -> AdaptiveClassifier:
  """Loads the network of an evaluated run for inference.

  Its thresholds are those of the cheapest operating point that reaches the validation accuracy of
  the last exit.

  Args:
    workdir: The run's folder.
    phase: Index of the phase, counted from 0; negative indices count from the last phase.
    rule: Name of the exit rule; see `adaptive.engine.rules`.
    sweep: Where its 40 operating points come from: 'geometric' (`policy.budget_sweep`) or 'optimal'
      (`policy.optimal_sweep`).

  Returns:
    A classifier for uint8 images, with the operating points of the run.

  Raises:
    UsageError: If the folder is not a workdir, a file of it is corrupt, or the run has not been
      evaluated.
    ValueError: If there is no such rule or sweep.
  """
  workdir = epath.Path(workdir)
  config = layout.load_config(workdir)
  if not -len(config.phases) <= phase < len(config.phases):
    raise UsageError(f'phase {phase + 1} does not exist: {workdir} has 1 to {len(config.phases)}')
  index = range(len(config.phases))[phase]
  name, folder = layout.phase_name(index), layout.evaluation_folder(workdir)
  madds = [cost.madds for cost in evaluate.load_costs(folder, name)]
  validation = evaluate.load_predictions(layout.predictions_path(workdir, name, 'validation'))
  class_names = layout.load_class_names(workdir)
  described, found = (len(madds), len(class_names)), validation.logits.shape[::2]
  if described != found:
    raise UsageError(
      f'{workdir} describes {described[0]} exits (evaluation.json) and {described[1]} classes '
      f'(classes.json), but its predictions are of {found[0]} exits and {found[1]} classes: run '
      'the training command again'
    )
  probabilities, labels = validation.probabilities(), validation.labels
  how = {'rule': rule, 'temperatures': None}
  if rule == 'calibrated':
    how['temperatures'] = fit_temperatures(probabilities, labels)
  of_both_splits = (probabilities, labels, probabilities, labels)
  if sweep == 'geometric':
    points = budget_sweep(*of_both_splits, madds, BUDGET_PARAMETERS, **how)
  elif sweep == 'optimal':
    budgets = np.linspace(madds[0], madds[-1], len(BUDGET_PARAMETERS))
    points = optimal_sweep(*of_both_splits, madds, budgets, **how)
  else:
    raise ValueError(f"sweep {sweep!r} is unknown: choose from 'geometric' and 'optimal'")
  chosen = cheapest_as_accurate(points, validation.accuracy()[-1])
  no_early_exits = (math.inf,) * len(madds)
  scores, correct = scores_and_correctness('validation', probabilities, labels, len(madds), **how)

  dataset = config.dataset
  image_shape = (dataset.image_size, dataset.image_size, len(dataset.mean))
  network = restore_network(config, workdir, index, len(class_names), image_shape)
  return AdaptiveClassifier.from_model(
    network.model,
    network.weights.variables,
    no_early_exits if chosen is None else chosen.thresholds,
    image_shape,
    mean=dataset.mean,
    std=dataset.std,
    operating_points=[
      OperatingPoint(p.thresholds, p.validation_exit_fractions, p.validation_accuracy)
      for p in points
    ],
    validation=CalibrationSet(scores, correct),
    madds=madds,
    class_names=class_names,
    **how,
    preprocessing={'crop': dataset.crop if dataset.in_memory else 'center'},
  )
