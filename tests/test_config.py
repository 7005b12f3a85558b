"""Configs: the paper's settings, what is refused, and configs as JSON."""

import json
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from imta_jax import config as config_lib
from imta_jax import models
from imta_jax.errors import UsageError
from imta_jax.training.workdir import differences

CONFIGS = Path(__file__).parents[1] / 'configs'


def refusal(config):
  """Returns the error message for an invalid config."""
  with pytest.raises(UsageError) as caught:
    config_lib.validate(config)
  message = str(caught.value)
  assert '\n' not in message
  return message


def parent_of(config, path):
  """Returns the group of fields, or the phase, that holds a field, and the name of the field."""
  *parents, field = path.split('.')
  for name in parents:
    config = config[int(name)] if name.isdigit() else config[name]
  return config, field


def test_the_name_of_a_config_is_no_config():
  with pytest.raises(UsageError, match="'mnist5k' is not a ConfigDict: load it with imta_jax.load"):
    config_lib.validate('mnist5k')


def test_default_holds_the_papers_settings_for_cifar_100():
  config = config_lib.default()
  config_lib.validate(config)
  assert config.batch_size == 64
  assert (config.dataset.name, config.dataset.image_size) == ('cifar100', 32)
  assert config.dataset.validation_size == 5_000
  assert (config.dataset.padding, config.dataset.flip) == (4, True)
  assert not config.dataset.augment_validation
  one, two = config.phases
  for phase in config.phases:
    assert (phase.learning_rate, phase.momentum, phase.nesterov) == (0.1, 0.9, True)
    assert (phase.weight_decay, phase.decayed) == (1e-4, 'everything')
    assert (phase.schedule, tuple(phase.milestones), phase.warmup_epochs) == (
      'multistep',
      (0.5, 0.75),
      0,
    )
    assert phase.reference_batch_size is None
    assert phase.gradient_equilibrium == 'all'
    assert phase.class_reduction == 'sum'
    assert phase.stop_collaboration_gradient
  assert (one.epochs, two.epochs) == (300, 180)
  assert (one.loss, one.trained, one.collaboration) == ('cross_entropy', 'everything', 'off')
  assert (two.loss, two.trained, two.collaboration) == ('one_for_all', 'last_layers', 'network')
  assert (two.teacher, two.frozen_batch_norm) == ('frozen', 'evaluation')
  assert (one.chosen_state, two.chosen_state) == ('best', 'best')


def test_default_is_made_anew():
  config_lib.default().phases[0].epochs = 1.0
  assert config_lib.default().phases[0].epochs == 300


@pytest.mark.parametrize(
  ('path', 'value', 'words'),
  [
    # Fields that do not exist.
    ('batch_sise', 3, "config.batch_sise does not exist: did you mean 'batch_size'?"),
    ('dataset.nme', 'x', "config.dataset.nme does not exist: did you mean 'name'?"),
    ('phases.1.epoch', 3, "config.phases[1].epoch does not exist: did you mean 'epochs'?"),
    ('zzz', 3, 'config.zzz does not exist: choose one of batch_size'),
    # Types.
    ('dataset', 3, 'config.dataset is 3: it must be a group of fields'),
    ('dataset.flip', 'yes', "config.dataset.flip is 'yes': it must be True or False"),
    ('phases.0.nesterov', 1, 'config.phases[0].nesterov is 1: it must be True or False'),
    ('init_from', 3, 'config.init_from is 3: it must be a string'),
    ('phases.0.loss', ['cross_entropy'], 'it must be a string'),
    ('seed', True, 'config.seed is True: it must be an integer'),
    ('seed', 2**64 - 1, 'config.seed is 18446744073709551615: it must be an integer below 2^31'),
    ('batch_size', 64.5, 'config.batch_size is 64.5: it must be an integer'),
    ('batch_size', None, 'config.batch_size is None: it must be an integer'),
    ('phases.0.epochs', float('inf'), 'config.phases[0].epochs is inf: it must be a finite number'),
    ('phases.0.milestones', 0.5, 'it must be a list of finite numbers'),
    ('phases.0.milestones', (0.5, float('nan')), 'it must be a list of finite numbers'),
    # Values.
    ('batch_size', -1, 'config.batch_size is -1: it must be above 0'),
    ('seed', -1, 'config.seed is -1: it must be 0 or more'),
    *(
      (path, 0, f'.{path.rpartition(".")[2]} is 0')
      for path in (
        *('batch_size', 'evaluation_batch_size', 'steps_per_dispatch', 'log_every_steps'),
        *('checkpoint_every_epochs', 'checkpoint_every_minutes'),
        *('dataset.validation_size', 'dataset.image_size'),
        *('phases.0.temperature', 'phases.0.epochs', 'phases.1.steps', 'phases.1.learning_rate'),
        *('phases.0.reference_batch_size', 'phases.0.max_gradient_norm'),
      )
    ),
    *(
      (path, -1, f'.{path.rpartition(".")[2]} is -1')
      for path in (
        *('profile_steps', 'dataset.padding', 'phases.0.warmup_epochs', 'phases.1.weight_decay'),
      )
    ),
    *(
      (path, 'x', f".{path.rpartition('.')[2]} is 'x': it must be one of {choices}")
      for path, choices in (
        ('dataset.crop', 'none, center'),
        ('phases.0.loss', 'cross_entropy, one_for_all'),
        ('phases.0.class_reduction', 'sum, mean'),
        ('phases.1.teacher', 'online, frozen'),
        ('phases.0.trained', 'everything, exits, last_layers'),
        ('phases.0.frozen_batch_norm', 'evaluation, training'),
        ('phases.0.gradient_equilibrium', 'all, coarsest, off'),
        ('phases.0.collaboration', 'off, identity, network'),
        ('phases.0.chosen_state', 'best, last'),
        ('phases.0.schedule', 'multistep, cosine'),
        ('phases.0.decayed', 'everything, kernels'),
      )
    ),
    ('phases.1.alpha', 1.5, 'config.phases[1].alpha is 1.5: it must be from 0 to 1'),
    ('phases.0.shared_channels', -0.5, 'it must be from 0 to 1'),
    ('phases.0.momentum', 1.0, 'it must be 0 or more and below 1'),
    *(
      ('phases.0.milestones', value, 'it must be numbers that increase from above 0 to below 1')
      for value in [(0.5, 0.5), (0.75, 0.5), (0.0, 0.5), (0.5, 1.0)]
    ),
    ('dataset.mean', (0.5,), 'it must have one number above 0 per channel'),
    ('dataset.std', (), 'it must have one number above 0 per channel'),
    ('dataset.std', (0.2, 0.0, 0.2), 'it must have one number above 0 per channel'),
    ('dataset.test_split', 'train', 'which is also the training split'),
    # Model and phases.
    ('phases', [3], 'config.phases'),
    ('phases', [], 'config.phases is empty'),
    ('model', ConfigDict({'name': ['msdnet']}), 'config.model must have a name'),
    ('model', ConfigDict(), 'config.model must have a name: choose one of msdnet'),
  ],
)
def test_wrong_fields_are_refused_by_name(path, value, words):
  config = config_lib.default()
  node, field = parent_of(config, path)
  with node.unlocked(), node.ignore_type():
    node[field] = value
  assert words in refusal(config)


@pytest.mark.parametrize('path', ['seed', 'dataset.flip', 'phases.1.momentum', 'phases', 'model'])
def test_missing_fields_are_refused_by_name(path):
  config = config_lib.default()
  node, field = parent_of(config, path)
  with node.unlocked():
    del node[field]
  assert field in refusal(config)


def test_a_frozen_teacher_needs_a_phase_before():
  config = config_lib.default()
  config.phases[0].update(loss='one_for_all', teacher='frozen')
  assert "config.phases[0].teacher is 'frozen'" in refusal(config)
  config.phases[0].teacher = 'online'
  config_lib.validate(config)
  config.phases[0].update(loss='cross_entropy', teacher='frozen')  # A loss that has no teacher.
  config_lib.validate(config)


def test_any_number_of_phases_is_valid():
  config = config_lib.default()
  one, two = config.phases
  for phases in ([one], [one, two, two]):
    config.phases = phases
    config_lib.validate(config)


def test_differences_are_one_line_per_field():
  old = config_lib.to_dict(config_lib.default())
  config = config_lib.default()
  assert differences(old, config_lib.to_dict(config)) == []
  config.seed = 1
  config.phases[1].epochs = 2.0
  config.dataset.mean = (0.1, 0.4865, 0.3)
  assert differences(old, config_lib.to_dict(config)) == [
    'config.dataset.mean[0]: 0.5071 → 0.1',
    'config.dataset.mean[2]: 0.4409 → 0.3',
    'config.phases[1].epochs: 180.0 → 2.0',
    'config.seed: 0 → 1',
  ]
  config = config_lib.default()
  config.phases = config.phases[:1]
  (line,) = differences(old, config_lib.to_dict(config))
  assert line.startswith('config.phases: ')


@pytest.mark.parametrize('name', ['mnist5k', 'imagenet'])
def test_json_gives_back_the_config(name):
  config = config_lib.load(str(CONFIGS / f'{name}.py'))
  read = config_lib.from_json(json.dumps(config_lib.to_dict(config)))
  config_lib.validate(read)
  assert json.dumps(config_lib.to_dict(read)) == json.dumps(config_lib.to_dict(config))
  assert models.create(**read.model).num_exits == models.create(**config.model).num_exits


def test_a_config_of_an_earlier_version_with_skip_corrupt_is_read():
  fields = config_lib.to_dict(config_lib.default())
  fields['dataset']['skip_corrupt'] = False
  config_lib.validate(read := config_lib.from_json(json.dumps(fields)))
  assert config_lib.to_dict(read) == config_lib.to_dict(config_lib.default())


@pytest.mark.parametrize('fields', [{'num_exits': 3}, {'name': 'resnet', 'depth': 20}])
def test_fields_that_json_of_an_earlier_version_lacks_get_their_defaults(fields):
  config = config_lib.default()
  config.model = ConfigDict({**models.defaults(fields.get('name', 'msdnet')), **fields})
  plain = config_lib.to_dict(config)
  old = {**plain, 'model': {'name': 'msdnet', 'dtype': 'float32', **fields}}
  del old['profile_steps'], old['phases'][1]['shared_channels'], old['dataset']['crop']
  read = config_lib.from_json(json.dumps(old))
  assert differences(config_lib.to_dict(read), config_lib.to_dict(config)) == []


def test_parse_argument_takes_names_and_their_types():
  parse = config_lib.parse_argument
  assert parse('', exits=7).to_dict() == {'exits': 7}
  assert parse(None, exits=7).to_dict() == {'exits': 7}
  read = parse('name=x,rate=0.5', exits=7, rate=1.0, name='y')
  assert read.to_dict() == {'exits': 7, 'rate': 0.5, 'name': 'x'}


@pytest.mark.parametrize(
  ('argument', 'words'),
  [
    ('exits=5,stp=3', "config argument 'stp' does not exist: did you mean 'step'?"),
    ('zzz=5', 'choose one of exits, step'),
    ('exits=5.5', "config argument exits is '5.5': it must be of type int"),
    ('exits', "config argument exits is '': it must be of type int"),
  ],
)
def test_wrong_arguments_are_refused(argument, words):
  with pytest.raises(UsageError) as caught:
    config_lib.parse_argument(argument, exits=7, step=4)
  assert words in str(caught.value)


@pytest.mark.parametrize(
  ('path', 'words'),
  [
    ('sed', "config.sed does not exist: did you mean 'seed'?"),
    ('dataset.nme', "config.dataset.nme does not exist: did you mean 'name'?"),
    ('phases[0].epoch', "config.phases[0].epoch does not exist: did you mean 'epochs'?"),
    ('phases[2].epochs', 'config.phases[2] does not exist: the indices are 0 to 1'),
    ('phases.epochs', 'config.phases[epochs] does not exist: the indices are 0 to 1'),
    (f'phases[{"9" * 5000}].epochs', 'does not exist: the indices are 0 to 1'),
    ('seed.x', 'config.seed.x does not exist'),
  ],
)
def test_paths_that_do_not_exist_are_refused_naming_what_does(path, words):
  config = config_lib.default()
  for exists in ('seed', 'dataset.name', 'phases[1].epochs', 'model.dtype'):
    config_lib.check_path(config, exists)
  with pytest.raises(UsageError) as caught:
    config_lib.check_path(config, path)
  assert words in str(caught.value)


def test_the_preset_of_the_published_code_sets_what_differs_from_the_paper():
  config = config_lib.default()
  config.phases[1].gradient_equilibrium = 'off'
  before = config_lib.to_dict(config)
  config_lib.follow_published_code(config)
  config_lib.validate(config)
  lines = differences(before, config_lib.to_dict(config))
  of_phases = [
    f'config.phases[{index}].{change}'
    for index in range(2)
    for change in (
      "class_reduction: 'sum' → 'mean'",
      "frozen_batch_norm: 'evaluation' → 'training'",
      "gradient_equilibrium: 'all' → 'coarsest'",
      'nesterov: True → False',
      'stop_collaboration_gradient: True → False',
    )
  ]
  of_phases.remove("config.phases[1].gradient_equilibrium: 'all' → 'coarsest'")
  assert lines == ['config.dataset.augment_validation: False → True', *of_phases]
