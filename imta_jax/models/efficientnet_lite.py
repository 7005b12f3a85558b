"""EfficientNet-Lite (Google, 2020), plain or with exits after any of its blocks.

EfficientNet (Tan and Le, ICML 2019) without squeeze-and-excitation and with ReLU6, for devices on
which other operations are slow. Convolutions pad as TensorFlow does ('SAME').
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from imta_jax.models.layers import (
  ConvNorm,
  ConvNormFactory,
  PooledExit,
  StatisticsExit,
  split_at_exits,
)

# Of each group: blocks, side of the kernel, stride, expansion and channels.
_GROUPS = (
  (1, 3, 1, 1, 16),
  (2, 3, 2, 6, 24),
  (2, 5, 2, 6, 40),
  (3, 3, 2, 6, 80),
  (3, 5, 1, 6, 112),
  (4, 5, 2, 6, 192),
  (1, 3, 1, 6, 320),
)
# Factors of the channels and of the blocks per group, by variant.
_VARIANTS = ((1.0, 1.0), (1.0, 1.1), (1.1, 1.2), (1.2, 1.4), (1.4, 1.8))
_STEM, _HEAD = 32, 1280


class Layer(nn.Module):
  """A convolution, batch norm and ReLU6."""

  features: int
  kernel_size: int
  conv_norm: ConvNormFactory
  stride: int = 1
  depthwise: bool = False

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    layer = self.conv_norm(
      self.features,
      self.kernel_size,
      stride=self.stride,
      depthwise=self.depthwise,
      padding='same',
      relu=False,
      name='conv_norm',
    )
    return _relu6(layer(x, train))


class Block(nn.Module):
  """An inverted bottleneck: 1×1 convolution that expands, depthwise convolution, 1×1 convolution.

  Attributes:
    features: Number of channels of the result.
    kernel_size: Side of the depthwise kernel.
    stride: Stride of the depthwise convolution.
    expansion: Factor of the channels in between; with 1 there is no first convolution.
    conv_norm: Creates the convolutions.
  """

  features: int
  kernel_size: int
  stride: int
  expansion: int
  conv_norm: ConvNormFactory

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    width, y = self.expansion * x.shape[-1], x
    if self.expansion > 1:
      y = Layer(width, 1, self.conv_norm, name='expand')(y, train)
    y = Layer(
      width, self.kernel_size, self.conv_norm, self.stride, depthwise=True, name='depthwise'
    )(y, train)
    y = self.conv_norm(self.features, 1, relu=False, name='project')(y, train)
    return x + y if x.shape == y.shape else y


def efficientnet_lite(
  variant: int = 0,
  exits_after: Sequence[int] = (),
  *,
  dtype: Any = jnp.float32,
  batch_norm_axis: str | None = None,
) -> tuple[Sequence[nn.Module], Sequence[nn.Module]]:
  """Creates the stages and exits of an EfficientNet-Lite; see `split_at_exits`.

  Args:
    variant: 0 to 4, trained on ImageNet with images of 224, 240, 260, 280 and 300 pixels.
    exits_after: Blocks, counted from 1, after which an exit branches off; the last block always
      has an exit. Empty for the plain network.
    dtype, batch_norm_axis: See `models.create`.

  Returns:
    Stages and exits for a MultiExitNetwork.

  Raises:
    ValueError: If the variant or a block does not exist.
  """
  if variant not in range(len(_VARIANTS)):
    raise ValueError(f'variant {variant} does not exist: choose one of 0 to {len(_VARIANTS) - 1}')
  width_factor, depth_factor = _VARIANTS[variant]
  conv_norm = partial(ConvNorm, dtype=dtype, batch_norm_axis=batch_norm_axis)
  blocks: list[list[nn.Module]] = []
  for group, (size, kernel_size, stride, expansion, channels) in enumerate(_GROUPS):
    is_scaled = 0 < group < len(_GROUPS) - 1  # The first and the last group keep their length.
    for index in range(math.ceil(depth_factor * size) if is_scaled else size):
      features, first_stride = _round(width_factor * channels), stride if index == 0 else 1
      blocks.append([Block(features, kernel_size, first_stride, expansion, conv_norm)])
  blocks[0].insert(0, Layer(_STEM, 3, conv_norm, stride=2))
  return split_at_exits(
    blocks,
    exits_after,
    'blocks',
    lambda: StatisticsExit(dtype, batch_norm_axis),
    lambda: PooledExit((Layer(_HEAD, 1, conv_norm),)),
  )


@jax.custom_jvp
def _relu6(x):
  return jnp.minimum(nn.relu(x), 6)


@_relu6.defjvp
def _relu6_jvp(primals, tangents):
  (x,), (tangent,) = primals, tangents
  # That of `minimum` divides where both are equal, in a pass of its own on CPUs.
  return _relu6(x), jnp.where((x > 0) & (x < 6), tangent, 0)


def _round(channels):
  """Rounds to a multiple of 8, but not down by more than a tenth."""
  rounded = max(8, int(channels + 4) // 8 * 8)
  return rounded + 8 if rounded < 0.9 * channels else rounded
