"""Compares ONNX Runtime with XLA on all stages of a trained network.

    pip install 'imta_jax[onnx]'
    python experiments/export_onnx.py runs/mnist5k exported_onnx
    python experiments/benchmarks/onnx_runtime.py runs/mnist5k exported_onnx

Both run all stages for all images on all cores: ONNX Runtime with one session per stage, which is
how an export is used, and XLA with one program. First, their logits are compared.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import common
import jax
import numpy as np

from imta_jax import command_line
from imta_jax.adaptive.engine import AdaptiveClassifier
from imta_jax.adaptive.engine.compiler import compiler_options
from imta_jax.command_line import list_of, open_classifier, positive
from imta_jax.errors import UsageError


def main() -> None:
  """Runs the command line."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('network', help='workdir of a run, or an exported folder')
  parser.add_argument('onnx', help='folder that export_onnx.py wrote for this network')
  parser.add_argument(
    '--batch_sizes',
    type=list_of(positive(int)),
    default=[1, 16, 64, 256],
    help='default: 1,16,64,256',
  )
  parser.add_argument(
    '--repeats', type=positive(int), default=5, help='turns per contestant; default: 5'
  )
  parser.add_argument('--output', type=command_line.output_file, help='JSON file for all timings')
  options = parser.parse_args()
  common.set_up()
  classifier = open_classifier(options.network)
  xla, onnx = xla_runner(classifier), onnx_runner(Path(options.onnx))

  random, rows, results = np.random.default_rng(0), [], {}
  for batch_size in options.batch_sizes:
    images = random.integers(0, 256, (batch_size, *classifier.image.shape), np.uint8)
    logits, others = xla(images), onnx(images)
    difference = np.abs(logits - others).max() / np.abs(logits).max()
    if not difference < 1e-3:
      raise UsageError(
        f'{options.onnx} is not an export of {options.network}: '
        f'its logits differ by {difference:.1e} of the largest logit'
      )
    contestants = {'XLA': repeated(xla, images), 'ONNX Runtime': repeated(onnx, images)}
    timings = results[batch_size] = common.interleave(contestants, options.repeats)
    rows.append(
      (
        batch_size,
        *(common.spread([1000 * x for x in seconds], 2) for seconds in timings.values()),
        common.spread([y / x for x, y in zip(*timings.values(), strict=True)], 2),
      )
    )
  print(common.machine())
  print()
  print(common.table(('batch', 'XLA, ms', 'ONNX Runtime, ms', 'ONNX Runtime / XLA'), rows))
  common.write_json(options.output, {'machine': common.machine(), 'seconds_a_batch': results})


def xla_runner(classifier: AdaptiveClassifier) -> Callable[[np.ndarray], np.ndarray]:
  """Returns a function from images to logits of the last exit, computed by one program."""

  @jax.jit(compiler_options=compiler_options())
  def run(weights, carry):
    for stage, weights_of_stage in zip(classifier.stages, weights, strict=True):
      carry = stage(weights_of_stage, carry)
    return carry[-1]

  return lambda images: np.asarray(run(classifier.weights, images))


def onnx_runner(folder: Path) -> Callable[[np.ndarray], np.ndarray]:
  """Returns a function from images to logits of the last exit, with one session per stage.

  Raises:
    UsageError: If the folder is not an export, or ONNX Runtime is not installed.
  """
  try:
    import onnxruntime
  except ModuleNotFoundError as error:
    raise UsageError("ONNX Runtime is not installed: pip install 'imta_jax[onnx]'") from error
  if not (folder / 'manifest.json').is_file():
    raise UsageError(f'{folder} is not an export: it has no manifest.json')
  stages = json.loads((folder / 'manifest.json').read_text(encoding='utf-8'))['stages']
  sessions = [onnxruntime.InferenceSession(str(folder / stage['file'])) for stage in stages]

  def run(images):
    values = {'images': images}
    for session, stage in zip(sessions, stages, strict=True):
      inputs = {name: values[name] for name in stage['inputs']}
      values = dict(zip(stage['outputs'], session.run(stage['outputs'], inputs), strict=True))
    return values[stages[-1]['outputs'][-1]]

  return run


def repeated(run: Callable[[np.ndarray], np.ndarray], images: np.ndarray) -> Callable[[int], None]:
  """Returns a function that classifies the images a given number of times."""

  def times(count):
    for _ in range(count):
      run(images)

  return times


if __name__ == '__main__':
  command_line.run(main)
