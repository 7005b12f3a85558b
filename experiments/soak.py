"""Kills a training again and again, and compares its end with that of a run that is left alone.

    python experiments/soak.py --kills=50 --output=experiments/results/soak

A small network learns from 5,000 digits in two phases. One run is left alone. In other workdirs the
same command is killed with SIGKILL, every other time as soon as it writes a checkpoint, otherwise
at a random moment, and started again until it ends; then the next workdir follows. States, metrics
and the evaluation of every run must equal those of the first one, bit for bit.
"""

import argparse
import collections
import dataclasses
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from benchmarks import common
from etils import epath

from imta_jax import command_line, files
from imta_jax.command_line import positive

_ROOT = Path(__file__).parents[1]
# 2 exits, 96 training images: 6 steps per epoch.
_EPOCHS = {'phase_1': 20, 'phase_2': 10}
_FLAGS = (
  f'--config={_ROOT}/configs/mnist5k.py:exits=2',
  '--config.dataset.validation_size=3904',
  '--config.batch_size=16',
  '--config.evaluation_batch_size=1000',
  '--config.log_every_steps=2',
  '--config.tensorboard=False',
  '--config.model.scale_factors=1,2',
  '--config.model.bottleneck_factors=1,2',
  *(f'--config.phases[{i}].epochs={epochs}' for i, epochs in enumerate(_EPOCHS.values())),
)
_POLL_SECONDS = 0.002


@dataclasses.dataclass(frozen=True)
class Kill:
  """A run that was killed.

  Attributes:
    workdir: Number of the workdir, counted from 1.
    seconds: After its start.
    while_saving: Whether there was a checkpoint that was not finished.
    at: The phase and step of the last metrics, as in 'phase_1 step 12'; empty before the first.
    saved: The same of the last finished checkpoint.
  """

  workdir: int
  seconds: float
  while_saving: bool
  at: str
  saved: str


def main(arguments: Sequence[str] | None = None) -> int:
  """Runs the command line.

  Returns:
    The exit status: 1 if a run did not end like the one that was left alone.
  """
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--kills', type=positive(int), default=50, help='default: 50')
  parser.add_argument('--seed', type=int, default=0, help='of the moments; default: 0')
  parser.add_argument('--output', required=True, help='folder to write')
  options = parser.parse_args(arguments)
  moments = random.Random(options.seed)
  with tempfile.TemporaryDirectory() as root:
    alone = Path(root, 'alone')
    _start(alone).wait()  # Compiles, which later runs need not.
    alone = Path(root, 'alone again')
    start = time.monotonic()
    _start(alone).wait()
    duration = time.monotonic() - start
    expected = contents(alone)
    kills, differences, num_aside = [], [], 0
    for number in range(1, options.kills + 1):
      workdir = Path(root, str(number))
      kills += _kill_until_it_ends(workdir, number, options.kills - len(kills), duration, moments)
      found = contents(workdir)
      num_aside += len(list(workdir.glob('checkpoints/*_damaged/*')))
      differences += [f'workdir {number}: {d}' for d in differences_of(expected, found)]
      print(f'{len(kills)} kills, {len(differences)} differences', flush=True)
      if len(kills) == options.kills:
        break
  folder = epath.Path(options.output)
  files.write_csv(folder / 'kills.csv', [dataclasses.asdict(kill) for kill in kills])
  text = _page(kills, differences, num_aside, duration, options)
  files.write_whole(folder / 'README.md', text.encode())
  print(text)
  return 1 if differences else 0


def _start(workdir: Path) -> subprocess.Popen:
  command = [sys.executable, '-m', 'imta_jax.main', *_FLAGS, f'--workdir={workdir}']
  return subprocess.Popen(command, cwd=_ROOT, stdout=subprocess.DEVNULL)


def _kill_until_it_ends(
  workdir: Path, number: int, most: int, duration: float, moments: random.Random
) -> Iterator[Kill]:
  """Trains in a workdir, and yields what was killed, at most so many times."""
  for count in range(most + 1):
    process, start = _start(workdir), time.monotonic()
    if count == most:
      process.wait()
      return
    deadline = start + moments.uniform(0, duration)
    waits_for_checkpoint = count % 2 == 0
    while process.poll() is None and time.monotonic() < deadline:
      if waits_for_checkpoint and _is_saving(workdir):
        break
      time.sleep(_POLL_SECONDS)
    process.kill()
    if process.wait() == 0:
      return
    yield Kill(
      number,
      round(time.monotonic() - start, 1),
      _is_saving(workdir),
      _last_metrics(workdir),
      _last_checkpoint(workdir),
    )


def _is_saving(workdir: Path) -> bool:
  return any(workdir.glob('checkpoints/*/*-tmp*'))


def _last_metrics(workdir: Path) -> str:
  path = workdir / 'metrics.jsonl'
  lines = path.read_text().splitlines(keepends=True) if path.exists() else []
  whole = [json.loads(line) for line in lines if line.endswith('\n')]
  return f'{whole[-1]["phase"]} step {whole[-1]["step"]}' if whole else ''


def _last_checkpoint(workdir: Path) -> str:
  saved = [(path.parent.name, int(path.name)) for path in _checkpoints(workdir)]
  return '{} step {}'.format(*max(saved)) if saved else ''


def _checkpoints(workdir: Path) -> list[Path]:
  """Returns the finished checkpoints; those set aside had been deleted in part when a run ended."""
  paths = workdir.glob('checkpoints/phase_?/*')
  return sorted(path for path in paths if path.name.isdigit())


def contents(workdir: Path) -> dict[str, object]:
  """Returns all that a run has left and that does not depend on time, by name."""
  found = {}
  for path in _checkpoints(workdir):
    state = ocp.StandardCheckpointer().restore(path / 'state')
    for name, leaf in jax.tree_util.tree_leaves_with_path(state):
      key = jax.tree_util.keystr(name, simple=True, separator='/')
      found[f'{path.relative_to(workdir)}/{key}'] = np.asarray(leaf)
  for line in (workdir / 'metrics.jsonl').read_text().splitlines():
    record = json.loads(line)
    for name, value in record.items():
      if name.startswith(('train/', 'validation/')):
        found[f'{record["phase"]} step {record["step"]} {name}'] = np.asarray(value)
  for path in sorted(workdir.glob('evaluation/*.npz')):
    with np.load(path) as arrays:
      found |= {f'{path.name}/{name}': arrays[name] for name in arrays}
  for name in ('evaluation.json', 'exits.csv', 'budget.csv'):
    found[name] = np.frombuffer((workdir / 'evaluation' / name).read_bytes(), np.uint8)
  return found


def differences_of(expected: dict[str, np.ndarray], found: dict[str, np.ndarray]) -> list[str]:
  """Returns what is missing, surplus or not equal, bit for bit."""
  lines = [f'{name} is missing' for name in sorted(expected.keys() - found.keys())]
  lines += [f'{name} is surplus' for name in sorted(found.keys() - expected.keys())]
  lines += [
    f'{name} differs'
    for name in sorted(expected.keys() & found.keys())
    if not np.array_equal(expected[name], found[name])
  ]
  return lines


def _page(kills, differences, num_aside, duration, options):
  moments = collections.Counter(
    'while a checkpoint was written'
    if kill.while_saving
    else 'before the first metrics of a workdir'
    if not kill.at
    else f'in {kill.at.split()[0]}'
    for kill in kills
  )
  rows = [(moment, str(count)) for moment, count in sorted(moments.items())]
  return _PAGE.format(
    kills=len(kills),
    workdirs=kills[-1].workdir,
    num_aside=num_aside,
    duration=duration,
    seed=options.seed,
    output=options.output,
    table=common.table(('killed', 'times'), rows),
    result='\n'.join(f'- {line}' for line in differences)
    or 'All runs ended like the one that was left alone, bit for bit.',
    machine=common.machine(),
  )


_PAGE = """# A training that is killed again and again

    python experiments/soak.py --kills={kills} --seed={seed} --output={output}

{kills} times SIGKILL in {workdirs} workdirs. Left alone, a run takes {duration:.0f} s.
All moments are in [kills.csv](kills.csv).

{table}

{result}

{num_aside} times an old checkpoint was being deleted; the next start moved it aside with a warning.

{machine}
"""


if __name__ == '__main__':
  command_line.run(main)
