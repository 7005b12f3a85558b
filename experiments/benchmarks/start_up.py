"""Measures the seconds from launching a training to the end of its first step.

    python experiments/benchmarks/start_up.py configs/cifar100.py configs/imagenet.py

Runs `python -m imta_jax.main --config=…` in a fresh workdir, with the data sets in TFDS_DATA_DIR,
and stops it as soon as it reports that its first step is done. The first run starts with empty
caches; the second and third runs use the caches of the runs before.
"""

import argparse
import collections
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import common

from imta_jax import command_line
from imta_jax import config as config_lib
from imta_jax.errors import UsageError

_ROOT = Path(__file__).resolve().parents[2]
_DONE = 'first step done'
_RUNS = ('empty caches', 'second run', 'third run')


def main() -> None:
  """Runs the command line."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument(
    'configs', nargs='+', help='config file as in training, for example configs/cifar100.py:exits=5'
  )
  parser.add_argument(
    '--overrides', default='', help="flags for training, for example '--config.batch_size=32'"
  )
  parser.add_argument(
    '--repeats',
    type=command_line.positive(int),
    default=3,
    help='number of times the three runs are repeated; default: 3',
  )
  parser.add_argument('--output', type=command_line.output_file, help='JSON file for all timings')
  options = parser.parse_args()
  if options.repeats < 1:
    raise UsageError(f'--repeats={options.repeats} must be at least 1')
  for config in options.configs:
    config_lib.load_file(config)

  timings = {config: {run: [] for run in _RUNS} for config in options.configs}
  for _ in range(options.repeats):
    for config, seconds in timings.items():
      with tempfile.TemporaryDirectory() as cache:
        for run in _RUNS:
          flags = [f'--config={os.path.abspath(config)}', *options.overrides.split()]
          seconds[run].append(seconds_to_first_step(flags, cache))
  print(common.machine())
  print()
  print(
    common.table(
      ('config', *(f'{run}, s' for run in _RUNS)),
      [
        (config, *(common.spread(seconds[run], 1) for run in _RUNS))
        for config, seconds in timings.items()
      ],
    )
  )
  common.write_json(options.output, {'machine': common.machine(), 'seconds': timings})


def seconds_to_first_step(flags: Sequence[str], cache: str) -> float:
  """Runs training until its first step is done.

  Args:
    flags: The flags of the training program.
    cache: The folder for its caches.

  Returns:
    Seconds from the launch to the end of the first step.

  Raises:
    UsageError: If the program exits before the end of its first step.
  """
  environment = {**os.environ, 'XDG_CACHE_HOME': cache, 'PYTHONUNBUFFERED': '1'}
  # Without this variable, the compilation cache is in XDG_CACHE_HOME.
  environment.pop('JAX_COMPILATION_CACHE_DIR', None)
  with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as workdir:
    start = time.perf_counter()
    process = subprocess.Popen(
      [sys.executable, '-m', 'imta_jax.main', *flags, f'--workdir={workdir}/run'],
      cwd=_ROOT,
      env=environment,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )
    last_lines = collections.deque(maxlen=1)
    try:
      for line in process.stdout:
        if _DONE in line:
          return time.perf_counter() - start
        last_lines.extend([line.strip()] if line.strip() else [])
    finally:
      process.kill()
      process.wait()
  reason = last_lines[0] if last_lines else f'status {process.returncode}'
  raise UsageError(
    f'training with {" ".join(flags)} exited before its first step was done: {reason}'
  )


if __name__ == '__main__':
  command_line.run(main)
