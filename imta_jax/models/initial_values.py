"""Initial values of a network, drawn on the host.

XLA would take minutes to compile the hundreds of random draws of a large network; NumPy does not
compile.
"""

import re
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict


def initialize(model: nn.Module, seed: int, image_shape: Sequence[int]) -> dict[str, Any]:
  """Draws the initial variables of a network.

  The distributions are those of `model.init`: convolution kernels are normal with standard
  deviation sqrt(2 / (kernel area × output channels)), dense kernels are uniform in
  ±1/sqrt(inputs), biases and running means are 0, scales and running variances are 1, class tokens
  and positions are normal with standard deviation 0.02. Layers may be stacked along another, first
  axis. The values of a layer depend only on the seed and its name, so
  networks that share layers start with the same values there.

  Args:
    model: The network; its variables must be kernels, biases, variables of batch norm, class tokens
      or positions.
    seed: The random seed.
    image_shape: (height, width, channels).

  Returns:
    {'params': …, 'batch_stats': …}, float32 NumPy arrays.

  Raises:
    ValueError: If the network has a variable of another kind.

  Example:
    >>> import imta_jax
    >>> import jax
    >>> model = imta_jax.create_model('msdnet', num_exits=2)
    >>> variables = imta_jax.initialize(model, seed=0, image_shape=(32, 32, 3))
    >>> sum(leaf.size for leaf in jax.tree.leaves(variables['params']))
    544208
  """
  images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
  shapes = jax.eval_shape(model.init, jax.random.key(0), images)
  return jax.tree_util.tree_map_with_path(lambda path, leaf: _draw(path, leaf.shape, seed), shapes)


def transplant(donor: Mapping[str, Any], fresh: Mapping[str, Any]) -> dict[str, Any]:
  """Copies the values of a trained network into one that differs only in its last layers.

  If only one of the networks has ISC, the kernels of their classifiers differ by the rows that read
  the previous logits, which follow those of the embedding. New ones are zero, so that the network
  initially computes the same function as the donor; those of the donor are dropped.

  Returns:
    Variables with the structure of `fresh`.
  """
  donor, fresh = (flatten_dict(variables, sep='/') for variables in (donor, fresh))
  return unflatten_dict(
    {name: _transplant_leaf(name, donor.get(name), leaf) for name, leaf in fresh.items()}, sep='/'
  )


def _transplant_leaf(name, donor, fresh):
  if donor is None:
    return fresh
  if donor.shape == fresh.shape:
    return donor
  is_classifier = re.fullmatch(r'params/classifiers_\d+/dense/kernel', name)
  if is_classifier and donor.shape[1] == fresh.shape[1]:
    width, rows = sorted((len(donor), len(fresh)))
    if rows == 2 * width:  # Another ratio means embeddings of another size.
      return np.concatenate([donor[:width], np.zeros_like(fresh[width:])])
  return fresh


def _draw(path, shape, seed):
  name = jax.tree_util.keystr(path, simple=True, separator='/')
  kind = name.rsplit('/', 1)[-1]
  random = np.random.default_rng([seed, zlib.crc32(name.encode())])
  if kind == 'kernel' and len(shape) in (4, 5):
    height, width, _, outputs = shape[-4:]
    scale = np.float32(np.sqrt(2 / (height * width * outputs)))
    return scale * random.standard_normal(shape, np.float32)
  if kind == 'kernel' and len(shape) in (2, 3):
    limit = np.float32(1 / np.sqrt(shape[-2]))
    return limit * (2 * random.random(shape, np.float32) - 1)
  if kind in ('class_token', 'positions'):
    return np.float32(0.02) * random.standard_normal(shape, np.float32)
  if kind in ('scale', 'var'):
    return np.ones(shape, np.float32)
  if kind in ('bias', 'mean'):
    return np.zeros(shape, np.float32)
  raise ValueError(f'variable {name!r} of shape {shape} has no rule for its initial value')
