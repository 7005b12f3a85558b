"""The training loop: phases, steps, validation and checkpoints; then the final evaluation."""

import collections
import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from imta_jax import config as config_lib
from imta_jax import evaluate, runtime
from imta_jax.adaptive.cost import exit_costs
from imta_jax.data.dataset import Dataset
from imta_jax.data.pipeline import open_dataset
from imta_jax.errors import UsageError
from imta_jax.models.multi_exit import MultiExitNetwork
from imta_jax.training import checkpoint, networks, steps, train_state, workdir_lock
from imta_jax.training import workdir as layout
from imta_jax.training.console import PhaseProgress, Reporter
from imta_jax.training.events import Events
from imta_jax.training.metrics import Metrics, has_tensorboard
from imta_jax.training.packing import pack
from imta_jax.training.phases import Phase, set_up_phase
from imta_jax.training.profiling import Profile
from imta_jax.training.signals import StopRequest

# Enough to keep the devices busy, few enough that their batches fit in memory.
_DISPATCHES_IN_FLIGHT = 2


def train_and_evaluate(config: ConfigDict, workdir: epath.Path) -> list[evaluate.Evaluation]:
  """Trains all phases, resuming where a previous run stopped, and evaluates each network.

  Args:
    config: A complete config; see imta_jax.config.
    workdir: The run's folder, which is created if necessary.

  Returns:
    One evaluation per phase.

  Raises:
    UsageError: If the config does not match the data, the devices or the workdir, if the data has
      changed since the workdir was first trained in, or if the loss is not finite.
    SystemExit: If a signal asked the run to stop; its state has been saved. While there is nothing
      to save, a signal ends the process at once.
  """
  config_lib.validate(config)
  for phase in config.phases:  # Checked first, because importing TensorFlow takes seconds.
    networks.create_model(config, phase, num_classes=1)
  with runtime.watchdog():
    dataset = open_dataset(config)
    with workdir_lock.hold(workdir), StopRequest() as stop:
      layout.claim(
        config,
        workdir,
        dataset.class_names,
        num_images=dataset.num_images,
        fingerprint=dataset.fingerprint(),
      )
      return _train_phases(Run(config, workdir, dataset, Reporter(), stop))


@dataclasses.dataclass(frozen=True)
class Run:
  """What the phases of a run share."""

  config: ConfigDict
  workdir: epath.Path
  dataset: Dataset
  reporter: Reporter
  stop: StopRequest


def _train_phases(run: Run) -> list[evaluate.Evaluation]:
  """Trains and evaluates all phases in a workdir that no other run uses."""
  config, reporter = run.config, run.reporter
  reporter.say(
    f'{config.dataset.name}: '
    + ', '.join(f'{count:,} {split}' for split, count in run.dataset.num_images.items())
    + f' images · {jax.device_count()} × {jax.devices()[0].device_kind}, '
    f'{jax.process_count()} host(s) · workdir {run.workdir}'
  )
  if config.tensorboard and not has_tensorboard():
    reporter.say('TensorFlow is not installed: metrics go to metrics.jsonl, not to TensorBoard.')
  trained = []
  for index in range(len(config.phases)):
    predecessor = (trained[-1].model, trained[-1].weights.variables) if trained else None
    trained.append(_train_phase(run, index, predecessor))
  return _evaluate(run, trained)


def _train_phase(
  run: Run, index: int, predecessor: tuple[MultiExitNetwork, Mapping[str, Any]] | None
) -> networks.TrainedNetwork:
  """Trains a phase, resuming if it was interrupted, and restores its chosen state."""
  runtime.progressed()
  dataset, reporter, stop = run.dataset, run.reporter, run.stop
  phase = set_up_phase(
    run.config,
    index,
    predecessor,
    num_classes=len(dataset.class_names),
    image_shape=dataset.image_shape,
    steps_per_epoch=dataset.steps_per_epoch,
  )
  costs = exit_costs(phase.model, dataset.image_shape, phase.state.weights.variables)
  if phase.loaded:
    reporter.say(f'{phase.name} starts from {run.config.init_from}: {phase.loaded}.')
  reporter.overview(
    f'{phase.name}: {phase.config.loss}, trains {phase.config.trained}, {phase.num_steps:,} steps',
    costs,
  )
  predict = steps.on_devices(phase.predict_step, (None, 0))
  folder = layout.checkpoint_folder(run.workdir, phase.name)
  with checkpoint.Checkpoints(folder) as checkpoints:
    with _open_session(run, index, phase, predict, checkpoints) as session:
      _take_all_steps(session, stop)
    chosen = networks.chosen_state(checkpoints, phase.state, phase.config, phase.name, run.workdir)
  reporter.say(
    f'{phase.name} is finished; its {phase.config.chosen_state} state is from step '
    f'{int(chosen.step):,}.'
  )
  stop.has_unsaved_steps = False
  if stop.requested():
    stop.leave('run the same command again to go on.')
  return networks.TrainedNetwork(phase.name, phase.model, chosen.weights, predict, costs)


def _take_all_steps(session: '_Session', stop: StopRequest) -> None:
  """The training loop of a phase: takes steps up to the next event, and handles it."""
  events = session.events
  while session.step < events.num_steps:
    session.take_steps(events.next_after(session.step))
    if events.logs_at(session.step):
      session.log()
    accuracy = None
    if events.validates_at(session.step):
      accuracy = session.validate()
      session.save(accuracy)
    elif events.logs_at(session.step) and session.is_save_due():
      session.save()
    if events.ends_epoch_at(session.step):
      session.report_epoch(accuracy)
    if stop.requested() and session.step < events.num_steps:
      session.save()
      session.checkpoints.wait()
      stop.leave(
        f'{session.phase.name} was saved at step {session.step:,}; run the same command again to '
        'resume.'
      )


@contextlib.contextmanager
def _open_session(
  run: Run, index: int, phase: Phase, predict: Callable, checkpoints: checkpoint.Checkpoints
) -> Iterator['_Session']:
  """Restores the latest state of a phase and opens what its steps read and write."""
  config, dataset = run.config, run.dataset
  restored = checkpoints.restore(phase.state)
  state = runtime.replicate(phase.state if restored is None else restored)
  step = int(state.step)
  if 0 < step < phase.num_steps:
    run.reporter.say(f'{phase.name} resumes from step {step:,}.')
  limit = _steps_per_dispatch(config)
  events = Events(
    step,
    phase.num_steps,
    dataset.steps_per_epoch,
    config.log_every_steps,
    config.checkpoint_every_epochs,
    limit,
    config.profile_steps,
  )
  loop = steps.make_train_loop(
    phase.train_step, dataset.draw, dtype=phase.model.dtype, one_step=limit == 1
  )
  tensorboard = layout.tensorboard_folder(run.workdir, phase.name)
  writes_tensorboard = config.tensorboard and has_tensorboard()
  metrics = Metrics(
    layout.metrics_path(run.workdir), phase.name, step, tensorboard if writes_tensorboard else None
  )
  progress = run.reporter.progress(phase.name, events, config.batch_size)
  with metrics, Profile(tensorboard, events.profile) as profile, progress as bar:
    yield _Session(
      run,
      phase,
      events,
      step,
      state,
      teacher=runtime.replicate(pack(phase.teacher)),
      read=dataset.train_reader(index, step),
      train=steps.on_devices(loop, (None, None, dataset.source_axes, None), donated=(0,)),
      predict=predict,
      checkpoints=checkpoints,
      metrics=metrics,
      profile=profile,
      progress=bar,
    )


def _steps_per_dispatch(config: ConfigDict) -> int | None:
  """Returns how many steps to send to the devices at once; None for all up to the next event."""
  has_single_steps = jax.default_backend() == 'cpu' or not config.dataset.in_memory
  if config.steps_per_dispatch is None and has_single_steps:
    return 1  # On CPUs loops are slow (`steps.make_train_loop`); streams have batches one by one.
  return config.steps_per_dispatch


@dataclasses.dataclass
class _Session:
  """A phase in training: its state on the devices, and what the host does between its steps."""

  run: Run
  phase: Phase
  events: Events
  step: int
  state: train_state.TrainState
  teacher: Any
  read: Callable[[int], Any]
  train: Callable
  predict: Callable
  checkpoints: checkpoint.Checkpoints
  metrics: Metrics
  profile: Profile
  progress: PhaseProgress
  epoch_totals: dict[str, Any] | None = None
  in_flight: collections.deque = dataclasses.field(default_factory=collections.deque)
  start: float = dataclasses.field(default_factory=time.monotonic)
  last_save: float = dataclasses.field(default_factory=time.monotonic)

  def take_steps(self, last: int) -> None:
    """Sends the steps up to `last` to the devices, some ahead of the last finished one."""
    is_first = self.step == self.events.first_step
    with self.progress.waiting_for_data():
      source = self.read(self.step)
    num_steps = np.int32(last - self.step)
    self.state, done = self.train(self.state, self.teacher, source, num_steps)
    self.in_flight.append(done)
    self.wait(0 if is_first else _DISPATCHES_IN_FLIGHT)
    self.step = last
    self.run.stop.has_unsaved_steps = True
    runtime.progressed()
    if is_first:
      seconds = time.monotonic() - self.start
      self.run.reporter.say(f'{self.phase.name}: first step done after {seconds:.1f} s.')
      self.progress.start_interval(self.step)
    self.profile.after_step(self.step, self.wait)

  def wait(self, num_left: int = 0) -> None:
    """Waits until at most so many dispatches are not finished."""
    while len(self.in_flight) > num_left:
      self.in_flight.popleft().block_until_ready()

  def log(self) -> None:
    """Writes the mean metrics of the steps since the last call."""
    totals = self._finite_totals()
    self.state = self.state.replace(totals=runtime.replicate(jax.tree.map(np.zeros_like, totals)))
    means = _means(totals)
    rates = self.progress.update(self.step, means['loss'])
    means['learning_rate'] = float(self.phase.schedule(self.step - 1))
    self.metrics.write(self.step, means, 'train/')
    self.metrics.write(self.step, rates)
    self.progress.start_interval(self.step)
    self.epoch_totals = (
      totals if self.epoch_totals is None else jax.tree.map(np.add, self.epoch_totals, totals)
    )

  def validate(self) -> np.ndarray:
    """Returns the accuracy of each exit on validation images, [exit], and writes it."""
    batches = self.run.dataset.evaluation_batches('validation')
    validation = evaluate.predict(self.predict, self.state.weights, batches)
    accuracy = validation.accuracy()
    figures = {'accuracy': accuracy, 'cross_entropy': validation.cross_entropy()}
    self.metrics.write(self.step, figures, 'validation/')
    return accuracy

  def save(self, accuracy: np.ndarray | None = None) -> None:
    """Saves the state, with its accuracies on validation images if it was validated."""
    self._finite_totals()
    self.metrics.flush()
    self.checkpoints.save(self.step, self.state, None if accuracy is None else accuracy.mean())
    self.last_save = time.monotonic()

  def is_save_due(self) -> bool:
    """Whether a checkpoint is due by time; the first host decides for all."""
    minutes = self.run.config.checkpoint_every_minutes
    if minutes is None:
      return False
    is_due = time.monotonic() - self.last_save >= 60 * minutes
    return bool(multihost_utils.broadcast_one_to_all(np.bool_(is_due)))

  def report_epoch(self, accuracy: np.ndarray | None) -> None:
    """Prints a line about the epoch that has ended."""
    self.run.reporter.epoch(
      self.phase.name,
      math.ceil(self.step / self.events.steps_per_epoch),
      math.ceil(self.events.num_steps / self.events.steps_per_epoch),
      _means(self.epoch_totals),
      accuracy,
      self.progress.images_per_second(),
    )
    self.epoch_totals = None
    self.progress.start_interval(self.step)

  def _finite_totals(self) -> dict[str, Any]:
    """Returns the totals since the last log.

    Raises:
      UsageError: If one is not finite: the run has diverged, and its state must not be saved.
    """
    totals = jax.device_get(self.state.totals)
    if all(np.isfinite(total).all() for total in totals.values()):
      return totals
    kept = self.checkpoints.steps('last')
    raise UsageError(
      f'{self.phase.name}: the loss is not finite at step {self.step:,}: lower the learning rate, '
      'add a warm-up, or fix the data; '
      + (f'the checkpoint of step {kept[0]:,} is kept' if kept else 'there is no checkpoint yet')
    )


def _means(totals: Mapping[str, Any]) -> dict[str, Any]:
  """Averages a TrainState's totals over their steps."""
  return {name: total / totals['steps'] for name, total in totals.items() if name != 'steps'}


def _evaluate(run: Run, trained: Sequence[networks.TrainedNetwork]) -> list[evaluate.Evaluation]:
  """Evaluates the network of each phase, and writes and prints the results."""
  workdir, evaluations = run.workdir, []
  for network in trained:
    runtime.progressed()
    predictions = networks.predict_splits(network, run.dataset)
    evaluations.append(evaluate.assess(network.name, network.costs, predictions))
    run.reporter.results(evaluations[-1])
    if jax.process_index() == 0:
      for split, prediction in predictions.items():
        evaluate.save_predictions(prediction, layout.predictions_path(workdir, network.name, split))
  if jax.process_index() == 0:
    folder = layout.evaluation_folder(workdir)
    evaluate.write_tables(evaluations, folder)
    labels = [
      layout.phase_label(network.name, phase)
      for network, phase in zip(trained, run.config.phases, strict=True)
    ]
    evaluate.write_figure(evaluations, folder / 'budget.png', run.config.dataset.name, labels)
  run.reporter.summary(evaluations[-1], workdir)
  return evaluations
