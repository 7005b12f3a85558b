"""Time per image of a trained network: what early exits save, and how other runtimes compare.

    python experiments/benchmarks/inference.py runs/mnist5k
    python experiments/export_onnx.py runs/mnist5k exported_onnx
    python experiments/benchmarks/inference.py runs/mnist5k --onnx=exported_onnx

Classifies test images by one XLA program that computes the logits of all exits; by the engine with
all images leaving at the same exit; and by the engine with thresholds chosen on validation images.
Other runtimes compute all exits as well: ONNX Runtime, with a session per stage of an export; and,
if installed, PyTorch and OpenVINO, which takes the network from PyTorch.

All take turns on a few images each and are compared within a repeat, so that other load on the
machine affects all of them alike. Images are given to `predict` in batches of each size, and to
`stream` in batches of the largest; images that fill no batch are left out. For data sets in memory.
Times are written to latency.json, what follows from them (savings.py) to latency.csv and
latency.png.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import common
import jax
import numpy as np
import savings
from etils import epath
from ml_collections import ConfigDict
from savings import ALL_EXITS, NEARLY_AS_ACCURATE

from imta_jax import command_line, files
from imta_jax.adaptive.compiler import compiler_options
from imta_jax.adaptive.engine import AdaptiveClassifier, OperatingPoint
from imta_jax.command_line import list_of, positive
from imta_jax.data import arrays
from imta_jax.data.pipeline import open_dataset
from imta_jax.data.preprocess import normalize
from imta_jax.errors import UsageError
from imta_jax.training import workdir as layout
from imta_jax.training.restore import restore_network

_POINTS_LOST = 0.005  # Of NEARLY_AS_ACCURATE.
# Default budgets, as fractions of the last exit's multiply-adds.
_BUDGETS = (0.25, 0.5, 0.75)
# Consecutive calls of a method classify this many images.
_IMAGES_PER_TURN = 16

# Images [image, height, width, channels], uint8 → logits [exit, image, class].
Program = Callable[[np.ndarray], np.ndarray]


class Method(NamedTuple):
  """A way to classify images.

  Attributes:
    name: Name in tables; of a program if there are no thresholds.
    thresholds: [exit], for the engine; None for a program that computes all exits.
    is_adaptive: Whether images leave at different exits.
  """

  name: str
  thresholds: tuple[float, ...] | None = None
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
  parser.add_argument('--onnx', help='folder that export_onnx.py wrote for this run')
  parser.add_argument(
    '--batch_sizes', type=list_of(positive(int)), default=(1, 16, 256), help='default: 1,16,256'
  )
  parser.add_argument(
    '--budgets',
    type=list_of(positive(float)),
    help="average multiply-adds; default: a quarter, half and three quarters of the last exit's",
  )
  parser.add_argument('--repeats', type=positive(int), default=5, help='default: 5')
  parser.add_argument('--images', type=positive(int), default=1000, help='at most; default: 1000')
  parser.add_argument('--calls', type=positive(int), default=200, help='at most; default: 200')
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
  output = epath.Path(options.output or layout.evaluation_folder(workdir) / 'latency')
  common.set_up()
  load_average = os.getloadavg()[0]  # Of other programs, before this one adds to it.

  config = layout.load_config(workdir)
  images, labels = test_images(config, options.images)
  if max(options.batch_sizes) > len(images):
    raise UsageError(f'{len(images)} test images do not fill a batch of {max(options.batch_sizes)}')
  classifier = AdaptiveClassifier.from_workdir(workdir, sweep=options.sweep).compile()
  programs = open_programs(config, workdir, classifier.num_classes, images, options.onnx)
  points, last_accuracy = classifier.operating_points, classifier.validation.correct[-1].mean()
  methods = [Method(name) for name in programs]
  methods += choose_methods(points, classifier.madds, last_accuracy, options.budgets)
  run_method = partial(run, programs, classifier)
  timings = measure(methods, run_method, images, labels, classifier.madds, options)
  description = {
    'title': f'{config.dataset.name} on {jax.default_backend()}',
    'command': ' '.join(['python', *(sys.argv if arguments is None else arguments)]),
    'machine': common.machine(),
    'load_average': load_average,
  }
  report(timings, description, output)


def report(
  timings: Sequence[Mapping[str, Any]], description: Mapping[str, Any], folder: epath.Path
) -> None:
  """Writes latency.json, latency.csv and latency.png to a folder, and prints what they contain."""
  rows = savings.compute_savings(timings)
  content = json.dumps({**description, 'timings': timings}, indent=2) + '\n'
  files.write_whole(folder / 'latency.json', content.encode())
  files.write_csv(folder / 'latency.csv', rows)
  savings.write_figure(rows, folder / 'latency.png', description['title'])
  print(f'{description["machine"]}; load average before: {description["load_average"]:.1f}')
  print('', savings.render(rows), '', *savings.verdicts(rows), sep='\n')
  print(f'tables and figure in {folder}')


def test_images(config: ConfigDict, count: int) -> tuple[np.ndarray, np.ndarray]:
  """Returns the first test images, uint8, and labels of a data set in memory.

  Args:
    config: A run's config.
    count: How many, at most.

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


def open_programs(
  config: ConfigDict, workdir: epath.Path, num_classes: int, images: np.ndarray, onnx: str | None
) -> dict[str, Program]:
  """Opens the programs that compute all exits of a run, by name, with XLA's first.

  Raises:
    UsageError: If the ONNX export is of another network: logits of the images differ.
  """

  def restore(index):
    restored = restore_network(workdir, index)
    return restored.model, restored.weights.variables

  last = len(config.phases) - 1
  network = restore(last)
  programs = {ALL_EXITS: xla_program(*network, config.dataset)}
  if onnx is not None:
    programs['ONNX Runtime'] = onnx_program(Path(onnx))
  if common.is_installed('torch'):
    predecessor = restore(last - 1) if last else None
    try:
      peer = common.peer_network(config, config.phases[last], network, predecessor)
      programs |= torch_programs(peer, config.dataset)
    except UsageError as error:
      print(f'PyTorch is not measured: {error}')
  expected = programs[ALL_EXITS](images[:4])
  for name, program in programs.items():
    difference = np.abs(program(images[:4]) - expected).max() / np.abs(expected).max()
    if not difference < 1e-3:
      raise UsageError(
        f'logits of {name} differ by {difference:.1e} of the largest logit: '
        f'is --onnx={onnx} an export of {workdir}?'
      )
  return programs


def xla_program(model: Any, variables: Mapping, dataset: ConfigDict) -> Program:
  """One XLA program for all exits."""
  variables = jax.device_put(variables)

  @partial(jax.jit, compiler_options=compiler_options())
  def logits(variables, images):
    return model.apply(variables, normalize(images, dataset.mean, dataset.std))

  return lambda images: np.asarray(logits(variables, images))


def onnx_program(folder: Path) -> Program:
  """ONNX Runtime, with a session per stage.

  Args:
    folder: What export_onnx.py wrote.

  Raises:
    UsageError: If the folder is not an export, or ONNX Runtime is not installed.
  """
  try:
    import onnxruntime
  except ModuleNotFoundError as error:
    raise UsageError("ONNX Runtime is not installed: pip install 'imta_jax[onnx]'") from error
  if not (folder / 'manifest.json').is_file():
    raise UsageError(f'--onnx={folder} is not an export: it has no manifest.json')
  stages = json.loads((folder / 'manifest.json').read_text(encoding='utf-8'))['stages']
  sessions = [onnxruntime.InferenceSession(str(folder / stage['file'])) for stage in stages]

  def program(images):
    values, logits = {'images': images}, []
    for stage, session in zip(stages, sessions, strict=True):
      inputs = {name: values[name] for name in stage['inputs']}
      results = session.run(stage['outputs'], inputs)
      values = dict(zip(stage['outputs'], results, strict=True))
      logits.append(results[-1])
    return np.stack(logits)

  return program


def torch_programs(network: Any, dataset: ConfigDict) -> dict[str, Program]:
  """Eager PyTorch on the device of the network, and OpenVINO on the CPU if it is installed."""
  import torch

  device = common.torch_device()
  mean, std = (
    255 * torch.tensor(tuple(values), device=device).reshape(1, -1, 1, 1)
    for values in (dataset.mean, dataset.std)
  )

  class FromPixels(torch.nn.Module):
    def forward(self, images):
      return network((images.permute(0, 3, 1, 2).float() - mean) / std)

  def program(images):
    with torch.inference_mode():
      return whole(torch.from_numpy(images).to(device)).cpu().numpy()

  network.eval().requires_grad_(False)
  whole, programs = FromPixels(), {'PyTorch': program}
  if common.is_installed('openvino'):
    import openvino

    shape = (2, dataset.image_size, dataset.image_size, len(dataset.mean))
    example = torch.zeros(shape, dtype=torch.uint8, device=device)
    compiled = openvino.compile_model(openvino.convert_model(whole, example_input=example), 'CPU')
    programs['OpenVINO'] = lambda images: compiled(images)[0]
  return programs


def choose_methods(
  operating_points: Sequence[OperatingPoint],
  madds: Sequence[float],
  last_accuracy: float,
  budgets: Sequence[float] | None = None,
) -> list[Method]:
  """Chooses thresholds to measure the engine with.

  Args:
    operating_points: Those of a classifier.
    madds: [exit].
    last_accuracy: Validation accuracy of the last exit.
    budgets: Average multiply-adds per image, or None for the default.

  Returns:
    The engine at each exit; and, as far as they exist, the cheapest point as accurate as the last
    exit, the cheapest half a point below it, and the most expensive within each budget.
  """

  def cost(point):
    return float(np.dot(point.exit_fractions, madds))

  def cheapest(accuracy):
    accurate = [point for point in operating_points if point.accuracy >= accuracy]
    return min(accurate, key=cost, default=None)

  def most_expensive(budget):
    within = [point for point in operating_points if cost(point) <= budget]
    return max(within, key=cost, default=None)

  num_exits = len(madds)
  methods = [
    Method(f'exit {index + 1}', (np.inf,) * index + (-np.inf,) * (num_exits - index))
    for index in range(num_exits)
  ]
  chosen = {
    'as accurate': cheapest(last_accuracy),
    NEARLY_AS_ACCURATE: cheapest(last_accuracy - _POINTS_LOST),
  }
  for budget in budgets or [part * madds[-1] for part in _BUDGETS]:
    chosen[f'budget {budget:,.0f}'] = most_expensive(budget)
  return methods + [
    Method(name, tuple(point.thresholds), is_adaptive=True)
    for name, point in chosen.items()
    if point is not None
  ]


def run(
  programs: Mapping[str, Program],
  classifier: AdaptiveClassifier,
  method: Method,
  mode: str,
  batches: Sequence[np.ndarray],
) -> tuple[np.ndarray, np.ndarray, list[float]]:
  """Classifies batches.

  Args:
    programs: Programs that compute all exits, by name.
    classifier: The engine.
    method: The method.
    mode: 'predict' or 'stream'; programs that compute all exits take batch by batch in either.
    batches: Images.

  Returns:
    Labels and exits [image], in the batches' order, and the seconds of each call.
  """
  if method.thresholds is not None and mode == 'stream':
    start = time.perf_counter()
    parts = list(classifier.stream(batches, method.thresholds))
    seconds = time.perf_counter() - start
    order = np.argsort(np.concatenate([part.indices for part in parts]))
    labels, exits = (
      np.concatenate([getattr(part, name) for part in parts])[order] for name in ('labels', 'exits')
    )
    return labels, exits, [seconds]
  labels, exits, seconds = [], [], []
  for batch in batches:
    start = time.perf_counter()
    if method.thresholds is None:
      logits = programs[method.name](batch)
      labels.append(logits[-1].argmax(axis=-1))
      exits.append(np.full(len(batch), len(logits) - 1))
    else:
      result = classifier.predict(batch, method.thresholds)
      labels.append(result.labels)
      exits.append(result.exits)
    seconds.append(time.perf_counter() - start)
  return np.concatenate(labels), np.concatenate(exits), seconds


def batches_of(images: np.ndarray, size: int, max_batches: int) -> list[np.ndarray]:
  """Returns full batches of images from all over the array."""
  count = min(len(images) // size, max_batches)
  chosen = np.linspace(0, len(images) - 1, count * size).round().astype(int)
  return list(images[chosen].reshape(count, size, *images.shape[1:]))


def measure(
  methods: Sequence[Method],
  run_method: Callable,
  images: np.ndarray,
  labels: np.ndarray,
  madds: Sequence[float],
  options: argparse.Namespace,
) -> list[dict[str, Any]]:
  """Measures accuracy and time of methods in all modes and batch sizes.

  Args:
    methods: The methods; the XLA program is among them.
    run_method: `run`, but for its first two arguments.
    images: Images.
    labels: Their labels.
    madds: [exit].
    options: batch_sizes, calls and repeats of the command line.

  Returns:
    Records as `savings.compute_savings` takes them.
  """
  largest = max(options.batch_sizes)
  batches = [images[i : i + largest] for i in range(0, len(images), largest)]
  accuracies = {m: float((run_method(m, 'predict', batches)[0] == labels).mean()) for m in methods}
  timings = []
  for mode, size in [*(('predict', size) for size in options.batch_sizes), ('stream', largest)]:
    batches = batches_of(images, size, options.calls)
    seconds, exits = _take_turns(methods, run_method, mode, batches, options.repeats)
    totals = {method: np.array([sum(calls) for calls in seconds[method]]) for method in methods}
    for method in methods:
      per_image = float(np.median(totals[method])) / (size * len(batches))
      percentiles = 1000 * np.percentile(np.concatenate(seconds[method]), (50, 99))
      timing = {
        'method': method.name,
        'is_adaptive': method.is_adaptive,
        'mode': mode,
        'batch_size': size,
        'images': size * len(batches),
        'accuracy': accuracies[method],
        'madds': float(np.asarray(madds)[np.concatenate(exits[method])].mean()),
        'milliseconds': 1000 * per_image,
        'images_per_second': 1 / per_image,
        'p50': None if mode == 'stream' else percentiles[0],
        'p99': None if mode == 'stream' else percentiles[1],
        'time_ratio': float(np.median(totals[method] / totals[Method(ALL_EXITS)])),
      }
      timings.append(savings.rounded(timing))
  return timings


def _take_turns(methods, run_method, mode, batches, repeats):
  """Seconds {method: [[of each call] of each repeat]} and exits {method: [[image]]}."""
  per_turn = len(batches) if mode == 'stream' else max(1, _IMAGES_PER_TURN // len(batches[0]))
  turns = [batches[start : start + per_turn] for start in range(0, len(batches), per_turn)]
  exits = {method: [] for method in methods}
  seconds = {method: [[] for _ in range(repeats)] for method in methods}
  for method in methods:
    run_method(method, mode, turns[0])  # Compiles what is left to compile, and fills the caches.
  for repeat in range(repeats):
    for turn in turns:
      for method in methods:
        _, turn_exits, calls = run_method(method, mode, turn)
        seconds[method][repeat] += calls
        exits[method].append(turn_exits)
  return seconds, exits


if __name__ == '__main__':
  command_line.run(main)
