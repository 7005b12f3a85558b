"""What a GPU at hand for minutes gives, in the order of its worth; goes on where it was stopped.

    python -m imta_jax.data.prepare --config=configs/cifar100.py cifar100_arrays  # With TensorFlow.
    python experiments/benchmarks/gpu_minutes.py cifar100_arrays --minutes=9 --output=minutes
    tar czf minutes.tgz --exclude=checkpoints --exclude='*.npz' minutes  # To go on elsewhere.

1. Steps of 5 and 7 exits, with each setting of config.cuda_graphs, against PyTorch.
2. Table 2 at a tenth of its length with three seeds, without partitioning, and Figure 4.
3. The engine's latency on CIFAR-100, with the network in this repository.
4. The step on ImageNet at three batch sizes.

Steps compile at once, and are timed one by one. What has a result is not repeated, and trainings
resume. NVIDIA's MPS lets these share the GPU, if it is installed. `--rehearse` does the same with
small networks and arrays of configs/mnist5k.py, on any machine.
"""

import argparse
import contextlib
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from imta_jax import command_line

FOLDER = Path(__file__).parent
# MNIST-5k in the place of CIFAR-100, and two exits.
_TINY = (
  *('dataset.name=mnist5k', 'dataset.test_split=test', 'dataset.validation_size=500'),
  *('dataset.image_size=28', 'dataset.mean=(0.131,)', 'dataset.std=(0.308,)'),
  *('model.num_exits=2', 'model.channels=2', 'model.growth_rate=2'),
  *('model.scale_factors=(1, 2)', 'model.bottleneck_factors=(1, 2)'),
)


class Part(NamedTuple):
  """A program and its result.

  Attributes:
    result: The file that exists once the program has ended well.
    command: What to run, without Python.
    seconds: How long it may take, so that one that hangs leaves time for the others.
  """

  result: Path
  command: Sequence[str | Path]
  seconds: float = math.inf


def main() -> int:
  """Runs the command line; the status is 1 if parts are left."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('arrays', type=Path, help='CIFAR-100, as imta_jax.data.prepare wrote it')
  parser.add_argument('--minutes', type=command_line.positive(float), required=True)
  parser.add_argument('--output', type=Path, default=Path('minutes'), help='default: %(default)s')
  parser.add_argument('--rehearse', action='store_true', help='with small networks')
  options = parser.parse_args()
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
  deadline = time.monotonic() + 60 * options.minutes
  output = options.output.resolve()
  output.mkdir(parents=True, exist_ok=True)
  steps, *others = all_parts(output, options.arrays.resolve(), options.rehearse)
  done = [run(steps, output, deadline)]
  mps = shutil.which('nvidia-cuda-mps-control')  # With it, trainings share a GPU.
  try:
    if mps:
      subprocess.run([mps, '-d'])
    done += [run(group, output, deadline) for group in others]
  finally:
    if mps:
      subprocess.run([mps], input=b'quit')
  return int(not all(done))


def all_parts(output: Path, arrays: Path, rehearse: bool) -> list[list[Part]]:
  """Returns the parts in their order; those of a group start at once.

  Args:
    output: Folder of the results.
    arrays: Folder of the data set.
    rehearse: Whether to use small networks.
  """
  name, exits, large, batch_sizes = 'cifar100', (5, 7), 'imagenet', (256, 1024, 2048)
  scale, jobs, dtype, fields = 0.1, 9, 'bfloat16', []
  network = [f'--config=configs/{name}.py:exits=5']
  if rehearse:
    name, exits, large, batch_sizes = 'mnist5k', (1, 2), 'mnist5k', (64, 128, 256)
    scale, jobs, dtype, fields = 0.003, 2, 'float32', list(_TINY)
    network = [f'--config=configs/{name}.py', '--repeats=1', '--calls=8']

  def step(config, phase, batch_size, *arguments):
    of_config = config.replace('.py', '').replace(':', '_')
    result = output / f'step_{of_config}_phase={phase}_batch={batch_size}.json'
    return Part(
      result,
      [
        *(FOLDER / 'training_step.py', f'--config=configs/{config}', f'--phases={phase}'),
        *(f'--batch_sizes={batch_size}', f'--dtype={dtype}', '--repeats=5', f'--output={result}'),
        *arguments,
      ],
      420,
    )

  compared = ('--cuda_graphs=whole,concurrent', f'--lock={output / "lock"}')
  table, figure = (
    Part(
      output / program / 'README.md',
      [
        *(FOLDER.parent / f'paper/{program}.py', '--train', f'--scale={scale}', f'--jobs={jobs}'),
        *(f'--runs={output / "runs"}', f'--output={output / program}', '--without=partitioning'),
        *(f'--config.dataset.arrays_dir={arrays}', f'--config.model.dtype={dtype}'),
        *(f'--config.{field}' for field in fields),
      ],
    )
    for program in ('table_2', 'figure_4')
  )
  latency = [
    *(FOLDER / 'inference.py', FOLDER.parent / f'results/{name}/export', '--batch_sizes=1,16,256'),
    *(*network, f'--arrays={arrays}', f'--output={output / "latency"}'),
  ]
  return [
    [step(f'{name}.py:exits={n}', phase, 64, *compared) for n in exits for phase in (1, 2)],
    [table],
    [figure],
    [Part(output / 'latency/latency.json', latency)],
    *([step(f'{large}.py', 1, size, '--peers=')] for size in batch_sizes),
  ]


def run(group: Sequence[Part], output: Path, deadline: float) -> bool:
  """Runs those parts of a group at once that have no result yet.

  Args:
    group: The parts.
    output: Folder for what they print.
    deadline: When to stop them, as time.monotonic() counts.

  Returns:
    Whether all have their results.
  """
  parts = [part for part in group if not part.result.exists()]
  environment = os.environ | {'XLA_PYTHON_CLIENT_PREALLOCATE': 'false'}
  start, processes = time.monotonic(), []
  try:
    for part in parts if start < deadline else ():
      with (output / f'{Path(part.command[0]).stem}_{part.result.stem}.log').open('w') as log:
        command = [sys.executable, *part.command]
        # A group of its own, to which the trainings that it starts belong.
        processes.append(
          subprocess.Popen(
            command,
            stdout=log,
            stderr=log,
            cwd=FOLDER.parents[1],
            env=environment,
            process_group=0,
          )
        )
    for part, process in zip(parts, processes, strict=False):
      process.wait(max(0, min(deadline, start + part.seconds) - time.monotonic()))
  except subprocess.TimeoutExpired:
    pass
  finally:
    stop(processes)
  for part in parts:
    state = 'done' if part.result.exists() else 'not done'
    print(f'{state} after {time.monotonic() - start:.0f} s: {part.result}', flush=True)
  return all(part.result.exists() for part in group)


def stop(processes: Sequence[subprocess.Popen]) -> None:
  """Ends programs with those that they have started, which have 20 seconds to save their states."""
  _signal(processes, signal.SIGTERM)
  end = time.monotonic() + 20
  while time.monotonic() < end and _signal(processes, 0):
    time.sleep(0.1)
  _signal(processes, signal.SIGKILL)


def _signal(processes, number):
  """Signals groups of processes; returns whether there are any."""
  found = False
  for process in processes:
    process.poll()  # Else it stays after its end.
    with contextlib.suppress(ProcessLookupError):
      os.killpg(process.pid, number)
      found = True
  return found


if __name__ == '__main__':
  command_line.run(main)
