"""The fields of a config, their defaults and their checks."""

import difflib
import itertools
import json
import os
import re
import runpy
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict, config_dict

from imta_jax import models, runtime
from imta_jax.errors import UsageError
from imta_jax.models.multi_exit import MultiExitNetwork

_INSTALLED = Path(__file__).with_name('configs')
# In a clone, configs are in the folder at the top.
_FOLDER = _INSTALLED if _INSTALLED.is_dir() else Path(__file__).parents[1] / 'configs'


class _Field(NamedTuple):
  """A field whose values are checked beyond the type of its default."""

  default: Any
  is_valid: Callable[[Any], bool]
  expected: str


def _positive(default):
  return _Field(default, lambda value: value > 0, 'above 0')


def _not_negative(default):
  return _Field(default, lambda value: value >= 0, '0 or more')


def _fraction(default):
  return _Field(default, lambda value: 0 <= value <= 1, 'from 0 to 1')


def _one_of(default, *others):
  choices = (default, *others)
  return _Field(default, lambda value: value in choices, f'one of {", ".join(choices)}')


# The default of each field; a type stands for None, which a value of that type may replace.
_FIELDS = {
  'seed': _not_negative(0),
  'batch_size': _positive(64),  # Images per training step, over all devices and hosts.
  'evaluation_batch_size': _positive(512),
  'dataset': {
    # A TFDS builder with features `image` and `label`, or 'image_folder'.
    'name': 'cifar100',
    # TFDS folder (default: TFDS_DATA_DIR or ~/tensorflow_datasets), or the folder of images.
    'data_dir': str,
    # Folder written by imta_jax.data.prepare, to be used instead of TFDS.
    'arrays_dir': str,
    'train_split': 'train',
    'test_split': 'test',
    # Training images held out to choose thresholds and states.
    'validation_size': _positive(5_000),
    'image_size': _positive(32),
    'mean': (0.5071, 0.4865, 0.4409),  # Per channel, for pixels between 0 and 1.
    'std': (0.2673, 0.2564, 0.2762),
    'in_memory': True,  # On the devices; False streams images, as for ImageNet.
    # Of image files in memory, 'none' stretches the whole image to a square, 'center' takes the
    # central square. Streamed images are cropped at random in training.
    'crop': _one_of('none', 'center'),
    # Minimum share of a streamed image that its random crop covers.
    'crop_area': _Field(0.08, lambda value: 0 < value <= 1, 'above 0, and 1 or less'),
    'padding': _not_negative(4),  # Zero padding before the random crop of images in memory.
    'flip': True,  # Whether to mirror half of the training images.
    'augment_validation': False,  # The published code augments validation images too.
  },
  # Whether batch statistics are over the images of all devices, which takes an exchange between
  # devices per batch norm. Needed with few images per device.
  'global_batch_norm': True,
  # Workdir or export of a trained network, a file of pretrained weights or the name of a package
  # with them (imta_jax/interop/pretrained.py), from which phase I takes the variables whose names
  # and shapes agree. Read at every start of the run.
  'init_from': str,
  # Training steps per device-side loop. Default: up to the next event for sets in memory on
  # accelerators; otherwise 1.
  'steps_per_dispatch': _positive(int),
  # CUDA graphs of a step on one GPU: 'partial', XLA's default, leaves convolutions out; 'whole' is
  # one graph of all kernels; 'concurrent' also runs independent ones at the same time, which takes
  # more memory.
  'cuda_graphs': _one_of('partial', 'whole', 'concurrent'),
  'checkpoint_every_epochs': _positive(1),  # Epochs between validations and checkpoints.
  # For epochs that take hours: if set, also saves checkpoints, without a validation, after so many
  # minutes, at the next of log_every_steps.
  'checkpoint_every_minutes': _positive(float),
  'log_every_steps': _positive(50),
  'tensorboard': True,  # Whether metrics are also written for TensorBoard; needs TensorFlow.
  'profile_steps': _not_negative(0),  # Steps of each phase to profile, for TensorBoard's profiler.
}
_PHASE_FIELDS = {
  'loss': _one_of('cross_entropy', 'one_for_all'),  # Cross-entropy is summed over exits (Eq. 1).
  'alpha': _fraction(0.1),  # OFA: weight of the labels; 1 - alpha weights the teacher (Eq. 7).
  'temperature': _positive(3.0),  # OFA: temperature T (Eq. 7).
  # OFA: 'mean', as in the published code, averages over classes.
  'class_reduction': _one_of('sum', 'mean'),
  # OFA: the network's last exit; 'frozen': the previous phase's.
  'teacher': _one_of('online', 'frozen'),
  # What is trained; 'exits' includes the classifiers, 'last_layers' are the classifiers alone.
  'trained': _one_of('everything', 'exits', 'last_layers'),
  'frozen_stages': _not_negative(0),  # Of 'everything', the first stages that are not trained.
  # Mode of batch norm in what 'everything' and 'exits' train: 'evaluation' keeps the running
  # statistics, for sets so small that those of a batch vary.
  'batch_norm': _one_of('training', 'evaluation'),
  # If that is 'training': the same in layers that are not trained, as in the published code.
  'frozen_batch_norm': _one_of('evaluation', 'training'),
  'gradient_equilibrium': _one_of('all', 'coarsest', 'off'),
  # Feature partitioning: share of each coarsest map's channels that later exits train. 1 turns it
  # off; its publication has 0.5.
  'shared_channels': _fraction(1.0),
  'collaboration': _one_of('off', 'identity', 'network'),
  'stop_collaboration_gradient': True,
  # State for the next phase and for evaluation: 'best' has the highest validation accuracy,
  # averaged over exits.
  'chosen_state': _one_of('best', 'last'),
  'epochs': _positive(300.0),
  'steps': _positive(int),  # If set, used instead of epochs.
  'learning_rate': _positive(0.1),
  # If set, the learning rate is multiplied by batch_size / reference_batch_size.
  'reference_batch_size': _positive(int),
  # 'multistep' divides the rate by 10 at each milestone.
  'schedule': _one_of('multistep', 'cosine'),
  'milestones': _Field(  # As fractions of the phase.
    (0.5, 0.75),
    lambda value: all(a < b for a, b in itertools.pairwise((0, *value, 1))),
    'numbers that increase from above 0 to below 1',
  ),
  'warmup_epochs': _not_negative(0.0),
  # If set, gradients whose global norm is larger are scaled down to it.
  'max_gradient_norm': _positive(float),
  'momentum': _Field(0.9, lambda value: 0 <= value < 1, '0 or more and below 1'),
  'nesterov': True,
  'weight_decay': _not_negative(1e-4),
  'decayed': _one_of('everything', 'kernels'),  # Parameters with weight decay.
}


def default() -> ConfigDict:
  """Returns a config with all fields, set as in the paper for CIFAR-100 (Table 1).

  A file in configs/ changes fields of this config and returns it from `get_config(argument)`.
  """
  config = _defaults(_FIELDS)
  # Fields of models.create; for another network, `ConfigDict(models.defaults('resnet'))`.
  config.model = models.defaults('msdnet')
  config.phases = [phase_one(), phase_two()]
  return config


def _defaults(fields):
  return ConfigDict({name: _default(field) for name, field in fields.items()})


def _default(field):
  if isinstance(field, dict):
    return _defaults(field)
  value = field.default if isinstance(field, _Field) else field
  return config_dict.placeholder(value) if isinstance(value, type) else value


def phase_one() -> ConfigDict:
  """Phase I of the paper: all layers are trained from scratch, with Gradient Equilibrium."""
  return _defaults(_PHASE_FIELDS)


def phase_two() -> ConfigDict:
  """Phase II of the paper: the last layers are fine-tuned with ISC and OFA."""
  phase = phase_one()
  phase.update(
    {
      'loss': 'one_for_all',
      'teacher': 'frozen',
      'trained': 'last_layers',
      'collaboration': 'network',
      'epochs': 180.0,
    }
  )
  return phase


def follow_published_code(config: ConfigDict) -> None:
  """Sets the fields in which the paper's published code differs from the paper.

  The code's OFA weights are `alpha` 0.1 and `temperature` 3 on CIFAR, as by default.

  Args:
    config: A complete config, which is changed.
  """
  config.dataset.augment_validation = True
  for phase in config.phases:
    phase.update(
      class_reduction='mean',
      frozen_batch_norm='training',
      nesterov=False,
      stop_collaboration_gradient=False,
    )
    if phase.gradient_equilibrium == 'all':
      phase.gradient_equilibrium = 'coarsest'


def parse_argument(argument: str | None, **defaults: Any) -> ConfigDict:
  """Reads a config file's argument, as in --config=configs/cifar100.py:exits=5.

  Args:
    argument: 'name=value,name=value', or empty.
    **defaults: The default value of each name.

  Returns:
    The value of each name, with the type of its default.

  Raises:
    UsageError: If a name does not exist, or a value does not have the type of its default.
  """
  values = ConfigDict(defaults)
  for part in filter(None, (argument or '').split(',')):
    name, _, text = part.partition('=')
    if name not in defaults:
      raise UsageError(f'config argument {name!r} does not exist: {suggest(name, defaults)}')
    try:
      values[name] = type(defaults[name])(text)
    except ValueError:
      expected = type(defaults[name]).__name__
      raise UsageError(
        f'config argument {name} is {text!r}: it must be of type {expected}'
      ) from None
  return values


def validate(config: ConfigDict) -> None:
  """Checks all fields and values.

  Raises:
    UsageError: On the first field that does not exist or has an invalid value.
  """
  if not isinstance(config, ConfigDict):
    raise UsageError(f'config {config!r} is not a ConfigDict: load it with imta_jax.load_config')
  fields = to_dict(config)
  model, phases = fields.pop('model', None), fields.pop('phases', None)
  if not isinstance(model, dict) or not isinstance(model.get('name'), str):
    choices = ', '.join(models.ARCHITECTURES)
    raise UsageError(f'config.model must have a name: choose one of {choices}')
  if not phases or not isinstance(phases, list) or not all(isinstance(p, dict) for p in phases):
    raise UsageError('config.phases is empty or no list of phases: add at least one phase')
  _check_fields(fields, _FIELDS, 'config')
  for index, phase in enumerate(phases):
    _check_fields(phase, _PHASE_FIELDS, f'config.phases[{index}]')
  if phases[0]['loss'] == 'one_for_all' and phases[0]['teacher'] == 'frozen':
    raise UsageError(
      "config.phases[0].teacher is 'frozen', but there is no previous phase: use 'online'"
    )
  dataset = fields['dataset']
  mean, std = dataset['mean'], dataset['std']
  if not std or len(mean) != len(std) or not all(value > 0 for value in std):
    raise UsageError(
      f'config.dataset.std is {std}: it must have one number above 0 per channel, as mean {mean}'
    )
  if dataset['train_split'] == dataset['test_split']:
    raise UsageError(
      f'config.dataset.test_split is {dataset["test_split"]!r}, which is also the training split: '
      'choose another split'
    )
  for phase in config.phases:
    create_model(config, phase, num_classes=1)


def create_model(config: ConfigDict, phase: ConfigDict, num_classes: int) -> MultiExitNetwork:
  """Creates the network of a phase.

  Raises:
    UsageError: If a field of config.model is wrong.
  """
  fields = {name: value for name, value in config.model.items() if name != 'name'}
  try:
    return models.create(
      config.model.name,
      num_classes=num_classes,
      gradient_equilibrium=phase.gradient_equilibrium,
      shared_channels=phase.shared_channels,
      collaboration=phase.collaboration,
      stop_collaboration_gradient=phase.stop_collaboration_gradient,
      batch_norm_axis=runtime.AXIS if config.global_batch_norm else None,
      **fields,
    )
  except (TypeError, ValueError) as error:
    raise UsageError(f'config.model: {error}') from error


def image_shape(config: ConfigDict) -> tuple[int, int, int]:
  """Returns the (height, width, channels) of the images that a network reads."""
  side = config.dataset.image_size
  return side, side, len(config.dataset.mean)


_TYPES = {
  bool: (lambda value: isinstance(value, bool), 'True or False'),
  int: (lambda value: _is_number(value) and isinstance(value, int), 'an integer below 2^31'),
  float: (lambda value: _is_number(value), 'a finite number below 2^31'),
  str: (lambda value: isinstance(value, str), 'a string'),
  tuple: (
    lambda value: isinstance(value, list) and all(map(_is_number, value)),
    'a list of finite numbers',
  ),
  ConfigDict: (lambda value: isinstance(value, dict), 'a group of fields'),
}


def _is_number(value):
  """Whether a value is a number of less than 2^31, in which devices count."""
  return isinstance(value, int | float) and not isinstance(value, bool) and -(2**31) < value < 2**31


def _check_fields(fields, table, path):
  for name in fields:
    if name not in table:
      raise UsageError(f'{path}.{name} does not exist: {suggest(name, table)}')
  reference = _defaults(table)
  for name, field in table.items():
    if name not in fields:
      raise UsageError(f'{path}.{name} is missing: start the config from imta_jax.config.default()')
    value, kind = fields[name], reference.get_type(name)
    if value is None and reference[name] is None:
      continue
    checks = [_TYPES[kind], field[1:]] if isinstance(field, _Field) else [_TYPES[kind]]
    for is_valid, expected in checks:
      if not is_valid(value):
        raise UsageError(f'{path}.{name} is {value!r}: it must be {expected}')
    if isinstance(field, dict):
      _check_fields(value, field, f'{path}.{name}')


def check_path(config: ConfigDict, path: str) -> None:
  """Checks that a config has a field, as in 'phases[0].epochs'.

  Raises:
    UsageError: If it does not; the message names the fields or indices that exist.
  """
  node, walked = to_dict(config), 'config'
  for name in re.findall(r'[^.\[\]]+', path):
    if isinstance(node, list):
      children = {str(index): item for index, item in enumerate(node)}
      walked, hint = f'{walked}[{name}]', f'the indices are 0 to {len(node) - 1}'
    else:
      children = node if isinstance(node, dict) else {}
      walked, hint = f'{walked}.{name}', suggest(name, children)
    if name not in children:
      raise UsageError(f'{walked} does not exist: {hint}')
    node = children[name]


def suggest(name: str, choices: Iterable[str]) -> str:
  """Suggests what to write instead of a name that does not exist."""
  close = difflib.get_close_matches(name, list(choices), 1)
  return f'did you mean {close[0]!r}?' if close else f'choose one of {", ".join(sorted(choices))}'


def to_dict(config: Any) -> Any:
  """Converts a config to plain dictionaries and lists, as JSON would return them."""
  if isinstance(config, ConfigDict):
    return {key: to_dict(config[key]) for key in sorted(config)}
  if isinstance(config, list | tuple):
    return [to_dict(item) for item in config]
  return config


def from_json(text: str) -> ConfigDict:
  """Reads a config from the JSON of `to_dict`; fields added since then get their defaults."""
  plain, defaults = json.loads(text), to_dict(default())
  phases = [ConfigDict({**to_dict(phase_one()), **phase}) for phase in plain['phases']]
  dataset = {**defaults['dataset'], **plain['dataset']}
  dataset.pop('skip_corrupt', None)  # A field of earlier versions.
  model = {**models.defaults(plain['model']['name']), **plain['model']}
  return ConfigDict({**defaults, **plain, 'dataset': dataset, 'model': model, 'phases': phases})


def load(argument: str) -> ConfigDict:
  """Loads a config, given as in training: 'cifar100:exits=5', or 'my_configs/mine.py'.

  Args:
    argument: The name of a config that comes with imta_jax, or a config file; after a colon, the
      argument of its `get_config`.

  Returns:
    A complete config, whose fields can be changed.

  Raises:
    UsageError: If the file does not exist or its config is invalid.

  Example:
    >>> import imta_jax
    >>> config = imta_jax.load_config('cifar100:exits=5')
    >>> config.model.num_exits, config.phases[1].loss
    (5, 'one_for_all')
  """
  path, _, config_argument = find(argument).partition(':')
  if not os.path.isfile(path):
    raise UsageError(f'config {argument!r} {expected()}')
  config = runpy.run_path(path)['get_config'](config_argument)
  validate(config)
  return config


def find(argument: str) -> str:
  """Replaces the name of a config that comes with imta_jax by its file; leaves files as they are.

  'cifar100:exits=5' → '…/configs/cifar100.py:exits=5'
  """
  name, colon, config_argument = argument.partition(':')
  file = _FOLDER / f'{name}.py'
  if os.path.isfile(name) or not file.is_file():
    return argument
  return f'{file}{colon}{config_argument}'


def expected() -> str:
  """Returns what is wrong with a config that does not exist, for a message."""
  names = ', '.join(sorted(path.stem for path in _FOLDER.glob('*.py')))
  return f'is not a config file: name one, or a config that comes with imta_jax ({names})'
