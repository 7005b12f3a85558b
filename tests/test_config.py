"""Configs: the paper's settings, the files in configs/, and what is refused."""

import importlib.util
import json
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from imta_jax import config as config_lib
from imta_jax import models
from imta_jax.errors import UsageError

FOLDER = Path(__file__).parents[1] / 'configs'
FILES = {'cifar10': 6, 'cifar100': 7, 'imagenet': 5, 'mnist5k': 4}


def load(name, *argument):
  spec = importlib.util.spec_from_file_location(f'configs_{name}', FOLDER / f'{name}.py')
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.get_config(*argument)


def make_model(config):
  return models.create(**config.model)


def refusal(config):
  """Returns the error message for an invalid config."""
  with pytest.raises(UsageError) as caught:
    config_lib.validate(config)
  message = str(caught.value)
  assert '\n' not in message
  return message


def changed(path, value):
  """Returns the default config with one field set, which need not exist."""
  config = config_lib.default()
  *parents, field = path.split('.')
  node = config
  for name in parents:
    node = node[int(name)] if name.isdigit() else node[name]
  with node.unlocked(), node.ignore_type():
    node[field] = value
  return config


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


@pytest.mark.parametrize('name', FILES)
def test_config_files_are_valid_and_make_their_network(name):
  config = load(name)
  config_lib.validate(config)
  assert make_model(config).num_exits == FILES[name]


@pytest.mark.parametrize('path', sorted(FOLDER.glob('*.py')), ids=lambda path: path.stem)
def test_every_config_file_is_tested_and_says_how_to_run_it(path):
  assert path.stem in (*FILES, 'image_folder')  # The latter needs a folder: see test_configs.py.
  assert f'--config=configs/{path.name}' in path.read_text()


@pytest.mark.parametrize('name', ['cifar10', 'cifar100', 'mnist5k'])
def test_config_argument_sets_the_exits(name):
  config = load(name, 'exits=5')
  config_lib.validate(config)
  assert make_model(config).num_exits == 5


def test_imagenet_argument_sets_base_and_step():
  for step in (4, 6, 7):
    config = load('imagenet', f'step={step}')
    config_lib.validate(config)
    assert (config.model.base, config.model.step, config.model.step_mode) == (step, step, 'even')
    assert make_model(config).num_exits == 5


def test_imagenet_follows_the_protocol():
  config = load('imagenet')
  assert (config.batch_size, config.dataset.image_size) == (256, 224)
  assert (config.dataset.validation_size, config.dataset.test_split) == (50_000, 'validation')
  assert not config.dataset.in_memory
  for phase in config.phases:
    assert phase.epochs == 90
    assert [round(drop * phase.epochs) for drop in phase.milestones] == [30, 60]
  assert (config.model.channels, config.model.growth_rate) == (32, 16)
  assert tuple(config.model.scale_factors) == (1, 2, 4, 4)


@pytest.mark.parametrize('name', ['cifar10', 'cifar100'])
def test_cifar_follows_the_protocol(name):
  config = load(name)
  assert config.dataset.name == name
  assert (config.model.step_mode, config.model.base, config.model.step) == ('lin_grow', 1, 1)
  assert [phase.epochs for phase in config.phases] == [300, 180]


@pytest.mark.parametrize(
  ('path', 'value', 'words'),
  [
    ('batch_sise', 3, ['config.batch_sise', 'not a field', "'batch_size'"]),
    ('dataset.nme', 'x', ['config.dataset.nme', "'name'"]),
    ('phases.1.epoch', 3, ['config.phases[1].epoch ', "'epochs'"]),
    ('zzz', 3, ['config.zzz', 'batch_size', 'evaluation_batch_size', 'seed']),
    ('dataset', 3, ['config.dataset is 3']),
    ('phases.0.loss', 'hinge', ['config.phases[0].loss', "'hinge'", 'cross_entropy']),
    ('phases.1.teacher', 'good', ['config.phases[1].teacher', "'good'", 'online', 'frozen']),
    ('phases.0.schedule', 'linear', ['multistep', 'cosine']),
    ('phases.0.decayed', 'some', ['everything', 'kernels']),
    ('phases.0.gradient_equilibrium', 'finest', ['all', 'coarsest', 'off']),
    ('phases.0.collaboration', 'on', ['off', 'identity', 'network']),
    ('phases.0.chosen_state', 'first', ['best', 'last']),
    ('batch_size', 0, ['config.batch_size is 0', 'above 0']),
    ('evaluation_batch_size', -1, ['config.evaluation_batch_size is -1']),
    ('checkpoint_every_epochs', 0, ['config.checkpoint_every_epochs']),
    ('log_every_steps', 0, ['config.log_every_steps']),
    ('dataset.validation_size', 0, ['config.dataset.validation_size']),
    ('dataset.image_size', -1, ['config.dataset.image_size']),
    ('phases.0.epochs', 0.0, ['config.phases[0].epochs']),
    ('phases.0.steps', 0, ['config.phases[0].steps']),
    ('phases.1.learning_rate', -0.1, ['config.phases[1].learning_rate']),
    ('phases.1.learning_rate', float('inf'), ['config.phases[1].learning_rate', 'finite']),
    ('phases.0.epochs', float('inf'), ['config.phases[0].epochs', 'finite']),
    ('phases.0.momentum', 5.0, ['config.phases[0].momentum', 'below 1']),
    ('phases.1.temperature', 0.0, ['config.phases[1].temperature']),
    ('phases.1.alpha', 1.5, ['config.phases[1].alpha', 'from 0 to 1']),
    *(
      ('phases.0.milestones', value, ['config.phases[0].milestones', 'increase', 'below 1'])
      for value in [(0.5, 0.5), (0.75, 0.5), (0.0, 0.5), (0.5, 1.0), (-0.5,), (5, -1)]
    ),
    ('phases.0.milestones', 0.5, ['config.phases[0].milestones', 'list of finite numbers']),
    ('phases.0.milestones', (0.5, float('nan')), ['list of finite numbers']),
    ('phases.0.steps', 10**30, ['config.phases[0].steps', 'an integer below 2^31']),
    ('phases.0.steps', 2.5, ['config.phases[0].steps', 'an integer']),
    ('phases.0.nesterov', 1, ['config.phases[0].nesterov is 1', 'True or False']),
    ('phases.0.loss', ['cross_entropy'], ['config.phases[0].loss', 'a string']),
    ('seed', -1, ['config.seed is -1', '0 or more']),
    ('seed', 2**64 - 1, ['config.seed is 18446744073709551615', 'below 2^31']),
    ('seed', True, ['config.seed is True', 'an integer']),
    ('batch_size', 64.5, ['config.batch_size is 64.5', 'an integer']),
    ('batch_size', '64', ["config.batch_size is '64'", 'an integer']),
    ('batch_size', None, ['config.batch_size is None', 'an integer']),
    ('init_from', 3, ['config.init_from is 3', 'a string']),
    ('dataset.flip', 'yes', ["config.dataset.flip is 'yes'", 'True or False']),
    ('dataset.mean', (0.5,), ['config.dataset.std', 'one number above 0 per channel']),
    ('dataset.std', (), ['config.dataset.std', 'one number above 0 per channel']),
    ('dataset.std', ('a',), ['config.dataset.std', 'list of finite numbers']),
    ('phases', [3], ['config.phases']),
    ('phases', 'x', ['config.phases']),
    ('model', ConfigDict({'name': ['msdnet']}), ['config.model', 'name']),
    ('phases', [], ['config.phases is empty']),
    ('model', ConfigDict(), ['config.model', 'name']),
  ],
)
def test_wrong_fields_are_refused_by_name(path, value, words):
  message = refusal(changed(path, value))
  for word in words:
    assert word in message


@pytest.mark.parametrize('path', ['seed', 'dataset.flip', 'phases.1.momentum', 'phases', 'model'])
def test_missing_fields_are_refused_by_name(path):
  config = config_lib.default()
  *parents, field = path.split('.')
  node = config
  for name in parents:
    node = node[int(name)] if name.isdigit() else node[name]
  with node.unlocked():
    del node[field]
  assert field in refusal(config)


def test_a_frozen_teacher_needs_a_phase_before():
  config = config_lib.default()
  config.phases[0].update(loss='one_for_all', teacher='frozen')
  assert "config.phases[0].teacher is 'frozen'" in refusal(config)
  config.phases[0].teacher = 'online'
  config_lib.validate(config)


def test_a_teacher_that_no_loss_asks_is_no_matter():
  config = config_lib.default()
  config.phases[0].teacher = 'frozen'
  config_lib.validate(config)


def test_any_number_of_phases_is_valid():
  config = config_lib.default()
  one, two = config.phases
  for phases in ([one], [one, two, two]):
    config.phases = phases
    config_lib.validate(config)


def test_differences_are_a_line_a_field():
  old = config_lib.default()
  new = config_lib.default()
  assert config_lib.differences(config_lib.to_dict(old), config_lib.to_dict(new)) == []
  new.seed = 1
  new.phases[1].epochs = 2.0
  new.dataset.mean = (0.1, 0.2, 0.3)
  new.model.num_exits = 5
  lines = config_lib.differences(config_lib.to_dict(old), config_lib.to_dict(new))
  assert sorted(lines) == [
    'config.dataset.mean[0]: 0.5071 → 0.1',
    'config.dataset.mean[1]: 0.4865 → 0.2',
    'config.dataset.mean[2]: 0.4409 → 0.3',
    'config.model.num_exits: 7 → 5',
    'config.phases[1].epochs: 180.0 → 2.0',
    'config.seed: 0 → 1',
  ]


def test_a_phase_more_is_a_difference():
  old = config_lib.default()
  new = config_lib.default()
  new.phases = new.phases[:1]
  (line,) = config_lib.differences(config_lib.to_dict(old), config_lib.to_dict(new))
  assert line.startswith('config.phases: ')


@pytest.mark.parametrize('name', FILES)
def test_json_gives_back_the_config(name):
  config = load(name)
  read = config_lib.from_json(config_lib.to_json(config))
  config_lib.validate(read)
  assert config_lib.to_dict(read) == config_lib.to_dict(config)
  assert config_lib.to_json(read) == config_lib.to_json(config)
  assert read.phases[1].epochs == config.phases[1].epochs
  assert make_model(read).num_exits == FILES[name]


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
  assert config_lib.differences(config_lib.to_dict(read), config_lib.to_dict(config)) == []


def test_parse_argument_takes_names_and_their_types():
  parse = config_lib.parse_argument
  assert parse('', exits=7).to_dict() == {'exits': 7}
  assert parse(None, exits=7).to_dict() == {'exits': 7}
  assert parse('exits=5', exits=7).to_dict() == {'exits': 5}
  read = parse('name=x,rate=0.5', exits=7, rate=1.0, name='y')
  assert read.to_dict() == {'exits': 7, 'rate': 0.5, 'name': 'x'}


@pytest.mark.parametrize(
  ('argument', 'words'),
  [
    ('exit=5', ["'exit'", 'does not exist', "'exits'"]),
    ('zzz=5', ["'zzz'", 'exits, step']),
    ('exits=many', ['exits', "'many'", 'int']),
    ('exits=5.5', ['exits', "'5.5'", 'int']),
    ('exits', ['exits', "''", 'int']),
    ('exits=5,stp=3', ["'stp'", "'step'"]),
  ],
)
def test_wrong_arguments_are_refused(argument, words):
  with pytest.raises(UsageError) as caught:
    config_lib.parse_argument(argument, exits=7, step=4)
  for word in words:
    assert word in str(caught.value)


@pytest.mark.parametrize('path', ['seed', 'dataset.name', 'phases[1].epochs', 'model.dtype'])
def test_paths_that_exist_pass(path):
  config_lib.check_path(config_lib.default(), path)


@pytest.mark.parametrize(
  ('path', 'words'),
  [
    ('sed', ['config.sed is not a field', "'seed'"]),
    ('zzz', ['config.zzz', 'batch_size', 'seed']),
    ('dataset.nme', ['config.dataset.nme', "'name'"]),
    ('phases[2].epochs', ['config.phases[2] does not exist', '0 to 1']),
    ('phases.epochs', ['config.phases', '0 to 1']),
    ('phases[²].epochs', ['config.phases[²] does not exist', '0 to 1']),
    (f'phases[{"9" * 5000}].epochs', ['does not exist', '0 to 1']),
    ('phases[0].epoch', ['config.phases[0].epoch ', "'epochs'"]),
  ],
)
def test_paths_that_do_not_exist_are_refused_naming_what_does(path, words):
  with pytest.raises(UsageError) as caught:
    config_lib.check_path(config_lib.default(), path)
  for word in words:
    assert word in str(caught.value)


def test_a_path_through_a_value_is_refused():
  with pytest.raises(UsageError, match='config.seed.x is not a field'):
    config_lib.check_path(config_lib.default(), 'seed.x')


def test_the_preset_of_the_published_code_sets_what_differs_from_the_paper():
  config = config_lib.default()
  config.phases[1].gradient_equilibrium = 'off'
  before = config_lib.to_dict(config)
  config_lib.follow_published_code(config)
  config_lib.validate(config)
  lines = config_lib.differences(before, config_lib.to_dict(config))
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
