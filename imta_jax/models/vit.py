"""Vision Transformer (Dosovitskiy et al., ICLR 2021), plain or with exits after any of its blocks.

The networks of DeiT and timm for patches of 16 × 16 pixels: a class token, learned positions, layer
norm before attention and MLP, and the exact GELU. An exit reads the class token.
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from imta_jax.models.layers import ConvParams, split_at_exits

PATCH = 16
# Width and number of heads by size; all have 12 blocks and MLPs four times as wide.
_SIZES = {'ti': (192, 3), 's': (384, 6), 'b': (768, 12)}
_BLOCKS = 12
_normal = nn.initializers.normal(0.02)
_uniform = nn.initializers.variance_scaling(1 / 3, 'fan_in', 'uniform')  # ±1/sqrt(inputs)


class Embed(nn.Module):
  """Maps images to tokens: the class token, then a linear map of each patch; adds positions.

  Attributes:
    width: Width of the tokens.
    dtype: Type of the computation.
  """

  width: int
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    """Maps [batch, height, width, channels] to [batch, tokens, width]."""
    del train
    batch, height, width, channels = x.shape
    if height % PATCH or width % PATCH:
      raise ValueError(
        f'images of {height}×{width} pixels are not made of patches of {PATCH}×{PATCH}: use '
        f'multiples of {PATCH}'
      )
    rows, columns = height // PATCH, width // PATCH
    shape = (PATCH, PATCH, channels, self.width)
    kernel, bias = ConvParams(shape, self.width, name='patches')()
    assert bias is not None
    patches = x.reshape(batch, rows, PATCH, columns, PATCH, channels).transpose(0, 1, 3, 2, 4, 5)
    patches = patches.reshape(batch, rows * columns, -1)
    tokens = patches.astype(self.dtype) @ kernel.reshape(-1, self.width).astype(self.dtype)
    tokens += bias.astype(self.dtype)
    class_token = self.param('class_token', _normal, (1, 1, self.width), jnp.float32)
    positions = self.param('positions', _normal, (1, 1 + rows * columns, self.width), jnp.float32)
    class_tokens = jnp.broadcast_to(class_token, (batch, 1, self.width)).astype(self.dtype)
    return jnp.concatenate([class_tokens, tokens], axis=1) + positions.astype(self.dtype)


class Block(nn.Module):
  """A transformer block: self-attention, then an MLP, each after layer norm and beside a shortcut.

  Attributes:
    heads: Number of heads.
    dtype: Type of the computation; attention weights are float32.
  """

  heads: int
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    """Maps [batch, tokens, width] to the same shape."""
    del train
    width = x.shape[-1]
    y = layer_norm(self.dtype, name='norm_0')(x)
    y = self._dense(3 * width, 'qkv')(y).reshape(*x.shape[:2], 3, self.heads, width // self.heads)
    queries, keys, values = (y[:, :, index] for index in range(3))
    scores = jnp.einsum('bqhd,bkhd->bhqk', queries, keys) * (width // self.heads) ** -0.5
    weights = nn.softmax(scores.astype(jnp.float32)).astype(self.dtype)
    y = jnp.einsum('bhqk,bkhd->bqhd', weights, values).reshape(x.shape)
    x += self._dense(width, 'project')(y)
    y = layer_norm(self.dtype, name='norm_1')(x)
    y = nn.gelu(self._dense(4 * width, 'mlp_0')(y), approximate=False)
    return x + self._dense(width, 'mlp_1')(y)

  def _dense(self, features, name):
    return nn.Dense(features, dtype=self.dtype, kernel_init=_uniform, name=name)


class ClassTokenExit(nn.Module):
  """The layers of an exit, applied to the class token."""

  layers: tuple[nn.Module, ...]

  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    """Maps tokens [batch, tokens, width] to an embedding [batch, width]."""
    del train
    token = x[:, 0]
    for layer in self.layers:
      token = layer(token)
    return token


def layer_norm(dtype: Any, name: str | None = None) -> nn.LayerNorm:
  """Creates a layer norm with the epsilon of ViT."""
  return nn.LayerNorm(1e-6, dtype=dtype, use_fast_variance=False, name=name)


def vit(
  size: str = 's',
  exits_after: Sequence[int] = (),
  *,
  dtype: Any = jnp.float32,
  batch_norm_axis: str | None = None,
) -> tuple[Sequence[nn.Module], Sequence[nn.Module]]:
  """Creates the stages and exits of a ViT with patches of 16 × 16; see `split_at_exits`.

  Args:
    size: 'ti', 's' or 'b', with tokens of width 192, 384 or 768.
    exits_after: Blocks, counted from 1 to 12, after which an exit branches off; the last block
      always has an exit. Empty for the plain network.
    dtype, batch_norm_axis: See `models.create`; there is no batch norm.

  Returns:
    Stages and exits for a MultiExitNetwork.

  Raises:
    ValueError: If the size or a block does not exist.
  """
  del batch_norm_axis
  if size not in _SIZES:
    raise ValueError(f'size {size!r} does not exist: choose one of {", ".join(_SIZES)}')
  width, heads = _SIZES[size]
  blocks: list[list[nn.Module]] = [[Block(heads, dtype)] for _ in range(_BLOCKS)]
  blocks[0].insert(0, Embed(width, dtype))

  def class_token_exit() -> nn.Module:
    return ClassTokenExit((layer_norm(dtype),))

  return split_at_exits(blocks, exits_after, 'blocks', class_token_exit, class_token_exit)
