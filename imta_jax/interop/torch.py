"""Checkpoints of the paper's published PyTorch code ↔ Flax variables.

The published MSDNet numbers its modules by position, whereas ours have names. Networks of phase I
and of phase II (collaboration 'network') can be converted. `from_state_dict` and `to_state_dict`
work on NumPy arrays; only `load_checkpoint` needs torch.
"""

import os
import textwrap
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from imta_jax.errors import UsageError
from imta_jax.models.msdnet import DenseLayer, FirstLayer, Transition
from imta_jax.models.multi_exit import MultiExitNetwork

_COUNTER = 'num_batches_tracked'
# Where files keep the weights that are not at the top level.
_KEYS = ('state_dict', 'model_state_dict', 'model', 'net')


class _Pair(NamedTuple):
  """The names of a variable in Flax and in the published code."""

  ours: str  # 'params/…' or 'batch_stats/…'
  theirs: str


def from_state_dict(state: Mapping[str, np.ndarray], model: MultiExitNetwork) -> dict[str, Any]:
  """Converts a published state dict to Flax variables.

  Args:
    state: {published name: array}. Prefixes that all names share are dropped, such as 'module.' of
      DataParallel and '_orig_mod.' of torch.compile.
    model: The network: 'msdnet' with the fields of the checkpoint's network; collaboration
      'network' for a checkpoint of phase II, 'off' for one of phase I.

  Returns:
    {'params': …, 'batch_stats': …}, float32 NumPy arrays.

  Raises:
    UsageError: If the checkpoint does not match the network, or has values that are no finite
      floating-point numbers.
  """
  while len({name.partition('.')[0] for name in state}) == 1 and all('.' in name for name in state):
    state = {name.partition('.')[2]: value for name, value in state.items()}
  pairs = _pairs(model)
  shapes = flatten_dict(_shapes(model), sep='/')
  expected = {pair.theirs for pair in pairs} | _ignored(model)
  surplus = [name for name in state if name not in expected and not name.endswith(_COUNTER)]
  missing = [pair.theirs for pair in pairs if pair.theirs not in state]
  if missing or surplus:
    wrong = [f'lacks {name!r}' for name in missing[:1]]
    wrong += [f'also has {name!r}' for name in surplus[:1]]
    raise UsageError(
      f"the checkpoint does not match the network: it {' and '.join(wrong)}; fix the model's "
      'fields, or the names'
    )
  variables = {}
  for pair in pairs:
    value, shape = _from_torch(np.asarray(state[pair.theirs])), shapes[pair.ours].shape
    if value.shape != shape:
      raise UsageError(
        f'the checkpoint does not match the network: {pair.theirs!r} has shape {value.shape}, '
        f"expected {shape}; fix the model's fields"
      )
    # Complex numbers, for example, would be cut to their real parts.
    if jnp.issubdtype(value.dtype, np.floating):
      with np.errstate(over='ignore'):
        value = value.astype(np.float32)
    if value.dtype != np.float32 or not np.isfinite(value).all():
      raise UsageError(
        f'the checkpoint has {pair.theirs!r} of type {value.dtype}, which is no array of finite '
        'floating-point numbers: use one from before its training diverged'
      )
    variables[pair.ours] = value
  return unflatten_dict(variables, sep='/')


def to_state_dict(variables: Mapping[str, Any], model: MultiExitNetwork) -> dict[str, np.ndarray]:
  """Converts Flax variables to a published state dict: the inverse of `from_state_dict`.

  The result has no prefix. It lacks two kinds of entries that have no counterpart here: the
  counters `num_batches_tracked` and, in phase II, the classifiers of phase I
  (`net.classifier.….linear`).

  Args:
    variables: {'params': …, 'batch_stats': …}, or a part of them; gradients may take the place of
      the parameters.
    model: The network.

  Returns:
    {published name: array}.
  """
  flat = flatten_dict(variables, sep='/')
  return {
    pair.theirs: _to_torch(np.asarray(flat[pair.ours]))
    for pair in _pairs(model)
    if pair.ours in flat
  }


def load_checkpoint(path: str | os.PathLike[str], model: MultiExitNetwork) -> dict[str, Any]:
  """Loads a published checkpoint file of any PyTorch version, without running code from it.

  Args:
    path: The file, as in 'model_best.pth.tar'.
    model: The network; see `from_state_dict`.

  Returns:
    {'params': …, 'batch_stats': …}, float32 NumPy arrays.

  Raises:
    UsageError: If torch is not installed, or the file is not a checkpoint of this network.
  """
  try:
    import torch
    from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals
  except ImportError:
    raise UsageError(
      f'reading {os.fspath(path)} requires PyTorch 2.6 or later: pip install --upgrade torch'
    ) from None
  if not os.path.isfile(path):  # Reading a pipe would wait.
    raise UsageError(f'{os.fspath(path)} does not exist or is not a regular file')
  try:
    is_zip = zipfile.is_zipfile(path)  # Since PyTorch 1.6.
    names = get_unsafe_globals_in_checkpoint(path) if is_zip else _BESIDE_WEIGHTS
    with safe_globals([(_Ignored, name) for name in names]):
      content = torch.load(path, map_location='cpu', weights_only=True)
  except Exception as error:
    raise UsageError(
      f'{os.fspath(path)} is not a checkpoint that can be read without running code from it '
      f'({type(error).__name__}): save only the state_dict'
    ) from error
  content = content if isinstance(content, dict) else {}
  for state in (*map(content.get, _KEYS), content):
    tensors = {
      name: _to_numpy(name, value)
      for name, value in (state.items() if isinstance(state, dict) else ())
      if isinstance(name, str) and isinstance(value, torch.Tensor)
    }
    if tensors:
      return from_state_dict(tensors, model)
  found = ', '.join(map(repr, content)) or 'none'
  raise UsageError(
    f'{os.fspath(path)} has no tensors under {", ".join(_KEYS)} or at the top level, whose keys '
    f'are {textwrap.shorten(found, 200, placeholder=" …")}: save a state_dict'
  )


# What older files, whose names cannot be listed, may contain besides weights.
_BESIDE_WEIGHTS = (
  'argparse.Namespace',
  'numpy.core.multiarray.scalar',
  'numpy._core.multiarray.scalar',
  'numpy.dtype',
  'pathlib.PosixPath',
)


class _Ignored:
  """Placeholder for the classes and functions that a checkpoint names, none of which is called.

  Files with NumPy numbers or an argparse.Namespace beside the weights can thus be read.
  """

  def __init__(self, *args):
    pass

  def __setstate__(self, state):
    pass


def _to_numpy(name, tensor):
  try:
    tensor = tensor.detach()
    return (tensor.float() if tensor.is_floating_point() else tensor).numpy()
  except (TypeError, RuntimeError) as error:
    raise UsageError(
      f'the checkpoint has {name!r}, which is not a plain tensor ({tensor.layout}, {tensor.dtype}, '
      f'{tensor.device}): save dense tensors'
    ) from error


def _shapes(model):
  side = {'cifar': 32, 'imagenet': 224}[model.stages[0].layers[0].stem]  # The published sizes.
  images = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
  return jax.eval_shape(model.init, jax.random.key(0), images)


def _pairs(model: MultiExitNetwork) -> list[_Pair]:
  if model.collaboration == 'identity':
    raise UsageError(
      "the published code has no network with collaboration 'identity': use 'off' or 'network'"
    )
  has_phase_two = model.collaboration == 'network'
  net = 'net.' if has_phase_two else ''
  pairs: list[_Pair] = []
  for index, (stage, exit_layers) in enumerate(zip(model.stages, model.exits, strict=True)):
    for number, layer in enumerate(stage.layers):
      ours, theirs = f'stages_{index}/layers_{number}', f'{net}blocks.{index}.{number}'
      pairs += _layer_pairs(layer, ours, theirs)
    for number in range(len(exit_layers.convolutions)):
      theirs = f'{net}classifier.{index}.m.{number}.net'
      pairs += _conv_norm_pairs(f'exits_{index}/convolutions_{number}', theirs, 0)
    dense = f'classifier.{index}' if has_phase_two else f'classifier.{index}.linear'
    pairs += _dense_pairs(f'classifiers_{index}/dense', dense)
    if has_phase_two and index:
      ours, theirs = f'classifiers_{index}/transfer', f'isc_modules.{index - 1}'
      pairs += _dense_pairs(f'{ours}_dense', f'{theirs}.0')
      pairs += _norm_pairs(f'{ours}_norm', f'{theirs}.1')
  return pairs


def _ignored(model):
  """Returns the names of phase I's classifiers, which a phase II checkpoint also contains."""
  if model.collaboration != 'network':
    return set()
  return {
    f'net.classifier.{index}.linear.{kind}'
    for index in range(model.num_exits)
    for kind in ('weight', 'bias')
  }


def _layer_pairs(layer: nn.Module, ours: str, theirs: str) -> Iterator[_Pair]:
  if isinstance(layer, FirstLayer):
    for scale in range(len(layer.widths)):
      net = '' if layer.stem == 'imagenet' and not scale else '.net'
      yield from _conv_norm_pairs(f'{ours}/scale_{scale}', f'{theirs}.layers.{scale}{net}', 0)
      if not net:
        yield _Pair(f'params/{ours}/scale_0/conv/bias', f'{theirs}.layers.0.0.bias')
  elif isinstance(layer, Transition):
    for number in range(len(layer.widths)):
      yield from _conv_norm_pairs(f'{ours}/map_{number}', f'{theirs}.m.{number}.net', 0)
  elif isinstance(layer, DenseLayer):
    for number, scale in enumerate(layer.scales):
      for kind in ('normal', 'down'):
        if kind == 'down' and not number and not layer.drops_scale:
          continue
        branch, net = f'{ours}/{kind}_{scale}', f'{theirs}.layers.{number}.conv_{kind}.net'
        if layer.bottleneck_factors is not None:
          yield from _conv_norm_pairs(f'{branch}/bottleneck', net, 0)
          yield from _conv_norm_pairs(f'{branch}/conv', net, 3)
        else:
          yield from _conv_norm_pairs(f'{branch}/conv', net, 0)
  else:
    raise UsageError('only MSDNets can be converted: the published code has no other network')


def _conv_norm_pairs(ours: str, theirs: str, first: int) -> list[_Pair]:
  """Pairs of a convolution at index `first` of a published sequence, and of its batch norm."""
  convolution = _Pair(f'params/{ours}/conv/kernel', f'{theirs}.{first}.weight')
  return [convolution, *_norm_pairs(f'{ours}/norm', f'{theirs}.{first + 1}')]


def _norm_pairs(ours: str, theirs: str) -> list[_Pair]:
  return [
    _Pair(f'params/{ours}/scale', f'{theirs}.weight'),
    _Pair(f'params/{ours}/bias', f'{theirs}.bias'),
    _Pair(f'batch_stats/{ours}/mean', f'{theirs}.running_mean'),
    _Pair(f'batch_stats/{ours}/var', f'{theirs}.running_var'),
  ]


def _dense_pairs(ours: str, theirs: str) -> list[_Pair]:
  return [
    _Pair(f'params/{ours}/kernel', f'{theirs}.weight'),
    _Pair(f'params/{ours}/bias', f'{theirs}.bias'),
  ]


def _from_torch(value: np.ndarray) -> np.ndarray:
  """Transposes (out, in, height, width) to (height, width, in, out), and (out, in) to (in, out)."""
  return value.transpose(2, 3, 1, 0) if value.ndim == 4 else value.transpose()


def _to_torch(value: np.ndarray) -> np.ndarray:
  return value.transpose(3, 2, 0, 1) if value.ndim == 4 else value.transpose()
