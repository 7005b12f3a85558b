"""Measures memory of training steps, and finds the largest batch that fits an accelerator.

    python experiments/benchmarks/memory.py --config=configs/imagenet.py --batch_sizes=32,64,128
    python experiments/benchmarks/memory.py --config=configs/imagenet.py --remat=off,on --largest

Reports what XLA plans for the compiled step: arguments (state and batch), outputs (the next state)
and temporary arrays; on an accelerator also the peak memory in use during two steps. Each batch
size is measured in a fresh process, so that peaks and failures do not affect each other.
"""

import argparse
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import common
import jax
import numpy as np

from imta_jax import command_line
from imta_jax import config as config_lib
from imta_jax.command_line import list_of, positive
from imta_jax.errors import UsageError


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
  parser.add_argument('--batch_sizes', type=list_of(positive(int)), help="default: the config's")
  parser.add_argument('--phases', type=list_of(positive(int)), default=[1], help='default: 1')
  parser.add_argument('--dtype', choices=('float32', 'bfloat16'), help="default: the config's")
  parser.add_argument(
    '--remat',
    default='off',
    help="'off', 'on' or 'off,on': whether to recompute activations; default: %(default)s",
  )
  parser.add_argument(
    '--largest',
    action='store_true',
    help='search for the largest batch that fits, starting from the largest of --batch_sizes',
  )
  parser.add_argument('--output', type=command_line.output_file, help='JSON file for all figures')
  options = parser.parse_args()
  remats = options.remat.split(',')
  if not set(remats) <= {'off', 'on'}:
    raise UsageError(f"--remat={options.remat}: choose from 'off' and 'on'")
  config = config_lib.load_file(options.config)
  config.model.dtype = options.dtype or config.model.dtype
  batch_sizes = options.batch_sizes or [config.batch_size]

  rows, machine = [], None
  for phase in options.phases:
    for remat in remats:
      fields = (options.config, phase, config.model.dtype, remat)
      figures = {size: in_own_process(*fields, size) for size in batch_sizes}
      if options.largest:
        search(fields, figures)
      for batch_size, figure in sorted(figures.items()):
        machine = figure.pop('machine', machine)
        rows.append(
          {'phase': phase, 'remat': remat, 'batch_size': batch_size, 'runs': bool(figure), **figure}
        )
  print(machine)
  print()
  gigabytes = ('arguments', 'outputs', 'temporary', 'planned', 'peak')
  print(
    common.table(
      ('phase', 'remat', 'batch', *(f'{name}, GB' for name in gigabytes)),
      [
        (
          row['phase'],
          row['remat'],
          row['batch_size'],
          *(f'{row[name] / 1e9:.3f}' if row.get(name) else '—' for name in gigabytes),
        )
        for row in rows
      ],
    )
  )
  if options.largest:
    print('A row of dashes means that the batch does not fit.')
  common.write_json(options.output, {'machine': machine, 'config': options.config, 'rows': rows})


def search(fields: tuple, figures: dict[int, dict[str, Any]]) -> None:
  """Searches for the largest batch that fits, to within an eighth.

  Doubles the largest batch until a step fails, then bisects.

  Args:
    fields: The arguments of `measure`, except the batch size.
    figures: Results of `measure` for each batch size; new ones are added.

  Raises:
    UsageError: If there is no accelerator that reports its memory.
  """
  if any(figure and figure['peak'] is None for figure in figures.values()):
    raise UsageError('--largest needs an accelerator that reports its memory')
  fails = max(figures)
  while figures[fails]:
    fails *= 2
    figures[fails] = in_own_process(*fields, fails)
  fits = max((size for size, figure in figures.items() if figure), default=fails)
  while fails - fits > max(1, fits // 8):
    middle = (fits + fails) // 2
    figures[middle] = in_own_process(*fields, middle)
    fits, fails = (middle, fails) if figures[middle] else (fits, middle)


def in_own_process(*arguments: Any) -> dict[str, Any]:
  """Runs `measure` in a fresh process; returns {} also if the process dies."""
  context = multiprocessing.get_context('spawn')
  with ProcessPoolExecutor(1, context) as pool:
    try:
      return pool.submit(measure, *arguments).result()
    except BrokenProcessPool:
      return {}


def measure(
  path: str, phase: int, dtype: str, remat: str, batch_size: int
) -> dict[str, int | str | None]:
  """Measures the bytes of a training step per device.

  Args:
    path: The config file, with its argument if any.
    phase: The phase, counted from 1.
    dtype: The type that the network computes in.
    remat: 'off' or 'on'.
    batch_size: Images per step, on all devices together.

  Returns:
    Bytes of 'arguments', 'outputs', 'temporary', 'planned' and 'peak' (None if unknown), and the
    'machine'; {} if the step does not fit.
  """
  config = config_lib.load_file(path)
  config.model.dtype = dtype
  if remat == 'on':
    config.model.remat = True
  task = common.make_task(config, phase - 1, batch_size)
  train, *arguments = task.train_loop()
  device, peak = jax.local_devices()[0], None
  try:
    plan = train.lower(*arguments, np.int32(2)).compile().memory_analysis()
    if device.platform != 'cpu':
      jax.block_until_ready(train(*arguments, np.int32(2)))
      peak = (device.memory_stats() or {}).get('peak_bytes_in_use')
  except jax.errors.JaxRuntimeError as error:
    if 'RESOURCE_EXHAUSTED' not in str(error):
      raise
    return {}
  arguments, outputs = plan.argument_size_in_bytes, plan.output_size_in_bytes
  return {
    'arguments': arguments,
    'outputs': outputs,
    'temporary': plan.temp_size_in_bytes,
    'planned': arguments + outputs + plan.temp_size_in_bytes - plan.alias_size_in_bytes,
    'peak': peak,
    'machine': common.machine(),
  }


if __name__ == '__main__':
  command_line.run(main)
