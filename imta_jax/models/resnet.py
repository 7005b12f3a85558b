"""ResNet (He et al., CVPR 2016), plain or with exits after any of its blocks."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from imta_jax.models.layers import ConvNorm, ConvNormFactory, split_at_exits, strided_exit

# Number of blocks per group of the ImageNet networks, and whether they have bottlenecks.
_IMAGENET_DEPTHS = {
  18: ((2, 2, 2, 2), False),
  34: ((3, 4, 6, 3), False),
  50: ((3, 4, 6, 3), True),
  101: ((3, 4, 23, 3), True),
}


class Stem(nn.Module):
  """Maps images to the first feature map."""

  stem: str
  conv_norm: ConvNormFactory

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    if self.stem == 'cifar':
      return self.conv_norm(16, 3, name='conv_norm')(x, train)
    x = self.conv_norm(64, 7, stride=2, name='conv_norm')(x, train)
    return nn.max_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)))


class Block(nn.Module):
  """A residual block: two 3×3 convolutions, or a bottleneck of 1×1, 3×3 and 1×1 convolutions.

  Attributes:
    width: Number of channels of the 3×3 convolutions; a bottleneck returns four times as many.
    stride: Stride of the first 3×3 convolution.
    bottleneck: Whether the block is a bottleneck.
    projects: Whether a shortcut that changes shape is a 1×1 convolution, as in the ImageNet
      networks; otherwise it skips pixels and pads channels with zeros, as in the CIFAR networks.
    conv_norm: Creates the convolutions.
  """

  width: int
  stride: int
  bottleneck: bool
  projects: bool
  conv_norm: ConvNormFactory

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    if self.bottleneck:
      features = 4 * self.width
      y = self.conv_norm(self.width, 1, name='conv_0')(x, train)
      y = self.conv_norm(self.width, 3, stride=self.stride, name='conv_1')(y, train)
      y = self.conv_norm(features, 1, relu=False, name='conv_2')(y, train)
    else:
      features = self.width
      y = self.conv_norm(self.width, 3, stride=self.stride, name='conv_0')(x, train)
      y = self.conv_norm(self.width, 3, relu=False, name='conv_1')(y, train)
    if x.shape != y.shape and self.projects:
      x = self.conv_norm(features, 1, stride=self.stride, relu=False, name='shortcut')(x, train)
    elif x.shape != y.shape:
      x = jax.lax.slice(x, (0,) * 4, x.shape, (1, self.stride, self.stride, 1))
      x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, features - x.shape[-1])))
    return nn.relu(x + y)


def resnet(
  depth: int = 56,
  exits_after: Sequence[int] = (),
  stem: str = 'cifar',
  *,
  dtype: Any = jnp.float32,
  batch_norm_axis: str | None = None,
) -> tuple[Sequence[nn.Module], Sequence[nn.Module]]:
  """Creates the stages and exits of a ResNet; see `split_at_exits`.

  Args:
    depth: 20, 32, 44, 56, 110 or another 6n + 2 for the stem 'cifar'; 18, 34, 50 or 101 for the
      stem 'imagenet'.
    exits_after: Blocks, counted from 1, after which an exit branches off; the last block always
      has an exit. Empty for the plain network.
    stem: 'cifar' for small images; 'imagenet' first divides the resolution by 4.
    dtype, batch_norm_axis: See `models.create`.

  Returns:
    Stages and exits for a MultiExitNetwork.

  Raises:
    ValueError: If the depth, a block or the stem does not exist.
  """
  group_sizes, bottleneck, base_width = _groups(depth, stem)
  conv_norm = partial(ConvNorm, dtype=dtype, batch_norm_axis=batch_norm_axis)
  blocks: list[list[nn.Module]] = []
  for group, size in enumerate(group_sizes):
    for index in range(size):
      width, stride = base_width * 2**group, 2 if group and not index else 1
      blocks.append([Block(width, stride, bottleneck, stem == 'imagenet', conv_norm)])
  blocks[0].insert(0, Stem(stem, conv_norm))
  return split_at_exits(blocks, exits_after, 'blocks', partial(strided_exit, conv_norm))


def num_blocks(depth: int, stem: str) -> int:
  """Returns the number of blocks of a ResNet, with the arguments and errors of `resnet`."""
  return sum(_groups(depth, stem)[0])


def _groups(depth, stem):
  """Returns the number of blocks per group, whether they have bottlenecks, and the first width."""
  if stem == 'cifar':
    if depth < 8 or depth % 6 != 2:
      raise ValueError(f'depth {depth} is not one of the CIFAR ResNets: use 6n + 2 (20, 56, 110)')
    return ((depth - 2) // 6,) * 3, False, 16
  if stem == 'imagenet':
    if depth not in _IMAGENET_DEPTHS:
      choices = ', '.join(map(str, _IMAGENET_DEPTHS))
      raise ValueError(f'depth {depth} is not one of the ImageNet ResNets: choose one of {choices}')
    return *_IMAGENET_DEPTHS[depth], 64
  raise ValueError(f"stem {stem!r} is unknown: use 'cifar' or 'imagenet'")
