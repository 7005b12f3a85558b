"""The training loop: phases, steps, validation and checkpoints; then the final evaluation."""

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from imta_jax import (
  checkpoint,
  devices,
  evaluate,
  hang_watch,
  networks,
  steps,
  train_state,
  workdir_lock,
)
from imta_jax import config as config_lib
from imta_jax import workdir as layout
from imta_jax.adaptive.cost import exit_costs
from imta_jax.console import Reporter
from imta_jax.data.dataset import Dataset
from imta_jax.data.pipeline import open_dataset
from imta_jax.dispatch import Dispatcher, steps_per_dispatch
from imta_jax.errors import UsageError
from imta_jax.metrics import Metrics, has_tensorboard
from imta_jax.models.multi_exit import MultiExitNetwork
from imta_jax.packing import pack
from imta_jax.phases import set_up_phase
from imta_jax.preemption import StopRequest
from imta_jax.profiling import Profile


def train_and_evaluate(config: ConfigDict, workdir: epath.Path) -> list[evaluate.Evaluation]:
  """Trains all phases, resuming where a previous run stopped, and evaluates each network.

  Args:
    config: A complete config; see imta_jax.config.
    workdir: The run's folder, which is created if necessary.

  Returns:
    One evaluation per phase.

  Raises:
    UsageError: If the config does not match the data, the devices or the workdir, or if the loss
      is not finite.
    SystemExit: If a signal asked the run to stop; its state has been saved. While there is nothing
      to save, a signal ends the process at once.
  """
  config_lib.validate(config)
  for phase in config.phases:  # Checked first, because importing TensorFlow takes seconds.
    networks.create_model(config, phase, num_classes=1)
  layout.check_owner(config, workdir)
  with hang_watch.watch():
    dataset = open_dataset(config)
    with workdir_lock.hold(workdir), StopRequest() as stop:
      return _train_phases(config, workdir, dataset, stop)


def _train_phases(
  config: ConfigDict, workdir: epath.Path, dataset: Dataset, stop: StopRequest
) -> list[evaluate.Evaluation]:
  """Trains and evaluates all phases in a workdir that no other run uses."""
  layout.claim(config, workdir, dataset.class_names)
  layout.record_environment(workdir)
  reporter = Reporter()
  reporter.say(
    f'{config.dataset.name}: '
    + ', '.join(f'{count:,} {split}' for split, count in dataset.num_images.items())
    + f' images · {jax.device_count()} × {jax.devices()[0].device_kind}, '
    f'{jax.process_count()} host(s) · workdir {workdir}'
  )
  if config.tensorboard and not has_tensorboard():
    reporter.say('TensorFlow is not installed: metrics go to metrics.jsonl, not to TensorBoard.')
  trained = []
  for index in range(len(config.phases)):
    predecessor = (trained[-1].model, trained[-1].weights.variables) if trained else None
    trained.append(_train_phase(config, workdir, index, dataset, predecessor, reporter, stop))
  return _evaluate(config, workdir, trained, dataset, reporter)


def _evaluate(
  config: ConfigDict,
  workdir: epath.Path,
  trained: Sequence[networks.TrainedNetwork],
  dataset: Dataset,
  reporter: Reporter,
) -> list[evaluate.Evaluation]:
  """Evaluates the network of each phase, and writes and prints the results."""
  evaluations = []
  for network in trained:
    hang_watch.progressed()
    predictions = networks.predict_splits(network, dataset)
    evaluations.append(evaluate.assess(network.name, network.costs, predictions))
    reporter.results(evaluations[-1])
    if jax.process_index() == 0:
      for split, prediction in predictions.items():
        evaluate.save_predictions(prediction, layout.predictions_path(workdir, network.name, split))
  if jax.process_index() == 0:
    folder = layout.evaluation_folder(workdir)
    evaluate.write_tables(evaluations, folder)
    labels = [
      layout.phase_label(network.name, phase)
      for network, phase in zip(trained, config.phases, strict=True)
    ]
    evaluate.write_figure(evaluations, folder / 'budget.png', config.dataset.name, labels)
  reporter.summary(evaluations[-1], workdir)
  return evaluations


def _train_phase(
  config: ConfigDict,
  workdir: epath.Path,
  index: int,
  dataset: Dataset,
  predecessor: tuple[MultiExitNetwork, Mapping[str, Any]] | None,
  reporter: Reporter,
  stop: StopRequest,
) -> networks.TrainedNetwork:
  """Trains a phase, resuming if it was interrupted, and restores its chosen state."""
  hang_watch.progressed()
  start = time.monotonic()
  phase = set_up_phase(
    config,
    index,
    predecessor,
    num_classes=len(dataset.class_names),
    image_shape=dataset.image_shape,
    steps_per_epoch=dataset.steps_per_epoch,
  )
  name, num_steps = phase.name, phase.num_steps
  costs = exit_costs(phase.model, dataset.image_shape, phase.state.weights.variables)
  if phase.loaded:
    reporter.say(f'{name} starts from {config.init_from}: {phase.loaded}.')
  reporter.overview(
    f'{name}: {phase.config.loss}, trains {phase.config.trained}, {num_steps:,} steps', costs
  )
  num_at_once = steps_per_dispatch(config)
  loop = steps.make_train_loop(
    phase.train_step, dataset.draw, dtype=phase.model.dtype, one_step=num_at_once == 1
  )
  axes = (None, None, dataset.source_axes, None)
  dispatch = Dispatcher(steps.on_devices(loop, axes, donated=(0,)), num_at_once)
  predict = steps.on_devices(phase.predict_step, (None, 0))
  empty_totals = train_state.empty_totals(phase.model.num_exits)
  teacher = devices.replicate(pack(phase.teacher))

  tensorboard = layout.tensorboard_folder(workdir, name)
  writes_tensorboard = config.tensorboard and has_tensorboard()
  with checkpoint.Checkpoints(layout.checkpoint_folder(workdir, name)) as checkpoints:
    restored = checkpoints.restore(phase.state)
    state = devices.replicate(phase.state if restored is None else restored)
    step = int(state.step)
    if 0 < step < num_steps:
      reporter.say(f'{name} resumes from step {step:,}.')
    read = dataset.train_reader(step)
    num_epochs = math.ceil(num_steps / dataset.steps_per_epoch)
    epoch_totals, first_step, last_save = None, step, time.monotonic()
    with (
      Metrics(
        layout.metrics_path(workdir), name, step, tensorboard if writes_tensorboard else None
      ) as metrics,
      Profile(tensorboard, step, config.profile_steps) as profile,
      reporter.progress(
        name, step, num_steps, dataset.steps_per_epoch, config.batch_size
      ) as progress,
    ):
      while step < num_steps:
        until_log = config.log_every_steps - step % config.log_every_steps
        most = min(dispatch.most, until_log, profile.steps_left(step), num_steps - step)
        with progress.waiting_for_data():
          source, count = read(most)
        state = dispatch(state, teacher, source, count)
        stop.has_unsaved_steps = True
        hang_watch.progressed()
        if step == first_step:
          reporter.say(f'{name}: first step done after {time.monotonic() - start:.1f} s.')
          progress.start_interval(step + count)
        step += count
        profile.after_step(step, dispatch.wait)
        ends_epoch = step % dataset.steps_per_epoch == 0 or step == num_steps

        if ends_epoch or step % config.log_every_steps == 0:
          totals = jax.device_get(state.totals)
          state = state.replace(totals=devices.replicate(empty_totals))
          _check_finite(totals, step, name, checkpoints)
          means = _means(totals)
          rates = progress.update(step, means['loss'])
          learning_rate = {'learning_rate': float(phase.schedule(step - 1))}
          metrics.write(step, means | learning_rate, 'train/')
          metrics.write(step, rates)
          progress.start_interval(step)
          epoch_totals = totals if epoch_totals is None else _add(epoch_totals, totals)

          if not ends_epoch and _is_due(config.checkpoint_every_minutes, last_save):
            metrics.flush()
            checkpoints.save(step, state, None)
            last_save = time.monotonic()

        if ends_epoch:
          epoch = math.ceil(step / dataset.steps_per_epoch)
          accuracy = None
          if epoch % config.checkpoint_every_epochs == 0 or step == num_steps:
            batches_of_split = dataset.evaluation_batches('validation')
            validation = evaluate.predict(predict, state.weights, batches_of_split)
            accuracy = validation.accuracy()
            figures = {'accuracy': accuracy, 'cross_entropy': validation.cross_entropy()}
            metrics.write(step, figures, 'validation/')
            metrics.flush()
            checkpoints.save(step, state, float(accuracy.mean()))
            last_save = time.monotonic()
          speed = progress.images_per_second()
          reporter.epoch(name, epoch, num_epochs, _means(epoch_totals), accuracy, speed)
          epoch_totals = None
          progress.start_interval(step)

        if stop.requested() and step < num_steps:
          _check_finite(jax.device_get(state.totals), step, name, checkpoints)
          metrics.flush()
          checkpoints.save(step, state, None)
          checkpoints.wait()
          stop.leave(f'{name} was saved at step {step:,}; run the same command again to resume.')

    chosen = networks.chosen_state(checkpoints, state, phase.config, name, workdir)
  reporter.say(
    f'{name} is finished; its {phase.config.chosen_state} state is from step {int(chosen.step):,}.'
  )
  stop.has_unsaved_steps = False
  if stop.requested():
    stop.leave('run the same command again to go on.')
  return networks.TrainedNetwork(name, phase.model, chosen.weights, predict, costs)


def _means(totals: Mapping[str, Any]) -> dict[str, Any]:
  """Averages a TrainState's totals over their steps."""
  return {name: total / totals['steps'] for name, total in totals.items() if name != 'steps'}


def _add(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
  """Adds the totals of two ranges of steps."""
  return {name: total + other[name] for name, total in one.items()}


def _is_due(minutes: float | None, last_save: float) -> bool:
  """Whether a checkpoint is due by time; the first host decides for all."""
  if minutes is None:
    return False
  is_due = time.monotonic() - last_save >= 60 * minutes
  return bool(multihost_utils.broadcast_one_to_all(np.bool_(is_due)))


def _check_finite(totals, step, name, checkpoints):
  """Stops a run that has diverged, before its state is saved.

  Raises:
    UsageError: If a total is not finite.
  """
  if all(np.isfinite(total).all() for total in totals.values()):
    return
  kept = checkpoints.steps('last')
  raise UsageError(
    f'{name}: the loss is not finite at step {step:,}: lower the learning rate, add a warm-up, or '
    'fix the data; '
    + (f'the checkpoint of step {kept[0]:,} is kept' if kept else 'there is no checkpoint yet')
  )
