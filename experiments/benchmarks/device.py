"""Runs all measurements on an accelerator within a given number of minutes, then trains.

    JAX_PLATFORMS=cpu python experiments/benchmarks/agreement.py --write=kit/reference.npz
    python -m imta_jax.prepare --config=configs/cifar100.py kit/arrays
    python experiments/benchmarks/device.py --minutes=9 --kit=kit --output=results

The first two commands run on any machine; copy the folder that they write to the device. The third
command runs there. It runs the measurements in a fixed order, the most important first, each in its
own process, and skips those for which too little time is left. In the remaining time it trains. It
needs neither TensorFlow nor a network connection; without PyTorch it measures no peers. On a
machine with many cores, --compile_first saves most of the time: it compiles all programs at once.

It writes device.json and device.md, and the state of the training as files run_0, run_1 and so on,
of at most 15 MB each. To continue the training in another session, pass their folder as --resume.
"""

import argparse
import concurrent.futures
import contextlib
import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from imta_jax import command_line
from imta_jax.command_line import positive
from imta_jax.errors import UsageError

_ROOT = Path(__file__).resolve().parents[2]
_BENCHMARKS = Path(__file__).resolve().parent
_PART_BYTES = 15_000_000
# Seconds reserved for the training to save its state on SIGTERM, and for packing it.
_SECONDS_TO_STOP = 45


@dataclasses.dataclass(frozen=True)
class Measurement:
  """One of the measurements.

  Attributes:
    name: Its name in the report and in --skip.
    command: The program and its arguments.
    least_seconds: It is skipped if fewer seconds are left.
    output: The JSON file that the program writes, or None.
    compile_with: With --compile_first, the program runs once with each of these further arguments
      before anything is measured.
  """

  name: str
  command: tuple[str, ...]
  least_seconds: float
  output: Path | None = None
  compile_with: tuple[tuple[str, ...], ...] = ((),)


def main(arguments: Sequence[str] | None = None) -> None:
  """Runs the command line.

  Raises:
    UsageError: If the kit is incomplete, or the state to resume from is missing or incomplete.
  """
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument(
    '--minutes', type=positive(float), default=9.0, help='total time in minutes; default: 9'
  )
  parser.add_argument(
    '--kit', default='kit', help='folder with reference.npz and arrays/; default: %(default)s'
  )
  parser.add_argument(
    '--output', type=command_line.output_folder, required=True, help='folder to write'
  )
  parser.add_argument(
    '--config',
    default='configs/cifar100.py',
    help='config to measure and to train; default: %(default)s',
  )
  parser.add_argument(
    '--large_config',
    default='configs/imagenet.py',
    help='config for the large training step; default: %(default)s; may be empty',
  )
  parser.add_argument(
    '--batch_sizes',
    default='64,512',
    help='batch sizes of training steps and memory, separated by commas; evaluation uses the last '
    'one; default: %(default)s',
  )
  parser.add_argument(
    '--large_batch_size', default='256', help='batch size for --large_config; default: %(default)s'
  )
  parser.add_argument(
    '--dtype', default='bfloat16', help='type that networks compute in; default: %(default)s'
  )
  parser.add_argument(
    '--resume', help='folder with run_0, run_1 and so on of a previous session, to resume from'
  )
  parser.add_argument(
    '--skip', default='', help='names of measurements to leave out, separated by commas'
  )
  parser.add_argument(
    '--compile_first',
    type=positive(float),
    metavar='MINUTES',
    help='first run everything once and all at the same time, for at most so many minutes, so that '
    'the caches contain the compiled programs',
  )
  options = parser.parse_args(arguments)
  start, kit, output = time.monotonic(), Path(options.kit).resolve(), Path(options.output).resolve()
  deadline = start + 60 * options.minutes
  for path in (kit / 'reference.npz', kit / 'arrays' / 'record.json'):
    if not path.exists():
      raise UsageError(f'--kit={options.kit} has no {path.relative_to(kit)}: see --help')
  runs = output / 'runs'  # Workdirs; only the training in it is packed.

  chosen = measurements(options, kit, output, runs)
  skipped = [name for name in options.skip.split(',') if name]
  names = [measurement.name for measurement in chosen]
  for name in skipped:
    if name not in names:
      raise UsageError(f'--skip={name} is not a measurement: choose from {", ".join(names)}')
  output.mkdir(parents=True, exist_ok=True)

  chosen = [measurement for measurement in chosen if measurement.name not in skipped]
  if options.compile_first:
    compile_all(chosen, time.monotonic() + 60 * options.compile_first)
  results = []
  for measurement in chosen:
    results.append(run(measurement, deadline - _SECONDS_TO_STOP))
    write_page(results, options, output)
  results.append(train(options, kit, runs / 'training', deadline))
  write_page(results, options, output)
  pack(runs / 'training', output)
  print((output / 'device.md').read_text())


def measurements(
  options: argparse.Namespace, kit: Path, output: Path, runs: Path
) -> list[Measurement]:
  """Returns the measurements, the most important first."""

  def script(name, title, least_seconds, *flags, compile_with=((),)):
    path = output / f'{title.replace(" ", "_")}.json'
    command = (sys.executable, str(_BENCHMARKS / name), *flags, f'--output={path}')
    return Measurement(title, command, least_seconds, path, compile_with)

  def training_step(title, config, batch_size):
    flags = (f'--config={config}', dtype, f'--batch_sizes={batch_size}', '--repeats=5')
    phases = (('--phases=1',), ('--phases=2',))
    return script('training_step.py', title, 60, *flags, compile_with=phases)

  config, dtype = f'--config={options.config}', f'--dtype={options.dtype}'
  batch_sizes = options.batch_sizes.split(',')
  data = _data_flags(kit)
  latency = str(_BENCHMARKS.parent / 'latency.py')
  short_run = str(runs / 'short')
  chosen = [
    script('agreement.py', 'agreement', 30, f'--check={kit / "reference.npz"}'),
    *(training_step(f'training step {size}', options.config, size) for size in batch_sizes),
  ]
  if options.large_config:
    chosen.append(
      training_step('large training step', options.large_config, options.large_batch_size)
    )
  chosen += [
    script('memory.py', 'memory', 40, config, dtype, f'--batch_sizes={options.batch_sizes}'),
    script(
      'evaluation.py',
      'evaluation',
      40,
      config,
      dtype,
      f'--batch_size={batch_sizes[-1]}',
      '--repeats=2',
    ),
    # Measuring latency needs a network; how well it is trained does not change its speed.
    Measurement(
      'short training for latency',
      (
        *_train_command(options, data, short_run),
        '--config.phases[0].steps=30',
        '--config.phases[1].steps=10',
      ),
      60,
    ),
    Measurement(
      'latency',
      (sys.executable, latency, short_run, f'--output={output / "latency"}'),
      60,
      output / 'latency' / 'latency.json',
      compile_with=(),  # It needs the short training.
    ),
    script(
      *('start_up.py', 'start-up', 60),
      *(options.config, f'--overrides={" ".join(data)}', '--repeats=1'),
      compile_with=(),  # It measures empty caches.
    ),
  ]
  return chosen


def _data_flags(kit):
  return (f'--config.dataset.arrays_dir={kit / "arrays"}', '--config.tensorboard=False')


def _train_command(options, data, workdir):
  return (
    *(sys.executable, '-m', 'imta_jax.main', f'--config={options.config}'),
    *(f'--config.model.dtype={options.dtype}', *data, f'--workdir={workdir}'),
  )


def compile_all(chosen: Sequence[Measurement], deadline: float) -> None:
  """Runs measurements all at the same time, for what they leave in caches.

  Args:
    chosen: The measurements.
    deadline: Time of `time.monotonic()` at which those that are still running are killed.
  """
  print('compiling …', flush=True)
  # Processes that share a device must not each reserve most of its memory.
  environment = {'XLA_PYTHON_CLIENT_PREALLOCATE': 'false'}
  runs = [
    dataclasses.replace(measurement, command=(*measurement.command, *arguments), least_seconds=0)
    for measurement in chosen
    for arguments in measurement.compile_with
  ]
  with concurrent.futures.ThreadPoolExecutor(len(runs)) as pool:
    results = pool.map(lambda each: run(each, deadline, environment), runs)
    for result in results:
      print(f'  {result["name"]}: {result["status"]}, {result["seconds"]:.0f} s', flush=True)
  for measurement in chosen:  # What was written so far was not measured alone.
    if measurement.output is not None:
      measurement.output.unlink(missing_ok=True)


def run(
  measurement: Measurement, deadline: float, environment: Mapping[str, str] | None = None
) -> dict[str, Any]:
  """Runs a measurement if enough time is left for it.

  Args:
    measurement: The measurement to run.
    deadline: Time of `time.monotonic()` at which it is killed if it is still running.
    environment: Environment variables to add.

  Returns:
    'name', 'status', 'seconds', the 'text' that it printed, and the 'results' that it wrote.
  """
  start = time.monotonic()
  left = deadline - start
  if left < measurement.least_seconds:
    status = f'skipped: {left:.0f} s left, {measurement.least_seconds:.0f} s needed'
    return {'name': measurement.name, 'status': status, 'seconds': 0.0, 'text': '', 'results': None}
  print(f'{measurement.name} …', flush=True)
  process = subprocess.Popen(
    measurement.command,
    cwd=_ROOT,
    env={**_environment(), **(environment or {})},
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
    start_new_session=True,
  )
  try:
    text, _ = process.communicate(timeout=left)
    status = 'done' if process.returncode == 0 else f'failed with status {process.returncode}'
  except subprocess.TimeoutExpired:
    with contextlib.suppress(ProcessLookupError):
      os.killpg(process.pid, signal.SIGKILL)
    text, _ = process.communicate()
    status = 'stopped before it finished: no time left'
  path = measurement.output
  results = json.loads(path.read_text()) if path is not None and path.exists() else None
  seconds = time.monotonic() - start
  return {
    'name': measurement.name,
    'status': status,
    'seconds': seconds,
    'text': text,
    'results': results,
  }


def _environment():
  paths = [str(_ROOT), *filter(None, [os.environ.get('PYTHONPATH')])]
  return {**os.environ, 'PYTHONPATH': os.pathsep.join(paths), 'PYTHONUNBUFFERED': '1'}


def train(options: argparse.Namespace, kit: Path, workdir: Path, deadline: float) -> dict[str, Any]:
  """Trains, from the state of the previous session if any, until it is time to save the state.

  Args:
    options: The options of the command line.
    kit: The folder with the data set.
    workdir: The workdir of the training.
    deadline: Time of `time.monotonic()` by which the state must be saved.

  Returns:
    A record as from `run`; its results are the lines of metrics.jsonl.
  """
  start = time.monotonic()
  if options.resume:
    unpack(Path(options.resume), workdir)
  left = deadline - _SECONDS_TO_STOP - start
  if left < _SECONDS_TO_STOP:
    status = f'skipped: {left:.0f} s left'
    return {'name': 'training', 'status': status, 'seconds': 0.0, 'text': '', 'results': None}
  print('training …', flush=True)
  process = subprocess.Popen(
    _train_command(options, _data_flags(kit), workdir),
    cwd=_ROOT,
    env=_environment(),
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )
  try:
    text, _ = process.communicate(timeout=left)
  except subprocess.TimeoutExpired:
    process.send_signal(signal.SIGTERM)  # The training saves its state and exits.
    try:
      text, _ = process.communicate(timeout=_SECONDS_TO_STOP)
    except subprocess.TimeoutExpired:
      process.kill()
      text, _ = process.communicate()
  status = {0: 'finished', 128 + signal.SIGTERM: 'stopped; can be resumed'}.get(
    process.returncode, f'failed with status {process.returncode}'
  )
  metrics = workdir / 'metrics.jsonl'
  lines = metrics.read_text().splitlines() if metrics.exists() else []
  return {
    'name': 'training',
    'status': status,
    'seconds': time.monotonic() - start,
    'text': text,
    'results': [json.loads(line) for line in lines],
  }


def pack(workdir: Path, folder: Path) -> list[Path]:
  """Packs everything that resuming a training needs into files that are easy to copy.

  Packs the newest checkpoint of the current phase, and all checkpoints of completed phases, since
  the next phase may start from the best one.

  Args:
    workdir: The workdir of the training.
    folder: The folder to write run_0, run_1 and so on to.

  Returns:
    The files; none if the training has not started.
  """
  for old in folder.glob('run_*'):
    old.unlink()
  if not (workdir / 'config.json').exists():
    return []
  chosen = [path for path in workdir.iterdir() if path.is_file()]
  phases = sorted(
    (workdir / 'checkpoints').glob('phase_*'), key=lambda path: (len(path.name), path.name)
  )
  for phase in phases:
    checkpoints = sorted(
      (path for path in phase.iterdir() if path.name.isdigit()), key=lambda path: int(path.name)
    )
    chosen += checkpoints[-1:] if phase == phases[-1] else checkpoints
  archive = io.BytesIO()
  with tarfile.open(fileobj=archive, mode='w') as tar:
    for path in chosen:
      tar.add(path, path.relative_to(workdir))
  content, parts = archive.getvalue(), []
  for number, start in enumerate(range(0, len(content), _PART_BYTES)):
    parts.append(folder / f'run_{number}')
    parts[-1].write_bytes(content[start : start + _PART_BYTES])
  return parts


def unpack(folder: Path, workdir: Path) -> None:
  """Unpacks the files that `pack` wrote, unless the workdir already holds a run.

  Args:
    folder: The folder with run_0, run_1 and so on.
    workdir: The workdir to write.

  Raises:
    UsageError: If there are no such files, or some of them are missing.
  """
  if (workdir / 'config.json').exists():
    return
  parts = sorted(folder.glob('run_*'), key=lambda path: int(path.name.removeprefix('run_')))
  if not parts:
    raise UsageError(
      f'--resume={folder} has no run_0: pass the output folder of the previous session'
    )
  content = b''.join(part.read_bytes() for part in parts)
  try:
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
      tar.extractall(workdir, filter='data')
  except tarfile.TarError as error:
    raise UsageError(f'--resume={folder} is incomplete ({error}): a part is missing') from error


def write_page(
  results: Sequence[dict[str, Any]], options: argparse.Namespace, folder: Path
) -> None:
  """Writes device.json, and device.md as a readable report."""
  content = json.dumps({'options': vars(options), 'results': results}, indent=2) + '\n'
  (folder / 'device.json').write_text(content, encoding='utf-8')
  lines = [
    f'# {options.config} on one device',
    '',
    f'`python experiments/benchmarks/device.py --minutes={options.minutes:g} '
    f'--config={options.config} --batch_sizes={options.batch_sizes} '
    f'--large_config={options.large_config} --large_batch_size={options.large_batch_size} '
    f'--dtype={options.dtype}`',
    '',
    '| measurement | status | seconds |',
    '| --- | --- | --- |',
    *(f'| {r["name"]} | {r["status"]} | {r["seconds"]:.0f} |' for r in results),
  ]
  for result in results:
    if result['text']:
      lines += ['', f'## {result["name"][:1].upper()}{result["name"][1:]}', '']
      # Tables are kept as they are; other lines become code blocks.
      for line in result['text'].strip().splitlines():
        is_table = line.startswith('|')
        lines.append(line if is_table or not line.strip() else f'    {line}')
  (folder / 'device.md').write_text('\n'.join(lines) + '\n', encoding='utf-8')


if __name__ == '__main__':
  command_line.run(main)
