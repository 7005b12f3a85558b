"""Plans a training step for a GPU or TPU that need not be present: does it fit, what does it do?

    python experiments/plan.py --config=configs/imagenet.py --target=v5e:2x4 --dtype=bfloat16
    python experiments/plan.py --config=configs/cifar100.py --target=h100:8 --batch_sizes=64,512

Compiles the training step of each phase with the target's own compiler (pip install
'imta_jax[tpu]' or 'imta_jax[cuda]'). Targets: v4, v5e, v5p and v6e with a topology, as in v5e:4x8;
a100, h100, h200 and b200 with a number of GPUs, as in h100:8; and cpu, this machine.

Amounts are per device and step. They are no estimate of time: lower bounds computed from them and
from published rates were 3 to 4 times too low on the one device measured (an H200).
"""

import argparse
import functools
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from benchmarks import common, limits
from ml_collections import ConfigDict
from planning import counts, targets

from imta_jax import command_line
from imta_jax import config as config_lib
from imta_jax.adaptive.compiler import graph_options
from imta_jax.command_line import list_of, positive
from imta_jax.errors import UsageError


def main(arguments: Sequence[str] | None = None) -> None:
  """Runs the command line.

  Raises:
    UsageError: If the config, the target or a batch size is wrong.
  """
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--config', required=True, help='as in training, for example with :exits=5')
  parser.add_argument('--target', required=True, help='accelerator, as in v5e:2x4 or h100:8')
  parser.add_argument('--batch_sizes', type=list_of(positive(int)), help="default: the config's")
  parser.add_argument('--phases', type=list_of(positive(int)), help='default: all')
  parser.add_argument('--dtype', choices=('float32', 'bfloat16'), help="default: the config's")
  parser.add_argument('--cuda_graphs', choices=('partial', 'whole', 'concurrent'))
  parser.add_argument('--remat', action='store_true', help='recompute activations')
  parser.add_argument('--largest', action='store_true', help='find the largest batch that fits')
  parser.add_argument('--output', type=command_line.output_file, help='JSON file for all records')
  options = parser.parse_args(arguments)
  targets.prepare_environment()
  config = config_lib.load(options.config)
  config.model.dtype = options.dtype or config.model.dtype
  config.cuda_graphs = options.cuda_graphs or config.cuda_graphs
  if options.remat:
    config.model.remat = True
  target = targets.open_target(options.target)
  if options.largest and target.memory is None:
    raise UsageError(f'--largest: the memory of {target.name} is unknown: choose an accelerator')

  records = []
  for phase in options.phases or range(1, len(config.phases) + 1):
    plan_batch = functools.partial(plan, config, target, phase)
    for batch_size in options.batch_sizes or [config.batch_size]:
      records.append(plan_batch(batch_size))
    if options.largest:
      records += search_largest(plan_batch, len(target.devices), records[-1])
  columns = [name for name in records[0] if name not in ('target', 'devices', 'dtype', 'versions')]
  print(f'{target.name}, {config.model.dtype}, {records[0]["versions"]}\n')
  print(common.table(columns, [[_cell(name, r[name]) for name in columns] for r in records]))
  if options.output:
    records = [{'config': options.config, **record} for record in records]
    Path(options.output).write_text(json.dumps(records, indent=2) + '\n', encoding='utf-8')


def _cell(name, value):
  if name.endswith('bytes') and value is not None:
    return f'{value / 1e9:.2f} GB'
  return f'{value:.3g}' if isinstance(value, float) else str(value)


def plan(
  config: ConfigDict, target: targets.Target, number: int, batch_size: int
) -> dict[str, Any]:
  """Compiles the training step of a phase, and counts what it does.

  Args:
    config: A complete config.
    target: What to compile for.
    number: The phase, counted from 1.
    batch_size: Images per step, over all devices.

  Returns:
    The record of the plan. Amounts are None if the compiler finds no way to fit the step. Of them,
    'operations' are two per multiply-add; see `counts.count_hlo` for 'bytes' and 'launches';
    'graphs' are CUDA graphs, 'launches_outside' is outside of them, both None but for GPUs.

  Raises:
    UsageError: If the phase does not exist or the devices do not divide the batch.
  """
  num_devices = len(target.devices)
  if batch_size % num_devices:
    raise UsageError(
      f'batch size {batch_size} is not divisible by the {num_devices} devices of {target.name}: '
      f'make it a multiple of {num_devices}'
    )
  config = config.copy_and_resolve_references()
  config.batch_size = batch_size
  phase, _ = common.set_up_without_data(config, number - 1, batch_size)
  on_cpu = target.memory is None
  loop, inputs = common.abstract_train_loop(config, phase, target.devices, one_step=on_cpu)
  work = limits.work(phase, batch_size // num_devices, config_lib.image_shape(config))
  record = {
    'target': target.name,
    'devices': num_devices,
    'dtype': config.model.dtype,
    'cuda_graphs': config.cuda_graphs,
    'phase': number,
    'batch_size': batch_size,
    'fits': False,
    'operations': work['operations'],
    **dict.fromkeys(('bytes', 'launches', 'graphs', 'launches_outside')),
    **dict.fromkeys(('collectives', 'collective_bytes')),
    **dict.fromkeys(('argument_bytes', 'temp_bytes', 'peak_bytes')),
    'memory_bytes': target.memory,
    'versions': f'jax {jax.__version__}, {target.compiler}',
  }
  print(f'compiling phase {number} at batch size {batch_size} for {target.name}', flush=True)
  try:
    options = graph_options(config.cuda_graphs, num_devices)
    compiled, graphs = _compile(loop.lower(*inputs), target, options)
  except jax.errors.JaxRuntimeError as error:
    if 'RESOURCE_EXHAUSTED' not in str(error):
      raise
    return record
  record.update(counts.count_hlo(compiled.as_text()), **graphs)
  if num_devices == 1:
    record.update(collectives=0, collective_bytes=0)
  memory = compiled.memory_analysis()
  arguments, temporary = memory.argument_size_in_bytes, memory.temp_size_in_bytes
  peak = arguments + memory.output_size_in_bytes + temporary - memory.alias_size_in_bytes
  record.update(argument_bytes=arguments, temp_bytes=temporary, peak_bytes=peak)
  return record | {'fits': on_cpu or peak <= target.memory}


def _compile(lowered, target, graph_options):
  """The compiled program and, for GPUs, the counts of its CUDA graphs."""
  if not target.compiler_options:
    return lowered.compile(), {}
  with tempfile.TemporaryDirectory() as folder:
    options = {**target.compiler_options, **graph_options, 'xla_dump_to': folder}
    compiled = lowered.compile(compiler_options=options)
    (path,) = Path(folder).glob('*.thunk_sequence_after_thunk_passes.txt')
    graphs, outside = counts.count_thunks(path.read_text())
    return compiled, {'graphs': graphs, 'launches_outside': outside}


def search_largest(
  plan_batch: Callable[[int], dict[str, Any]], num_devices: int, last: dict[str, Any]
) -> Iterator[dict[str, Any]]:
  """Doubles the batch until a step does not fit, then narrows the largest batch to an eighth.

  Args:
    plan_batch: Maps a batch size, a multiple of the number of devices, to its record.
    num_devices: The number of devices.
    last: The record to start from.

  Yields:
    The records made on the way; the largest batch that fits is among them and `last`.
  """
  fitting, failing = (last['batch_size'], None) if last['fits'] else (0, last['batch_size'])
  while failing is None or failing - fitting > max(num_devices, fitting // 8):
    size = (fitting + (failing or 3 * fitting)) // 2 // num_devices * num_devices
    record = plan_batch(size)
    yield record
    fitting, failing = (size, failing) if record['fits'] else (fitting, size)


if __name__ == '__main__':
  command_line.run(main)
