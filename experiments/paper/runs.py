"""The trainings behind a table or figure: which there are, which are missing, what they gave."""

import argparse
import concurrent.futures
import dataclasses
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from imta_jax import command_line, evaluate, files
from imta_jax import config as config_lib
from imta_jax.errors import UsageError
from imta_jax.training import workdir as layout

ROOT = Path(__file__).parents[2]


@dataclasses.dataclass(frozen=True)
class Run:
  """A training.

  Attributes:
    name: Its folder.
    config: Config file with its argument, from the top of the repository.
    overrides: Values of config fields, by path: {'phases[0].epochs': 9.0}.
    first_phase_of: Name of the run whose phase I this one continues; None to train its own.
  """

  name: str
  config: str
  overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  first_phase_of: str | None = None


@dataclasses.dataclass(frozen=True)
class Runs:
  """The finished runs of a table or figure.

  Attributes:
    folder: Folder of all workdirs.
    scale: Length of the trainings as a fraction of the paper's.
    num_seeds: Number of repetitions, with seeds from 0.
    overrides: Values of config fields for all runs, by path, as text.
  """

  folder: epath.Path
  scale: float
  num_seeds: int
  overrides: Mapping[str, str]

  def workdir(self, run: str, seed: int) -> epath.Path:
    """Returns the workdir of a run."""
    return self.folder / run / f'seed_{seed}'

  def has(self, run: str) -> bool:
    """Whether all seeds of a run are finished."""
    return all(is_finished(self.workdir(run, seed)) for seed in range(self.num_seeds))

  def predictions(self, run: str, phase: int, split: str) -> list[evaluate.Predictions]:
    """Returns the predictions of a run after a phase, counted from 0, for each seed."""
    name = layout.phase_name(phase)
    return [
      evaluate.load_predictions(layout.predictions_path(self.workdir(run, seed), name, split))
      for seed in range(self.num_seeds)
    ]

  def accuracies(self, run: str, phase: int) -> np.ndarray:
    """Returns the accuracies on test images in %, [seed, exit]."""
    name = layout.phase_name(phase)
    folders = [layout.evaluation_folder(self.workdir(run, seed)) for seed in range(self.num_seeds)]
    return 100 * np.array([evaluate.load_accuracies(folder, name) for folder in folders])

  def metrics(self, run: str, seed: int) -> Iterator[dict[str, Any]]:
    """Yields what a run wrote while it trained, without a phase that it took from another run."""
    for line in layout.metrics_path(self.workdir(run, seed)).read_text().splitlines():
      yield json.loads(line)

  def training_seconds(self, run: str, seed: int) -> float:
    """Returns how long the training steps of a run took."""
    seconds, last_step = 0.0, {}
    for record in self.metrics(run, seed):
      if record.get('speed/steps_per_second'):  # 0 for an interval without steps.
        steps = record['step'] - last_step.get(record['phase'], 0)
        seconds += steps / record['speed/steps_per_second']
        last_step[record['phase']] = record['step']
    return seconds


def main(
  description: str, name: str, runs: Sequence[Run], write: Callable[[Runs, epath.Path], str]
) -> None:
  """Runs the command line of a table or figure.

  Args:
    description: What the program shows, for --help.
    name: Name of the table or figure.
    runs: The runs it needs; runs that others continue come first.
    write: Writes the table or figure to a folder, and returns what to print.

  Raises:
    UsageError: If an argument is wrong, a training fails, or runs are missing.
  """
  parser = argparse.ArgumentParser(
    description=f'{description}\nFields of all runs can be set, as in --config.batch_size=128.',
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument(
    '--train', action='store_true', help='train what is missing; resumes what was interrupted'
  )
  parser.add_argument(
    '--scale',
    type=command_line.positive(float),
    default=1.0,
    help="length of the trainings as a fraction of the paper's; default: %(default)s",
  )
  parser.add_argument(
    '--seeds', type=command_line.positive(int), default=3, help='repetitions; default: %(default)s'
  )
  parser.add_argument(
    '--jobs',
    type=command_line.positive(int),
    default=1,
    help='trainings at the same time, which share the devices: a small network does not fill a '
    'large device; default: %(default)s',
  )
  parser.add_argument(
    '--without',
    default='',
    help="runs of Tables 2 and 3 to leave out with their rows, as in 'partitioning,OFA'",
  )
  parser.add_argument(
    '--runs', help='folder of the workdirs, which tables and figures share; default: runs/paper'
  )
  parser.add_argument(
    '--output',
    type=command_line.output_folder,
    help=f'folder of the results; default: {name} in that folder',
  )
  known, others = parser.parse_known_args()
  folder = epath.Path(known.runs or 'runs/paper').resolve()
  chosen = Runs(folder, known.scale, known.seeds, _overrides(others))
  without = known.without.split(',')
  runs = [run for run in runs if run.name.rpartition('/')[2] not in without]
  wanted = [(run, seed) for seed in range(known.seeds) for run in runs]
  if known.train:
    train_all(chosen, wanted, known.jobs)
  missing = [(run, seed) for run, seed in wanted if not is_finished(chosen.workdir(run.name, seed))]
  if missing:
    for run, seed in missing:
      print(shlex.join(command(chosen, run, seed)))
    raise UsageError(
      f'{len(missing)} of {len(wanted)} runs are missing in {folder}: add --train to train them '
      'one after another with the commands above'
    )
  output = epath.Path(known.output or folder / name)
  for run in runs:
    content = (chosen.workdir(run.name, 0) / 'config.json').read_bytes()
    files.write_whole(output / 'configs' / f'{run.name.replace("/", "_")}.json', content)
  print(write(chosen, output))


def _overrides(arguments):
  overrides = {}
  for argument in arguments:
    path, equals, value = argument.partition('=')
    if not path.startswith('--config.') or not equals:
      raise UsageError(f'{argument!r} is not an argument: see --help')
    overrides[path.removeprefix('--config.')] = value
  return overrides


def command(chosen: Runs, run: Run, seed: int) -> list[str]:
  """Returns the training command of a run."""
  config = config_lib.load(str(ROOT / run.config))
  epochs = {
    f'phases[{index}].epochs': chosen.scale * phase.epochs
    for index, phase in enumerate(config.phases)
  }
  values = {'seed': seed, **epochs, **run.overrides, **chosen.overrides}
  return [
    *('python', '-m', 'imta_jax.main', f'--config={run.config}'),
    f'--workdir={chosen.workdir(run.name, seed)}',
    *(f'--config.{path}={value}' for path, value in values.items()),
  ]


def is_finished(workdir: epath.Path) -> bool:
  """Whether a run has been evaluated, which is the last thing that it does."""
  return (layout.evaluation_folder(workdir) / 'evaluation.json').exists()


def train_all(chosen: Runs, wanted: Sequence[tuple[Run, int]], jobs: int) -> None:
  """Trains runs, several at a time; a run that continues another one waits for it.

  Args:
    chosen: Where they lie, and their options.
    wanted: Runs and seeds; runs that others continue come first.
    jobs: Number of trainings at the same time.

  Raises:
    UsageError: If a training fails; no more are started then.
  """
  waiting = list(wanted)
  with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
    active = {}
    while waiting or active:
      unfinished = {(run.name, seed) for run, seed in [*waiting, *active.values()]}
      ready = [(run, seed) for run, seed in waiting if (run.first_phase_of, seed) not in unfinished]
      for run, seed in ready[: jobs - len(active)]:
        waiting.remove((run, seed))
        active[pool.submit(train, chosen, run, seed, jobs > 1)] = run, seed
      done, _ = concurrent.futures.wait(active, return_when=concurrent.futures.FIRST_COMPLETED)
      for future in done:
        del active[future]
        future.result()


def train(chosen: Runs, run: Run, seed: int, shares_device: bool = False) -> None:
  """Trains a run if it is not finished, resuming where it stopped.

  Args:
    chosen: Where it lies, and its options.
    run: The run.
    seed: The repetition.
    shares_device: Whether others train at the same time; then none may reserve most of the memory
      of a device, as JAX does.

  Raises:
    UsageError: If the training fails.
  """
  workdir = chosen.workdir(run.name, seed)
  if is_finished(workdir):
    return
  if run.first_phase_of is not None and not (workdir / 'config.json').exists():
    source, target = (
      layout.checkpoint_folder(of_run, layout.phase_name(0))
      for of_run in (chosen.workdir(run.first_phase_of, seed), workdir)
    )
    if source.exists():  # Otherwise, for example on another machine, the phase is trained again.
      shutil.rmtree(target, ignore_errors=True)
      shutil.copytree(source, target)
  arguments = command(chosen, run, seed)
  print(shlex.join(arguments), flush=True)
  environment = {'XLA_PYTHON_CLIENT_PREALLOCATE': 'false'} if shares_device else {}
  status = subprocess.run(
    [sys.executable, *arguments[1:]], cwd=ROOT, env={**os.environ, **environment}
  ).returncode
  if status:
    raise UsageError(f'the training in {workdir} ended with status {status}')
