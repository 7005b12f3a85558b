"""MSDNet, the multi-scale dense network (Huang et al., ICLR 2018) that the paper trains."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from imta_jax.models.layers import (
  ConvNorm,
  ConvNormFactory,
  PooledExit,
  run_together,
  split_features,
)
from imta_jax.models.multi_exit import Features


class FirstLayer(nn.Module):
  """Maps images to the first feature map of every scale; each scale halves the resolution."""

  widths: Sequence[int]
  stem: str
  conv_norm: ConvNormFactory

  @nn.compact
  def __call__(self, features: Features, train: bool) -> Features:
    (x,) = features
    if self.stem == 'cifar':
      x = self.conv_norm(self.widths[0], 3, name='scale_0')(x, train)
    else:
      x = self.conv_norm(self.widths[0], 7, stride=2, use_bias=True, name='scale_0')(x, train)
      x = nn.max_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)))
    maps = [x]
    for scale, width in enumerate(self.widths[1:], start=1):
      maps.append(self.conv_norm(width, 3, stride=2, name=f'scale_{scale}')(maps[-1], train))
    return tuple(maps)


class Branch(nn.Module):
  """A 3×3 convolution, optionally after a 1×1 bottleneck that limits its input width."""

  features: int
  stride: int
  bottleneck_width: int | None
  conv_norm: ConvNormFactory

  @nn.compact
  def parts(self, inputs: int) -> tuple[ConvNorm | None, ConvNorm]:
    """Returns the bottleneck, or None, and the 3×3 convolution."""
    bottleneck = None
    if self.bottleneck_width is not None:
      bottleneck = self.conv_norm(min(inputs, self.bottleneck_width), 1, name='bottleneck')
    return bottleneck, self.conv_norm(self.features, 3, stride=self.stride, name='conv')


class DenseLayer(nn.Module):
  """A multi-scale dense layer: each scale gains features of its own and of the next finer map.

  Attributes:
    scales: Indices of the scales that are written, fine to coarse.
    drops_scale: Whether the layer also reads the next finer scale, which it does not write.
    growth: Number of channels that each written scale gains.
    bottleneck_factors: Factor per scale, by index; None for no bottlenecks.
    conv_norm: Creates the convolutions.
  """

  scales: Sequence[int]
  drops_scale: bool
  growth: Sequence[int]
  bottleneck_factors: Sequence[int] | None
  conv_norm: ConvNormFactory

  @nn.compact
  def __call__(self, features: Features, train: bool) -> Features:
    first_read = self.scales[0] - self.drops_scale
    scales_read = range(first_read, self.scales[-1] + 1)
    maps = dict(zip(scales_read, features[-len(scales_read) :], strict=True))

    branches = []  # (scale that is written, scale that is read, branch)
    for scale, growth in zip(self.scales, self.growth, strict=True):
      if scale == first_read:
        branches.append((scale, scale, self._branch(scale, growth, 1, f'normal_{scale}')))
      else:
        branches += [
          (scale, scale - 1, self._branch(scale - 1, growth // 2, 2, f'down_{scale}')),
          (scale, scale, self._branch(scale, growth // 2, 1, f'normal_{scale}')),
        ]
    groups: dict[int, list[Any]] = {scale: [] for scale in self.scales}
    for (scale, _, _), pair in zip(branches, self._narrow(maps, branches, train), strict=True):
      groups[scale].append(pair)
    gained = run_together(list(groups.values()), train)
    return tuple(
      jnp.concatenate([maps[scale], gain], axis=-1)
      for scale, gain in zip(groups, gained, strict=True)
    )

  def _branch(self, source, growth, stride, name):
    width = None if self.bottleneck_factors is None else self.bottleneck_factors[source] * growth
    return Branch(growth, stride, width, self.conv_norm, name=name)

  def _narrow(self, maps, branches, train):
    """Returns for each branch its 3×3 convolution, and what that reads: a map or its bottleneck."""
    parts = [branch.parts(maps[source].shape[-1]) for _, source, branch in branches]
    inputs = [maps[source] for _, source, _ in branches]
    if self.bottleneck_factors is not None:
      readers = [[i for i, (_, s, _) in enumerate(branches) if s == source] for source in maps]
      groups = [[(parts[i][0], inputs[i]) for i in of_map] for of_map in readers]
      for of_map, x in zip(readers, run_together(groups, train), strict=True):
        split = split_features([parts[i][0] for i in of_map], x)
        for i, narrowed in zip(of_map, split, strict=True):
          inputs[i] = narrowed
    return [(convolution, x) for (_, convolution), x in zip(parts, inputs, strict=True)]


class Transition(nn.Module):
  """A 1×1 convolution per scale that reduces its width."""

  widths: Sequence[int]
  conv_norm: ConvNormFactory

  @nn.compact
  def __call__(self, features: Features, train: bool) -> Features:
    groups = [
      [(self.conv_norm(width, 1, name=f'map_{index}'), x)]
      for index, (x, width) in enumerate(zip(features, self.widths, strict=True))
    ]
    return tuple(run_together(groups, train))


class Stage(nn.Module):
  """A sequence of layers."""

  layers: Sequence[nn.Module]

  def __call__(self, features: Features, train: bool = False) -> Features:
    for layer in self.layers:
      features = layer(features, train)
    return features


def msdnet(
  num_exits: int = 7,
  base: int = 1,
  step: int = 1,
  step_mode: str = 'lin_grow',
  channels: int = 16,
  growth_rate: int = 6,
  scale_factors: Sequence[int] = (1, 2, 4),
  bottleneck_factors: Sequence[int] = (1, 2, 4),
  prune: str = 'max',
  reduction: float = 0.5,
  bottleneck: bool = True,
  stem: str = 'cifar',
  *,
  dtype: Any = jnp.float32,
  batch_norm_axis: str | None = None,
) -> tuple[Sequence[nn.Module], Sequence[nn.Module]]:
  """Creates the stages and exits of an MSDNet; the defaults are the network of Table 1.

  Args:
    num_exits: Number of exits and of stages.
    base: Number of layers of the first stage.
    step: Number of layers of each further stage, or its growth per stage; see `step_mode`.
    step_mode: 'even': `step` layers per stage. 'lin_grow': `step * i + 1` layers in stage i + 1,
      counted from 1.
    channels: Number of channels of the first layer, per unit of the scale factor.
    growth_rate: Number of channels that a layer adds, per unit of the scale factor.
    scale_factors: Relative width of each scale, fine to coarse.
    bottleneck_factors: Width of the bottlenecks of each scale, relative to the 3×3 convolution.
    prune: 'max': scales are dropped at equal intervals. 'min': as late as possible.
    reduction: Fraction of the channels that transitions keep; 0 for no transitions.
    bottleneck: Whether a 1×1 convolution precedes each 3×3 one.
    stem: 'cifar' for small images; 'imagenet' first divides the resolution by 4.
    dtype, batch_norm_axis: See `models.create`.

  Returns:
    Stages and exits for a MultiExitNetwork.

  Raises:
    ValueError: If an argument is invalid.
  """
  for field, value, choices in (
    ('step_mode', step_mode, ('even', 'lin_grow')),
    ('prune', prune, ('max', 'min')),
    ('stem', stem, ('cifar', 'imagenet')),
  ):
    if value not in choices:
      raise ValueError(f'{field} {value!r} is unknown: choose one of {", ".join(choices)}')
  for field, number in (
    ('num_exits', num_exits),
    ('base', base),
    ('step', step),
    ('channels', channels),
    ('growth_rate', growth_rate),
    ('the number of scale_factors', len(scale_factors)),
  ):
    if number < 1:
      raise ValueError(f'{field} {number} is out of range: it must be 1 or more')
  if not 0 <= reduction <= 1:
    raise ValueError(f'reduction {reduction} is out of range: it must be between 0 and 1')
  num_scales = len(scale_factors)
  if any(growth_rate * factor < 2 for factor in scale_factors[1:]):
    raise ValueError(
      f'growth_rate {growth_rate} is too small: with scale_factors {tuple(scale_factors)} a branch '
      'has no channels; use 2 or more'
    )
  if bottleneck and len(bottleneck_factors) != num_scales:
    raise ValueError(
      f'bottleneck_factors {tuple(bottleneck_factors)} must have the length of scale_factors '
      f'{tuple(scale_factors)}'
    )

  depths = [base] + [step if step_mode == 'even' else step * i + 1 for i in range(1, num_exits)]
  num_layers = sum(depths)

  def scales_after(layer):
    """Returns the number of scales that a layer writes; layer 0 is the first, which writes all."""
    if not layer:
      return num_scales
    if prune == 'max':
      return num_scales - max(0, layer - 1) // math.ceil(num_layers / num_scales)
    return min(num_scales, num_layers - layer + 1)

  conv_norm = partial(ConvNorm, dtype=dtype, batch_norm_axis=batch_norm_axis)
  stages: list[Stage] = []
  exits = []
  number, width = 0, channels
  for depth in depths:
    layers: list[nn.Module] = []
    if not stages:
      layers.append(FirstLayer([channels * f for f in scale_factors], stem, conv_norm))
    for _ in range(depth):
      number += 1
      scales = range(num_scales - scales_after(number), num_scales)
      drops_scale = scales_after(number) < scales_after(number - 1)
      layers.append(
        DenseLayer(
          scales,
          drops_scale,
          [growth_rate * scale_factors[scale] for scale in scales],
          bottleneck_factors if bottleneck else None,
          conv_norm,
        )
      )
      width += growth_rate
      narrows = drops_scale if prune == 'max' else number in (num_layers // 3, 2 * num_layers // 3)
      if reduction and narrows:
        width = math.floor(reduction * width)
        if not width:
          raise ValueError(f'reduction {reduction} is too small: no channels are left')
        layers.append(Transition([width * scale_factors[scale] for scale in scales], conv_norm))
    stages.append(Stage(layers))
    exit_width = 128 if stem == 'cifar' else width * scale_factors[-1]
    exits.append(PooledExit(tuple(conv_norm(exit_width, 3, stride=2) for _ in range(2)), pool=2))
  return stages, exits
