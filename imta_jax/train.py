"""The loop: phases, steps, validation, checkpoints; then the evaluation on the test set."""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from clu import metric_writers
from etils import epath
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from imta_jax import checkpoint, devices, evaluate, models, steps
from imta_jax import config as config_lib
from imta_jax.adaptive.cost import ExitCost, exit_costs
from imta_jax.console import Reporter
from imta_jax.data.pipeline import Dataset, open_dataset
from imta_jax.errors import UsageError
from imta_jax.models.initial_values import initialize, transplant
from imta_jax.models.multi_exit import MultiExitNetwork
from imta_jax.preemption import StopRequest


@dataclasses.dataclass(frozen=True)
class TrainedNetwork:
  """A phase's network and the state chosen from it.

  Attributes:
    name: The phase's name.
    model: The network.
    variables: Its variables, on the host.
    predict: Its evaluation step, see steps.predict_step.
    costs: [exit].
  """

  name: str
  model: MultiExitNetwork
  variables: Mapping[str, Any]
  predict: Callable
  costs: list[ExitCost]


def train_and_evaluate(config: ConfigDict, workdir: epath.Path) -> list[evaluate.Evaluation]:
  """Trains every phase, from where it stands, and evaluates each phase's network.

  Args:
    config: A whole config, see imta_jax.config.
    workdir: The run's folder; made if need be.

  Returns:
    An evaluation a phase.

  Raises:
    UsageError: If the config does not fit the data, the devices or the workdir, or the loss is not
      finite.
    SystemExit: If a signal asked the run to stop; its state is saved.
  """
  config_lib.validate(config)
  claim_workdir(config, workdir)
  reporter = Reporter()
  dataset = open_dataset(config)
  reporter.say(
    f'{config.dataset.name}: '
    + ', '.join(f'{count:,} {split}' for split, count in dataset.num_images.items())
    + f' images · {jax.device_count()} × {jax.devices()[0].device_kind}, '
    f'{jax.process_count()} host(s) · workdir {workdir}'
  )

  trained = []
  with StopRequest() as stop:
    for index in range(len(config.phases)):
      trained.append(_train_phase(config, workdir, index, dataset, trained, reporter, stop))

  evaluations = []
  for network in trained:
    predictions = predict_splits(network, dataset)
    evaluations.append(evaluate.assess(network.name, network.costs, predictions))
    reporter.results(evaluations[-1])
    if jax.process_index() == 0:
      for split, prediction in predictions.items():
        evaluate.save_predictions(prediction, predictions_path(workdir, network.name, split))
  if jax.process_index() == 0:
    folder = workdir / 'evaluation'
    costs = [dataclasses.asdict(cost) for cost in trained[-1].costs]
    evaluate.write_whole(folder / 'costs.json', json.dumps(costs).encode())
    evaluate.write_tables(evaluations, folder)
    evaluate.write_figure(evaluations, folder / 'budget.png', config.dataset.name)
  reporter.summary(evaluations[-1], workdir)
  return evaluations


def create_model(config: ConfigDict, phase: ConfigDict, num_classes: int) -> MultiExitNetwork:
  """The network of a phase.

  Raises:
    UsageError: If a field of config.model is wrong.
  """
  fields = {name: value for name, value in config.model.items() if name != 'name'}
  try:
    return models.create(
      config.model.name,
      num_classes=num_classes,
      gradient_equilibrium=phase.gradient_equilibrium,
      collaboration=phase.collaboration,
      stop_collaboration_gradient=phase.stop_collaboration_gradient,
      batch_norm_axis=devices.AXIS if config.global_batch_norm else None,
      **fields,
    )
  except (TypeError, ValueError) as error:
    raise UsageError(f'config.model: {error}') from error


def claim_workdir(config: ConfigDict, workdir: epath.Path) -> None:
  """Writes the config into a new workdir; refuses one that another config has.

  Raises:
    UsageError: Naming the fields that differ.
  """
  path = workdir / 'config.json'
  if path.exists():
    lines = config_lib.differences(
      config_lib.to_dict(config_lib.from_json(path.read_text())), config_lib.to_dict(config)
    )
    if lines:
      raise UsageError(
        f'workdir {workdir} belongs to another config ({"; ".join(lines)}): '
        'choose another --workdir, or take back what differs'
      )
  elif jax.process_index() == 0:
    workdir.mkdir(parents=True, exist_ok=True)
    evaluate.write_whole(path, config_lib.to_json(config).encode())
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices('workdir claimed')


def _train_phase(
  config: ConfigDict,
  workdir: epath.Path,
  index: int,
  dataset: Dataset,
  predecessors: list[TrainedNetwork],
  reporter: Reporter,
  stop: StopRequest,
) -> TrainedNetwork:
  """Trains a phase to its end, from where it stands, and chooses its state."""
  phase, name = config.phases[index], phase_name(index)
  predecessor = predecessors[-1] if predecessors else None

  # The network, its optimizer, and the state to go on from.
  model = create_model(config, phase, len(dataset.class_names))
  variables = initial_variables(model, config.seed, dataset.image_shape, predecessor)
  costs = exit_costs(model, dataset.image_shape)
  num_steps = phase.steps or round(phase.epochs * dataset.steps_per_epoch)
  schedule = steps.create_schedule(phase, num_steps, dataset.steps_per_epoch, config.batch_size)
  optimizer = steps.create_optimizer(phase, schedule)
  state = steps.create_state(variables, phase.trained, optimizer)
  checkpoints = checkpoint.Checkpoints(checkpoint_folder(workdir, name))
  restored = checkpoints.restore(state)
  state = devices.replicate(state if restored is None else restored)
  step = int(state.step)

  # What runs on the devices.
  teacher_model, teacher = _teacher(phase, predecessor)
  train = steps.train_step(model, teacher_model, phase, optimizer)
  predict = steps.predict_step(model)
  empty_totals = devices.replicate(steps.empty_totals(model.num_exits))

  reporter.overview(f'{name}: {phase.loss}, trains {phase.trained}, {num_steps:,} steps', costs)
  if step:
    reporter.say(f'{name} goes on from step {step:,}.')
  writer = _metric_writer(workdir / 'tensorboard' / name)
  batches = dataset.train_batches(step)
  num_epochs = math.ceil(num_steps / dataset.steps_per_epoch)
  with reporter.progress(
    name, step, num_steps, dataset.steps_per_epoch, config.batch_size
  ) as progress:
    while step < num_steps:
      with progress.waiting_for_data():
        batch = next(batches)
      state = train(state, teacher, batch)
      step += 1
      ends_epoch = step % dataset.steps_per_epoch == 0 or step == num_steps

      if ends_epoch or step % config.log_every_steps == 0:
        means = _means(state, step, name, checkpoints)
        progress.update(step, means['loss'])

      if ends_epoch:
        epoch = math.ceil(step / dataset.steps_per_epoch)
        state = state.replace(totals=empty_totals)
        scalars = {f'train/{key}': value for key, value in _by_exit(means).items()}
        scalars['train/learning_rate'] = float(schedule(step - 1))
        scalars |= progress.end_epoch()
        accuracy = None
        if epoch % config.checkpoint_every_epochs == 0 or step == num_steps:
          validation = evaluate.predict(
            predict, state.variables, dataset.evaluation_batches('validation')
          )
          accuracy = validation.accuracy()
          checkpoints.save(step, state, float(accuracy.mean()))
          figures = {'accuracy': accuracy, 'cross_entropy': validation.cross_entropy()}
          scalars |= {f'validation/{key}': value for key, value in _by_exit(figures).items()}
        writer.write_scalars(step, scalars)
        reporter.epoch(name, epoch, num_epochs, means, accuracy, scalars)
        progress.start_epoch()

      if stop.requested(step) and step < num_steps:
        checkpoints.save(step, state, None)
        checkpoints.close()
        writer.close()
        stop.leave(f'{name} is saved at step {step:,}; the same command goes on from there.')
  writer.close()
  checkpoints.wait()

  chosen = checkpoints.restore(jax.eval_shape(lambda: state), phase.chosen_state)
  checkpoints.close()
  if chosen is None:
    raise UsageError(f'{name} has no whole checkpoint in {workdir}: run the command again')
  reporter.say(f'{name} gives its {phase.chosen_state} state, of step {int(chosen.step):,}.')
  return TrainedNetwork(name, model, chosen.variables, predict, costs)


def initial_variables(
  model: MultiExitNetwork,
  seed: int,
  image_shape: tuple[int, int, int],
  predecessor: TrainedNetwork | None,
) -> Mapping[str, Any]:
  """What a phase starts from: the phase before, and fresh values for what it did not have."""
  try:
    fresh = initialize(model, seed, image_shape)
  except ValueError as error:
    reason = str(error).strip().splitlines()[0]
    raise UsageError(f'config.model does not fit images of {image_shape}: {reason}') from error
  return fresh if predecessor is None else transplant(predecessor.variables, fresh)


def predict_splits(network: TrainedNetwork, dataset: Dataset) -> dict[str, evaluate.Predictions]:
  """Predictions for the validation and test images."""
  variables = devices.replicate(network.variables)
  return {
    split: evaluate.predict(network.predict, variables, dataset.evaluation_batches(split))
    for split in evaluate.SPLITS
  }


def phase_name(index: int) -> str:
  """The name of a phase, counted from 0, in folders and output."""
  return f'phase_{index + 1}'


def checkpoint_folder(workdir: epath.Path, name: str) -> epath.Path:
  """Where a phase's checkpoints are."""
  return workdir / 'checkpoints' / name


def predictions_path(workdir: epath.Path, name: str, split: str) -> epath.Path:
  """Where the predictions of a phase's network for a split are."""
  return workdir / 'evaluation' / f'{name}_{split}.npz'


def _teacher(
  phase: ConfigDict, predecessor: TrainedNetwork | None
) -> tuple[MultiExitNetwork | None, Any]:
  """The teacher's network and replicated variables, where it is the phase before's."""
  if phase.loss != 'one_for_all' or phase.teacher != 'frozen':
    return None, {}
  variables = predecessor.variables
  if phase.trained == 'last_layers':  # The backbone is the student's own.
    variables = {
      kind: {name: tree for name, tree in trees.items() if name.startswith('classifiers_')}
      for kind, trees in variables.items()
    }
  return predecessor.model, devices.replicate(variables)


def _means(state, step, name, checkpoints):
  """Averages over the epoch so far.

  Raises:
    UsageError: If one of them is not finite.
  """
  totals = jax.device_get(state.totals)
  count = totals.pop('steps')
  means = jax.tree.map(lambda total: total / count, totals)
  if not all(np.isfinite(mean).all() for mean in means.values()):
    kept = checkpoints.steps('last')
    checkpoints.close()
    raise UsageError(
      f'{name}: the loss is not finite at step {step:,}: lower the learning rate, warm up, or mend '
      f'the data; '
      + (f'the checkpoint of step {kept[0]:,} is kept' if kept else 'there is no checkpoint yet')
    )
  return means


def _by_exit(figures: Mapping[str, Any]) -> dict[str, float]:
  """Scalars, with arrays [exit] spread over names."""
  scalars = {}
  for name, value in figures.items():
    if np.ndim(value):
      scalars |= {f'{name}_exit_{number}': float(x) for number, x in enumerate(value, start=1)}
    else:
      scalars[name] = float(value)
  return scalars


def _metric_writer(folder: epath.Path) -> metric_writers.MetricWriter:
  """TensorBoard on the first host, nothing on the others."""
  if jax.process_index() > 0:
    return metric_writers.MultiWriter([])
  return metric_writers.AsyncWriter(metric_writers.SummaryWriter(str(folder)))
