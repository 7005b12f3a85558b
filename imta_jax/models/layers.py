"""Layers that the architectures share."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


def convolve(
  x: jax.Array, kernel: jax.Array, strides: Sequence[int], padding: Any, **options: Any
) -> jax.Array:
  """`jax.lax.conv_general_dilated`, with a 1×1 convolution as the matrix product that it is.

  XLA's CPU backend runs the product, and above all its gradients, two to three times as fast.
  """
  if kernel.shape[:2] == (1, 1) and set(strides) == {1}:
    return jax.lax.dot_general(
      x, kernel[0, 0], (((3,), (0,)), ((), ())), precision=options.get('precision')
    )
  return jax.lax.conv_general_dilated(x, kernel, strides, padding, **options)


class ConvNorm(nn.Module):
  """Convolution, batch norm and, unless told otherwise, ReLU.

  Padding is symmetric, kernel_size // 2 on every side. Kernels start normal with standard deviation
  sqrt(2 / (kernel area × output channels)), batch norm at 1 and 0.

  Attributes:
    features: Output channels.
    kernel_size: Side of the square kernel.
    stride: Stride in both directions.
    relu: Whether ReLU follows.
    use_bias: Whether the convolution has a bias of its own.
    dtype: What it computes in; parameters and batch statistics are float32.
    batch_norm_axis: Name of the mapped axis over which batch statistics are averaged, or None.
  """

  features: int
  kernel_size: int
  stride: int = 1
  relu: bool = True
  use_bias: bool = False
  dtype: Any = jnp.float32
  batch_norm_axis: str | None = None

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    x = nn.Conv(
      self.features,
      (self.kernel_size, self.kernel_size),
      strides=self.stride,
      padding=self.kernel_size // 2,
      use_bias=self.use_bias,
      kernel_init=nn.initializers.variance_scaling(2.0, 'fan_out', 'normal'),
      conv_general_dilated=convolve,
      dtype=self.dtype,
      name='conv',
    )(x)
    x = nn.BatchNorm(
      use_running_average=not train,
      momentum=0.9,
      epsilon=1e-5,
      dtype=self.dtype,
      axis_name=self.batch_norm_axis,
      name='norm',
    )(x)
    return nn.relu(x) if self.relu else x


class PooledExit(nn.Module):
  """An exit's own layers: convolutions of stride 2, then average pooling and flattening.

  Attributes:
    convolutions: Modules applied in turn.
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
        f'an exit is left with a map of {x.shape[1]}×{x.shape[2]}, too small to pool by '
        f'{window[0]}: give larger images or fewer scales'
      )
    return nn.avg_pool(x, window, window).reshape(x.shape[0], -1)
