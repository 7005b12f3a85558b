"""All measurements on an accelerator in one go, for as many minutes as it is at hand.

    JAX_PLATFORMS=cpu python experiments/benchmarks/agreement.py --write=kit/reference.npz
    python -m imta_jax.prepare --config=configs/cifar100.py kit/arrays
    python experiments/benchmarks/device.py --minutes=9 --kit=kit --output=results

The first two commands run anywhere; their folder travels. The third one runs on the device: the
measurements in their order, each as a process of its own, as far as time allows; then training, for
the time that remains. It needs no TensorFlow and no network. Without PyTorch there are no peers.

It writes device.json and device.md, and what the next stretch resumes the training from: the files
run_0, run_1 and so on, of at most 15 MB each, to be given back with --resume=FOLDER.
"""

import argparse
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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from imta_jax import command_line
from imta_jax.command_line import positive
from imta_jax.errors import UsageError

_ROOT = Path(__file__).resolve().parents[2]
_FOLDER = Path(__file__).resolve().parent
_PART_BYTES = 15_000_000
# Seconds in which a training that is told to stop has saved its state, and all is packed.
_SECONDS_TO_STOP = 45


@dataclasses.dataclass(frozen=True)
class Measurement:
  """One of the measurements.

  Attributes:
    name: What the page calls it.
    command: The program and its arguments.
    least_seconds: With less time left it is skipped.
    output: The JSON file that the program writes, or None.
  """

  name: str
  command: tuple[str, ...]
  least_seconds: float
  output: Path | None = None


def main(arguments: Sequence[str] | None = None) -> None:
  """Runs the command line.

  Raises:
    UsageError: If the kit is not there.
  """
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--minutes', type=positive(float), default=9.0, help='default: 9')
  parser.add_argument('--kit', default='kit', help='folder with reference.npz and arrays/')
  parser.add_argument('--output', required=True, help='folder to write')
  parser.add_argument('--config', default='configs/cifar100.py', help='default: %(default)s')
  parser.add_argument(
    '--large_config', default='configs/imagenet.py', help='default: %(default)s; may be empty'
  )
  parser.add_argument('--batch_sizes', default='64,512', help='default: 64,512')
  parser.add_argument('--large_batch_size', default='256', help='default: 256')
  parser.add_argument('--dtype', default='bfloat16', help='default: bfloat16')
  parser.add_argument('--resume', help='folder with the run_0, run_1 … of the stretch before')
  parser.add_argument('--skip', default='', help='names of measurements to leave out')
  options = parser.parse_args(arguments)
  start, kit, output = time.monotonic(), Path(options.kit).resolve(), Path(options.output).resolve()
  deadline = start + 60 * options.minutes
  for path in (kit / 'reference.npz', kit / 'arrays' / 'record.json'):
    if not path.exists():
      raise UsageError(f'--kit={options.kit} has no {path.relative_to(kit)}: see --help')
  output.mkdir(parents=True, exist_ok=True)
  runs = output / 'runs'  # Not packed: the machine's own.

  results = []
  skipped = options.skip.split(',')
  for measurement in measurements(options, kit, output, runs):
    if measurement.name in skipped:
      continue
    results.append(run(measurement, deadline - _SECONDS_TO_STOP))
    write_page(results, options, output)
  results.append(train(options, kit, runs / 'training', deadline))
  write_page(results, options, output)
  pack(runs / 'training', output)
  print((output / 'device.md').read_text())


def measurements(
  options: argparse.Namespace, kit: Path, output: Path, runs: Path
) -> list[Measurement]:
  """The measurements, in the order of their worth."""

  def script(name, title, least_seconds, *flags):
    path = output / f'{title.replace(" ", "_")}.json'
    command = (sys.executable, str(_FOLDER / name), *flags, f'--output={path}')
    return Measurement(title, command, least_seconds, path)

  config, dtype = f'--config={options.config}', f'--dtype={options.dtype}'
  sizes = f'--batch_sizes={options.batch_sizes}'
  largest = f'--batch_size={options.batch_sizes.split(",")[-1]}'
  data = _data_flags(kit)
  latency = str(_FOLDER.parent / 'latency.py')
  short_run = str(runs / 'short')
  chosen = [
    script('agreement.py', 'agreement', 30, config, f'--check={kit / "reference.npz"}'),
    script('training_step.py', 'training step', 60, config, dtype, sizes, '--repeats=5'),
  ]
  if options.large_config:
    large = (f'--config={options.large_config}', f'--batch_sizes={options.large_batch_size}')
    chosen.append(
      script('training_step.py', 'large training step', 60, *large, dtype, '--repeats=5')
    )
  chosen += [
    script('memory.py', 'memory', 40, config, dtype, sizes),
    script(
      'start_up.py', 'start-up', 60, options.config, f'--overrides={" ".join(data)}', '--repeats=1'
    ),
    script('evaluation.py', 'evaluation', 40, config, dtype, largest),
    # The engine's latency needs a network; how well it is trained does not change its time.
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


def run(measurement: Measurement, deadline: float) -> dict[str, Any]:
  """Runs a measurement if there is time for it.

  Args:
    measurement: What to run.
    deadline: When it is ended at the latest, by the monotonic clock.

  Returns:
    'name', 'status', 'seconds', 'text' that it printed, and the 'results' that it wrote.
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
    env={**os.environ, 'PYTHONPATH': str(_ROOT), 'PYTHONUNBUFFERED': '1'},
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
    status = 'ended before it was done: no time left'
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


def train(options: argparse.Namespace, kit: Path, workdir: Path, deadline: float) -> dict[str, Any]:
  """Trains until there is just the time to save, from where the stretch before stopped.

  Returns:
    As `run`; its results are the lines of metrics.jsonl.
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
    env={**os.environ, 'PYTHONPATH': str(_ROOT), 'PYTHONUNBUFFERED': '1'},
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )
  try:
    text, _ = process.communicate(timeout=left)
  except subprocess.TimeoutExpired:
    process.send_signal(signal.SIGTERM)  # It saves its state.
    try:
      text, _ = process.communicate(timeout=_SECONDS_TO_STOP)
    except subprocess.TimeoutExpired:
      process.kill()
      text, _ = process.communicate()
  status = {0: 'finished', 128 + signal.SIGTERM: 'saved, to be resumed'}.get(
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
  """Packs what a training is resumed from into files that travel.

  Of each phase the newest checkpoint goes along, and of a phase that is over all of them, since the
  next one starts from the best.

  Args:
    workdir: The run's folder.
    folder: Where to write run_0, run_1 and so on.

  Returns:
    The files.
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
  """Unpacks what `pack` wrote; a run that is there already stays.

  Raises:
    UsageError: If nothing is there, or not all of it.
  """
  if (workdir / 'config.json').exists():
    return
  parts = sorted(folder.glob('run_*'), key=lambda path: int(path.name.removeprefix('run_')))
  if not parts:
    raise UsageError(f'--resume={folder} has no run_0: name the folder of the stretch before')
  content = b''.join(part.read_bytes() for part in parts)
  try:
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
      tar.extractall(workdir, filter='data')
  except tarfile.TarError as error:
    raise UsageError(f'--resume={folder} is not whole ({error}): a part is missing') from error


def write_page(
  results: Sequence[dict[str, Any]], options: argparse.Namespace, folder: Path
) -> None:
  """Writes device.json, and device.md for readers."""
  content = json.dumps({'options': vars(options), 'results': results}, indent=2) + '\n'
  (folder / 'device.json').write_text(content, encoding='utf-8')
  lines = [
    f'# {options.config} on one device',
    '',
    f'`python experiments/benchmarks/device.py --minutes={options.minutes:g} '
    f'--config={options.config} --dtype={options.dtype}`',
    '',
    '| measurement | status | seconds |',
    '| --- | --- | --- |',
    *(f'| {r["name"]} | {r["status"]} | {r["seconds"]:.0f} |' for r in results),
  ]
  for result in results:
    if result['text']:
      lines += ['', f'## {result["name"][:1].upper()}{result["name"][1:]}', '']
      # Tables stand as they are; other lines as paragraphs.
      for line in result['text'].strip().splitlines():
        is_table = line.startswith('|')
        lines.append(line if is_table or not line.strip() else f'    {line}')
  (folder / 'device.md').write_text('\n'.join(lines) + '\n', encoding='utf-8')


if __name__ == '__main__':
  command_line.run(main)
