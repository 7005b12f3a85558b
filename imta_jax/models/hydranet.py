"""HydraNet (Mullapudi et al., CVPR 2018): a stem, branches for groups of similar classes, a gate.

The gate chooses `top_k` branches per image from the features of the stem, and the combiner adds the
features of the chosen branches, weighted by the gate. Training computes all branches; inference
computes only those that an image chose.

From the publication, as its abstract and summaries by others describe it, are the four components,
equally large groups of similar classes with a branch each (experiments/class_groups.py finds them),
and the k branches that inference runs. The sizes of its CIFAR-100 networks, Hydra-Res-d1 to d9,
were inferred from Table 1 of the IMTA paper, whose parameters and multiply-adds this network
reproduces to the last digit:

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
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from imta_jax.models.layers import ConvNorm, ConvNormFactory, PooledExit, SingleMapStage
from imta_jax.models.multi_exit import AUXILIARY
from imta_jax.models.resnet import Block, Stem

_uniform = nn.initializers.variance_scaling(1 / 3, 'fan_in', 'uniform')  # ±1/sqrt(inputs)


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


def run_chosen(branch: Branch, stacked: Any, x: jax.Array, chosen: jax.Array) -> jax.Array:
  """Runs branches in evaluation mode for the images that chose them, and for no others.

      chosen [[0, 2], [2, 1]] → image 0 by branches 0 and 2, image 1 by branches 2 and 1

  Args:
    branch: A branch without a parent.
    stacked: Variables of all branches, stacked along the first axis.
    x: What branches read, [batch, height, width, channels].
    chosen: [batch, top_k], the branches of each image.

  Returns:
    Features [batch, top_k, width].
  """
  num_images, top_k = chosen.shape

  def run(number, features):
    image, choice = number // top_k, number % top_k
    variables = jax.tree.map(lambda leaf: jnp.asarray(leaf)[chosen[image, choice]], stacked)
    return features.at[image, choice].set(branch.apply(variables, x[image][jnp.newaxis])[0])

  features = jnp.zeros((num_images, top_k, branch.width), branch.dtype)
  return jax.lax.fori_loop(0, num_images * top_k, run, features)


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
    groups: [class], the group of each class, counted from 0. There is a branch per group; the
      publication has 20 for the 100 classes of CIFAR-100.
    top_k: Number of branches per image.
    dtype, batch_norm_axis: See `models.create`.

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
  stem: list[nn.Module] = [Stem('cifar', conv_norm)]
  for width, stride in ((16, 1), (32, 2)):
    stem += [
      Block(width, 1 if index else stride, False, False, conv_norm) for index in range(blocks)
    ]
  branch = partial(Branch, 64, blocks, conv_norm, dtype)
  return [SingleMapStage(stem)], [GatedBranches(groups, top_k, branch)]
