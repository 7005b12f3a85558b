"""How much of the multiply-adds that early exits save is time saved, on this machine?

    python experiments/latency.py runs/mnist5k
    python experiments/latency.py runs/cifar100 --batch_sizes=1,64 --images=512 --output=latency

Classifies test images with the network that a run has trained: by one program that computes the
logits of all exits, by the engine with all images leaving at the same exit, and by the engine with
thresholds of the run's operating points, chosen on validation images. All take turns, some images
each, and times are compared within a repeat, so that what else the machine does hits all alike.
Images are given some at once to `predict`, and the largest batches also to `stream`; images that
fill no batch are left out. For data sets in memory.
"""

import argparse
import csv
import dataclasses
import io
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from benchmarks import common
from etils import epath
from ml_collections import ConfigDict

from imta_jax import command_line, evaluate, networks
from imta_jax import workdir as layout
from imta_jax.adaptive.engine import AdaptiveClassifier, OperatingPoint
from imta_jax.adaptive.engine.compiler import compiler_options
from imta_jax.command_line import list_of, positive
from imta_jax.compilation_cache import set_up_compilation_cache
from imta_jax.data import arrays
from imta_jax.data.pipeline import open_dataset
from imta_jax.data.preprocess import normalize
from imta_jax.errors import UsageError
from imta_jax.workdir import write_whole

FULL, AS_ACCURATE, NEARLY_AS_ACCURATE = 'full network', 'as accurate', 'within 0.5 points'

# The part of the multiply-adds saved that shall be time saved.
GOAL = 0.8
_POINTS_LOST = 0.005
# Of the last exit's multiply-adds, where no budgets are given.
_BUDGETS = (0.25, 0.5, 0.75)
# Small batches that one contestant classifies in a row: calls one after another are the rule.
_IMAGES_A_TURN = 16

# Batches → labels and exits [image], in the batches' order, and the seconds of each call.
Run = Callable[[Sequence[np.ndarray]], tuple[np.ndarray, np.ndarray, list[float]]]


@dataclasses.dataclass(frozen=True)
class Contestant:
  """A way to classify images.

  Attributes:
    name: What tables call it.
    thresholds: [exit], for the engine; None for the program that computes all exits.
    is_adaptive: Whether images leave at different exits.
  """

  name: str
  thresholds: tuple[float, ...] | None
  is_adaptive: bool = False


@dataclasses.dataclass(frozen=True)
class Row:
  """What was measured of a contestant.

  Attributes:
    contestant: Its name.
    is_adaptive: Whether images leave at different exits.
    mode: 'predict' or 'stream'.
    batch_size: Images at once.
    images: Different images that were timed.
    accuracy: Fraction of all test images in use that was classified correctly.
    madds: Average multiply-adds of the images that were timed.
    milliseconds: An image, on average; the median of the repeats.
    images_per_second: Likewise.
    p50: Milliseconds of a call of `predict`, the median of all; None for 'stream'.
    p99: Likewise, the 99th percentile.
    time_ratio: Time by the full network's in the same repeat; the median of the repeats.
    madds_saving: The part of the full network's multiply-adds that is saved.
    time_saving: The part of its time that is saved.
    share: time_saving by madds_saving; None where no multiply-adds are saved.
  """

  contestant: str
  is_adaptive: bool
  mode: str
  batch_size: int
  images: int
  accuracy: float
  madds: float
  milliseconds: float
  images_per_second: float
  p50: float | None
  p99: float | None
  time_ratio: float
  madds_saving: float
  time_saving: float
  share: float | None


def main(arguments: Sequence[str] | None = None) -> None:
  """Runs the command line.

  Raises:
    UsageError: If the workdir has no evaluated network, or too few test images.
  """
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('workdir', help='workdir of a run')
  parser.add_argument(
    '--batch_sizes', type=list_of(positive(int)), default=(1, 16, 256), help='default: 1,16,256'
  )
  parser.add_argument(
    '--budgets',
    type=list_of(positive(float)),
    help="average multiply-adds; default: a quarter, half and three quarters of the last exit's",
  )
  parser.add_argument('--repeats', type=positive(int), default=5, help='default: 5')
  parser.add_argument(
    '--images', type=positive(int), default=1000, help='test images, at most; default: 1000'
  )
  parser.add_argument(
    '--calls', type=positive(int), default=200, help='of a contestant a repeat; default: 200'
  )
  parser.add_argument('--output', help='folder; default: evaluation/latency of the workdir')
  options = parser.parse_args(arguments)
  workdir = epath.Path(options.workdir)
  output = (
    epath.Path(options.output) if options.output else layout.evaluation_folder(workdir) / 'latency'
  )
  set_up_compilation_cache()
  load_average = os.getloadavg()[0]  # Before this program adds to it: what disturbs the times.

  config = layout.load_config(workdir)
  images, labels = test_images(config, options.images)
  if max(options.batch_sizes) > len(images):
    raise UsageError(f'{len(images)} test images do not fill a batch of {max(options.batch_sizes)}')
  classifier = AdaptiveClassifier.from_workdir(workdir).compile()
  name = layout.phase_name(len(config.phases) - 1)
  validation = evaluate.load_predictions(layout.predictions_path(workdir, name, 'validation'))
  contestants = choose_contestants(
    classifier.operating_points, classifier.madds, validation.accuracy()[-1], options.budgets
  )
  network = networks.restore_network(
    config, workdir, len(config.phases) - 1, classifier.num_classes, classifier.image.shape
  )
  full = full_program(network.model, network.variables, config.dataset)
  runs = {
    contestant: {mode: partial(run, full, classifier, contestant, mode) for mode in _MODES}
    for contestant in contestants
  }
  plans = [('predict', size) for size in options.batch_sizes]
  plans.append(('stream', max(options.batch_sizes)))
  accuracies = measure_accuracies(runs, images, labels, max(options.batch_sizes))
  rows = []
  for mode, size in plans:
    rows += measure(
      {contestant: of_mode[mode] for contestant, of_mode in runs.items()},
      batches_of(images, size, options.calls),
      classifier.madds,
      accuracies,
      mode,
      options.repeats,
    )

  command = ' '.join(['python', *(sys.argv if arguments is None else arguments)])
  description = {'command': command, 'machine': common.machine(), 'load_average': load_average}
  write_tables(rows, description, output)
  write_figure(rows, output / 'latency.png', f'{config.dataset.name} on {jax.default_backend()}')
  print(f'{description["machine"]}; load average before: {load_average:.1f}')
  print()
  print(render(rows))
  print()
  print('\n'.join(verdicts(rows)))
  print(f'tables and figure in {output}')


def test_images(config: ConfigDict, count: int) -> tuple[np.ndarray, np.ndarray]:
  """The first test images of a data set in memory.

  Args:
    config: A run's config.
    count: How many, at most.

  Returns:
    Images [image, height, width, channels], unsigned bytes, and labels [image].

  Raises:
    UsageError: If the data set is streamed, or cannot be read.
  """
  if not config.dataset.in_memory:
    raise UsageError(f'{config.dataset.name} is streamed: latency is measured on sets in memory')
  open_dataset(config)  # Stores the arrays.
  stored = arrays.load(config.dataset)
  if stored is None:
    raise UsageError(f'the arrays of {config.dataset.name} could not be kept in the cache folder')
  return stored.images['test'][:count], stored.labels['test'][:count]


def average_madds(point: OperatingPoint, madds: Sequence[float]) -> float:
  """The multiply-adds of a validation image."""
  return float(np.dot(point.exit_fractions, madds))


def cheapest(
  operating_points: Sequence[OperatingPoint], madds: Sequence[float], accuracy: float
) -> OperatingPoint | None:
  """The setting of the fewest multiply-adds that is so accurate on validation images, if any is."""
  accurate = [point for point in operating_points if point.accuracy >= accuracy]
  return min(accurate, key=lambda point: average_madds(point, madds), default=None)


def dearest(
  operating_points: Sequence[OperatingPoint], madds: Sequence[float], budget: float
) -> OperatingPoint | None:
  """The setting of the most multiply-adds within a budget, if any is."""
  within = [point for point in operating_points if average_madds(point, madds) <= budget]
  return max(within, key=lambda point: average_madds(point, madds), default=None)


def choose_contestants(
  operating_points: Sequence[OperatingPoint],
  madds: Sequence[float],
  last_accuracy: float,
  budgets: Sequence[float] | None = None,
) -> list[Contestant]:
  """Who is measured.

  Args:
    operating_points: A classifier's.
    madds: [exit].
    last_accuracy: Of the last exit, on validation images.
    budgets: Average multiply-adds, or None for some that are spread.

  Returns:
    The full network, the engine at each exit, and the operating points that exist: the cheapest as
    accurate as the last exit, the cheapest half a point below it, the dearest within each budget.
  """
  num_exits = len(madds)
  contestants = [Contestant(FULL, None)]
  for index in range(num_exits):
    thresholds = (np.inf,) * index + (-np.inf,) * (num_exits - index)
    contestants.append(Contestant(f'exit {index + 1}', thresholds))
  if budgets is None:
    budgets = [part * madds[-1] for part in _BUDGETS]
  chosen = {
    AS_ACCURATE: cheapest(operating_points, madds, last_accuracy),
    NEARLY_AS_ACCURATE: cheapest(operating_points, madds, last_accuracy - _POINTS_LOST),
    **{f'budget {budget:,.0f}': dearest(operating_points, madds, budget) for budget in budgets},
  }
  contestants += [
    Contestant(name, tuple(point.thresholds), is_adaptive=True)
    for name, point in chosen.items()
    if point is not None
  ]
  return contestants


def full_program(
  model: networks.MultiExitNetwork, variables: Mapping, dataset: ConfigDict
) -> Callable[[np.ndarray], jax.Array]:
  """One program from images, unsigned bytes, to the logits [exit, image, class] of all exits."""
  variables = jax.device_put(variables)

  @partial(jax.jit, compiler_options=compiler_options())
  def logits(variables, images):
    return model.apply(variables, normalize(images, dataset.mean, dataset.std))

  return partial(logits, variables)


def run(
  full: Callable[[np.ndarray], jax.Array],
  classifier: AdaptiveClassifier,
  contestant: Contestant,
  mode: str,
  batches: Sequence[np.ndarray],
) -> tuple[np.ndarray, np.ndarray, list[float]]:
  """Classifies batches, see Run."""
  if contestant.thresholds is None:
    return _call_each(partial(_all_exits, full), batches)
  if mode == 'predict':
    return _call_each(partial(_predict, classifier, contestant.thresholds), batches)
  start = time.perf_counter()
  parts = list(classifier.stream(batches, contestant.thresholds))
  seconds = time.perf_counter() - start
  order = np.argsort(np.concatenate([part.indices for part in parts]))
  labels, exits = (
    np.concatenate([getattr(part, name) for part in parts])[order] for name in ('labels', 'exits')
  )
  return labels, exits, [seconds]


_MODES = ('predict', 'stream')


def _call_each(classify, batches):
  labels, exits, seconds = [], [], []
  for batch in batches:
    start = time.perf_counter()
    answer = classify(batch)
    seconds.append(time.perf_counter() - start)
    labels.append(answer[0])
    exits.append(answer[1])
  return np.concatenate(labels), np.concatenate(exits), seconds


def _all_exits(full, batch):
  logits = np.asarray(full(batch))
  return logits[-1].argmax(axis=-1), np.full(len(batch), len(logits) - 1)


def _predict(classifier, thresholds, batch):
  answers = classifier.predict(batch, thresholds)
  return answers.labels, answers.exits


def batches_of(images: np.ndarray, size: int, most: int) -> list[np.ndarray]:
  """Full batches, as many as there are up to `most`, of images from all over the array."""
  count = min(len(images) // size, most)
  chosen = np.linspace(0, len(images) - 1, count * size).round().astype(int)
  return list(images[chosen].reshape(count, size, *images.shape[1:]))


def measure_accuracies(
  runs: Mapping[Contestant, Mapping[str, Run]],
  images: np.ndarray,
  labels: np.ndarray,
  batch_size: int,
) -> dict[Contestant, float]:
  """The fraction of the images that each contestant classifies correctly."""
  batches = [images[i : i + batch_size] for i in range(0, len(images), batch_size)]
  return {
    contestant: float((of_mode['predict'](batches)[0] == labels).mean())
    for contestant, of_mode in runs.items()
  }


def measure(
  runs: Mapping[Contestant, Run],
  batches: Sequence[np.ndarray],
  madds: Sequence[float],
  accuracies: Mapping[Contestant, float],
  mode: str,
  repeats: int,
) -> list[Row]:
  """Times contestants, who take turns.

  Args:
    runs: By contestant, the full network among them.
    batches: Of one size.
    madds: [exit].
    accuracies: By contestant.
    mode: 'predict' or 'stream', for the rows.
    repeats: How often each classifies the batches.

  Returns:
    A row a contestant.
  """
  size, count = len(batches[0]), sum(map(len, batches))
  a_turn = len(batches) if mode == 'stream' else max(1, _IMAGES_A_TURN // size)
  turns = [batches[start : start + a_turn] for start in range(0, len(batches), a_turn)]
  exits = {contestant: [] for contestant in runs}
  seconds = {contestant: [[] for _ in range(repeats)] for contestant in runs}
  for contestant_run in runs.values():
    contestant_run(turns[0])  # Whatever is still to compile, and the first touch of memory.
  for repeat in range(repeats):
    for turn in turns:
      for contestant, contestant_run in runs.items():
        _, turn_exits, calls = contestant_run(turn)
        seconds[contestant][repeat] += calls
        exits[contestant].append(turn_exits)
  totals = {
    contestant: np.array([sum(calls) for calls in seconds[contestant]]) for contestant in runs
  }
  full = next(contestant for contestant in runs if contestant.name == FULL)
  rows = []
  for contestant in runs:
    average = float(np.asarray(madds)[np.concatenate(exits[contestant])].mean())
    ratio = float(np.median(totals[contestant] / totals[full]))
    total = float(np.median(totals[contestant]))
    calls = np.concatenate(seconds[contestant])
    p50, p99 = (None, None) if mode == 'stream' else 1000 * np.percentile(calls, (50, 99))
    rows.append(
      Row(
        contestant.name,
        contestant.is_adaptive,
        mode,
        size,
        count,
        accuracies[contestant],
        average,
        1000 * total / count,
        count / total,
        p50,
        p99,
        ratio,
        *savings(average / madds[-1], ratio),
      )
    )
  return rows


def savings(madds_ratio: float, time_ratio: float) -> tuple[float, float, float | None]:
  """What is saved of multiply-adds and of time, and the latter by the former.

  Args:
    madds_ratio: Multiply-adds by those of the full network.
    time_ratio: Time by that of the full network.

  Returns:
    Two fractions, and their ratio, or None where no multiply-adds are saved.
  """
  saved_madds, saved_time = 1 - madds_ratio, 1 - time_ratio
  return saved_madds, saved_time, saved_time / saved_madds if saved_madds > 0 else None


def verdicts(rows: Sequence[Row]) -> list[str]:
  """Lines: the share of the saving that is real, and who is slower than the full network."""
  lines = []
  chosen = [row for row in rows if row.contestant == NEARLY_AS_ACCURATE]
  for row in chosen:
    share = 'none' if row.share is None else f'{100 * row.share:.0f} %'
    is_met = row.share is not None and row.share >= GOAL
    lines.append(
      f'{row.contestant}, {row.mode} {row.batch_size}: {share} of the multiply-adds saved are time '
      f'saved; goal {100 * GOAL:.0f} %: {"met" if is_met else "missed"}'
    )
  if not chosen:
    lines.append('no setting is within 0.5 points of the last exit on validation images')
  slower = [
    f'{row.contestant}, {row.mode} {row.batch_size} ({100 * row.time_ratio - 100:+.0f} %)'
    for row in rows
    if row.time_ratio > 1
  ]
  lines.append(f'slower than the full network: {"; ".join(slower) or "none"}')
  return lines


_HEADINGS = (
  *('mode', 'batch', 'contestant', 'accuracy %', 'multiply-adds', 'ms/image', 'images/s'),
  *('p50 ms', 'p99 ms', 'saved madds %', 'saved time %', 'share %'),
)


def render(rows: Sequence[Row]) -> str:
  """A table to print."""
  return common.table(
    _HEADINGS,
    [
      (
        row.mode,
        row.batch_size,
        row.contestant,
        f'{100 * row.accuracy:.1f}',
        f'{row.madds:,.0f}',
        f'{row.milliseconds:.3f}',
        f'{row.images_per_second:,.0f}',
        *('' if value is None else f'{value:.2f}' for value in (row.p50, row.p99)),
        f'{100 * row.madds_saving:.0f}',
        f'{100 * row.time_saving:.0f}',
        '' if row.share is None else f'{100 * row.share:.0f}',
      )
      for row in rows
    ],
  )


def write_tables(rows: Sequence[Row], description: Mapping[str, Any], folder: epath.Path) -> None:
  """Writes latency.csv and latency.json."""
  records = [
    {
      name: float(f'{value:.6g}') if isinstance(value, float) else value
      for name, value in dataclasses.asdict(row).items()
    }
    for row in rows
  ]
  folder.mkdir(parents=True, exist_ok=True)
  content = json.dumps({**description, 'rows': records}, indent=2) + '\n'
  write_whole(folder / 'latency.json', content.encode())
  table = io.StringIO()
  writer = csv.DictWriter(table, records[0], lineterminator='\n')
  writer.writeheader()
  writer.writerows(records)
  write_whole(folder / 'latency.csv', table.getvalue().encode())


def write_figure(rows: Sequence[Row], path: epath.Path, title: str) -> None:
  """Draws accuracy against multiply-adds, and against time for each batch size."""
  from matplotlib.figure import Figure
  from matplotlib.ticker import LogLocator, NullFormatter

  figure = Figure(figsize=(10, 4.4), layout='constrained')
  by_madds, by_time = figure.subplots(1, 2, sharey=True)
  groups = {}
  for row in rows:
    name = f'{row.batch_size} at once' if row.mode == 'predict' else 'stream'
    groups.setdefault(name, []).append(row)
  _draw(by_madds, groups['stream'], lambda row: row.madds / 1e6, 'black', None)
  for index, (name, group) in enumerate(groups.items()):
    _draw(by_time, group, lambda row: row.milliseconds, f'C{index}', name)
  for marker, name in (('*', 'full network'), ('o', 'one exit for all images'), ('.-', 'adaptive')):
    by_madds.plot([], [], marker, color='black', fillstyle='none', label=name)
  by_madds.set(xlabel='average multiply-adds an image (million)', ylabel='test accuracy (%)')
  by_time.set(xlabel='average time an image (ms)', xscale='log')
  by_time.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
  by_time.xaxis.set_major_formatter('{x:g}')
  by_time.xaxis.set_minor_formatter(NullFormatter())
  for axes in (by_madds, by_time):
    axes.grid(alpha=0.3)
    axes.legend()
  figure.suptitle(title)
  content = io.BytesIO()
  figure.savefig(content, format='png', dpi=150)
  write_whole(path, content.getvalue())


def _draw(axes, rows, cost, color, label):
  full, *others = rows
  adaptive = sorted((row for row in others if row.is_adaptive), key=cost)
  fixed = [row for row in others if not row.is_adaptive]
  for group, marker, size in (([full], '*', 10), (fixed, 'o', 5)):
    axes.plot(
      *zip(*((cost(row), 100 * row.accuracy) for row in group), strict=True),
      marker,
      color=color,
      markersize=size,
      fillstyle='none',
    )
  points = [(cost(row), 100 * row.accuracy) for row in adaptive]
  axes.plot(*(zip(*points, strict=True) if points else ([], [])), '.-', color=color, label=label)


if __name__ == '__main__':
  command_line.run(main)
