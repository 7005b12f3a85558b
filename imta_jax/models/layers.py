"""Layers that the architectures share.

Convolution and batch norm are functions under `jax.jit`: a large network has few distinct shapes,
and each shape is traced, differentiated and lowered only once.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from imta_jax.models.convolution import convolve

_EPSILON = 1e-5
_MOMENTUM = 0.9

# Flax traces an initializer whenever it reads the parameter; under jit, only once per shape.
_normal = jax.jit(nn.initializers.variance_scaling(2.0, 'fan_out', 'normal'), static_argnums=(1, 2))
_zeros = jax.jit(nn.initializers.zeros, static_argnums=(1, 2))
_ones = jax.jit(nn.initializers.ones, static_argnums=(1, 2))


class ConvNorm(nn.Module):
  """A convolution, batch norm and optionally ReLU.

  The padding is kernel_size // 2 on every side. Kernels are initialised from a normal distribution
  with standard deviation sqrt(2 / (kernel area × output channels)).

  Attributes:
    features: Number of output channels.
    kernel_size: Side of the square kernel.
    stride: Stride in both directions.
    relu: Whether ReLU follows.
    use_bias: Whether the convolution has a bias.
    dtype: Type of the computation; parameters and batch statistics are float32.
    batch_norm_axis: Name of the mapped axis over which batch statistics are averaged, or None.
  """

  features: int
  kernel_size: int
  stride: int = 1
  relu: bool = True
  use_bias: bool = False
  dtype: Any = jnp.float32
  batch_norm_axis: str | None = None

  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    return run_together([self], x, train)[0]

  @nn.compact
  def parts(self, inputs: int) -> tuple['ConvParams', 'BatchNormVars']:
    """Returns the variables of the layer for a number of input channels."""
    shape = (self.kernel_size, self.kernel_size, inputs, self.features)
    return (
      ConvParams(shape, self.use_bias, name='conv')(),
      BatchNormVars(self.features, name='norm')(),
    )


class ConvParams(nn.Module):
  """The parameters of a convolution: the kernel, and the bias or None."""

  shape: Sequence[int]
  use_bias: bool

  @nn.compact
  def __call__(self) -> tuple[jax.Array, jax.Array | None]:
    kernel = self.param('kernel', _normal, self.shape, jnp.float32)
    bias = self.param('bias', _zeros, self.shape[-1:], jnp.float32) if self.use_bias else None
    return kernel, bias


class BatchNormVars(nn.Module):
  """The variables of batch norm: scale, bias and running statistics."""

  features: int

  @nn.compact
  def __call__(self) -> tuple[jax.Array, jax.Array, nn.Variable, nn.Variable]:
    shape = (self.features,)
    return (
      self.param('scale', _ones, shape, jnp.float32),
      self.param('bias', _zeros, shape, jnp.float32),
      self.variable('batch_stats', 'mean', _zeros, None, shape, jnp.float32),
      self.variable('batch_stats', 'var', _ones, None, shape, jnp.float32),
    )


def run_together(layers: Sequence[ConvNorm], x: jax.Array, train: bool) -> list[jax.Array]:
  """Runs layers as one layer; they must read the same map and differ only in width.

  Args:
    layers: The layers.
    x: [batch, height, width, channels].
    train: Whether batch norm uses and records the statistics of the batch.

  Returns:
    The output of each layer, [batch, height, width, features].
  """
  layer, dtype = layers[0], layers[0].dtype
  convolutions, norms = zip(*(each.parts(x.shape[-1]) for each in layers), strict=True)
  kernels, biases = zip(*convolutions, strict=True)
  scales, shifts, *statistics = zip(*norms, strict=True)
  scale, shift = _join(scales), _join(shifts)
  x = convolve(x.astype(dtype), _join(kernels).astype(dtype), layer.stride, layer.kernel_size // 2)
  if layer.use_bias:
    x = x + _join(biases).astype(dtype)
  ends = np.cumsum([each.features for each in layers])[:-1]
  if train:
    axis_name = None if layer.is_initializing() else layer.batch_norm_axis
    x, *batch_statistics = batch_norm(x, scale, shift, layer.relu, axis_name)
    for running, batch in zip(statistics, batch_statistics, strict=True):
      for variable, value in zip(running, jnp.split(batch, ends), strict=True):
        if not layer.is_initializing():
          variable.value = _MOMENTUM * variable.value + (1 - _MOMENTUM) * value
  else:
    mean, var = (_join([variable.value for variable in running]) for running in statistics)
    x = _scale_and_shift(x, mean, var, scale, shift, layer.relu)
  return jnp.split(x, ends, axis=-1)


def _join(arrays):
  return arrays[0] if len(arrays) == 1 else jnp.concatenate(arrays, axis=-1)


@partial(jax.jit, static_argnames='relu')
def _scale_and_shift(x, mean, var, scale, bias, relu):
  """Applies batch norm with given statistics, then optionally ReLU."""
  y = (x.astype(jnp.float32) - mean) * (scale * jax.lax.rsqrt(var + _EPSILON)) + bias
  y = y.astype(x.dtype)
  return nn.relu(y) if relu else y


@partial(jax.jit, static_argnames=('relu', 'axis_name'))
def batch_norm(
  x: jax.Array, scale: jax.Array, bias: jax.Array, relu: bool, axis_name: str | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Normalises with the statistics of the batch, then optionally applies ReLU.

  The gradient is written by hand: it takes a fraction of the operations that automatic
  differentiation would trace, and the input is the only large array that it stores.

  Args:
    x: [..., channels].
    scale: [channels].
    bias: [channels].
    relu: Whether ReLU follows.
    axis_name: Name of the mapped axis over which statistics are averaged, or None.

  Returns:
    The result with the type of `x`; mean and variance [channels], float32, without gradients.
  """
  y, mean, var = _batch_norm(relu, axis_name, x, scale, bias)
  return y, jax.lax.stop_gradient(mean), jax.lax.stop_gradient(var)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _batch_norm(relu, axis_name, x, scale, bias):
  return _batch_norm_forward(relu, axis_name, x, scale, bias)[0]


def _batch_norm_forward(relu, axis_name, x, scale, bias):
  x32 = x.astype(jnp.float32)
  mean, square = _average(axis_name, _mean(x32), _mean(jnp.square(x32)))
  var = jnp.maximum(square - jnp.square(mean), 0)
  y = _scale_and_shift(x, mean, var, scale, bias, relu)
  return (y, mean, var), (x, mean, var, scale, bias)


def _batch_norm_backward(relu, axis_name, residuals, gradients):
  x, mean, var, scale, bias = residuals
  inverse = jax.lax.rsqrt(var + _EPSILON)
  normalized = (x.astype(jnp.float32) - mean) * inverse
  gradient = gradients[0].astype(jnp.float32)
  if relu:
    gradient = jnp.where(normalized * scale + bias > 0, gradient, 0)
  scale_gradient, bias_gradient = _mean(gradient * normalized), _mean(gradient)
  mean_product, mean_gradient = _average(axis_name, scale_gradient, bias_gradient)
  x_gradient = (gradient - mean_gradient - normalized * mean_product) * (scale * inverse)
  count = x.size / x.shape[-1]
  return x_gradient.astype(x.dtype), count * scale_gradient, count * bias_gradient


_batch_norm.defvjp(_batch_norm_forward, _batch_norm_backward)


def _mean(x):
  """Means [channels] of [batch, ..., channels], first per image and then over images.

  On CPUs, XLA adds term by term, which loses precision in long sums: two decimal digits if all
  pixels of a batch are summed at once.
  """
  return x.mean(tuple(range(1, x.ndim - 1))).mean(0)


def _average(axis_name, *values):
  return values if axis_name is None else jax.lax.pmean(values, axis_name)


class PooledExit(nn.Module):
  """The layers of an exit: convolutions of stride 2, then average pooling and flattening.

  Attributes:
    convolutions: Modules that are applied one after another.
    pool: Side of the pooling window; None pools the whole map.
  """

  convolutions: tuple[nn.Module, ...] = ()
  pool: int | None = None

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    """Maps [batch, height, width, channels] to an embedding [batch, width]."""
    for convolution in self.convolutions:
      x = convolution(x, train)
    window = x.shape[1:3] if self.pool is None else (self.pool, self.pool)
    if min(x.shape[1:3]) < window[0]:
      raise ValueError(
        f'the map of an exit is {x.shape[1]}×{x.shape[2]}, too small to pool by {window[0]}: use '
        'larger images or fewer scales'
      )
    return nn.avg_pool(x, window, window).reshape(x.shape[0], -1)
