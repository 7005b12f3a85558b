"""The trainings behind a table or figure: which there are, which are missing, what they gave."""

import argparse
import dataclasses
import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from imta_jax import command_line, evaluate
from imta_jax import config as config_lib
from imta_jax import workdir as layout
from imta_jax.errors import UsageError

ROOT = Path(__file__).parents[2]


@dataclasses.dataclass(frozen=True)
class Run:
  """A training.

  Attributes:
    name: Its folder.
    config: Config file with its argument, from the top of the repository.
    overrides: Values of config fields, by path: {'phases[0].epochs': 9.0}.
    first_phase_of: Name of the run whose phase I this one goes on from; None to train its own.
  """

  name: str
  config: str
  overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  first_phase_of: str | None = None


@dataclasses.dataclass(frozen=True)
class Options:
  """What all tables and figures take from the command line.

  Attributes:
    folder: Folder of all workdirs.
    output: Folder of tables and figures.
    scale: Length of the trainings as a fraction of the paper's.
    seeds: Number of repetitions, with seeds from 0.
    overrides: Values of config fields for all runs, by path, as text.
  """

  folder: epath.Path
  output: epath.Path
  scale: float
  seeds: int
  overrides: Mapping[str, str]

  def workdir(self, run: str, seed: int) -> epath.Path:
    """Returns the workdir of a run."""
    return self.folder / run / f'seed_{seed}'


def start(description: str, name: str, runs: Sequence[Run]) -> Options:
  """Reads the command line, trains if it says so, and otherwise names the missing runs.

  Args:
    description: What the program shows, for --help.
    name: Name of the table or figure, for its default folders.
    runs: The runs that it needs; those that others go on from come first.

  Returns:
    The options, once all runs are there.

  Raises:
    UsageError: If an argument is wrong or runs are missing.
  """
  parser = argparse.ArgumentParser(
    description=description, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--train', action='store_true', help='train what is missing; resumes')
  parser.add_argument(
    '--scale',
    type=command_line.positive(float),
    default=1.0,
    help="length of the trainings as a fraction of the paper's; default: %(default)s",
  )
  parser.add_argument(
    '--seeds', type=command_line.positive(int), default=3, help='repetitions; default: %(default)s'
  )
  parser.add_argument('--runs', help=f'folder of the workdirs; default: runs/paper/{name}')
  parser.add_argument('--output', help='folder of the results; default: results in that folder')
  known, others = parser.parse_known_args()
  overrides = {}
  for argument in others:
    path, equals, value = argument.partition('=')
    if not path.startswith('--config.') or not equals:
      raise UsageError(
        f'{argument!r} is not an argument: see --help; fields of all runs are set as in '
        '--config.batch_size=128'
      )
    overrides[path.removeprefix('--config.')] = value
  folder = epath.Path(known.runs or f'runs/paper/{name}').resolve()
  options = Options(
    folder, epath.Path(known.output or folder / 'results'), known.scale, known.seeds, overrides
  )
  for seed in range(options.seeds):
    for run in runs:
      if known.train:
        train(run, seed, options)
  missing = [
    f'{" ".join(map(shlex.quote, command(run, seed, options)))}'
    + (f'  # after phase I of {run.first_phase_of}' if run.first_phase_of else '')
    for seed in range(options.seeds)
    for run in runs
    if not is_finished(options.workdir(run.name, seed))
  ]
  if missing:
    raise UsageError(
      f'{len(missing)} of {len(runs) * options.seeds} runs are missing in {folder}; --train starts '
      'them one after another:\n' + '\n'.join(missing)
    )
  return options


def command(run: Run, seed: int, options: Options) -> list[str]:
  """Returns the training command of a run."""
  config = config_lib.load_file(str(ROOT / run.config))
  values = {
    'seed': seed,
    **{
      f'phases[{index}].epochs': options.scale * phase.epochs
      for index, phase in enumerate(config.phases)
    },
    **run.overrides,
    **options.overrides,
  }
  return [
    *('python', '-m', 'imta_jax.main', f'--config={run.config}'),
    f'--workdir={options.workdir(run.name, seed)}',
    *(f'--config.{path}={value}' for path, value in values.items()),
  ]


def is_finished(workdir: epath.Path) -> bool:
  """Whether a run has been evaluated, which is the last thing that it does."""
  return (layout.evaluation_folder(workdir) / 'evaluation.json').exists()


def train(run: Run, seed: int, options: Options) -> None:
  """Trains a run if it is not finished, resuming where it stopped.

  Raises:
    UsageError: If the training fails.
  """
  workdir = options.workdir(run.name, seed)
  if is_finished(workdir):
    return
  if run.first_phase_of is not None and not (workdir / 'config.json').exists():
    _copy_first_phase(options.workdir(run.first_phase_of, seed), workdir)
  arguments = command(run, seed, options)
  print(' '.join(map(shlex.quote, arguments)), flush=True)
  status = subprocess.run([sys.executable, *arguments[1:]], cwd=ROOT).returncode
  if status:
    raise UsageError(f'the training in {workdir} ended with status {status}')


def _copy_first_phase(source, target):
  folder = layout.checkpoint_folder(source, layout.phase_name(0))
  copy = layout.checkpoint_folder(target, layout.phase_name(0))
  if copy.exists():
    shutil.rmtree(copy)
  shutil.copytree(folder, copy)


def accuracies(options: Options, run: str, phase: int) -> np.ndarray:
  """Returns the accuracies on test images in %, [seed, exit], after a phase, counted from 0."""
  return 100 * np.stack(
    [
      evaluate.load_predictions(
        layout.predictions_path(options.workdir(run, seed), layout.phase_name(phase), 'test')
      ).accuracy()
      for seed in range(options.seeds)
    ]
  )


def training_seconds(workdir: epath.Path) -> float:
  """Returns the time that the training steps of a run took, without those of other runs."""
  seconds, step, phase = 0.0, 0, None
  for line in layout.metrics_path(workdir).read_text().splitlines():
    record = json.loads(line)
    if 'speed/steps_per_second' in record:
      if record['phase'] != phase:
        phase, step = record['phase'], 0
      seconds += (record['step'] - step) / record['speed/steps_per_second']
      step = record['step']
  return seconds
