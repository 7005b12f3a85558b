"""Checkpoints of the paper's published PyTorch code ↔ Flax variables.

The published MSDNet numbers its modules by position, whereas ours have names. Networks of phase I
and of phase II (collaboration 'network') can be converted. PyTorch is not needed.
"""

import os
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from imta_jax.errors import UsageError
from imta_jax.interop.state_dict import to_torch, to_variables, without_prefix
from imta_jax.interop.torch_file import read_state_dict
from imta_jax.models.msdnet import DenseLayer, FirstLayer, Transition
from imta_jax.models.multi_exit import MultiExitNetwork


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
  names = {pair.ours: pair.theirs for pair in _pairs(model)}
  shapes = flatten_dict(_shapes(model), sep='/')
  variables = to_variables(without_prefix(state), names, shapes, ignored=_ignored(model))
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
    pair.theirs: to_torch(np.asarray(flat[pair.ours]))
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
    UsageError: If the file is not a checkpoint of this network.
  """
  return from_state_dict(read_state_dict(path), model)


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
