"""The inference form of a network: batch norm is part of the convolution before it.

    scale · (conv(x) - mean) / sqrt(var + ε) + bias  =  conv'(x) + bias'

`layers.ConvNorm` takes either form from its variables. Batch norm elsewhere stays.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from imta_jax.models.batch_norm import EPSILON

Variables = Mapping[str, Any]


def fold_batch_norm(variables: Variables) -> dict[str, Any]:
  """Folds batch norm into the kernels and biases of convolutions.

  Args:
    variables: {'params': …, 'batch_stats': …} of a network.

  Returns:
    Variables with which the network computes the same in evaluation mode, on the host.
  """
  return _by_kind(_fold, variables)


def unfold_batch_norm(variables: Variables, like: Variables) -> dict[str, Any]:
  """Gives folded convolutions a batch norm that adds their bias, so that they can be trained.

  Args:
    variables: Variables of a network; it may be folded.
    like: Variables of a network in the usual form, which tell where batch norm belongs.

  Returns:
    Variables with which the network computes the same.
  """
  return _by_kind(_unfold, variables, like['params'])


def _by_kind(function, variables, *like):
  params, statistics = function(variables['params'], variables.get('batch_stats', {}), *like)
  return {'params': params} | ({'batch_stats': statistics} if statistics else {})


def _fold(params, statistics):
  if 'norm' not in params or 'conv' not in params:
    return _of_children(_fold, params, statistics)
  conv, norm, running = params['conv'], params['norm'], statistics['norm']
  factor = np.asarray(norm['scale']) / np.sqrt(np.asarray(running['var']) + EPSILON)
  bias = norm['bias'] + (conv.get('bias', 0) - np.asarray(running['mean'])) * factor
  kernel = np.asarray(conv['kernel'])
  # Depthwise kernels have the channels on their last but one axis, the branches of a HydraNet
  # one more axis in front.
  channels = kernel.shape[:-4] + (
    (1, 1, factor.shape[-1], 1) if kernel.shape[-1] == 1 < factor.shape[-1] else (1, 1, 1, -1)
  )
  return {'conv': {'kernel': kernel * factor.reshape(channels), 'bias': bias}}, {}


def _unfold(params, statistics, like):
  if 'norm' not in like or 'conv' not in params or 'norm' in params:
    return _of_children(_unfold, params, statistics, like)
  kernel, bias = params['conv']['kernel'], np.asarray(params['conv']['bias'])
  conv = {'kernel': kernel} | ({'bias': np.zeros_like(bias)} if 'bias' in like['conv'] else {})
  zeros, ones = np.zeros_like(bias), np.ones_like(bias)
  norm = {'scale': ones, 'bias': bias}
  return {'conv': conv, 'norm': norm}, {'norm': {'mean': zeros, 'var': ones - EPSILON}}


def _of_children(function, params, statistics, *like):
  """Applies a function to all modules that the variables of a module contain."""
  params, statistics = dict(params), dict(statistics)
  for name, child in params.items():
    if isinstance(child, Mapping):
      of_like = (tree.get(name, {}) for tree in like)
      params[name], of_child = function(child, statistics.pop(name, {}), *of_like)
      statistics |= {name: of_child} if of_child else {}
  return params, statistics
