"""What larger slices of TPUs bring: extrapolates compiled plans to other numbers of chips.

    python experiments/scaling.py experiments/results/plans/imagenet_v5e-2x4.json \
      experiments/results/plans/imagenet_v5p-2x2x1.json --output=experiments/results/scaling

Reads plans that experiments/plan.py has written for small TPU slices, and takes for granted:

- Each chip keeps its number of images, so that its program stays the same but for the number of
  chips that it exchanges gradients with (weak scaling; each chip has batch statistics of its own).
  Compiled for 8, 64 and 256 chips of v5e, ImageNet has the same operations, bytes and all-reduces.
- A kind of chip without a plan of its own runs the same operations and moves the same bytes as
  that of the first plan. This can be far off: on v5p the compiler keeps less in fast memory than on
  v5e, and moves 2.6 (phase I) and 3.8 times (phase II) as many bytes.
- Arithmetic and memory traffic overlap; the all-reduce of gradients, which come last, does not. It
  sends 2 (n - 1) / n of the gradients over the published interconnect, and takes 1 µs per hop along
  the longest way in the torus besides.
- The learning rate grows with the batch (linear scaling), from 0.1 at 256, after a warm-up.

Times are floors, from published rates; real steps take longer.
"""

import argparse
import dataclasses
import json
import math
from collections.abc import Sequence

from benchmarks import common
from etils import epath
from planning.targets import CHIPS

from imta_jax import command_line, files
from imta_jax import config as config_lib
from imta_jax.command_line import list_of, positive
from imta_jax.errors import UsageError

_SLICES = ('v5e:8', 'v5e:64', 'v5e:256', 'v5p:4', 'v5p:32', 'v5p:256', 'v5p:1024')
# Chips of a host, its virtual CPUs (Google Cloud's pages), and dimensions of the torus.
_HOSTS = {'v4': (4, 240, 3), 'v5e': (4, 112, 2), 'v5p': (4, 208, 3), 'v6e': (4, 180, 2)}
_SECONDS_PER_HOP = 1e-6  # Assumed.
_BASE_BATCH, _BASE_RATE = 256, 0.1
# Larger batches need other optimizers than momentum with a warm-up (Goyal et al., 2017).
_LARGEST_BATCH = 8192
_DECODED_PER_CPU = 110  # Images per second, measured; see benchmarks/README.md.


@dataclasses.dataclass(frozen=True)
class Step:
  """A training step of a phase on a slice; times in seconds.

  Attributes:
    phase: Counted from 1.
    slice: Kind and number of chips, as in 'v5e:64'.
    batch_size: Images per step, over all chips.
    operations: Time of the matrix operations.
    memory: Time of the memory traffic.
    gradients: Time of the all-reduce of gradients.
    efficiency: Images per second and chip, relative to no all-reduce.
    cpus_per_host: Virtual CPUs that a host needs so that decoding does not slow the step.
    hours: All steps of the phase, if images come in time.
    hours_with_input: The same with the CPUs that a host has.
    chip_hours: `hours_with_input` times chips.
  """

  phase: int
  slice: str
  batch_size: int
  operations: float
  memory: float
  gradients: float
  efficiency: float
  cpus_per_host: float
  hours: float
  hours_with_input: float
  chip_hours: float


def main(arguments: Sequence[str] | None = None) -> None:
  """Runs the command line.

  Raises:
    UsageError: If the plan is not one of a TPU slice, or a slice is unknown.
  """
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument(
    'plans', nargs='+', help='JSON files of experiments/plan.py, one for each kind of TPU'
  )
  parser.add_argument(
    '--slices', type=list_of(str), default=_SLICES, help=f'default: {",".join(_SLICES)}'
  )
  parser.add_argument(
    '--gradient_bytes',
    type=positive(float),
    default=4,
    help='bytes per gradient in the all-reduce; default: 4, float32',
  )
  parser.add_argument(
    '--output', type=command_line.output_folder, required=True, help='folder to write'
  )
  options = parser.parse_args(arguments)
  plans = {path: json.loads(epath.Path(path).read_text()) for path in options.plans}
  steps = extrapolate(list(plans.values()), options.slices, options.gradient_bytes)
  text = page(steps, plans, options)
  files.write_csv(
    epath.Path(options.output) / 'scaling.csv', [dataclasses.asdict(s) for s in steps]
  )
  files.write_whole(epath.Path(options.output) / 'README.md', text.encode())
  print(text)


def extrapolate(
  plans: Sequence[Sequence[dict]], slices: Sequence[str], gradient_bytes: float = 4
) -> list[Step]:
  """Extrapolates plans to slices, each from the plan for its kind of chip or else from the first.

  Args:
    plans: The records of each plan, a record per phase.
    slices: Kinds and numbers of chips.
    gradient_bytes: Bytes per gradient in the all-reduce.

  Returns:
    The steps of all slices, phase by phase.

  Raises:
    UsageError: If a slice or a plan cannot be used.
  """
  of_kind = {_kind(plan[0]['target']): plan for plan in reversed(plans)}
  return [
    step_on(of_kind.get(_kind(name), plans[0])[index], name, gradient_bytes)
    for index in range(len(plans[0]))
    for name in slices
  ]


def _kind(name):
  return name.partition(':')[0]


def step_on(record: dict, name: str, gradient_bytes: float = 4) -> Step:
  """Extrapolates the plan of a phase to a slice.

  Args:
    record: A record of the plan, for a slice of at least two chips.
    name: Kind and number of chips.
    gradient_bytes: Bytes per gradient in the all-reduce.

  Raises:
    UsageError: If the slice or the plan cannot be used.
  """
  kind, _, count = name.partition(':')
  if kind not in _HOSTS or not count.isdigit() or int(count) < 1:
    raise UsageError(f'slice {name!r} must be one of {", ".join(_HOSTS)} with a number of chips')
  if record['target'].partition(':')[0] not in _HOSTS or record['devices'] < 2:
    raise UsageError(
      f'the plan is for {record["target"]}: it must be for a TPU slice of two or more'
    )
  chip, num_chips = CHIPS[kind], int(count)
  chips_per_host, cpus, dimensions = _HOSTS[kind]
  batch_size = record['batch_size'] // record['devices'] * num_chips
  operations = record['operations'] / chip.rates[record['dtype']]
  memory = record['hbm_bytes'] / chip.bandwidth
  sent = 2 * (num_chips - 1) / num_chips * record['collective_bytes'] * gradient_bytes / 4
  hops = dimensions * math.ceil(num_chips ** (1 / dimensions) / 2)
  gradients = (sent / chip.interconnect + 2 * hops * _SECONDS_PER_HOP) if num_chips > 1 else 0.0
  alone = max(operations, memory)
  seconds = alone + gradients
  images_per_host = batch_size / max(1, num_chips / chips_per_host)
  cpus_needed = images_per_host / seconds / _DECODED_PER_CPU
  hours = num_steps(record['config'], record['phase'], batch_size) * seconds / 3600
  hours_with_input = hours * max(1, cpus_needed / cpus)
  return Step(
    phase=record['phase'],
    slice=name,
    batch_size=batch_size,
    operations=operations,
    memory=memory,
    gradients=gradients,
    efficiency=alone / seconds,
    cpus_per_host=cpus_needed,
    hours=hours,
    hours_with_input=hours_with_input,
    chip_hours=hours_with_input * num_chips,
  )


def num_steps(config_file: str, phase: int, batch_size: int) -> int:
  """Returns the number of steps of a phase at a batch size."""
  config = config_lib.load_file(config_file)
  steps_per_epoch = common.num_train_images(config) // batch_size
  return round(config.phases[phase - 1].epochs * steps_per_epoch)


def page(
  steps: Sequence[Step], plans: dict[str, Sequence[dict]], options: argparse.Namespace
) -> str:
  """Returns the study in Markdown."""
  parts = common.table(
    (
      *('phase', 'slice', 'batch', 'arithmetic, ms', 'memory, ms', 'gradients, ms', 'efficiency'),
      *('CPUs per host', 'minutes', 'with the CPUs of a host'),
    ),
    [
      (
        'I' * step.phase,
        step.slice,
        f'{step.batch_size:,}',
        *(f'{1000 * x:.2f}' for x in (step.operations, step.memory, step.gradients)),
        f'{step.efficiency:.0%}',
        f'{step.cpus_per_host:,.0f}',
        f'{60 * step.hours:.1f}',
        f'{60 * step.hours_with_input:.1f}',
      )
      for step in steps
    ],
  )
  totals = common.table(
    ('slice', 'batch', 'learning rate', 'minutes', 'with the CPUs of a host', 'chip hours'),
    [
      (
        name,
        f'{of_slice[0].batch_size:,}' + ('' if _is_sound(of_slice[0]) else ' (too large)'),
        f'{_BASE_RATE * of_slice[0].batch_size / _BASE_BATCH:g}',
        f'{60 * sum(step.hours for step in of_slice):.1f}',
        f'{60 * sum(step.hours_with_input for step in of_slice):.1f}',
        f'{sum(step.chip_hours for step in of_slice):.1f}',
      )
      for name in options.slices
      for of_slice in [[step for step in steps if step.slice == name]]
    ],
  )
  records = [records[0] for records in plans.values()]
  return _PAGE.format(
    config=records[0]['config'],
    commands='\n'.join(_COMMAND.format(**records[0], plan=path) for path, records in plans.items()),
    plans=' '.join(plans),
    targets=' and '.join(record['target'] for record in records),
    versions=records[0]['versions'],
    output=options.output,
    largest=_LARGEST_BATCH,
    per_cpu=_DECODED_PER_CPU,
    totals=totals,
    parts=parts,
  )


def _is_sound(step):
  return step.batch_size <= _LARGEST_BATCH


_COMMAND = """    python experiments/plan.py --config={config} --target={target} \\
      --batch_sizes={batch_size} --dtype={dtype} --output={plan}"""
_PAGE = """# Scaling {config}

{commands}
    python experiments/scaling.py {plans} \\
      --output={output}

The last command extrapolates steps that were compiled for {targets} ({versions}) to
other slices. Nothing was measured on a TPU, and real steps take longer than these floors;
[scaling.py](../../scaling.py) states the assumptions.

Both phases:

{totals}

Batches above {largest:,} are known to lose accuracy with momentum and a warm-up; they are shown
for their cost alone. `reference_batch_size` and `warmup_epochs` of both phases set the learning
rate.

## Where the time goes

{parts}

- **Input** binds first. A host must decode as fast as its four chips compute: *CPUs per host*, at
  {per_cpu} images per second and CPU, as measured on a cloud CPU. Hosts have 112 (v5e) and 208
  (v5p). Phase II suffers most. Images that were made smaller beforehand would help, or hosts that
  only decode.
- **Memory traffic** binds the chip at every size: arithmetic takes a seventh (v5p) to two fifths
  (phase II on v5e) of its time.
- **Gradients** cost the same on 8 chips as on a thousand, since each chip keeps its images, and a
  ring sends each gradient about twice however many chips there are. In bfloat16
  (`--gradient_bytes=2`) they would cost half; the code has no such option yet.
- **Batch norm** sends nothing: each chip has statistics of its own images, the default for
  ImageNet. `--config.global_batch_norm=True`, which few images per chip need, adds all-reduces in
  each layer.
"""


if __name__ == '__main__':
  command_line.run(main)
