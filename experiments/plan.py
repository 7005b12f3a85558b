"""Does a config fit an accelerator, and what is the fastest it can go? Needs no accelerator.

    python experiments/plan.py --config=configs/imagenet.py --target=v5e:2x4 --dtype=bfloat16
    python experiments/plan.py --config=configs/cifar100.py --target=h100:8 --batch_sizes=64,512

Compiles the training step of each phase with the target's own compiler (pip install
'imta_jax[tpu]' or 'imta_jax[cuda]') and reads what the step holds, computes, moves, launches and
sends on each device. Targets: v4, v5e, v5p and v6e with a topology, as in v5e:4x8; a100, h100,
h200 and b200 with a number of GPUs, as in h100:8; and cpu, this machine.

The floor of a step is the longest of four times, none of which a step can go below unless caches
save memory traffic: operations over the rate of the matrix units, bytes over memory bandwidth,
launches (on GPUs 1 µs each in CUDA graphs, 2 µs outside), and bytes of collectives over the
interconnect. Rates are published figures (planning/targets.py); those of the CPU are measured.
"""

import argparse
import dataclasses
import functools
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from benchmarks import common, limits
from ml_collections import ConfigDict
from planning import counts, targets

from imta_jax import command_line
from imta_jax import config as config_lib
from imta_jax.command_line import list_of, positive
from imta_jax.data import in_memory, streamed
from imta_jax.errors import UsageError
from imta_jax.training import steps
from imta_jax.training.packing import pack


@dataclasses.dataclass(frozen=True)
class Record:
  """The plan of a phase at a batch size; amounts are per device and step.

  Attributes:
    config: As it was given.
    target: As it was given.
    devices: Number of devices.
    dtype: What the network computes in.
    phase: Counted from 1.
    batch_size: Images per step, over all devices.
    fits: Whether the step fits the memory of a device.
    operations: Matrix operations, two per multiply-add.
    bytes: What the launched instructions read and write, caches aside. The compilers' own figures
      differ: they count all of an array of which a kernel reads a part.
    hbm_bytes: Those of them that lie in the main memory of the device, with padding.
    launches: Kernels, library calls, copies and collectives.
    launches_in_graphs: Those that lie in CUDA graphs; None for other targets.
    launches_per_dispatch: What is launched besides, before and after all steps of a dispatch.
    argument_bytes: State and batch.
    temp_bytes: Temporary arrays.
    peak_bytes: Arguments, results and temporary arrays, less what is reused.
    memory_bytes: The memory of a device; None for the CPU.
    collectives: Number of exchanges between devices.
    collective_bytes: What a device contributes to them.
    floor_seconds: The least time of a step.
    bound_by: What determines it: operations, bytes, launches or collectives.
    images_per_second: At the floor, over all devices.
    hours: The steps of the whole phase at the floor.
    compile_seconds: Time to compile the step on this machine.
    versions: Of JAX and of the target's compiler.
  """

  config: str
  target: str
  devices: int
  dtype: str
  phase: int
  batch_size: int
  fits: bool
  operations: float
  bytes: float
  hbm_bytes: float
  launches: int
  launches_in_graphs: int | None
  launches_per_dispatch: int
  argument_bytes: int
  temp_bytes: int
  peak_bytes: int
  memory_bytes: float | None
  collectives: int
  collective_bytes: int
  floor_seconds: float
  bound_by: str
  images_per_second: float
  hours: float
  compile_seconds: float
  versions: str


class DoesNotFitError(UsageError):
  """A step that the compiler cannot fit into the memory of a device."""


def main(arguments: Sequence[str] | None = None) -> None:
  """Runs the command line.

  Raises:
    UsageError: If the config, the target or a batch size is wrong.
  """
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--config', required=True, help='as in training, with :exits=5 or the like')
  parser.add_argument('--target', required=True, help='accelerator, as in v5e:2x4 or h100:8')
  parser.add_argument(
    '--batch_sizes',
    type=list_of(positive(int)),
    help="images per step over all devices; default: the config's",
  )
  parser.add_argument('--phases', type=list_of(positive(int)), help='default: all')
  parser.add_argument('--dtype', choices=('float32', 'bfloat16'), help="default: the config's")
  parser.add_argument(
    '--largest',
    action='store_true',
    help='search for the largest batch that fits, upwards from the largest of --batch_sizes',
  )
  parser.add_argument('--output', type=command_line.output_file, help='JSON file for all records')
  options = parser.parse_args(arguments)
  targets.prepare_environment()
  config = config_lib.load_file(options.config)
  config.model.dtype = options.dtype or config.model.dtype
  target = targets.open_target(options.target)

  records = []
  for number in options.phases or range(1, len(config.phases) + 1):
    for batch_size in options.batch_sizes or [config.batch_size]:
      records.append(plan(options.config, config, target, number, batch_size))
      print(describe(records[-1]), flush=True)
    if options.largest:
      records += search_largest(options.config, config, target, number, records[-1])
  print(f'\n{render(records)}')
  for line in hours_of_all_phases(records, len(config.phases)):
    print(line)
  if options.output:
    content = [dataclasses.asdict(record) for record in records]
    Path(options.output).write_text(json.dumps(content, indent=2) + '\n', encoding='utf-8')


def plan(
  name: str, config: ConfigDict, target: targets.Target, number: int, batch_size: int
) -> Record:
  """Compiles the training step of a phase and reads what it takes.

  Args:
    name: The config's, for the record.
    config: A whole config.
    target: What to compile for.
    number: The phase, counted from 1.
    batch_size: Images per step, over all devices.

  Raises:
    UsageError: If the phase does not exist or the devices do not divide the batch.
    DoesNotFitError: If the compiler finds no way to fit the step.
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
  draw, source_axes, source = _input(config, num_devices)
  loop = steps.on_devices(
    steps.make_train_loop(
      phase.train_step, draw, dtype=phase.model.dtype, one_step=target.chip is None
    ),
    (None, None, source_axes, None),
    donated=(0,),
    devices=target.devices,
  )
  state, teacher = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), (phase.state, pack(phase.teacher))
  )
  lowered = loop.lower(state, teacher, source, jax.ShapeDtypeStruct((), np.int32))
  start = time.monotonic()
  try:
    compiled, in_graphs = _compile(lowered, target)
  except jax.errors.JaxRuntimeError as error:
    if 'RESOURCE_EXHAUSTED' not in str(error):
      raise
    raise DoesNotFitError(
      f'phase {number} does not fit {target.name} at batch size {batch_size}: '
      f'{str(error).splitlines()[0]}'
    ) from error
  compile_seconds = time.monotonic() - start
  counted, memory = counts.count_hlo(compiled.as_text()), compiled.memory_analysis()
  work = limits.work(phase, batch_size // num_devices, common.image_shape(config))
  times = _least_times(target, config.model.dtype, work['operations'], counted, in_graphs or 0)
  bound_by = max(times, key=times.get)
  arguments, temporary = memory.argument_size_in_bytes, memory.temp_size_in_bytes
  peak = arguments + memory.output_size_in_bytes + temporary - memory.alias_size_in_bytes
  capacity = None if target.chip is None else target.chip.memory
  return Record(
    config=name,
    target=target.name,
    devices=num_devices,
    dtype=config.model.dtype,
    phase=number,
    batch_size=batch_size,
    fits=capacity is None or peak <= capacity,
    operations=work['operations'],
    bytes=counted.bytes,
    hbm_bytes=counted.hbm_bytes,
    launches=counted.launches,
    launches_in_graphs=in_graphs,
    launches_per_dispatch=counted.launches_outside,
    argument_bytes=arguments,
    temp_bytes=temporary,
    peak_bytes=peak,
    memory_bytes=capacity,
    collectives=counted.collectives if num_devices > 1 else 0,
    collective_bytes=counted.collective_bytes if num_devices > 1 else 0,
    floor_seconds=times[bound_by],
    bound_by=bound_by,
    images_per_second=batch_size / times[bound_by],
    hours=phase.num_steps * times[bound_by] / 3600,
    compile_seconds=compile_seconds,
    versions=f'jax {jax.__version__}, {target.compiler}',
  )


def _input(config, num_devices):
  """What a step draws its batches from: the function, axes over devices, and shapes."""
  shape, size = common.image_shape(config), config.batch_size // num_devices
  if config.dataset.in_memory:
    num_images = common.num_train_images(config)
    source = (
      jax.ShapeDtypeStruct((num_images, *shape), np.uint8),
      jax.ShapeDtypeStruct((num_images,), np.int32),
      jax.eval_shape(functools.partial(in_memory.plan_epoch, config, num_images), np.int32(0)),
      jax.ShapeDtypeStruct((num_devices,), np.int32),
    )
    return functools.partial(in_memory.draw_batch, config), in_memory.SOURCE_AXES, source
  source = {
    'image': jax.ShapeDtypeStruct((num_devices, 1, size, *shape), np.uint8),
    'label': jax.ShapeDtypeStruct((num_devices, 1, size), np.int32),
  }
  return functools.partial(streamed.draw_batch, config), streamed.SOURCE_AXES, source


def _compile(lowered, target):
  """The compiled program and, for GPUs, the number of its launches in CUDA graphs."""
  if target.chip is None or target.chip.gpu is None:
    return lowered.compile(compiler_options=target.compiler_options), None
  with tempfile.TemporaryDirectory() as folder:
    options = {**target.compiler_options, 'xla_dump_to': folder}
    compiled = lowered.compile(compiler_options=options)
    (path,) = Path(folder).glob('*.thunk_sequence_after_thunk_passes.txt')
    _, in_graphs = counts.count_thunks(path.read_text())
  return compiled, in_graphs


def _least_times(target, dtype, operations, counted, in_graphs):
  """Seconds that each of the resources of a device takes at least."""
  if target.chip is None:
    rates = measure_rates(dtype)
    return {
      'operations': operations / rates['operations'],
      'bytes': counted.hbm_bytes / rates['bytes'],
    }
  chip, num_devices = target.chip, len(target.devices)
  inside, outside = chip.seconds_per_launch
  # A ring sends each byte of an all-reduce twice, but for each device's own part.
  sent = 2 * (num_devices - 1) / num_devices * counted.collective_bytes
  return {
    'operations': operations / chip.rates[dtype],
    'bytes': counted.hbm_bytes / chip.bandwidth,
    'launches': in_graphs * inside + (counted.launches - in_graphs) * outside,
    'collectives': sent / chip.interconnect,
  }


@functools.cache
def measure_rates(dtype: str) -> dict[str, float]:
  """Operations and bytes per second of this machine."""
  yardsticks = {'operations': limits.matrix_product(dtype), 'bytes': limits.triad()}
  timings = common.interleave({name: run for name, (run, _) in yardsticks.items()}, repeats=3)
  return {name: amount / min(timings[name]) for name, (_, amount) in yardsticks.items()}


def search_largest(
  name: str, config: ConfigDict, target: targets.Target, number: int, last: Record
) -> list[Record]:
  """Doubles the batch until a step does not fit, then narrows the largest batch to an eighth.

  Args:
    name: The config's, for the records.
    config: A whole config.
    target: What to compile for.
    number: The phase, counted from 1.
    last: The plan to start from.

  Returns:
    The plans that were made on the way; the largest one that fits is among them and `last`.

  Raises:
    UsageError: If the target has no memory of its own.
  """
  if target.chip is None:
    raise UsageError('--largest needs an accelerator, whose memory is known: choose another target')
  records, num_devices = [], len(target.devices)

  def fits(batch_size):
    try:
      records.append(plan(name, config, target, number, batch_size))
    except DoesNotFitError as error:  # The compiler of TPUs gives up.
      print(error, flush=True)
      return False
    print(describe(records[-1]), flush=True)
    return records[-1].fits

  fitting, failing = (last.batch_size, None) if last.fits else (0, last.batch_size)
  while failing is None:
    if fits(2 * fitting):
      fitting *= 2
    else:
      failing = 2 * fitting
  while failing - fitting > max(num_devices, fitting // 8):
    middle = (fitting + failing) // 2 // num_devices * num_devices
    if fits(middle):
      fitting = middle
    else:
      failing = middle
  return records


def describe(record: Record) -> str:
  """A line for people who wait."""
  return (
    f'{record.config}, phase {record.phase}, batch size {record.batch_size}: compiled for '
    f'{record.target} in {record.compile_seconds:.0f} s, '
    + ('fits' if record.fits else 'does not fit')
  )


_HEADINGS = (
  *('phase', 'batch', 'memory GB', 'fits', 'T operations', 'GB accessed', 'GB of HBM', 'launches'),
  *('collectives', 'MB sent', 'floor ms', 'bound by', 'images/s', 'hours'),
)


def render(records: Sequence[Record]) -> str:
  """A table; amounts are per device and step."""
  first = records[0]
  memory = '' if first.memory_bytes is None else f' of {first.memory_bytes / 1e9:.0f} GB'
  rows = [
    (
      record.phase,
      record.batch_size,
      f'{record.peak_bytes / 1e9:.2f}',
      'yes' if record.fits else 'no',
      f'{record.operations / 1e12:.3f}',
      f'{record.bytes / 1e9:.2f}',
      f'{record.hbm_bytes / 1e9:.2f}',
      f'{record.launches:,}',
      record.collectives,
      f'{record.collective_bytes / 1e6:.1f}',
      f'{1000 * record.floor_seconds:.2f}',
      record.bound_by,
      f'{record.images_per_second:,.0f}',
      f'{record.hours:.2f}',
    )
    for record in records
  ]
  return (
    f'{first.config}, {first.dtype}, on {first.devices} device(s) of {first.target}{memory}; '
    f'{first.versions}\n\n{common.table(_HEADINGS, rows)}'
  )


def hours_of_all_phases(records: Sequence[Record], num_phases: int) -> list[str]:
  """Lines with the hours of a whole config at the floor, for batch sizes with all phases."""
  lines = []
  for batch_size in dict.fromkeys(record.batch_size for record in records):
    hours = {r.phase: r.hours for r in records if r.batch_size == batch_size}
    if len(hours) == num_phases:
      lines.append(
        f'batch size {batch_size}: all phases take {sum(hours.values()):.2f} hours at the floor'
      )
  return lines


if __name__ == '__main__':
  command_line.run(main)
