"""The fields of a config, their defaults and their checks."""

import difflib
import importlib.util
import itertools
import json
import os
import re
from typing import Any

from ml_collections import ConfigDict, config_dict

from imta_jax import models
from imta_jax.errors import UsageError


def default() -> ConfigDict:
  """Returns a config with all fields, set as in the paper for CIFAR-100 (Table 1).

  A file in configs/ starts from this config, changes fields and returns it from
  `get_config(argument)`.
  """
  return ConfigDict(
    {
      'seed': 0,
      'batch_size': 64,  # Images per training step, over all devices and hosts.
      'evaluation_batch_size': 512,
      'dataset': {
        # A TFDS builder with features `image` and `label`, or 'image_folder'.
        'name': 'cifar100',
        # TFDS folder (default: TFDS_DATA_DIR or ~/tensorflow_datasets), or the folder of images.
        'data_dir': config_dict.placeholder(str),
        # Folder written by imta_jax.data.prepare, to be used instead of TFDS.
        'arrays_dir': config_dict.placeholder(str),
        'train_split': 'train',
        'test_split': 'test',
        'validation_size': 5_000,  # Training images held out to choose thresholds and states.
        'image_size': 32,
        'mean': (0.5071, 0.4865, 0.4409),  # Per channel, for pixels between 0 and 1.
        'std': (0.2673, 0.2564, 0.2762),
        'in_memory': True,  # On the devices; False streams images, as for ImageNet.
        # How image files that are kept in memory become squares: 'none' stretches the whole image,
        # 'center' takes the central square. Streamed images are cropped at random in training.
        'crop': 'none',
        'padding': 4,  # Zero padding before the random crop of images in memory.
        'flip': True,  # Whether to mirror half of the training images.
        'augment_validation': False,  # The published code augments validation images too.
      },
      # Fields of models.create and of the architecture that it names; for another one than MSDNet,
      # `config.model = ConfigDict(models.defaults('resnet'))`.
      'model': models.defaults('msdnet'),
      # Whether batch statistics are over the images of all devices, not of each device, which takes
      # an exchange between devices per batch norm. Needed with few images per device.
      'global_batch_norm': True,
      # Workdir or export of a trained network, from which phase I takes the variables whose names
      # and shapes agree. Needed at every start of the run.
      'init_from': config_dict.placeholder(str),
      'phases': [phase_one(), phase_two()],
      # Training steps that the devices take before they need the host again. Default: chosen by the
      # time of a step for sets in memory; 1 for streamed sets, whose batches the host sends.
      'steps_per_dispatch': config_dict.placeholder(int),
      'checkpoint_every_epochs': 1,  # Epochs between validations and checkpoints.
      # If set, checkpoints without a validation are also saved after so many minutes, at the next
      # of log_every_steps; for epochs that take hours.
      'checkpoint_every_minutes': config_dict.placeholder(float),
      'log_every_steps': 50,
      'tensorboard': True,  # Whether metrics are also written for TensorBoard; needs TensorFlow.
      'profile_steps': 0,  # Steps of each phase to profile, for TensorBoard's profiler.
    }
  )


def phase_one() -> ConfigDict:
  """Phase I of the paper: all layers are trained from scratch, with Gradient Equilibrium."""
  return ConfigDict(
    {
      'loss': 'cross_entropy',  # Summed over exits (Eq. 1); or 'one_for_all'.
      'alpha': 0.1,  # OFA: weight of the labels; 1 - alpha weights the teacher (Eq. 7).
      'temperature': 3.0,  # OFA: temperature T (Eq. 7).
      'class_reduction': 'sum',  # OFA: 'mean', as in the published code, averages over classes.
      'teacher': 'online',  # OFA: the network's last exit; 'frozen': the previous phase's.
      'trained': 'everything',  # Or 'last_layers': only the classifiers.
      # Mode of batch norm in layers that are not trained; the published code uses 'training'.
      'frozen_batch_norm': 'evaluation',
      'gradient_equilibrium': 'all',
      # Share of each coarsest map's channels that later exits train; 1 turns feature partitioning
      # off, its publication has 0.5.
      'shared_channels': 1.0,
      'collaboration': 'off',
      'stop_collaboration_gradient': True,
      # State for the next phase and for evaluation: 'best' has the highest validation accuracy,
      # averaged over exits; or 'last'.
      'chosen_state': 'best',
      'epochs': 300.0,
      'steps': config_dict.placeholder(int),  # If set, used instead of epochs.
      'learning_rate': 0.1,
      # If set, the learning rate is multiplied by batch_size / reference_batch_size.
      'reference_batch_size': config_dict.placeholder(int),
      'schedule': 'multistep',  # Divides the rate by 10 at each milestone; or 'cosine'.
      'milestones': (0.5, 0.75),  # As fractions of the phase.
      'warmup_epochs': 0.0,
      'momentum': 0.9,
      'nesterov': True,
      'weight_decay': 1e-4,
      'decayed': 'everything',  # Parameters with weight decay; or 'kernels'.
    }
  )


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

  Example:
    >>> config = default()
    >>> follow_published_code(config)
    >>> config.phases[1].class_reduction
    'mean'
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
  fields = to_dict(config)
  model, phases = fields.pop('model', None), fields.pop('phases', None)
  if not isinstance(model, dict) or not isinstance(model.get('name'), str):
    choices = ', '.join(models.ARCHITECTURES)
    raise UsageError(f'config.model must have a name: choose one of {choices}')
  if not phases or not isinstance(phases, list) or not all(isinstance(p, dict) for p in phases):
    raise UsageError('config.phases is empty or no list of phases: add at least one phase')
  _check_fields(fields, default(), 'config')
  for index, phase in enumerate(phases):
    _check_fields(phase, phase_one(), f'config.phases[{index}]')
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


# What a field may hold whose default has a type.
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


def _above(bound):
  return lambda value: value > bound, f'above {bound}'


def _at_least(bound):
  return lambda value: value >= bound, f'{bound} or more'


def _one_of(*choices):
  return lambda value: value in choices, f'one of {", ".join(choices)}'


_FRACTION = (lambda value: 0 <= value <= 1, 'from 0 to 1')
_INCREASES = (
  lambda value: all(a < b for a, b in itertools.pairwise((0, *value, 1))),
  'numbers that increase from above 0 to below 1',
)
# What a field of the right type may hold, in whichever group it stands.
_VALUES = {
  'seed': _at_least(0),
  'batch_size': _above(0),
  'evaluation_batch_size': _above(0),
  'steps_per_dispatch': _above(0),
  'checkpoint_every_epochs': _above(0),
  'checkpoint_every_minutes': _above(0),
  'log_every_steps': _above(0),
  'profile_steps': _at_least(0),
  'validation_size': _above(0),
  'image_size': _above(0),
  'padding': _at_least(0),
  'crop': _one_of('none', 'center'),
  'loss': _one_of('cross_entropy', 'one_for_all'),
  'alpha': _FRACTION,
  'temperature': _above(0),
  'class_reduction': _one_of('sum', 'mean'),
  'teacher': _one_of('online', 'frozen'),
  'trained': _one_of('everything', 'last_layers'),
  'frozen_batch_norm': _one_of('evaluation', 'training'),
  'gradient_equilibrium': _one_of('all', 'coarsest', 'off'),
  'shared_channels': _FRACTION,
  'collaboration': _one_of('off', 'identity', 'network'),
  'chosen_state': _one_of('best', 'last'),
  'epochs': _above(0),
  'steps': _above(0),
  'learning_rate': _above(0),
  'reference_batch_size': _above(0),
  'schedule': _one_of('multistep', 'cosine'),
  'milestones': _INCREASES,
  'warmup_epochs': _at_least(0),
  'momentum': (lambda value: 0 <= value < 1, '0 or more and below 1'),
  'weight_decay': _at_least(0),
  'decayed': _one_of('everything', 'kernels'),
}


def _is_number(value):
  """Whether a value is a number of less than 2^31, in which devices count."""
  return isinstance(value, int | float) and not isinstance(value, bool) and -(2**31) < value < 2**31


def _check_fields(fields, reference, path):
  for name in fields:
    if name not in reference:
      raise UsageError(f'{path}.{name} is not a field: {suggest(name, reference)}')
  for name in sorted({*reference} - {'model', 'phases'}):  # Those are checked apart.
    if name not in fields:
      raise UsageError(f'{path}.{name} is missing: start the config from imta_jax.config.default()')
    value, kind = fields[name], reference.get_type(name)
    if value is None and reference[name] is None:
      continue
    for is_valid, expected in (_TYPES[kind], *([_VALUES[name]] if name in _VALUES else [])):
      if not is_valid(value):
        raise UsageError(f'{path}.{name} is {value!r}: it must be {expected}')
    if kind is ConfigDict:
      _check_fields(value, reference[name], f'{path}.{name}')


def check_path(config: ConfigDict, path: str) -> None:
  """Checks that a config has a field, as in 'phases[0].epochs'.

  Raises:
    UsageError: If it does not; the message names the fields or indices that exist.
  """
  node, walked = to_dict(config), 'config'
  for name in re.findall(r'[^.\[\]]+', path):
    if isinstance(node, list):
      if name not in map(str, range(len(node))):
        raise UsageError(f'{walked}[{name}] does not exist: the indices are 0 to {len(node) - 1}')
      node, walked = node[int(name)], f'{walked}[{name}]'
    elif not isinstance(node, dict) or name not in node:
      fields = node if isinstance(node, dict) else ()
      raise UsageError(f'{walked}.{name} is not a field: {suggest(name, fields)}')
    else:
      node, walked = node[name], f'{walked}.{name}'


def suggest(name: str, choices) -> str:
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


def differences(old: Any, new: Any, path: str = 'config') -> list[str]:
  """Returns one line per field in which two plain configs differ: 'config.seed: 0 → 1'."""
  if isinstance(old, dict) and isinstance(new, dict):
    pairs = [(f'.{key}', old.get(key), new.get(key)) for key in sorted({*old, *new})]
  elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
    pairs = [(f'[{index}]', *pair) for index, pair in enumerate(zip(old, new, strict=True))]
  else:
    return [] if old == new else [f'{path}: {old!r} → {new!r}']
  return [line for key, *pair in pairs for line in differences(*pair, path + key)]


def to_json(config: ConfigDict) -> str:
  """Converts a config to JSON."""
  return json.dumps(to_dict(config), indent=2) + '\n'


def from_json(text: str) -> ConfigDict:
  """Reads a config that `to_json` wrote; fields added since then get their defaults."""
  plain, defaults = json.loads(text), to_dict(default())
  phases = [ConfigDict({**to_dict(phase_one()), **phase}) for phase in plain['phases']]
  dataset = {**defaults['dataset'], **plain['dataset']}
  dataset.pop('skip_corrupt', None)  # A field of earlier versions.
  model = {**models.defaults(plain['model']['name']), **plain['model']}
  return ConfigDict({**defaults, **plain, 'dataset': dataset, 'model': model, 'phases': phases})


def load_file(argument: str) -> ConfigDict:
  """Loads a config file, given as in training: 'configs/cifar100.py:exits=5'.

  Raises:
    UsageError: If the file does not exist or its config is invalid.
  """
  path, _, config_argument = argument.partition(':')
  if not os.path.isfile(path):
    raise UsageError(f'--config={argument}: file {path!r} does not exist')
  spec = importlib.util.spec_from_file_location('config', path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  config = module.get_config(config_argument)
  validate(config)
  return config
