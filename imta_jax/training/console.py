"""What a person at a terminal sees; without a terminal, a line per epoch and tables."""

import contextlib
import datetime
import time
from collections.abc import Iterator, Mapping, Sequence

import jax
import numpy as np
from etils import epath
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Table

from imta_jax.adaptive.cost import ExitCost
from imta_jax.adaptive.policy import cheapest_as_accurate
from imta_jax.evaluate import Evaluation
from imta_jax.training.events import Events


class Reporter:
  """Prints on the first host; prints nothing on the others."""

  def __init__(self):
    # Of a notebook, Rich would make every line an output of its own.
    force = False if Console().is_jupyter else None
    self._console = Console(
      quiet=jax.process_index() > 0, highlight=False, force_jupyter=force, force_terminal=force
    )

  def say(self, text: str) -> None:
    """Prints a line."""
    self._console.print(text, markup=False, soft_wrap=True)

  def overview(self, title: str, costs: Sequence[ExitCost]) -> None:
    """Prints cost and parameters up to each exit, and the parameters that each exit adds."""
    added = np.diff([cost.params for cost in costs], prepend=0)
    self._table(
      title,
      ('exit', 'multiply-adds', 'parameters', 'added here'),
      [(f'{c.madds:,}', f'{c.params:,}', f'{n:,}') for c, n in zip(costs, added, strict=True)],
    )

  def results(self, evaluation: Evaluation) -> None:
    """Prints the table of exits."""
    columns = [evaluation.accuracies[key] for key in (('validation', 1), ('test', 1), ('test', 5))]
    self._table(
      f'{evaluation.name}: accuracy of each exit for all images',
      ('exit', 'multiply-adds', 'parameters', 'validation', 'test', 'test top-5'),
      [
        (f'{cost.madds:,}', f'{cost.params:,}', *(f'{100 * x:.2f} %' for x in accuracies))
        for cost, *accuracies in zip(evaluation.costs, *columns, strict=True)
      ],
    )

  def summary(self, evaluation: Evaluation, workdir: epath.Path) -> None:
    """Prints what early exits save, and where the results are."""
    last = evaluation.costs[-1].madds
    target = evaluation.accuracies['validation', 1][-1]
    point = cheapest_as_accurate(evaluation.points, target)
    if point is not None:
      self.say(
        f'With early exits, {100 * point.test_accuracy:.2f} % of the test images are classified '
        f"correctly at {point.test_madds / last:.0%} of the last exit's multiply-adds "
        f'(p = {point.parameter:g}; the last exit alone: '
        f'{100 * evaluation.accuracies["test", 1][-1]:.2f} %).'
      )
    for name, content in (
      ('evaluation/budget.png', 'accuracy against average multiply-adds'),
      ('evaluation/', 'tables of budgets and exits as CSV and JSON; logits'),
      ('checkpoints/', 'latest and best states of each phase'),
      ('metrics.jsonl', 'metrics of each phase, one line per write'),
      ('tensorboard/', f'tensorboard --logdir {workdir / "tensorboard"}'),
    ):
      if (workdir / name).exists():
        self.say(f'  {workdir / name}  {content}')

  def epoch(
    self,
    name: str,
    epoch: int,
    num_epochs: int,
    means: Mapping[str, np.ndarray],
    validation_accuracy: np.ndarray | None,
    images_per_second: float | None,
  ) -> None:
    """Prints a line per epoch, with the accuracies of the first and the last exit."""
    parts = [
      f'{name} epoch {epoch}/{num_epochs}',
      f'loss {means["loss"]:.4f}',
      f'train {_first_and_last(means["accuracy"])}',
    ]
    if validation_accuracy is not None:
      parts.append(f'validation {_first_and_last(validation_accuracy)}')
    if images_per_second is not None:
      parts.append(f'{images_per_second:,.0f} images/s')
    self.say('  '.join(parts))

  @contextlib.contextmanager
  def progress(self, name: str, events: Events, batch_size: int) -> Iterator['PhaseProgress']:
    """A live line with throughput and time left, if there is a terminal."""
    columns = (
      TextColumn('{task.description}'),
      BarColumn(bar_width=24),
      TextColumn('{task.completed}/{task.total}  {task.fields[status]}'),
    )
    hidden = not self._console.is_terminal
    with Progress(*columns, console=self._console, disable=hidden, transient=True) as bar:
      task = bar.add_task(
        name, total=events.num_steps, completed=events.first_step, status='compiling …'
      )
      yield PhaseProgress(bar, task, events, batch_size)

  def _table(self, title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    self.say(title)
    table = Table()
    for heading in headings:
      table.add_column(heading, justify='right', no_wrap=True)
    for number, row in enumerate(rows, start=1):
      table.add_row(str(number), *row)
    self._console.print(table)


class PhaseProgress:
  """Measures a phase's speed and shows it on the live line."""

  def __init__(self, bar: Progress, task: TaskID, events: Events, batch_size: int):
    self._bar, self._task = bar, task
    self._events, self._batch_size = events, batch_size
    self._epoch_steps, self._epoch_seconds = 0, 0.0
    self.start_interval(events.first_step)

  def start_interval(self, step: int) -> None:
    """Restarts the measurement; compiling, validation and what is written do not count."""
    self._start, self._start_step, self._waited = time.monotonic(), step, 0.0

  @contextlib.contextmanager
  def waiting_for_data(self) -> Iterator[None]:
    """Counts the time inside as time in which the devices may have waited for data."""
    start = time.monotonic()
    yield
    self._waited += time.monotonic() - start

  def update(self, step: int, loss: float) -> dict[str, float]:
    """Moves the live line to a finished step.

    Returns:
      The speed since the last `start_interval` as metrics; empty if no steps were taken since.
    """
    num_steps, elapsed = step - self._start_step, time.monotonic() - self._start
    rate = num_steps / elapsed
    self._epoch_steps += num_steps
    self._epoch_seconds += elapsed
    last = self._events.num_steps
    epoch_end = -(-step // self._events.steps_per_epoch) * self._events.steps_per_epoch
    self._bar.update(
      self._task,
      completed=step,
      status=(
        f'loss {loss:.4f}  {rate * self._batch_size:,.0f} images/s  '
        f'left: epoch {_duration(min(epoch_end, last) - step, rate)}, '
        f'phase {_duration(last - step, rate)}'
      ),
    )
    if not num_steps:
      return {}
    return {
      'speed/steps_per_second': rate,
      'speed/images_per_second': rate * self._batch_size,
      'speed/fraction_waiting_for_data': self._waited / elapsed,
    }

  def images_per_second(self) -> float | None:
    """Returns the speed since the last call, over all intervals together; None without steps."""
    num_images, seconds = self._epoch_steps * self._batch_size, self._epoch_seconds
    self._epoch_steps, self._epoch_seconds = 0, 0.0
    return num_images / seconds if num_images else None


def _first_and_last(accuracy: np.ndarray) -> str:
  return f'{100 * accuracy[0]:.1f} … {100 * accuracy[-1]:.1f} %'


def _duration(num_steps: int, rate: float) -> str:
  return str(datetime.timedelta(seconds=round(num_steps / rate))) if rate else '…'
