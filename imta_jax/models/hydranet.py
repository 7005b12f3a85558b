"""HydraNet (Mullapudi et al., CVPR 2018): a stem, branches for groups of similar classes, a gate.

The gate chooses `top_k` branches per image from the features of the stem, and the combiner adds the
features of the chosen branches, weighted by the gate. Training computes all branches; inference
computes only those that an image chose.

From the publication, as its abstract and summaries by others describe it, are the four components,
equally large groups of similar classes with a branch each (see `class_groups`), and the k branches
that inference runs. The sizes of its CIFAR-100 networks, Hydra-Res-d1 to d9, were inferred from
Table 1 of the IMTA paper, whose parameters and multiply-adds this network reproduces to the last
digit:

- The stem is the first two groups of a CIFAR ResNet, with 16 and 32 channels and d blocks each.
  Each of 20 branches, and the gate too, is its third group, with 64 channels and d blocks: 1.577
  million parameters per d are 21 third groups and one each of the others, with batch norm.
- Shortcuts have no parameters.
- The branches and the gate pool their maps and apply a dense layer from 64 to 64. The gate has
  another one from 64 to 20, and the combined features have one from 64 to 100: the features of
  branches are added, because concatenated they would need a larger layer.
- Four branches run. Table 1 counts each multiplication and each addition of convolutions and dense
  layers, and drops the fraction of a million. The project counts a pair of them once, and also
  counts ReLU and pooling, which gives half as many.

Not known, and chosen here: ReLU after the dense layers from 64 to 64; weights that are the softmax
of the scores of the chosen branches, in training too (as in Shazeer et al., ICLR 2017); a gate that
learns to name the group of an image, by cross-entropy with weight 1; batch statistics over all
images.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from imta_jax.models.layers import ConvNorm, PooledExit, SingleMapStage
from imta_jax.models.multi_exit import AUXILIARY
from imta_jax.models.resnet import Block, ConvNormFactory, Stem

_uniform = nn.initializers.variance_scaling(1 / 3, 'fan_in', 'uniform')  # ±1/sqrt(inputs)

# Inference runs a branch on at most this many images at once: with larger blocks more places are
# padding, with smaller ones accelerators are idle.
_LARGEST_BLOCK = 32


class Branch(nn.Module):
  """Residual blocks, of which the first halves the resolution, pooling and a dense layer.

  Attributes:
    width: Number of channels of the blocks and of the features.
    blocks: Number of residual blocks.
    conv_norm: Creates the convolutions.
    dtype: Type of the computation.
  """

  width: int
  blocks: int
  conv_norm: ConvNormFactory
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    """Maps [batch, height, width, channels] to features [batch, width]."""
    for index in range(self.blocks):
      x = Block(self.width, 1 if index else 2, False, False, self.conv_norm)(x, train)
    x = PooledExit()(x)
    return nn.relu(nn.Dense(self.width, dtype=self.dtype, kernel_init=_uniform)(x))


class GatedBranches(nn.Module):
  """The gate, the branches, and the weighted sum of the features of the chosen branches.

  In training it sows into AUXILIARY what the gate is to learn: for each class, the log-probability
  of its group.

  Attributes:
    groups: [class], the group of each class, counted from 0; there is a branch per group.
    top_k: Number of branches per image.
    branch: Creates a branch, and the gate up to its scores.
  """

  groups: Sequence[int]
  top_k: int
  branch: Callable[..., Branch]

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    """Maps [batch, height, width, channels] to combined features [batch, width]."""
    num_branches = len(set(self.groups))
    features = self.branch(name='gate')(x, train)
    # In float32, since equal scores would choose branches by their number.
    dense = nn.Dense(num_branches, dtype=jnp.float32, kernel_init=_uniform, name='scores')
    scores = dense(features)
    if train:
      self.sow(AUXILIARY, 'group', jax.nn.log_softmax(scores)[:, np.array(self.groups)])
    highest, chosen = jax.lax.top_k(scores, self.top_k)
    if train or self.is_initializing():
      run_all = nn.vmap(
        lambda branch, x: branch(x, train),
        variable_axes={'params': 0, 'batch_stats': 0},
        split_rngs={'params': True},
        in_axes=None,
        out_axes=1,
        axis_size=num_branches,
      )
      features = run_all(self.branch(name='branches'), x)
      features = jnp.take_along_axis(features, chosen[..., jnp.newaxis], axis=1)
    else:
      stacked = {kind: tree['branches'] for kind, tree in self.variables.items()}
      features = run_chosen(self.branch(parent=None), stacked, x, chosen)
    return (jax.nn.softmax(highest)[..., jnp.newaxis] * features).sum(axis=1)


class Blocks(NamedTuple):
  """Which branch runs on which images, in blocks of one size.

  Attributes:
    branches: [block], the branch of each block.
    pairs: [block, size], pairs of image and choice in `chosen`, numbered row by row; their number
      where a block is padded.
    count: The number of blocks that hold a pair; these come first.
  """

  branches: jax.Array
  pairs: jax.Array
  count: jax.Array | int


def plan_blocks(chosen: jax.Array, num_branches: int, size: int) -> Blocks:
  """Divides the pairs of images and branches into blocks of one branch each.

  Args:
    chosen: [batch, top_k], the branches of each image.
    num_branches: Number of branches.
    size: Images per block.

  Returns:
    The blocks, as few as possible.
  """
  branches = chosen.reshape(-1)
  num_pairs = branches.size
  order = jnp.argsort(branches)
  counts = jnp.bincount(branches, length=num_branches)
  ends = jnp.cumsum(counts)
  blocks = -(-counts // size)
  last_blocks = jnp.cumsum(blocks)
  # Each branch fills at most one block partly.
  number = jnp.arange(num_pairs if size == 1 else num_pairs // size + num_branches)
  branch = jnp.searchsorted(last_blocks, number, side='right')
  within = number - (last_blocks - blocks)[branch]
  place = ((ends - counts)[branch] + size * within)[:, jnp.newaxis] + jnp.arange(size)
  pairs = jnp.where(place < ends[branch][:, jnp.newaxis], order[place], num_pairs)
  return Blocks(branch, pairs, num_pairs if size == 1 else last_blocks[-1])


def run_chosen(branch: Branch, stacked: Any, x: jax.Array, chosen: jax.Array) -> jax.Array:
  """Runs branches in evaluation mode for the images that chose them, and for no others.

  Args:
    branch: A branch without a parent.
    stacked: Variables of all branches, stacked along the first axis.
    x: What branches read, [batch, height, width, channels].
    chosen: [batch, top_k], different branches for each image.

  Returns:
    Features [batch, top_k, width].
  """
  num_images, top_k = chosen.shape
  num_branches = jax.tree.leaves(stacked)[0].shape[0]
  size = block_size(chosen.size, num_branches)
  blocks = plan_blocks(chosen, num_branches, size)

  def run_block(number, features):
    variables = jax.tree.map(
      lambda leaf: jax.lax.dynamic_index_in_dim(leaf, blocks.branches[number], keepdims=False),
      stacked,
    )
    pairs = blocks.pairs[number]
    # Padding reads the last image, and its result is dropped.
    results = branch.apply(variables, x[jnp.minimum(pairs // top_k, num_images - 1)])
    return features.at[pairs].set(results, mode='drop')

  features = jnp.zeros((chosen.size, branch.width), branch.dtype)
  features = jax.lax.fori_loop(0, blocks.count, run_block, features)
  return features.reshape(num_images, top_k, branch.width)


def block_size(num_pairs: int, num_branches: int) -> int:
  """Returns the number of images per block: half a branch's average, within limits.

  Exported networks take batches of any size, whose blocks are single images.
  """
  if not isinstance(num_pairs, int):
    return 1
  return min(max(1, num_pairs // (2 * num_branches)), _LARGEST_BLOCK)


def hydranet(
  blocks: int = 1,
  groups: Sequence[int] = (),
  top_k: int = 4,
  *,
  dtype: Any = jnp.float32,
  batch_norm_axis: str | None = None,
) -> tuple[Sequence[nn.Module], Sequence[nn.Module]]:
  """Creates the stage and the exit of a HydraNet for small images.

  Args:
    blocks: Number of residual blocks per resolution: the d of Hydra-Res-d1 to d9.
    groups: [class], the group of each class, counted from 0; see `class_groups`. There is a branch
      per group; the publication has 20 for the 100 classes of CIFAR-100.
    top_k: Number of branches per image.
    dtype: Type of the computation.
    batch_norm_axis: Name of the mapped axis over which batch statistics are averaged, or None.

  Returns:
    The stage (the stem) and the exit (gate, branches and combiner) for a MultiExitNetwork.

  Raises:
    ValueError: If a field is out of range.
  """
  if blocks < 1:
    raise ValueError(f'blocks {blocks} is out of range: it must be 1 or more')
  groups = tuple(groups)
  num_branches = len(set(groups))
  if not groups or set(groups) != set(range(num_branches)):
    raise ValueError(
      f'groups {groups} must be a group per class, counted from 0 without gaps: '
      'experiments/class_groups.py computes them from a trained network'
    )
  if not 1 <= top_k <= num_branches:
    raise ValueError(f'top_k {top_k} is out of range: it must be from 1 to {num_branches} branches')
  conv_norm = partial(ConvNorm, dtype=dtype, batch_norm_axis=batch_norm_axis)
  stem = [Stem('cifar', conv_norm)]
  for width, stride in ((16, 1), (32, 2)):
    stem += [
      Block(width, 1 if index else stride, False, False, conv_norm) for index in range(blocks)
    ]
  branch = partial(Branch, 64, blocks, conv_norm, dtype)
  return [SingleMapStage(stem)], [GatedBranches(groups, top_k, branch)]
