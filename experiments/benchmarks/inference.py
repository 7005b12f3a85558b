"""Time per image with early exits, against the whole network in the fastest runtimes.

    pip install -e '.[train,cpu]' torch
    python experiments/benchmarks/inference.py runs/mnist5k
    python experiments/benchmarks/inference.py experiments/results/cifar100/export \\
      --config=configs/cifar100.py:exits=5 --output=latency

*Whole network*: one program that computes the logits of the last exit, as XLA and `torch.compile`
run it and, on CPUs, OpenVINO and ONNX Runtime, with ONNX written by imta_jax and by PyTorch.
*Engine*: `AdaptiveClassifier` after `compile()`, with no early exit and with thresholds chosen on
validation images. Images are given to `predict` in batches of each size, and to `stream` in batches
of 64. All take turns on the same images, so that other load on the machine affects all alike.

Savings are relative to the whole network that is fastest at the same batch size. Times are written
to latency.json, what follows from them to latency.csv and latency.png.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import common
import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from imta_jax import command_line, files
from imta_jax import config as config_lib
from imta_jax.adaptive.compiler import compiler_options
from imta_jax.adaptive.engine import AdaptiveClassifier, OperatingPoint
from imta_jax.adaptive.engine.onnx_programs import import_openvino, join_stages, read_models
from imta_jax.command_line import list_of, positive
from imta_jax.data import arrays, image_folder
from imta_jax.data.pipeline import open_dataset
from imta_jax.errors import UsageError
from imta_jax.evaluate import new_figure, save_figure
from imta_jax.models.initial_values import initialize
from imta_jax.training import phases
from imta_jax.training import workdir as layout
from imta_jax.training.restore import load_variables

NO_EARLY_EXIT, NEARLY_AS_ACCURATE = 'engine, no early exit', 'engine, within 0.5 points'
_POINTS_LOST = 0.005  # Of NEARLY_AS_ACCURATE.
_BUDGETS = (0.25, 0.5, 0.75)  # Fractions of the last exit's multiply-adds.
_STREAMED_BATCH = 64
# Seconds until the threads of the method before are asleep: those of ONNX Runtime spin for long.
_PAUSE = 0.1
# Consecutive calls of a method classify this many images.
_IMAGES_PER_TURN = 64

# Images [image, height, width, channels], uint8 → logits [image, class] of the last exit.
Program = Callable[[np.ndarray], np.ndarray]


class Method(NamedTuple):
  """A way to classify images: the name of a whole network, or thresholds [exit] for the engine."""

  name: str
  thresholds: tuple[float, ...] | None = None


def main(arguments: Sequence[str] | None = None) -> None:
  """Runs the command line.

  Raises:
    UsageError: If there is no such network, or there are too few test images.
  """
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('network', help='workdir of a run, or an exported folder')
  parser.add_argument('--config', help='config of an exported network, as in training')
  parser.add_argument('--arrays', help='the data set, as imta_jax.data.prepare wrote it')
  parser.add_argument('--batch_sizes', type=list_of(positive(int)), default=(1, 16, 64, 256))
  parser.add_argument('--repeats', type=positive(int), default=5, help='default: 5')
  parser.add_argument('--images', type=positive(int), default=1024, help='at most; default: 1024')
  parser.add_argument('--calls', type=positive(int), default=100, help='at most; default: 100')
  parser.add_argument('--runtime', help='of the engine; default: the fastest, as compile() finds')
  parser.add_argument(
    '--output', type=command_line.output_folder, default=epath.Path('latency'), help='folder'
  )
  options = parser.parse_args(arguments)
  common.set_up()
  load_average = os.getloadavg()[0]  # Of other programs, before this one adds to it.
  if options.config:
    config = config_lib.load(options.config)
  else:
    config = layout.load_config(epath.Path(options.network))
  config.dataset.arrays_dir = options.arrays or config.dataset.arrays_dir
  images, labels = test_images(config, options.images)
  classifier = command_line.open_classifier(options.network, runtime=options.runtime)
  start = time.perf_counter()
  classifier.compile()
  compile_seconds = time.perf_counter() - start
  programs = whole_networks(classifier, torch_network(config, options.network, classifier))
  last_accuracy = classifier.validation.correct[-1].mean()
  methods = [
    *map(Method, programs),
    *choose_methods(classifier.operating_points, classifier.madds, last_accuracy),
  ]
  timings = measure(methods, programs, classifier, images, labels, options)
  name = image_folder.title(config.dataset)
  description = {
    'title': f'{name}, {classifier.runtime} on {jax.default_backend()}',
    'command': ' '.join(['python', *(sys.argv if arguments is None else arguments)]),
    'machine': common.machine(),
    'load_average': load_average,
    'runtime': classifier.runtime,
    'compile_seconds': round(compile_seconds, 1),
  }
  report(timings, description, options.output)


def report(
  timings: Sequence[Mapping[str, Any]], description: Mapping[str, Any], folder: epath.Path
) -> None:
  """Writes latency.json, latency.csv and latency.png to a folder, and prints what they contain."""
  rows = compute_savings(timings)
  content = json.dumps({**description, 'timings': timings}, indent=2) + '\n'
  files.write_whole(folder / 'latency.json', content.encode())
  files.write_csv(folder / 'latency.csv', rows)
  write_figure(rows, folder / 'latency.png', description['title'])
  print(*(f'{name}: {value}' for name, value in description.items()), '', sep='\n')
  columns = [name for name in rows[0] if name not in ('images', 'time_ratio')]
  cells = [['' if row[name] is None else row[name] for name in columns] for row in rows]
  print(
    common.table(columns, [[f'{x:.4g}' if isinstance(x, float) else x for x in r] for r in cells])
  )
  print('', *verdicts(rows), f'tables and figure in {folder}', sep='\n')


def test_images(config: ConfigDict, count: int) -> tuple[np.ndarray, np.ndarray]:
  """Returns test images, uint8, from all over the set, and their labels.

  Args:
    config: A run's config.
    count: How many, at most.

  Raises:
    UsageError: If the data set is streamed through TFDS, or cannot be read.
  """
  dataset = config.dataset
  if dataset.name == image_folder.NAME:
    shape = (dataset.image_size, dataset.image_size, len(dataset.mean))
    crop = dataset.crop if dataset.in_memory else 'center'
    stored = image_folder.read(image_folder.scan(dataset.data_dir), shape, crop)
  elif dataset.in_memory:
    open_dataset(config)  # Stores the arrays.
    stored = arrays.load(dataset)
  else:
    raise UsageError(f'{dataset.name} is streamed: times are measured on sets in memory')
  if stored is None:
    raise UsageError(f'the arrays of {dataset.name} could not be kept in the cache folder')
  images, labels = stored.images['test'], stored.labels['test']
  chosen = np.linspace(0, len(images) - 1, min(count, len(images))).round().astype(int)
  chosen = np.random.default_rng(0).permutation(chosen)  # Files are sorted by class.
  return images[chosen], labels[chosen]


def whole_networks(classifier: AdaptiveClassifier, peer: Any | None) -> dict[str, Program]:
  """Returns programs that compute the logits of the last exit, by name.

  Args:
    classifier: The network.
    peer: The same in PyTorch, a module of images [image, height, width, channels]; or None.
  """
  stages, weights = classifier.stages, classifier.weights

  def last_logits(weights, carry):
    for stage, of_stage in zip(stages, weights, strict=True):
      carry = stage(of_stage, carry)
    return carry[1]

  program = jax.jit(last_logits, compiler_options=compiler_options())
  programs = {'XLA': lambda images: np.asarray(program(weights, images))}
  written, on_cpu = {}, jax.default_backend() == 'cpu'
  if on_cpu and common.is_installed('onnx'):
    written[''] = _read_stages(classifier)
  if peer is not None:
    import torch

    if on_cpu:
      example = torch.zeros((2, *classifier.image.shape), dtype=torch.uint8)
      written[" of PyTorch's export"] = _torch_to_onnx(peer, example)
    compiled = torch.compile(peer, mode=None if on_cpu else 'reduce-overhead')  # With CUDA graphs.

    def run_compiled(images):
      with torch.inference_mode():
        return compiled(torch.from_numpy(images).to(common.torch_device())).cpu().numpy()

    programs['PyTorch compiled'] = run_compiled
  for source, model in written.items():
    if common.is_installed('openvino'):
      programs[f'OpenVINO{source}'] = openvino_program(model)
    if common.is_installed('onnxruntime'):
      programs[f'ONNX Runtime{source}'] = onnxruntime_program(model)
  return programs


def _read_stages(classifier):
  """Writes the network as one ONNX model."""
  weights = [[np.asarray(leaf) for leaf in jax.tree.leaves(tree)] for tree in classifier.weights]
  models = read_models(classifier.onnx_models())
  return join_stages(models, weights, 0, [models[-1].graph.output[-1].name])


def _torch_to_onnx(peer, example):
  import io

  import torch

  file = io.BytesIO()
  axes = {'images': {0: 'batch'}, 'logits': {0: 'batch'}}
  names = {'input_names': ['images'], 'output_names': ['logits'], 'dynamic_axes': axes}
  torch.onnx.export(peer, (example,), file, opset_version=17, dynamo=False, **names)
  return file.getvalue()


def openvino_program(model: bytes) -> Program:
  """OpenVINO, compiled for each batch size."""
  openvino, requests = import_openvino(), {}

  def program(images):
    if len(images) not in requests:
      network = openvino.Core().read_model(model)
      network.reshape([len(images), *images.shape[1:]])
      compiled = openvino.compile_model(network, 'CPU', {'PERFORMANCE_HINT': 'LATENCY'})
      requests[len(images)] = compiled.create_infer_request()
    return requests[len(images)].infer([images], share_inputs=True)[0]

  return program


def onnxruntime_program(model: bytes) -> Program:
  """ONNX Runtime, as it is by default."""
  import onnxruntime

  options = onnxruntime.SessionOptions()
  options.log_severity_level = 3
  session = onnxruntime.InferenceSession(model, options)
  (image,) = session.get_inputs()
  return lambda images: session.run(None, {image.name: images})[0]


def torch_network(config: ConfigDict, network: str, classifier: AdaptiveClassifier) -> Any | None:
  """Returns the network in PyTorch, or None if PyTorch is not installed or has no such network.

  EfficientNet-Lite, from the package efficientnet-lite-pytorch, has random weights.
  """
  if not common.is_installed('torch'):
    return None
  import torch

  if config.model.name == 'efficientnet_lite':
    from efficientnet_lite_pytorch import EfficientNet

    name = f'efficientnet-lite{config.model.get("variant", 0)}'
    module = EfficientNet.from_name(name, num_classes=classifier.num_classes)
  else:
    shape, classes = config_lib.image_shape(config), classifier.num_classes
    last = config.phases[-1]
    model = config_lib.create_model(config, last, classes)
    donor = load_variables(network, model, shape)
    restored = phases.start_from(donor, initialize(model, 0, shape))[0]
    # The peer's phase II contains a network of phase I, of which the embeddings count.
    first = config_lib.create_model(config, config.phases[0], classes)
    predecessor = first, phases.start_from(donor, initialize(first, 0, shape))[0]
    try:
      module = common.peer_network(config, last, (model, restored), predecessor)
    except UsageError as error:
      print(f'PyTorch is not measured: {error}')
      return None
  mean, std = (
    255 * torch.tensor(tuple(values), device=common.torch_device()).reshape(1, -1, 1, 1)
    for values in (config.dataset.mean, config.dataset.std)
  )

  class FromPixels(torch.nn.Module):
    def __init__(self):
      super().__init__()
      self.module = module

    def forward(self, images):
      logits = self.module((images.permute(0, 3, 1, 2).float() - mean) / std)
      return logits[-1] if logits.ndim == 3 else logits

  return FromPixels().to(common.torch_device()).eval().requires_grad_(False)


def choose_methods(
  operating_points: Sequence[OperatingPoint], madds: Sequence[float], last_accuracy: float
) -> list[Method]:
  """Chooses thresholds to measure the engine with.

  Args:
    operating_points: Those of a classifier.
    madds: [exit].
    last_accuracy: Validation accuracy of the last exit.

  Returns:
    No early exit; and, as far as they exist, the cheapest point as accurate as the last exit, the
    cheapest half a point below it, and the most expensive within each budget.
  """

  def cost(point):
    return float(np.dot(point.exit_fractions, madds))

  def cheapest(accuracy):
    accurate = [point for point in operating_points if point.accuracy >= accuracy]
    return min(accurate, key=cost, default=None)

  def most_expensive(budget):
    within = [point for point in operating_points if cost(point) <= budget]
    return max(within, key=cost, default=None)

  chosen = {
    'engine, as accurate': cheapest(last_accuracy),
    NEARLY_AS_ACCURATE: cheapest(last_accuracy - _POINTS_LOST),
  }
  for part in _BUDGETS:
    chosen[f'engine, budget {part:.0%}'] = most_expensive(part * madds[-1])
  return [Method(NO_EARLY_EXIT, (np.inf,) * len(madds))] + [
    Method(name, tuple(point.thresholds)) for name, point in chosen.items() if point is not None
  ]


def run(
  method: Method,
  programs: Mapping[str, Program],
  classifier: AdaptiveClassifier,
  mode: str,
  batches: Sequence[np.ndarray],
) -> tuple[np.ndarray, np.ndarray, float]:
  """Classifies batches.

  Args:
    method: The method.
    programs: The whole networks, by name.
    classifier: The engine.
    mode: 'predict' or 'stream'; whole networks take batch by batch in either.
    batches: Images.

  Returns:
    Labels and exits [image], in the batches' order, and seconds.
  """
  labels, exits = [], []
  start = time.perf_counter()
  if method.thresholds is None:
    for batch in batches:
      labels.append(programs[method.name](batch).argmax(axis=-1))
    exits = [np.full(sum(map(len, batches)), len(classifier.stages) - 1)]
    return np.concatenate(labels), np.concatenate(exits), time.perf_counter() - start
  if mode == 'stream':
    parts = list(classifier.stream(batches, method.thresholds))
    seconds = time.perf_counter() - start
    order = np.argsort(np.concatenate([part.indices for part in parts]))
    labels, exits = (
      np.concatenate([getattr(part, name) for part in parts])[order] for name in ('labels', 'exits')
    )
    return labels, exits, seconds
  results = [classifier.predict(batch, method.thresholds) for batch in batches]
  seconds = time.perf_counter() - start
  return *(np.concatenate([getattr(r, n) for r in results]) for n in ('labels', 'exits')), seconds


def measure(
  methods: Sequence[Method],
  programs: Mapping[str, Program],
  classifier: AdaptiveClassifier,
  images: np.ndarray,
  labels: np.ndarray,
  options: argparse.Namespace,
) -> list[dict[str, Any]]:
  """Measures accuracy and time of methods in all modes and batch sizes.

  Args:
    methods: The methods.
    programs: The whole networks, by name.
    classifier: The engine.
    images: Images.
    labels: Their labels.
    options: batch_sizes, calls and repeats of the command line.

  Returns:
    Records as `compute_savings` takes them: accuracy and average multiply-adds of the images that
    were timed, milliseconds per image, and the time divided by that of NO_EARLY_EXIT in the same
    repeat, both medians over the repeats.
  """
  sizes = [size for size in options.batch_sizes if size <= len(images)]
  modes = [('predict', size) for size in sizes]
  if len(images) >= _STREAMED_BATCH:
    modes.append(('stream', _STREAMED_BATCH))
  timings = []
  for mode, size in modes:
    count = min(len(images) // size, options.calls)
    batches = list(images[: count * size].reshape(count, size, *images.shape[1:]))
    per_turn = count if mode == 'stream' else max(1, _IMAGES_PER_TURN // size)
    turns = [batches[start : start + per_turn] for start in range(0, count, per_turn)]
    answers = {method: [] for method in methods}
    seconds = {method: np.zeros(options.repeats) for method in methods}
    for method in methods:
      run(method, programs, classifier, mode, turns[0])  # Compiles what is left to compile.
    for repeat in range(options.repeats):
      for turn in turns:
        for method in methods:
          time.sleep(_PAUSE)
          run(method, programs, classifier, mode, turn[:1])
          *answer, elapsed = run(method, programs, classifier, mode, turn)
          seconds[method][repeat] += elapsed
          if repeat == 0:
            answers[method].append(answer)
    reference = next(seconds[method] for method in methods if method.name == NO_EARLY_EXIT)
    for method in methods:
      found, exits = map(np.concatenate, zip(*answers[method], strict=True))
      timing = {
        'method': method.name,
        'mode': mode,
        'batch_size': size,
        'images': count * size,
        'accuracy': float((found == labels[: count * size]).mean()),
        'madds': float(np.asarray(classifier.madds)[exits].mean()),
        'milliseconds': 1000 * float(np.median(seconds[method])) / (count * size),
        'time_ratio': float(np.median(seconds[method] / reference)),
      }
      timings.append(_rounded(timing))
    print(f'{mode} {size}: measured', file=sys.stderr)
  return timings


def compute_savings(timings: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
  """Compares timings with the fastest whole network of the same mode and batch size.

  Returns:
    The timings with `of_fastest`, the time relative to it; `madds_saving`; `time_saving`, which is
    1 - of_fastest; and `share`, time_saving / madds_saving.
  """
  savings = []
  for timing in timings:
    group = [t for t in timings if _group(t) == _group(timing)]
    fastest = min(t['time_ratio'] for t in group if _is_whole(t))
    of_fastest = timing['time_ratio'] / fastest
    madds_saving = 1 - timing['madds'] / max(t['madds'] for t in group)
    share = (1 - of_fastest) / madds_saving if madds_saving > 0 else None
    derived = {'of_fastest': of_fastest, 'madds_saving': madds_saving}
    savings.append(_rounded({**timing, **derived, 'time_saving': 1 - of_fastest, 'share': share}))
  return savings


def _group(timing):
  return timing['mode'], timing['batch_size']


def _is_whole(timing):
  return not timing['method'].startswith('engine')


def _rounded(record):
  return {
    name: float(f'{value:.6g}') if isinstance(value, float) else value
    for name, value in record.items()
  }


def verdicts(savings: Sequence[Mapping[str, Any]]) -> list[str]:
  """Returns lines: what early exits save, and where the engine is slower than a whole network."""

  def name(saving):
    return f'{saving["method"]}, {saving["mode"]} {saving["batch_size"]}'

  lines = [
    f'{name(s)}: {s["time_saving"]:.0%} of the time, {s["madds_saving"]:.0%} of the multiply-adds'
    for s in savings
    if s['method'] == NEARLY_AS_ACCURATE
  ]
  slower = [
    f'{name(s)} ({s["of_fastest"] - 1:+.0%})'
    for s in savings
    if not _is_whole(s) and s['of_fastest'] > 1
  ]
  return [*lines, f'slower than the fastest whole network: {"; ".join(slower) or "none"}']


def write_figure(savings: Sequence[Mapping[str, Any]], path: epath.Path, title: str) -> None:
  """Draws accuracy against the time relative to the fastest whole network, for each batch size."""
  # Fewer images are timed in small batches: accuracies are those of the most images.
  accuracies = {s['method']: s['accuracy'] for s in sorted(savings, key=lambda s: s['images'])}
  figure = new_figure(6.4, 4.4)
  axes = figure.subplots()
  for index, group in enumerate(dict.fromkeys(map(_group, savings))):
    engine = [s for s in savings if _group(s) == group and not _is_whole(s)]
    engine.sort(key=lambda s: s['madds'])
    mode, size = group
    axes.plot(
      [s['of_fastest'] for s in engine],
      [100 * accuracies[s['method']] for s in engine],
      '.-',
      color=f'C{index}',
      label=f'batch {size}' if mode == 'predict' else f'stream of batches of {size}',
    )
  axes.axvline(1, color='black', linewidth=1, linestyle=':', label='fastest whole network')
  axes.set(xlabel='time of the engine, relative to the fastest whole network', xlim=(0, None))
  axes.set(ylabel='test accuracy (%)', title=title)
  axes.grid(alpha=0.3)
  axes.legend()
  save_figure(figure, path)


if __name__ == '__main__':
  command_line.run(main)
