"""Measures the parts of an evaluation: the logits of all exits, and the sweep over budgets.

    python experiments/benchmarks/evaluation.py --config=configs/cifar100.py --images=10000

Logits: `evaluate.predict` with the mapped step that training uses, against the same network in
PyTorch. Both process one batch on the device again and again, and copy its logits to the host.

Sweep: `budget_sweep` and `optimal_sweep` with 40 budgets, for 5 exits, 50,000 validation images and
50,000 test images.
"""

import argparse
import itertools
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import common
import jax
import numpy as np

from imta_jax import command_line, evaluate, runtime
from imta_jax import config as config_lib
from imta_jax.adaptive.policy import BUDGET_PARAMETERS, budget_sweep, optimal_sweep
from imta_jax.errors import UsageError
from imta_jax.training import steps


def main() -> None:
  """Runs the command line."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument(
    '--config',
    required=True,
    help='config file as in training, for example configs/cifar100.py:exits=5',
  )
  parser.add_argument(
    '--phase',
    type=command_line.positive(int),
    help='training phase, counted from 1; default: the last',
  )
  parser.add_argument(
    '--images',
    type=command_line.positive(int),
    default=10_000,
    help='images per turn; default: 10,000',
  )
  parser.add_argument(
    '--batch_size', type=command_line.positive(int), help="default: the config's for evaluation"
  )
  parser.add_argument('--dtype', choices=('float32', 'bfloat16'), help="default: the config's")
  parser.add_argument(
    '--repeats', type=command_line.positive(int), default=3, help='turns per contestant; default: 3'
  )
  parser.add_argument('--output', type=command_line.output_file, help='JSON file for all timings')
  options = parser.parse_args()
  config = config_lib.load_file(options.config)
  config.model.dtype = options.dtype or config.model.dtype
  index = (len(config.phases) if options.phase is None else options.phase) - 1
  batch_size = options.batch_size or config.evaluation_batch_size
  if options.images < 1 or options.repeats < 1:
    raise UsageError('--images and --repeats must be at least 1')
  common.set_up()

  task = common.make_task(config, index, batch_size)
  contestants = {'ours': ours(task)}
  if common.has_torch():
    common.check_peer(config, index)
    contestants['eager'] = peer(config, task)
  else:
    print('PyTorch is not installed: the peer is not measured.')
  num_batches = -(-options.images // batch_size)
  timings = common.interleave(contestants, options.repeats, num_batches)
  print(common.machine())
  print()
  print(
    common.table(
      ('network', 'batch', 'dtype', 'logits of', 'images/s', 'time / ours'),
      [
        (
          options.config,
          batch_size,
          config.model.dtype,
          name,
          common.spread([batch_size / x for x in seconds], 0),
          common.spread([x / y for x, y in zip(seconds, timings['ours'], strict=True)], 2),
        )
        for name, seconds in timings.items()
      ],
    )
  )
  sweeps = [
    {'classes': num_classes, 'sweep': name, 'seconds': seconds}
    for num_classes in (100, 1000)
    for name, seconds in sweep_seconds(num_classes, options.repeats).items()
  ]
  print()
  print(
    common.table(
      ('classes', 'sweep', f'seconds for {len(BUDGET_PARAMETERS)} budgets'),
      [(row['classes'], row['sweep'], common.spread(row['seconds'], 2)) for row in sweeps],
    )
  )
  results = {'seconds_a_batch': timings, 'batch_size': batch_size, 'seconds_a_sweep': sweeps}
  common.write_json(options.output, {'machine': common.machine(), **results})


def ours(task: common.Task) -> Callable[[int], None]:
  """Returns a function that predicts a given number of batches."""
  predict = steps.on_devices(task.phase.predict_step, (None, 0))
  weights = runtime.replicate(task.phase.state.weights)
  mask = np.ones((jax.local_device_count(), len(task.images) // jax.device_count()), bool)
  batch = {**task.batch, 'mask': mask}
  return lambda count: evaluate.predict(predict, weights, itertools.repeat(batch, count))


def peer(config: Any, task: common.Task) -> Callable[[int], None]:
  """Returns a function that predicts a given number of batches with the peer."""
  import torch

  network = common.peer_network(config, task).eval()
  images, _ = common.to_torch(task)

  def run(count):
    is_mixed = config.model.dtype == 'bfloat16'
    with (
      torch.inference_mode(),
      torch.autocast(images.device.type, torch.bfloat16, enabled=is_mixed),
    ):
      torch.cat([network(images).cpu() for _ in range(count)], dim=1)

  return run


def sweep_seconds(num_classes: int, repeats: int) -> dict[str, list[float]]:
  """Times sweeps on probabilities of 5 exits, each of which is better than the one before.

  The same arrays serve as validation and as test images, which halves the memory.

  Args:
    num_classes: The number of classes.
    repeats: The number of sweeps.

  Returns:
    The seconds of each sweep, by the kind of sweep.
  """
  random, num_exits, num_images = np.random.default_rng(0), 5, 50_000
  labels = random.integers(num_classes, size=num_images)
  probabilities = random.standard_normal((num_exits, num_images, num_classes), np.float32)
  for exit, logits in enumerate(probabilities):
    logits[np.arange(num_images), labels] += (3 + 0.5 * exit) * random.random(
      num_images, np.float32
    )
    np.exp(logits, out=logits)
    logits /= logits.sum(axis=-1, keepdims=True)
  arrays, madds = (probabilities, labels, probabilities, labels), np.arange(1, num_exits + 1)
  budgets = np.linspace(madds[0], madds[-1], len(BUDGET_PARAMETERS))
  sweeps = {
    'geometric': partial(budget_sweep, *arrays, madds),
    'optimal': partial(optimal_sweep, *arrays, madds, budgets),
  }
  seconds = {name: [] for name in sweeps}
  for _ in range(repeats):
    for name, sweep in sweeps.items():
      start = time.perf_counter()
      sweep()
      seconds[name].append(time.perf_counter() - start)
  return seconds


if __name__ == '__main__':
  command_line.run(main)
