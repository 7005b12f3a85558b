"""Compares the time of a training step with PyTorch's and with the limit of the device.

    python experiments/benchmarks/training_step.py --config=configs/cifar100.py --batch_sizes=64,512
    python experiments/benchmarks/training_step.py --config=configs/imagenet.py --dtype=bfloat16

Ours is the step that training runs, on images that lie on the device. The peers run the same step
of the same network with the same weights in PyTorch (torch_peer.py): 'eager', and 'tuned' with
channels_last, a fused optimizer and torch.compile. All compute in --dtype. Without PyTorch, only
our step and the limit are measured.
"""

import argparse
import concurrent.futures
import contextlib
import fcntl
import functools
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import common
import jax
import limits
from ml_collections import ConfigDict

from imta_jax import command_line
from imta_jax import config as config_lib
from imta_jax.command_line import list_of, positive
from imta_jax.errors import UsageError


def main() -> None:
  """Runs the command line."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--config', required=True, help='as in training, for example with :exits=5')
  parser.add_argument('--batch_sizes', type=list_of(positive(int)), help="default: the config's")
  parser.add_argument('--phases', type=list_of(positive(int)), default=[1, 2], help='default: 1,2')
  parser.add_argument('--dtype', choices=('float32', 'bfloat16'), help="default: the config's")
  parser.add_argument('--peers', default='eager,tuned', help="default: 'eager,tuned'; may be empty")
  parser.add_argument(
    '--cuda_graphs',
    type=list_of(str),
    default=(),
    help="values of config.cuda_graphs to compare ours with, as in 'whole,concurrent'",
  )
  parser.add_argument(
    '--lock', help='file shared by programs that compile at once and are timed one by one'
  )
  parser.add_argument('--repeats', type=positive(int), default=7, help='turns; default: 7')
  parser.add_argument('--output', type=command_line.output_file, help='JSON file for all timings')
  options = parser.parse_args()
  config = config_lib.load(options.config)
  config.model.dtype = options.dtype or config.model.dtype
  batch_sizes = options.batch_sizes or [config.batch_size]
  peers = [name for name in options.peers.split(',') if name]
  if not set(peers) <= {'eager', 'tuned'}:
    raise UsageError(f"--peers={options.peers}: choose from 'eager' and 'tuned'")
  common.set_up()
  if peers and not common.is_installed('torch'):
    print('PyTorch is not installed: the peers are not measured.')
    peers = []

  machine = common.machine()
  print(machine)
  results = []
  for number in options.phases:
    if peers:
      difference = common.check_peer(config, number - 1)
      print(f'phase {number}: logits of the peer differ by {difference:.0e} of the largest logit')
    for batch_size in batch_sizes:
      result = measure(config, number - 1, batch_size, peers, options)
      results.append({'config': options.config, 'dtype': config.model.dtype, **result})
  print(f'\n{format_table(results)}')
  common.write_json(options.output, {'machine': machine, 'results': results})


def measure(
  config: ConfigDict,
  index: int,
  batch_size: int,
  peers: Sequence[str],
  options: argparse.Namespace,
) -> dict[str, Any]:
  """Measures the training step of a phase at a batch size.

  Args:
    config: A complete config.
    index: The phase, counted from 0.
    batch_size: Images per step, on all devices together.
    peers: The peers to compare with, of 'eager' and 'tuned'.
    options: `repeats`, `cuda_graphs` and `lock` of the command line.

  Returns:
    The record for the JSON file: seconds per step of each contestant, the limit, the step's work
    and the measured rates.
  """
  task = common.make_task(config, index, batch_size)
  contestants = {'ours': common.ours(task, config.cuda_graphs)}
  for name in options.cuda_graphs:
    contestants[f'ours, {name}'] = common.ours(task, name)
  with _locked(options.lock, fcntl.LOCK_SH):
    with concurrent.futures.ThreadPoolExecutor() as pool:
      list(pool.map(lambda run: run(1), contestants.values()))  # Compile at once.
    for name in peers:
      contestants[name] = peer(config, task, name)
      contestants[name](1)
  yardsticks = {'operations': limits.matrix_product(config.model.dtype), 'bytes': limits.triad()}
  contestants |= {name: run for name, (run, _) in yardsticks.items()}
  with _locked(options.lock, fcntl.LOCK_EX):
    timings = common.interleave(contestants, options.repeats)
  per_device = batch_size // jax.device_count()
  amounts = limits.work(task.phase, per_device, config_lib.image_shape(config))
  rates, bounds = {}, {}
  for name, (_, amount) in yardsticks.items():
    rates[name] = [amount / seconds for seconds in timings.pop(name)]
    bounds[name] = [amounts[name] / rate for rate in rates[name]]
  by = max(bounds, key=lambda name: statistics.median(bounds[name]))
  return {
    'phase': index + 1,
    'batch_size': batch_size,
    'steps': task.phase.num_steps,
    'seconds_per_step': timings,
    'limit': {'seconds_per_step': bounds[by], 'by': by},
    'work_per_step': amounts,
    'rates': rates,
  }


@contextlib.contextmanager
def _locked(path: str | None, kind: int) -> Iterator[None]:
  """Holds a lock, if there is one: shared by all who compile, or alone."""
  if path is None:
    yield
    return
  with open(path, 'a') as file:
    fcntl.flock(file, kind)
    yield


def peer(config: ConfigDict, task: common.Task, name: str) -> Callable[[int], None]:
  """Returns a function that runs a given number of the peer's steps and waits for them.

  Raises:
    UsageError: If the peer does not implement the phase.
  """
  import torch
  import torch_peer

  if jax.device_count() > 1:
    raise UsageError(
      f'the peers run on one device, but there are {jax.device_count()}: '
      'pass --peers= to measure without them'
    )
  phase = task.phase.config
  kind = (phase.trained, phase.loss)
  if kind == ('everything', 'cross_entropy'):
    loss_of = torch_peer.loss_of_phase_one
  elif kind == ('last_layers', 'one_for_all') and phase.teacher == 'frozen':
    loss_of = functools.partial(
      torch_peer.loss_of_phase_two,
      alpha=phase.alpha,
      temperature=phase.temperature,
      class_reduction=phase.class_reduction,
    )
  else:
    raise UsageError(
      f'the peer does not implement training {kind[0]} with the loss {kind[1]}: '
      'pass --peers= to measure without it'
    )
  step = torch_peer.TrainingStep(
    common.peer_network(config, phase, task.network, task.predecessor),
    loss_of,
    learning_rate=phase.learning_rate,
    momentum=phase.momentum,
    nesterov=phase.nesterov,
    weight_decay=phase.weight_decay,
    dtype=config.model.dtype,
  )
  images, labels = common.to_torch(task)
  if name == 'tuned':
    images = images.to(memory_format=torch.channels_last)
    reason = step.tune(images, labels)
    if reason:
      print(f'the step of the tuned peer is not compiled: {reason}')

  def run(count):
    for _ in range(count):
      step(images, labels)
    if images.is_cuda:
      torch.cuda.synchronize()

  return run


def format_table(results: list[dict[str, Any]]) -> str:
  """Formats a table with a row for each contestant and for the limit.

  The ratios divide each time by our time of the same turn.
  """
  header = (
    *('network', 'phase', 'batch', 'dtype', 'step of', 'ms per step', 'images/s'),
    *('time / ours', 'hours'),
  )
  rows = []
  for result in results:
    batch_size, timings = result['batch_size'], result['seconds_per_step']
    limit = result['limit']
    lines = {**timings, f'limit ({limit["by"]})': limit['seconds_per_step']}
    for name, seconds in lines.items():
      ratios = [theirs / ours for theirs, ours in zip(seconds, timings['ours'], strict=True)]
      middle = statistics.median(seconds)
      rows.append(
        (
          result['config'],
          result['phase'],
          batch_size,
          result['dtype'],
          name,
          common.spread([1000 * x for x in seconds], 2),
          f'{batch_size / middle:,.0f}',
          common.spread(ratios, 2),
          f'{middle * result["steps"] / 3600:,.2f}',
        )
      )
  return common.table(header, rows)


if __name__ == '__main__':
  command_line.run(main)
