"""Layers that the architectures share.

Convolution and batch norm are functions under `jax.jit`: a large network has few distinct shapes,
and each shape is traced, differentiated and lowered only once.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from imta_jax.models.batch_norm import EPSILON, MOMENTUM, batch_norm, normalize
from imta_jax.models.convolution import convolve, convolve_pair
from imta_jax.models.depthwise import convolve_depthwise
from imta_jax.models.multi_exit import Features

# Flax traces an initializer whenever it reads the parameter; under jit, only once per shape.
_normal = jax.jit(nn.initializers.variance_scaling(2.0, 'fan_out', 'normal'), static_argnums=(1, 2))
_zeros = jax.jit(nn.initializers.zeros, static_argnums=(1, 2))
_ones = jax.jit(nn.initializers.ones, static_argnums=(1, 2))


# Kernel and bias of a convolution; scale, bias and running statistics of batch norm.
OfConvolution = tuple[jax.Array, jax.Array | None]
OfNorm = tuple[jax.Array, jax.Array, nn.Variable, nn.Variable]


class ConvNorm(nn.Module):
  """A convolution, batch norm and optionally ReLU.

  Kernels are initialized from a normal distribution with standard deviation
  sqrt(2 / (kernel area × output channels)). With variables of `folding.fold_batch_norm` there is no
  batch norm.

  Attributes:
    features: Number of output channels.
    kernel_size: Side of the square kernel.
    stride: Stride in both directions.
    relu: Whether ReLU follows.
    use_bias: Whether the convolution has a bias.
    depthwise: Whether each channel has a kernel of its own; `features` is then their number.
    padding: 'half': kernel_size // 2 zeros on every side; 'same': as TensorFlow pads.
    dtype: Type of the computation; parameters and batch statistics are float32.
    batch_norm_axis: Name of the mapped axis over which batch statistics are averaged, or None.
  """

  features: int
  kernel_size: int
  stride: int = 1
  relu: bool = True
  use_bias: bool = False
  depthwise: bool = False
  padding: str = 'half'
  dtype: Any = jnp.float32
  batch_norm_axis: str | None = None

  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    return run_together([[(self, x)]], train)[0]

  @nn.compact
  def parts(self, inputs: int) -> tuple[OfConvolution, OfNorm | None]:
    """Returns the variables of the layer for a number of input channels."""
    is_folded = not self.is_initializing() and 'norm' not in self.variables['params']
    outputs = 1 if self.depthwise else self.features
    shape = (self.kernel_size, self.kernel_size, inputs, outputs)
    return (
      ConvParams(shape, self.features if self.use_bias or is_folded else 0, name='conv')(),
      None if is_folded else BatchNormVars(self.features, name='norm')(),
    )


ConvNormFactory = Callable[..., ConvNorm]


class Convolution(nn.Module):
  """A convolution alone, without bias, padded and initialized like that of ConvNorm.

  Attributes:
    features: Number of output channels.
    kernel_size: Side of the square kernel.
    dtype: Type of the computation.
  """

  features: int
  kernel_size: int
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    del train
    shape = (self.kernel_size, self.kernel_size, x.shape[-1], self.features)
    kernel = self.param('kernel', _normal, shape, jnp.float32)
    return convolve(x.astype(self.dtype), kernel.astype(self.dtype), 1, self.kernel_size // 2)


class NormRelu(nn.Module):
  """Batch norm and ReLU, for networks that normalize the input of a convolution.

  Attributes:
    batch_norm_axis: Name of the mapped axis over which batch statistics are averaged, or None.
  """

  batch_norm_axis: str | None = None

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    norm = BatchNormVars(x.shape[-1], name='norm')()
    return _normalize(self, (x,), [norm], True, train)[0]


class ConvParams(nn.Module):
  """The parameters of a convolution: the kernel, and the bias or, if it has no width, None."""

  shape: Sequence[int]
  bias_width: int

  @nn.compact
  def __call__(self) -> OfConvolution:
    kernel = self.param('kernel', _normal, self.shape, jnp.float32)
    width = self.bias_width
    return kernel, self.param('bias', _zeros, (width,), jnp.float32) if width else None


class BatchNormVars(nn.Module):
  """The variables of batch norm: scale, bias and running statistics."""

  features: int

  @nn.compact
  def __call__(self) -> OfNorm:
    shape = (self.features,)
    return (
      self.param('scale', _ones, shape, jnp.float32),
      self.param('bias', _zeros, shape, jnp.float32),
      self.variable('batch_stats', 'mean', _zeros, None, shape, jnp.float32),
      self.variable('batch_stats', 'var', _ones, None, shape, jnp.float32),
    )


Group = Sequence[tuple[ConvNorm, jax.Array]]


def run_together(groups: Sequence[Group], train: bool) -> list[jax.Array]:
  """Runs layers that do not depend on each other, with one batch norm for all of them.

  Many small kernels, and many small exchanges between devices, become a few.

  Args:
    groups: Groups of layers with their inputs [batch, height, width, channels]. The outputs of a
      group form one map. It consists of a single layer, or of layers that read the same map and
      differ only in width, or of two layers of kernel size 3 and stride 2 and 1, in this order,
      whose outputs have the same size. All layers agree in `relu`, `dtype` and `batch_norm_axis`.
    train: Whether batch norm uses and records the statistics of the batch.

  Returns:
    For each group a map [batch, height, width, features], with the features of its layers in order.
  """
  layers = [layer for group in groups for layer, _ in group]
  parts = [layer.parts(x.shape[-1]) for group in groups for layer, x in group]
  remaining = iter(params for params, _ in parts)
  maps = tuple(_convolve(group, [next(remaining) for _ in group]) for group in groups)
  if parts[0][1] is None:
    return [nn.relu(x) if layers[0].relu else x for x in maps]
  return _normalize(layers[0], maps, [norm for _, norm in parts], layers[0].relu, train)


def split_features(layers: Sequence[ConvNorm], x: jax.Array) -> list[jax.Array]:
  """Splits the last axis into the features of each layer."""
  ends = np.cumsum([layer.features for layer in layers])[:-1]
  return jnp.split(x, ends, axis=-1)


def _normalize(layer, maps, norms, relu, train):
  """Applies the batch norms of layers that run together, of which `layer` is one, to their maps."""
  scales, biases, *statistics = zip(*norms, strict=True)
  scale, bias = _join(scales), _join(biases)
  if not train:
    mean, var = (_join([variable.value for variable in running]) for running in statistics)
    return list(normalize(maps, mean, var, scale, bias, relu))
  initializing = layer.is_initializing()
  axis_name = None if initializing else layer.batch_norm_axis
  maps, *added = batch_norm(maps, scale, bias, relu, axis_name)
  if not initializing:
    ends = np.cumsum([scale.size for scale in scales])[:-1]
    for running, of_batch in zip(statistics, added, strict=True):
      for variable, value in zip(running, jnp.split(of_batch, ends), strict=True):
        variable.value = MOMENTUM * variable.value + value
  return list(maps)


def _convolve(group, params):
  """Computes the convolutions of a group of `run_together`."""
  (layer, x), *others = group
  kernels, biases = zip(*params, strict=True)
  padding = _padding(layer, x)
  if layer.depthwise:
    (kernel,) = kernels
    dtype = layer.dtype
    x = convolve_depthwise(x.astype(dtype), kernel.astype(dtype), layer.stride, padding)
  elif all(other is x for _, other in others):
    x = convolve(
      x.astype(layer.dtype),
      _join(kernels).astype(layer.dtype),
      layer.stride,
      padding,
    )
  else:
    (_, other), *_ = others
    x = convolve_pair(*(array.astype(layer.dtype) for array in (x, other, *kernels)))
  return x if biases[0] is None else x + _join(biases).astype(layer.dtype)


def _padding(layer, x):
  """Returns the zeros (above, below) and (to the left, to the right) of a map."""
  if layer.padding == 'half':
    return ((layer.kernel_size // 2,) * 2,) * 2
  # As many as ceil(size / stride) outputs read.
  totals = [
    max((-(-size // layer.stride) - 1) * layer.stride + layer.kernel_size - size, 0)
    for size in x.shape[1:3]
  ]
  return tuple((total // 2, total - total // 2) for total in totals)


def _join(arrays):
  return arrays[0] if len(arrays) == 1 else jnp.concatenate(arrays, axis=-1)


class SingleMapStage(nn.Module):
  """A stage with a single feature map, to which layers are applied one after another."""

  layers: Sequence[nn.Module]

  def __call__(self, features: Features, train: bool = False) -> Features:
    (x,) = features
    for layer in self.layers:
      x = layer(x, train)
    return (x,)


class PooledExit(nn.Module):
  """The layers of an exit: mostly convolutions of stride 2, then average pooling and flattening.

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


class StatisticsExit(nn.Module):
  """An exit of few weights: mean and standard deviation of each channel, and their batch norm.

  Standard deviations tell textures apart long before the means of a pretrained network do.

  Attributes:
    dtype: Type of the computation; the statistics are float32.
    batch_norm_axis: Name of the mapped axis over which batch statistics are averaged, or None.
  """

  dtype: Any = jnp.float32
  batch_norm_axis: str | None = None

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    """Maps [batch, height, width, channels] to an embedding [batch, 2 × channels]."""
    x = x.astype(jnp.float32)
    mean = x.mean(axis=(1, 2))
    variance = jnp.square(x - mean[:, jnp.newaxis, jnp.newaxis]).mean(axis=(1, 2))
    statistics = jnp.concatenate([mean, jnp.sqrt(variance + EPSILON)], axis=-1)
    norm = BatchNormVars(statistics.shape[-1], name='norm')()
    return _normalize(self, (statistics,), [norm], False, train)[0].astype(self.dtype)


def strided_exit(conv_norm: ConvNormFactory, first_layers: Sequence[nn.Module] = ()) -> PooledExit:
  """Creates an exit like those of MSDNet: two 3×3 convolutions with stride 2 and 128 channels."""
  return PooledExit((*first_layers, conv_norm(128, 3, stride=2), conv_norm(128, 3, stride=2)))


def split_at_exits(
  blocks: Sequence[Sequence[nn.Module]],
  exits_after: Sequence[int],
  unit: str,
  early_exit: Callable[[], nn.Module],
  last_exit: Callable[[], nn.Module] = PooledExit,
) -> tuple[Sequence[nn.Module], Sequence[nn.Module]]:
  """Divides a plain network into stages and gives each of them an exit.

  The last exit is that of the plain network.

      exits_after (2, 5) of 9 blocks → blocks 1 to 2, 3 to 5 and 6 to 9, each with an exit

  Args:
    blocks: The layers of each block of the network.
    exits_after: Blocks, counted from 1, after which an exit branches off; the last one always has
      an exit.
    unit: What the blocks are called, for the error.
    early_exit: Creates an exit before the last one.
    last_exit: Creates the last exit; by default, it pools the whole map.

  Returns:
    Stages and exits for a MultiExitNetwork.

  Raises:
    ValueError: If a block does not exist or is given twice.
  """
  last = len(blocks)
  if not set(exits_after) <= set(range(1, last + 1)) or len(set(exits_after)) < len(exits_after):
    raise ValueError(f'exits_after {tuple(exits_after)} must be different {unit} from 1 to {last}')
  stages, exits, start = [], [], 0
  for end in sorted({*exits_after, last}):
    stages.append(SingleMapStage(list(itertools.chain(*blocks[start:end]))))
    exits.append(early_exit() if end < last else last_exit())
    start = end
  return stages, exits
