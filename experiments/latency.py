"""How much of the multiply-adds that early exits save is time saved on this machine?

    python experiments/latency.py runs/mnist5k
    python experiments/latency.py runs/cifar100 --batch_sizes=1,64 --images=512 --output=latency

Classifies test images with a trained network in several ways: by one program that computes the
logits of all exits, by the engine with all images leaving at the same exit, and by the engine with
thresholds that were chosen on validation images. The methods take turns on a few images each and
are compared within a repeat, so that other load on the machine affects all of them alike. Images
are given to `predict` in batches of each size, and to `stream` in batches of the largest; images
that fill no batch are left out. For data sets that are kept in memory.

The times are kept in latency.json; latency_report.py says how savings follow from them.
"""

import argparse
import dataclasses
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import jax
import numpy as np
from benchmarks import common
from etils import epath
from latency_report import NEARLY_AS_ACCURATE, Timing, report, write_timings
from ml_collections import ConfigDict

from imta_jax import command_line, evaluate
from imta_jax.adaptive.engine import AdaptiveClassifier, OperatingPoint
from imta_jax.adaptive.engine.compiler import compiler_options
from imta_jax.command_line import list_of, positive
from imta_jax.data import arrays
from imta_jax.data.pipeline import open_dataset
from imta_jax.data.preprocess import normalize
from imta_jax.errors import UsageError
from imta_jax.runtime import set_up_compilation_cache
from imta_jax.training import networks
from imta_jax.training import workdir as layout

ALL_EXITS, AS_ACCURATE = 'all exits', 'as accurate'

_POINTS_LOST = 0.005  # Of NEARLY_AS_ACCURATE.
# Default budgets, as fractions of the last exit's multiply-adds.
_BUDGETS = (0.25, 0.5, 0.75)
# A method classifies so many images in a row, as in use, where calls follow each other.
_IMAGES_PER_TURN = 16

# Batches → labels and exits [image], in the batches' order, and the seconds of each call.
Run = Callable[[Sequence[np.ndarray]], tuple[np.ndarray, np.ndarray, list[float]]]


@dataclasses.dataclass(frozen=True)
class Method:
  """A way to classify images.

  Attributes:
    name: What tables call it.
    thresholds: [exit], for the engine; None for the program that computes all exits.
    is_adaptive: Whether images leave at different exits.
  """

  name: str
  thresholds: tuple[float, ...] | None
  is_adaptive: bool = False


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
    '--images',
    type=positive(int),
    default=1000,
    help='number of test images, at most; default: 1000',
  )
  parser.add_argument(
    '--calls',
    type=positive(int),
    default=200,
    help='calls per method and repeat, at most; default: 200',
  )
  parser.add_argument(
    '--sweep',
    choices=('geometric', 'optimal'),
    default='geometric',
    help='thresholds to choose from; see docs/thresholds.md; default: %(default)s',
  )
  parser.add_argument(
    '--output',
    type=command_line.output_folder,
    help='folder; default: evaluation/latency of the workdir',
  )
  options = parser.parse_args(arguments)
  workdir = epath.Path(options.workdir)
  output = (
    epath.Path(options.output) if options.output else layout.evaluation_folder(workdir) / 'latency'
  )
  set_up_compilation_cache()
  load_average = os.getloadavg()[0]  # Of other programs, before this one adds to it.

  config = layout.load_config(workdir)
  images, labels = test_images(config, options.images)
  if max(options.batch_sizes) > len(images):
    raise UsageError(f'{len(images)} test images do not fill a batch of {max(options.batch_sizes)}')
  classifier = AdaptiveClassifier.from_workdir(workdir, sweep=options.sweep).compile()
  name = layout.phase_name(len(config.phases) - 1)
  validation = evaluate.load_predictions(layout.predictions_path(workdir, name, 'validation'))
  methods = choose_methods(
    classifier.operating_points, classifier.madds, validation.accuracy()[-1], options.budgets
  )
  network = networks.restore_network(
    config, workdir, len(config.phases) - 1, classifier.num_classes, classifier.image.shape
  )
  full = full_program(network.model, network.weights.variables, config.dataset)
  runs = {
    method: {mode: partial(run, full, classifier, method, mode) for mode in _MODES}
    for method in methods
  }
  plans = [('predict', size) for size in options.batch_sizes]
  plans.append(('stream', max(options.batch_sizes)))
  accuracies = measure_accuracies(runs, images, labels, max(options.batch_sizes))
  timings = []
  for mode, size in plans:
    timings += measure(
      {method: of_mode[mode] for method, of_mode in runs.items()},
      batches_of(images, size, options.calls),
      classifier.madds,
      accuracies,
      mode,
      options.repeats,
    )

  description = {
    'title': f'{config.dataset.name} on {jax.default_backend()}',
    'command': ' '.join(['python', *(sys.argv if arguments is None else arguments)]),
    'machine': common.machine(),
    'load_average': load_average,
  }
  write_timings(timings, description, output)
  report(timings, description, output)


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
  """The average multiply-adds per validation image."""
  return float(np.dot(point.exit_fractions, madds))


def cheapest(
  operating_points: Sequence[OperatingPoint], madds: Sequence[float], accuracy: float
) -> OperatingPoint | None:
  """The point of the fewest multiply-adds among those of at least this validation accuracy."""
  accurate = [point for point in operating_points if point.accuracy >= accuracy]
  return min(accurate, key=lambda point: average_madds(point, madds), default=None)


def most_expensive(
  operating_points: Sequence[OperatingPoint], madds: Sequence[float], budget: float
) -> OperatingPoint | None:
  """The point of the most multiply-adds among those within a budget."""
  within = [point for point in operating_points if average_madds(point, madds) <= budget]
  return max(within, key=lambda point: average_madds(point, madds), default=None)


def choose_methods(
  operating_points: Sequence[OperatingPoint],
  madds: Sequence[float],
  last_accuracy: float,
  budgets: Sequence[float] | None = None,
) -> list[Method]:
  """The methods to measure.

  Args:
    operating_points: Those of a classifier.
    madds: [exit].
    last_accuracy: Validation accuracy of the last exit.
    budgets: Average multiply-adds per image, or None for the default.

  Returns:
    The program that computes all exits; the engine at each exit; and, as far as they exist, the
    cheapest point as accurate as the last exit, the cheapest half a point below it, and the most
    expensive within each budget.
  """
  num_exits = len(madds)
  methods = [Method(ALL_EXITS, None)]
  for index in range(num_exits):
    thresholds = (np.inf,) * index + (-np.inf,) * (num_exits - index)
    methods.append(Method(f'exit {index + 1}', thresholds))
  if budgets is None:
    budgets = [part * madds[-1] for part in _BUDGETS]
  chosen = {
    AS_ACCURATE: cheapest(operating_points, madds, last_accuracy),
    NEARLY_AS_ACCURATE: cheapest(operating_points, madds, last_accuracy - _POINTS_LOST),
    **{
      f'budget {budget:,.0f}': most_expensive(operating_points, madds, budget) for budget in budgets
    },
  }
  methods += [
    Method(name, tuple(point.thresholds), is_adaptive=True)
    for name, point in chosen.items()
    if point is not None
  ]
  return methods


def full_program(
  model: networks.MultiExitNetwork, variables: Mapping, dataset: ConfigDict
) -> Callable[[np.ndarray], jax.Array]:
  """One program from uint8 images to the logits [exit, image, class] of all exits."""
  variables = jax.device_put(variables)

  @partial(jax.jit, compiler_options=compiler_options())
  def logits(variables, images):
    return model.apply(variables, normalize(images, dataset.mean, dataset.std))

  return partial(logits, variables)


def run(
  full: Callable[[np.ndarray], jax.Array],
  classifier: AdaptiveClassifier,
  method: Method,
  mode: str,
  batches: Sequence[np.ndarray],
) -> tuple[np.ndarray, np.ndarray, list[float]]:
  """Classifies batches, see Run."""
  if method.thresholds is None:
    return _call_each(partial(_all_exits, full), batches)
  if mode == 'predict':
    return _call_each(partial(_predict, classifier, method.thresholds), batches)
  start = time.perf_counter()
  parts = list(classifier.stream(batches, method.thresholds))
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
  runs: Mapping[Method, Mapping[str, Run]],
  images: np.ndarray,
  labels: np.ndarray,
  batch_size: int,
) -> dict[Method, float]:
  """The fraction of the images that each method classifies correctly."""
  batches = [images[i : i + batch_size] for i in range(0, len(images), batch_size)]
  return {
    method: float((of_mode['predict'](batches)[0] == labels).mean())
    for method, of_mode in runs.items()
  }


def measure(
  runs: Mapping[Method, Run],
  batches: Sequence[np.ndarray],
  madds: Sequence[float],
  accuracies: Mapping[Method, float],
  mode: str,
  repeats: int,
) -> list[Timing]:
  """Times methods in turns.

  Args:
    runs: By method; the program that computes all exits is among them.
    batches: Batches of one size.
    madds: [exit].
    accuracies: By method.
    mode: 'predict' or 'stream', for the timings.
    repeats: How often each method classifies the batches.

  Returns:
    A timing per method.
  """
  size, count = len(batches[0]), sum(map(len, batches))
  per_turn = len(batches) if mode == 'stream' else max(1, _IMAGES_PER_TURN // size)
  turns = [batches[start : start + per_turn] for start in range(0, len(batches), per_turn)]
  exits = {method: [] for method in runs}
  seconds = {method: [[] for _ in range(repeats)] for method in runs}
  for run_method in runs.values():
    run_method(turns[0])  # Compiles what is left to compile, and touches memory first.
  for repeat in range(repeats):
    for turn in turns:
      for method, run_method in runs.items():
        _, turn_exits, calls = run_method(turn)
        seconds[method][repeat] += calls
        exits[method].append(turn_exits)
  totals = {method: np.array([sum(calls) for calls in seconds[method]]) for method in runs}
  (reference,) = (totals[method] for method in runs if method.name == ALL_EXITS)
  timings = []
  for method in runs:
    total, calls = float(np.median(totals[method])), np.concatenate(seconds[method])
    p50, p99 = (None, None) if mode == 'stream' else 1000 * np.percentile(calls, (50, 99))
    timings.append(
      Timing(
        method=method.name,
        is_adaptive=method.is_adaptive,
        mode=mode,
        batch_size=size,
        images=count,
        accuracy=accuracies[method],
        madds=float(np.asarray(madds)[np.concatenate(exits[method])].mean()),
        milliseconds=1000 * total / count,
        images_per_second=count / total,
        p50=p50,
        p99=p99,
        time_ratio=float(np.median(totals[method] / reference)),
      )
    )
  return timings


if __name__ == '__main__':
  command_line.run(main)
