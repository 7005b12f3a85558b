"""The training loop: phases, steps, validation and checkpoints; then the final evaluation."""

import collections
import contextlib
import dataclasses
import functools
import math
import os
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
from imta_jax.data import image_folder
from imta_jax.data.dataset import Dataset
from imta_jax.data.pipeline import open_dataset
from imta_jax.errors import UsageError
from imta_jax.training import checkpoint, steps, train_state, workdir_lock
from imta_jax.training import workdir as layout
from imta_jax.training.console import PhaseProgress, Reporter
from imta_jax.training.events import Events
from imta_jax.training.metrics import Metrics, has_tensorboard
from imta_jax.training.packing import pack
from imta_jax.training.phases import Phase
from imta_jax.training.profiling import Profile
from imta_jax.training.restore import TrainedNetwork, chosen_state, load_variables
from imta_jax.training.signals import StopRequest

# Enough to keep the devices busy, few enough that their batches fit in memory.
_DISPATCHES_IN_FLIGHT = 2


def train_and_evaluate(
  config: ConfigDict, workdir: str | os.PathLike[str], *, handle_signals: bool = False
) -> list[evaluate.Evaluation]:
  """Trains all phases, resuming where a previous run stopped, and evaluates each network.

  Args:
    config: A complete config; see imta_jax.config.
    workdir: The run's folder, which is created if necessary.
    handle_signals: Whether SIGTERM and Ctrl-C stop the run after its state has been saved; only in
      the main thread. Preemption notices of several hosts always do.

  Returns:
    One evaluation per phase.

  Raises:
    UsageError: If the config does not match the data, the devices or the workdir, if the data has
      changed since the workdir was first trained in, or if the loss is not finite.
    SystemExit: If a signal asked the run to stop; its state has been saved. While there is nothing
      to save, a signal ends the process at once.

  Example:
    >>> import imta_jax
    >>> config = imta_jax.load_config('mnist5k')
    >>> evaluations = imta_jax.train_and_evaluate(config, 'runs/mnist5k')  # doctest: +SKIP
  """
  workdir = layout.open_workdir(workdir)
  config_lib.validate(config)  # Before importing TensorFlow, which takes seconds.
  evaluate.require_matplotlib()  # The figure comes last.
  with runtime.watchdog():
    dataset = open_dataset(config)
    with workdir_lock.hold(workdir), StopRequest(handle_signals) as stop:
      layout.claim(
        config,
        workdir,
        dataset.class_names,
        num_images=dataset.num_images,
        fingerprint=dataset.fingerprint(),
      )
      run = _Run(config, workdir, dataset, Reporter(), stop)
      return run.evaluate_networks(run.train_networks())


@dataclasses.dataclass(frozen=True)
class _Run:
  """A run in a workdir that no other run uses."""

  config: ConfigDict
  workdir: epath.Path
  dataset: Dataset
  reporter: Reporter
  stop: StopRequest

  def train_networks(self) -> list[TrainedNetwork]:
    """Trains all phases."""
    self.reporter.say(
      f'{image_folder.title(self.config.dataset)}: '
      + ', '.join(f'{count:,} {split}' for split, count in self.dataset.num_images.items())
      + f' images · {jax.device_count()} × {jax.devices()[0].device_kind}, '
      f'{jax.process_count()} host(s) · workdir {self.workdir}'
    )
    if self.config.tensorboard and not has_tensorboard():
      self.reporter.say(
        'TensorFlow is not installed: metrics go to metrics.jsonl, not to TensorBoard.'
      )
    trained: list[TrainedNetwork] = []
    for index in range(len(self.config.phases)):
      runtime.progressed()
      trained.append(self._train_phase(index, trained[-1] if trained else None))
    return trained

  def _train_phase(self, index: int, predecessor: TrainedNetwork | None) -> TrainedNetwork:
    """Trains a phase, resuming if it was interrupted, and restores its chosen state."""
    phase = self._set_up_phase(index, predecessor)
    if phase.loaded:
      self.reporter.say(f'{phase.name} starts from {self.config.init_from}: {phase.loaded}.')
    self.reporter.overview(
      f'{phase.name}: {phase.config.loss}, trains {phase.config.trained}, '
      f'{phase.num_steps:,} steps',
      phase.costs,
    )
    folder = layout.checkpoint_folder(self.workdir, phase.name)
    with checkpoint.Checkpoints(folder) as checkpoints:
      with self._open_session(index, phase, checkpoints) as session:
        session.take_all_steps()
      chosen = chosen_state(checkpoints, phase.state, phase.config, phase.name, self.workdir)
    self.reporter.say(
      f'{phase.name} is finished; its {phase.config.chosen_state} state is from step '
      f'{int(chosen.step):,}.'
    )
    self.stop.has_unsaved_steps = False
    if self.stop.requested():
      self.stop.leave('run the same command again to go on.')
    return TrainedNetwork(phase.name, phase.model, chosen.weights, phase.predict, phase.costs)

  def _set_up_phase(self, index: int, predecessor: TrainedNetwork | None) -> Phase:
    donor = None
    if predecessor is None and self.config.init_from is not None:
      donor = functools.partial(load_variables, self.config.init_from)
    return Phase(
      self.config,
      index,
      None if predecessor is None else (predecessor.model, predecessor.weights.variables),
      donor,
      num_classes=len(self.dataset.class_names),
      image_shape=self.dataset.image_shape,
      steps_per_epoch=self.dataset.steps_per_epoch,
    )

  @contextlib.contextmanager
  def _open_session(
    self, index: int, phase: Phase, checkpoints: checkpoint.Checkpoints
  ) -> Iterator['_Session']:
    """Restores the latest state of a phase and opens what its steps read and write."""
    config, dataset = self.config, self.dataset
    restored = checkpoints.restore(phase.state)
    state = runtime.replicate(phase.state if restored is None else restored)
    step = int(state.step)
    if 0 < step < phase.num_steps:
      self.reporter.say(f'{phase.name} resumes from step {step:,}.')
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
    tensorboard = layout.tensorboard_folder(self.workdir, phase.name)
    writes_tensorboard = config.tensorboard and has_tensorboard()
    metrics = Metrics(
      layout.metrics_path(self.workdir),
      phase.name,
      step,
      tensorboard if writes_tensorboard else None,
    )
    progress = self.reporter.progress(phase.name, events, config.batch_size)
    with metrics, Profile(tensorboard, events.profile) as profile, progress as bar:
      yield _Session(
        self,
        phase,
        events,
        step,
        state,
        teacher=runtime.replicate(pack(phase.teacher)),
        read=dataset.train_reader(index, step),
        train=steps.on_devices(
          loop,
          (None, None, dataset.source_axes, None),
          donated=(0,),
          cuda_graphs=config.cuda_graphs,
        ),
        checkpoints=checkpoints,
        metrics=metrics,
        profile=profile,
        progress=bar,
      )

  def evaluate_networks(self, trained: Sequence[TrainedNetwork]) -> list[evaluate.Evaluation]:
    """Evaluates the network of each phase, and writes and prints the results."""
    evaluations = []
    for of_phase in trained:
      runtime.progressed()
      predictions = evaluate.predict_splits(of_phase.predict, of_phase.weights, self.dataset)
      evaluations.append(evaluate.assess(of_phase.name, of_phase.costs, predictions))
      self.reporter.results(evaluations[-1])
      if jax.process_index() == 0:
        for split, prediction in predictions.items():
          path = layout.predictions_path(self.workdir, of_phase.name, split)
          evaluate.save_predictions(prediction, path)
        scores_path = layout.scores_path(self.workdir, of_phase.name)
        evaluate.save_scores(predictions['validation'], scores_path)
    if jax.process_index() == 0:
      folder = layout.evaluation_folder(self.workdir)
      evaluate.write_tables(evaluations, folder)
      labels = [
        layout.phase_label(of_phase.name, phase)
        for of_phase, phase in zip(trained, self.config.phases, strict=True)
      ]
      title = image_folder.title(self.config.dataset)
      evaluate.write_figure(evaluations, folder / 'budget.png', title, labels)
    self.reporter.summary(evaluations[-1], self.workdir)
    return evaluations


@dataclasses.dataclass
class _Session:
  """A phase in training: its state on the devices, and what the host does between its steps."""

  run: _Run
  phase: Phase
  events: Events
  step: int
  state: train_state.TrainState
  teacher: Any
  read: Callable[[int], Any]
  train: Callable
  checkpoints: checkpoint.Checkpoints
  metrics: Metrics
  profile: Profile
  progress: PhaseProgress
  epoch_totals: dict[str, Any] | None = None
  in_flight: collections.deque = dataclasses.field(default_factory=collections.deque)
  start: float = dataclasses.field(default_factory=time.monotonic)
  last_save: float = dataclasses.field(default_factory=time.monotonic)

  def take_all_steps(self) -> None:
    """The training loop of a phase: takes steps up to the next event, and handles it."""
    while self.step < self.events.num_steps:
      self.take_steps(self.events.next_after(self.step))
      if self.events.logs_at(self.step):
        self.log()
      accuracy = None
      if self.events.validates_at(self.step):
        accuracy = self.validate()
        self.save(accuracy)
      elif self.events.logs_at(self.step) and self.is_save_due():
        self.save()
      if self.events.ends_epoch_at(self.step):
        self.report_epoch(accuracy)
      if self.run.stop.requested() and self.step < self.events.num_steps:
        self.save()
        self.checkpoints.wait()
        self.run.stop.leave(
          f'{self.phase.name} was saved at step {self.step:,}; run the same command again to '
          'resume.'
        )

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
    validation = evaluate.predict(self.phase.predict, self.state.weights, batches)
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
    assert self.epoch_totals is not None  # `log` comes first.
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


def _steps_per_dispatch(config: ConfigDict) -> int | None:
  """Returns how many steps to send to the devices at once; None for all up to the next event."""
  has_single_steps = jax.default_backend() == 'cpu' or not config.dataset.in_memory
  if config.steps_per_dispatch is None and has_single_steps:
    return 1  # On CPUs loops are slow (`steps.make_train_loop`); streams have batches one by one.
  return config.steps_per_dispatch
