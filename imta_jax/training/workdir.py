"""The folder of a run: its layout and its config.

config.json                       the config as it ran
classes.json                      the names of the classes
data.json                         number of images per split, and a checksum of the data
environment.jsonl                 devices and versions: one line per kind of machine that trained
checkpoints/phase_1/<step>/       the latest states and the best one
metrics.jsonl                     metrics: one line per write, with step and phase
tensorboard/phase_1/              the same metrics for TensorBoard, and profiles
evaluation/                       tables, a figure, and the predictions behind them
evaluation/phase_1_scores.npz     what a classifier needs of the validation images
"""

import importlib.util
import json
import os
import platform
from collections.abc import Sequence
from importlib import metadata
from typing import Any

import jax
from etils import epath
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from imta_jax import config as config_lib
from imta_jax.errors import UsageError
from imta_jax.files import accessing, read_whole, write_whole
from imta_jax.runtime import import_tensorflow

# Fields that do not change what an undisturbed run computes. Where the data lies is one: data.json
# tells whether it is the same.
_MAY_CHANGE = (
  'config.checkpoint_every_minutes',
  'config.cuda_graphs',
  'config.dataset.arrays_dir',
  'config.dataset.data_dir',
  'config.profile_steps',
  'config.tensorboard',
)

_TRAIN_AGAIN = 'remove it and run the training command again'


def open_workdir(path: str | os.PathLike[str]) -> epath.Path:
  """Returns the path of a workdir; absolute, as checkpoints need it."""
  if '://' not in os.fspath(path):
    return epath.Path(os.path.abspath(path))
  if importlib.util.find_spec('tensorflow'):  # It reads and writes buckets.
    import_tensorflow()
  return epath.Path(path)


def phase_name(index: int) -> str:
  """Returns the name of a phase, counted from 0, for folders and output."""
  return f'phase_{index + 1}'


def phase_label(name: str, phase: ConfigDict) -> str:
  """Returns what figures call the network of a phase: its name and the techniques in it."""
  techniques = [
    technique
    for technique, is_used in (
      ('GE', phase.gradient_equilibrium != 'off' and phase.trained == 'everything'),
      ('ISC', phase.collaboration != 'off'),
      ('OFA', phase.loss == 'one_for_all'),
    )
    if is_used
  ]
  return f'{name} (with {" and ".join(techniques)})' if techniques else name


def checkpoint_folder(workdir: epath.Path, phase: str) -> epath.Path:
  """Returns the folder of a phase's checkpoints."""
  return workdir / 'checkpoints' / phase


def metrics_path(workdir: epath.Path) -> epath.Path:
  """Returns the path of the metrics of all phases."""
  return workdir / 'metrics.jsonl'


def tensorboard_folder(workdir: epath.Path, phase: str) -> epath.Path:
  """Returns the folder of a phase's metrics and profiles for TensorBoard."""
  return workdir / 'tensorboard' / phase


def evaluation_folder(workdir: epath.Path) -> epath.Path:
  """Returns the folder of the tables, figures and predictions."""
  return workdir / 'evaluation'


def predictions_path(workdir: epath.Path, phase: str, split: str) -> epath.Path:
  """Returns the path of the predictions of a phase's network for a split."""
  return evaluation_folder(workdir) / f'{phase}_{split}.npz'


def scores_path(workdir: epath.Path, phase: str) -> epath.Path:
  """Returns the path of what a classifier needs of the validation images."""
  return evaluation_folder(workdir) / f'{phase}_scores.npz'


def phase_index(config: ConfigDict, phase: int) -> int:
  """Returns the index of a phase, counted from 0; -1 is the last one.

  Raises:
    UsageError: If there is none.
  """
  if not -len(config.phases) <= phase < len(config.phases):
    names = ', '.join(map(phase_name, range(len(config.phases))))
    raise UsageError(f'{phase_name(phase)} does not exist: the run has {names}')
  return phase % len(config.phases)


def load_config(workdir: epath.Path) -> ConfigDict:
  """Loads the config of a run.

  Raises:
    UsageError: If the folder is not a workdir, or its config is corrupt.
  """
  path = workdir / 'config.json'
  with accessing(path):
    is_workdir = path.exists()
  if not is_workdir:
    raise UsageError(f'{workdir} is not a workdir: it has no config.json')
  hint = 'restore it, or choose another workdir'
  content = read_whole(path, hint)
  try:
    config = config_lib.from_json(content.decode())
    config_lib.validate(config)
  except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
    reason = error if isinstance(error, UsageError) else f'{type(error).__name__}: {error}'
    raise UsageError(f'{path} is corrupt ({reason}): {hint}') from error
  return config


def load_class_names(workdir: epath.Path) -> list[str]:
  """Loads the class names of a run's data set.

  Raises:
    UsageError: If the run has not written its class names, or they are corrupt.
  """
  path = workdir / 'classes.json'
  if not path.exists():
    raise UsageError(f'{workdir} has no classes.json: {_TRAIN_AGAIN}')
  names = _read_json(path)
  if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
    raise UsageError(f'{path} is corrupt: it must be a list of names; {_TRAIN_AGAIN}')
  return names


def _read_json(path: epath.Path) -> Any:
  content = read_whole(path, _TRAIN_AGAIN)
  try:
    return json.loads(content)
  except (ValueError, RecursionError) as error:
    raise UsageError(f'{path} is corrupt ({error}): {_TRAIN_AGAIN}') from error


def has_checkpoints(workdir: epath.Path) -> bool:
  """Whether a run has saved anything in a workdir."""
  return any(path.name.isdigit() for path in (workdir / 'checkpoints').glob('*/*'))


def claim(config: ConfigDict, workdir: epath.Path, class_names: Sequence[str], **data: Any) -> None:
  """Writes a run's config, data and devices to its workdir; without checkpoints, it may be reused.

  Args:
    config: A complete config.
    workdir: The run's folder.
    class_names: Names of the classes.
    **data: What else tells its data from other data, as JSON takes it.

  Raises:
    UsageError: If there are checkpoints of a run with another config or other data, where the
      message names what differs, or if the config is missing.
  """
  found = {'config': config_lib.to_dict(config), 'classes': list(class_names), 'data': data}
  with accessing(workdir):
    is_new = not has_checkpoints(workdir)
  if not is_new:
    _check_owner(workdir, found)
  if jax.process_index() == 0:
    for name, content in found.items():
      write_whole(workdir / f'{name}.json', (json.dumps(content, indent=2) + '\n').encode())
    record_environment(workdir)
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices('workdir claimed')


def _check_owner(workdir, found):
  """Refuses another config or other data than those of the checkpoints in a workdir."""
  recorded = {}
  if (workdir / 'config.json').exists():
    recorded['config'] = config_lib.to_dict(load_config(workdir))
  elif metrics_path(workdir).exists():  # Otherwise checkpoints alone were put there to go on from.
    raise UsageError(
      f'workdir {workdir} has been trained in, but has no config.json that says what: put it back, '
      'or choose another --workdir'
    )
  for name in ('classes', 'data'):  # Runs of earlier versions have no data.json.
    if (workdir / f'{name}.json').exists():
      recorded[name] = _read_json(workdir / f'{name}.json')
  lines = [
    line
    for name, content in recorded.items()
    for line in differences(content, found[name], name)
    if line.partition(':')[0] not in _MAY_CHANGE
  ]
  if lines:
    raise UsageError(
      f'workdir {workdir} belongs to another config or other data ({"; ".join(lines)}): choose '
      f'another --workdir, also to go on from its network with --config.init_from={workdir}, or '
      'restore what differs'
    )


def differences(old: Any, new: Any, path: str = 'config') -> list[str]:
  """Returns one line per field in which two plain configs differ: 'config.seed: 0 → 1'."""
  if isinstance(old, dict) and isinstance(new, dict):
    pairs = [(f'.{key}', old.get(key), new.get(key)) for key in sorted({*old, *new})]
  elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
    pairs = [(f'[{index}]', *pair) for index, pair in enumerate(zip(old, new, strict=True))]
  else:
    return [] if old == new else [f'{path}: {old!r} → {new!r}']
  return [line for key, was, now in pairs for line in differences(was, now, path + key)]


def record_environment(workdir: epath.Path) -> None:
  """Adds the devices and versions of this process to environment.jsonl, if they are new there."""
  path = workdir / 'environment.jsonl'
  lines = path.read_text() if path.exists() else ''
  line = json.dumps(
    {
      'devices': f'{jax.device_count()} × {jax.devices()[0].device_kind}',
      'python': platform.python_version(),
      **{name: metadata.version(name) for name in ('jax', 'flax', 'optax')},
    },
    ensure_ascii=False,
  )
  if line not in lines.splitlines():
    write_whole(path, f'{lines}{line}\n'.encode())


def load_environments(workdir: epath.Path) -> list[dict[str, str]]:
  """Loads what `record_environment` wrote; empty for a run of a version without it."""
  path = workdir / 'environment.jsonl'
  return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
