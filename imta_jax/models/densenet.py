"""DenseNet and DenseNet-BC (Huang et al., CVPR 2017), plain or with exits after any layer."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from imta_jax.models.layers import (
  ConvNorm,
  Convolution,
  NormRelu,
  PooledExit,
  split_at_exits,
  strided_exit,
)

# Number of layers per dense block of the ImageNet networks.
_IMAGENET_DEPTHS = {
  121: (6, 12, 24, 16),
  169: (6, 12, 32, 32),
  201: (6, 12, 48, 32),
}
# Channels that a bottleneck keeps, per channel of the growth rate.
_BOTTLENECK_FACTOR = 4


class Stem(nn.Module):
  """Maps images to the first feature map; the CIFAR networks leave its batch norm to the layers."""

  features: int
  stem: str
  dtype: Any
  batch_norm_axis: str | None

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    if self.stem == 'cifar':
      return Convolution(self.features, 3, self.dtype, name='conv')(x)
    conv_norm = partial(ConvNorm, dtype=self.dtype, batch_norm_axis=self.batch_norm_axis)
    x = conv_norm(self.features, 7, stride=2, name='conv_norm')(x, train)
    return nn.max_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)))


class DenseLayer(nn.Module):
  """Batch norm, ReLU and a 3×3 convolution, whose output is concatenated to the input.

  A bottleneck precedes them with batch norm, ReLU and a 1×1 convolution, which leaves the 3×3
  convolution four times the growth rate to read.
  """

  growth_rate: int
  bottleneck: bool
  dtype: Any
  batch_norm_axis: str | None

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    y = NormRelu(self.batch_norm_axis, name='norm_relu')(x, train)
    if self.bottleneck:
      conv_norm = partial(ConvNorm, dtype=self.dtype, batch_norm_axis=self.batch_norm_axis)
      y = conv_norm(_BOTTLENECK_FACTOR * self.growth_rate, 1, name='bottleneck')(y, train)
    y = Convolution(self.growth_rate, 3, self.dtype, name='conv')(y)
    return jnp.concatenate([x, y], axis=-1)


class Transition(nn.Module):
  """Batch norm, ReLU, a 1×1 convolution, and average pooling that halves the resolution."""

  features: int
  dtype: Any
  batch_norm_axis: str | None

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    x = NormRelu(self.batch_norm_axis, name='norm_relu')(x, train)
    x = Convolution(self.features, 1, self.dtype, name='conv')(x)
    return nn.avg_pool(x, (2, 2), (2, 2))


def densenet(
  depth: int = 100,
  growth_rate: int = 12,
  bc: bool = True,
  exits_after: Sequence[int] = (),
  stem: str = 'cifar',
  *,
  dtype: Any = jnp.float32,
  batch_norm_axis: str | None = None,
) -> tuple[Sequence[nn.Module], Sequence[nn.Module]]:
  """Creates the stages and exits of a DenseNet, without dropout; see `split_at_exits`.

  All exits begin with batch norm and ReLU, since convolutions do not end with them.

  Args:
    depth: For the stem 'cifar' 40, 52, 64, 76, 88, 100 or another 6n + 4, and without `bc` also
      3n + 4; 121, 169 or 201 for the stem 'imagenet'.
    growth_rate: Number of channels that a layer adds; 32 in the published ImageNet networks.
    bc: True for DenseNet-BC, which has bottlenecks, transitions that halve the number of channels,
      and twice the growth rate as channels of the first layer; False for DenseNet, which starts
      with 16 channels. The ImageNet networks are all DenseNet-BC.
    exits_after: Dense layers, counted from 1, after which an exit branches off; the last layer
      always has an exit. Empty for the plain network.
    stem: 'cifar' for small images; 'imagenet' first divides the resolution by 4.
    dtype, batch_norm_axis: See `models.create`.

  Returns:
    Stages and exits for a MultiExitNetwork.

  Raises:
    ValueError: If the depth, a layer or the stem does not exist, or the growth rate is below 1.
  """
  block_sizes = _block_sizes(depth, bc, stem)
  if growth_rate < 1:
    raise ValueError(f'growth_rate {growth_rate} is out of range: it must be 1 or more')
  variables = {'dtype': dtype, 'batch_norm_axis': batch_norm_axis}
  width = 2 * growth_rate if bc else 16
  layers = []  # Each with the stem or the transition that precedes it.
  for block, size in enumerate(block_sizes):
    if block:
      width = width // 2 if bc else width
      before: list[nn.Module] = [Transition(width, **variables)]
    else:
      before = [Stem(width, stem, **variables)]
    for _ in range(size):
      width += growth_rate
      layers.append([*before, DenseLayer(growth_rate, bc, **variables)])
      before = []

  norm = partial(NormRelu, batch_norm_axis)
  return split_at_exits(
    layers,
    exits_after,
    'layers',
    lambda: strided_exit(partial(ConvNorm, **variables), [norm()]),
    lambda: PooledExit((norm(),)),
  )


def num_layers(depth: int, bc: bool, stem: str) -> int:
  """Returns the number of dense layers of a DenseNet, with the arguments and errors of `densenet`.

  A layer with a bottleneck counts twice in the depth.
  """
  return sum(_block_sizes(depth, bc, stem))


def _block_sizes(depth, bc, stem):
  if stem == 'cifar':
    step = 6 if bc else 3
    if depth < step + 4 or depth % step != 4 % step:
      kind = 'DenseNet-BCs' if bc else 'DenseNets'
      raise ValueError(f'depth {depth} is not one of the CIFAR {kind}: use {step}n + 4 (40, 100)')
    return ((depth - 4) // step,) * 3
  if stem == 'imagenet':
    if depth not in _IMAGENET_DEPTHS or not bc:
      choices = ', '.join(map(str, _IMAGENET_DEPTHS))
      raise ValueError(
        f'depth {depth} with bc {bc} is not one of the ImageNet DenseNets: use bc True and one of '
        f'{choices}'
      )
    return _IMAGENET_DEPTHS[depth]
  raise ValueError(f"stem {stem!r} is unknown: use 'cifar' or 'imagenet'")
