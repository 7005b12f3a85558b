"""Batch norm of several maps at once.

Running variances are those of the batch, divided by its number of elements n, as in Flax. PyTorch
divides by n - 1, which differs most where ISC normalizes vectors: by 64/63 in batches of 64.
"""

from collections.abc import Sequence
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

EPSILON = 1e-5
# What running averages keep of their value in a step.
MOMENTUM = 0.9

Maps = tuple[jax.Array, ...]


@partial(jax.jit, static_argnames='relu')
def normalize(
  maps: Maps, mean: jax.Array, var: jax.Array, scale: jax.Array, bias: jax.Array, relu: bool
) -> Maps:
  """Normalizes maps with given statistics, then optionally applies ReLU.

  Args:
    maps: Arrays [..., channels], whose shapes may differ.
    mean, var, scale, bias: [channels of all maps].
    relu: Whether ReLU follows.

  Returns:
    The results, with the types of the maps.
  """
  return _normalize(relu, maps, mean, var, scale, bias)


# XLA on CPUs would sum the gradients of scale and bias on a single core, in most of the time of a
# backward pass; see `_sums`.
@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _normalize(relu, maps, mean, var, scale, bias):
  return _scale_and_shift(maps, mean, scale * jax.lax.rsqrt(var + EPSILON), bias, relu)


def _normalize_backward(relu, operands, gradients):
  maps, mean, var, scale, bias = operands
  inverse = jax.lax.rsqrt(var + EPSILON)
  of_maps = _split(maps, mean, inverse, scale, bias)
  map_gradients, sums = [], []
  for x, g, mean, inverse_of_map, scale_of_map, bias in zip(maps, gradients, *of_maps, strict=True):
    centred, g = x.astype(jnp.float32) - mean, g.astype(jnp.float32)
    if relu:
      g = jnp.where(centred * inverse_of_map * scale_of_map + bias > 0, g, 0)
    map_gradients.append((g * inverse_of_map * scale_of_map).astype(x.dtype))
    sums.append(_sums(g * centred, g))
  products, totals = map(jnp.concatenate, zip(*sums, strict=True))
  mean_gradient, var_gradient = -totals * scale * inverse, -products * scale * inverse**3 / 2
  return tuple(map_gradients), mean_gradient, var_gradient, products * inverse, totals


_normalize.defvjp(
  lambda relu, *operands: (_normalize(relu, *operands), operands), _normalize_backward
)


@partial(jax.jit, static_argnames=('relu', 'axis_name'))
def batch_norm(
  maps: Maps, scale: jax.Array, bias: jax.Array, relu: bool, axis_name: str | None
) -> tuple[Maps, jax.Array, jax.Array]:
  """Normalizes maps with the statistics of the batch, then optionally applies ReLU.

  The gradient is written by hand: it takes a fraction of the operations that automatic
  differentiation would trace, and the maps are the only large arrays that it stores.

  Args:
    maps: Arrays [batch, ..., channels], whose shapes may differ.
    scale, bias: [channels of all maps].
    relu: Whether ReLU follows.
    axis_name: Name of the mapped axis over which statistics are averaged, or None.

  Returns:
    The results with the types of the maps; and what this batch adds to running averages,
    (1 - MOMENTUM) times its mean and variance [channels of all maps], float32, without gradients.
  """
  results, mean, var = _batch_norm(relu, axis_name, maps, scale, bias)
  return results, jax.lax.stop_gradient(mean), jax.lax.stop_gradient(var)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _batch_norm(relu, axis_name, maps, scale, bias):
  return _forward(relu, axis_name, maps, scale, bias)[0]


def _forward(relu, axis_name, maps, scale, bias):
  wide = [x.astype(jnp.float32) for x in maps]
  means = [
    [total / pixels for total in _sums(x, jnp.square(x))]
    for x, pixels in zip(wide, _pixels(maps), strict=True)
  ]
  mean, square = _average(axis_name, _join(means)).T
  var = jnp.maximum(square - jnp.square(mean), 0)
  # The barrier makes one kernel of all that depends on the statistics alone; without it, kernels
  # for whole maps would compute parts of it again for every pixel.
  mean, inverse, *added = jax.lax.optimization_barrier(
    (mean, jax.lax.rsqrt(var + EPSILON), (1 - MOMENTUM) * mean, (1 - MOMENTUM) * var)
  )
  results = _scale_and_shift(maps, mean, scale * inverse, bias, relu)
  return (results, *added), (maps, mean, inverse, scale, bias)


def _backward(relu, axis_name, residuals, gradients):
  maps, mean, inverse, scale, bias = residuals
  of_maps = _split(maps, mean, inverse, scale, bias)
  normalized = [
    (x.astype(jnp.float32) - mean) * inverse
    for x, mean, inverse, _, _ in zip(maps, *of_maps, strict=True)
  ]
  masked = [g.astype(jnp.float32) for g in gradients[0]]
  if relu:
    masked = [
      jnp.where(x * scale + bias > 0, g, 0)
      for g, x, _, _, scale, bias in zip(masked, normalized, *of_maps, strict=True)
    ]
  sums = [_sums(g * x, g) for g, x in zip(masked, normalized, strict=True)]
  products, gradient_sums = zip(*_average_each(axis_name, maps, sums), strict=True)
  (factors,) = _split(maps, scale * inverse)
  # (g - mean of g - x · mean of g x) · factor; dividing the sums alone would take kernels.
  map_gradients = tuple(
    ((g - (total + x * product) / pixels) * factor).astype(original.dtype)
    for original, pixels, g, x, product, total, factor in zip(
      maps, _pixels(maps), masked, normalized, products, gradient_sums, factors, strict=True
    )
  )
  scale_gradient, bias_gradient = map(jnp.concatenate, zip(*sums, strict=True))
  return map_gradients, scale_gradient, bias_gradient


_batch_norm.defvjp(_forward, _backward)


def _scale_and_shift(maps, mean, factor, bias, relu):
  results = []
  for x, *of_map in zip(maps, *_split(maps, mean, factor, bias), strict=True):
    mean, factor, bias = of_map
    y = ((x.astype(jnp.float32) - mean) * factor + bias).astype(x.dtype)
    results.append(nn.relu(y) if relu else y)
  return tuple(results)


def _split(maps, *arrays):
  """Splits arrays [channels of all maps] into those of each map."""
  ends = np.cumsum([x.shape[-1] for x in maps])[:-1]
  return [jnp.split(array, ends) for array in arrays]


def _sums(*values: jax.Array) -> Sequence[jax.Array]:
  """Sums [channels] of arrays [batch, ..., channels] of one shape, in one reduction."""
  axes = tuple(range(values[0].ndim - 1))

  def add(*values, axes=axes):
    return jax.lax.reduce(values, (np.float32(0),) * len(values), _add, axes)

  def add_images(*values):
    # XLA adds term by term on CPUs, which loses precision in long sums: two decimal digits if all
    # pixels of a batch are added at once, instead of those of each column and then the columns.
    # Summing whole rows also takes a fraction of the time.
    return tuple(total.sum(tuple(range(total.ndim - 1))) for total in add(*values, axes=axes[1:2]))

  return jax.lax.platform_dependent(*values, cpu=add_images, default=add)


def _add(values, others):
  return tuple(map(jnp.add, values, others))


def _pixels(maps):
  """Returns the number of pixels of each map in all images."""
  return [x.size // x.shape[-1] for x in maps]


def _join(pairs):
  """Joins pairs of arrays [channels], one pair per map, to an array [channels of all maps, 2]."""
  return jnp.concatenate([jnp.stack(pair, axis=1) for pair in pairs])


def _average(axis_name, values):
  return values if axis_name is None else jax.lax.pmean(values, axis_name)


def _average_each(axis_name, maps, pairs):
  """Averages pairs of arrays [channels] over devices, in one exchange."""
  if axis_name is None or jax.lax.axis_size(axis_name) == 1:
    return pairs
  return [part.T for part in _split(maps, _average(axis_name, _join(pairs)))[0]]
