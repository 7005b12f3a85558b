"""GoogLeNet, the first Inception network (Szegedy et al., CVPR 2015), with batch norm."""

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
  SingleMapStage,
  run_together,
  split_features,
)


class MaxPool(nn.Module):
  """Max pooling with stride 2, padded at the bottom and on the right: it leaves out no pixel."""

  window: int

  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    del train
    return nn.max_pool(x, (self.window, self.window), (2, 2), padding=((0, 1), (0, 1)))


class Inception(nn.Module):
  """An Inception module: four branches that read one map, concatenated.

  Attributes:
    direct: Channels of the 1×1 convolution.
    reduced: Channels of the 1×1 convolutions that precede the two 3×3 ones.
    wide: Channels of the two 3×3 convolutions. The second is 5×5 in the publication.
    pooled: Channels of the 1×1 convolution that follows 3×3 max pooling.
    conv_norm: Creates the convolutions.
  """

  direct: int
  reduced: tuple[int, int]
  wide: tuple[int, int]
  pooled: int
  conv_norm: ConvNormFactory

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    readers = [
      self.conv_norm(self.direct, 1, name='direct'),
      *(self.conv_norm(width, 1, name=f'reduce_{i}') for i, width in enumerate(self.reduced)),
    ]
    surroundings = nn.max_pool(x, (3, 3), padding='SAME')
    read, pooled = run_together(
      [
        [(reader, x) for reader in readers],
        [(self.conv_norm(self.pooled, 1, name='pooled'), surroundings)],
      ],
      train,
    )
    direct, *reduced = split_features(readers, read)
    wide = run_together(
      [
        [(self.conv_norm(width, 3, name=f'wide_{i}'), y)]
        for i, (width, y) in enumerate(zip(self.wide, reduced, strict=True))
      ],
      train,
    )
    return jnp.concatenate([direct, *wide, pooled], axis=-1)


class AuxiliaryExit(nn.Module):
  """An exit that averages windows of 5×5 pixels, narrows them and has a hidden dense layer."""

  conv_norm: ConvNormFactory
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    """Maps [batch, height, width, channels] to an embedding [batch, 1024]."""
    if min(x.shape[1:3]) < 5:
      raise ValueError(
        f'the map of an auxiliary exit is {x.shape[1]}×{x.shape[2]}, too small to pool by 5: use '
        'larger images or auxiliary_exits False'
      )
    x = nn.avg_pool(x, (5, 5), (3, 3))
    x = self.conv_norm(128, 1, name='conv_norm')(x, train)
    uniform = nn.initializers.variance_scaling(1 / 3, 'fan_in', 'uniform')  # ±1/sqrt(inputs)
    dense = nn.Dense(1024, dtype=self.dtype, kernel_init=uniform, name='dense')
    return nn.relu(dense(x.reshape(x.shape[0], -1)))


def googlenet(
  auxiliary_exits: bool = False,
  *,
  dtype: Any = jnp.float32,
  batch_norm_axis: str | None = None,
) -> tuple[Sequence[nn.Module], Sequence[nn.Module]]:
  """Creates the stages and exits of GoogLeNet, without dropout.

  As in torchvision and in the TensorFlow code that its weights are from, batch norm follows each
  convolution, 3×3 convolutions take the place of 5×5 ones, and the last max pooling is 2×2. The
  epsilon of batch norm is 1e-5 here and 1e-3 there.

  Args:
    auxiliary_exits: Whether the two auxiliary classifiers of the publication are exits, after the
      third and the sixth Inception module. They need images of 79 pixels or more.
    dtype, batch_norm_axis: See `models.create`.

  Returns:
    Stages and exits for a MultiExitNetwork: one of each, or three.
  """
  conv_norm = partial(ConvNorm, dtype=dtype, batch_norm_axis=batch_norm_axis)
  inception = partial(Inception, conv_norm=conv_norm)
  first = [
    conv_norm(64, 7, stride=2),
    MaxPool(3),
    conv_norm(64, 1),
    conv_norm(192, 3),
    MaxPool(3),
    inception(64, (96, 16), (128, 32), 32),
    inception(128, (128, 32), (192, 96), 64),
    MaxPool(3),
    inception(192, (96, 16), (208, 48), 64),
  ]
  second = [
    inception(160, (112, 24), (224, 64), 64),
    inception(128, (128, 24), (256, 64), 64),
    inception(112, (144, 32), (288, 64), 64),
  ]
  third = [
    inception(256, (160, 32), (320, 128), 128),
    MaxPool(2),
    inception(256, (160, 32), (320, 128), 128),
    inception(384, (192, 48), (384, 128), 128),
  ]
  if not auxiliary_exits:
    return [SingleMapStage([*first, *second, *third])], [PooledExit()]
  auxiliary = [AuxiliaryExit(conv_norm, dtype) for _ in range(2)]
  return [SingleMapStage(layers) for layers in (first, second, third)], [*auxiliary, PooledExit()]
