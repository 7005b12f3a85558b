"""The multi-exit network: stages and exits of any architecture, combined with the techniques."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from imta_jax.techniques.feature_partitioning import partition
from imta_jax.techniques.gradient_equilibrium import equilibrium_factors, scale_gradient
from imta_jax.techniques.inline_collaboration import CollaborativeClassifier

GRADIENT_EQUILIBRIA = ('all', 'coarsest', 'off')
# Collection into which a network in training may sow log-likelihoods [batch, class]; the training
# step adds the mean negative log-likelihood of the labels to the loss.
AUXILIARY = 'auxiliary'
Features = tuple[jax.Array, ...]


class MultiExitNetwork(nn.Module):
  """k stages and k exits; stage i feeds exit i and stage i+1.

  A stage maps a tuple of feature maps, fine to coarse, to the next; the first stage reads only the
  images. An exit reads the last, coarsest map and returns an embedding. A classifier turns the
  embedding and, with collaboration, the logits of the previous exit into logits. Phase II trains
  only the classifiers, whose variables are named `classifiers_0` … `classifiers_{k-1}`.

  Attributes:
    stages: Modules (features, train) -> features.
    exits: Modules (feature map, train) -> embedding [batch, width].
    num_classes: Number of classes.
    gradient_equilibrium: Which maps GE rescales between stages: 'all' (as in the paper), 'coarsest'
      (only the last one, as in the published code) or 'off'.
    shared_channels: See `feature_partitioning.partition`, for each coarsest map; 1 is off.
    collaboration: ISC between exits; see CollaborativeClassifier.
    stop_collaboration_gradient: See CollaborativeClassifier.
    dtype: Type of the computation; variables and logits are float32.
    batch_norm_axis: Name of the mapped axis over which the classifiers' batch statistics are
      averaged, or None.
    remat: Whether training stores only the maps between stages and recomputes the others in the
      backward pass, which takes less memory and a third more computation.

  Example:
    >>> import flax.linen as nn
    >>> import jax.numpy as jnp
    >>> import imta_jax
    >>> class Stage(nn.Module):
    ...   @nn.compact
    ...   def __call__(self, features, train):
    ...     return (nn.relu(nn.Conv(8, (3, 3), strides=2)(features[-1])),)
    >>> class Exit(nn.Module):
    ...   def __call__(self, feature_map, train):
    ...     return feature_map.mean(axis=(1, 2))
    >>> model = imta_jax.MultiExitNetwork([Stage(), Stage()], [Exit(), Exit()], num_classes=10)
    >>> variables = imta_jax.initialize(model, seed=0, image_shape=(32, 32, 3))
    >>> model.apply(variables, jnp.zeros((4, 32, 32, 3))).shape
    (2, 4, 10)
  """

  stages: Sequence[nn.Module]
  exits: Sequence[nn.Module]
  num_classes: int = 100
  gradient_equilibrium: str = 'all'
  shared_channels: float = 1.0
  collaboration: str = 'off'
  stop_collaboration_gradient: bool = True
  dtype: Any = jnp.float32
  batch_norm_axis: str | None = None
  remat: bool = False

  @property
  def num_exits(self) -> int:
    """Number of exits."""
    return len(self.exits)

  def setup(self):
    self.classifiers = [
      CollaborativeClassifier(
        self.num_classes,
        self.collaboration,
        self.stop_collaboration_gradient,
        self.dtype,
        self.batch_norm_axis,
      )
      for _ in self.exits
    ]

  def __call__(self, images: jax.Array, train: bool = False, frozen_stages: int = 0) -> jax.Array:
    """Computes the logits of every exit.

    Args:
      images: [batch, height, width, channels], normalized.
      train: Whether batch norm uses and records the statistics of the batch.
      frozen_stages: The number of first stages in which it does not.

    Returns:
      [num_exits, batch, num_classes], float32.
    """
    return self.classify(self.embed(images, train, frozen_stages), train)

  def embed(
    self, images: jax.Array, train: bool = False, frozen_stages: int = 0
  ) -> tuple[jax.Array, ...]:
    """Computes the embedding of every exit: all but the last layers.

    Args:
      images: [batch, height, width, channels], normalized.
      train: Whether batch norm uses and records the statistics of the batch.
      frozen_stages: The number of first stages in which it does not.

    Returns:
      [batch, width] for each exit.
    """
    features = self.start(images)
    embeddings = []
    for index in range(self.num_exits):
      features, embedding = self._advance(index, features, train, frozen_stages)
      embeddings.append(embedding)
    return tuple(embeddings)

  def classify(self, embeddings: Sequence[jax.Array], train: bool = False) -> jax.Array:
    """Computes the logits of every exit from its embedding: the last layers.

    Args:
      embeddings: [batch, width] for each exit.
      train: Whether batch norm uses and records the statistics of the batch.

    Returns:
      [num_exits, batch, num_classes], float32.
    """
    logits: list[jax.Array] = []
    for classifier, embedding in zip(self.classifiers, embeddings, strict=True):
      logits.append(classifier(embedding, logits[-1] if logits else None, train))
    return jnp.stack(logits)

  def start(self, images: jax.Array) -> Features:
    """Returns the input of the first stage, for `run_stage`.

    Args:
      images: [batch, height, width, channels], normalized.
    """
    return (images.astype(self.dtype),)

  def run_stage(
    self, index: int, features: Features, previous_logits: jax.Array | None = None
  ) -> tuple[Features, jax.Array]:
    """Runs one stage and its exit in evaluation mode, for inference that may stop at any exit.

        features, logits = model.apply(variables, images, method='start'), None
        for index in range(model.num_exits):
          features, logits = model.apply(variables, index, features, logits, method='run_stage')

    Args:
      index: The stage, counted from 0.
      features: Features from the previous stage; `start(images)` for the first one.
      previous_logits: [batch, num_classes] of the previous exit; None for the first one.

    Returns:
      The features for the next stage, and this exit's logits [batch, num_classes].
    """
    features, embedding = self._advance(index, features, train=False)
    return features, self.classifiers[index](embedding, previous_logits)

  def _advance(
    self, index: int, features: Features, train: bool, frozen_stages: int = 0
  ) -> tuple[Features, jax.Array]:
    """Runs stage `index` and its exit, with GE where the exit branches off (Eq. 4 and 5)."""
    # Training steps can change statistics, also those that keep them as they are.
    is_training = self.is_mutable_collection('batch_stats') and not self.is_initializing()
    run = nn.remat(_run, static_argnums=2) if self.remat and is_training else _run
    features = run(self.stages[index], features, train and index >= frozen_stages)
    coarsest = features[-1]
    if self.gradient_equilibrium not in GRADIENT_EQUILIBRIA:
      raise ValueError(
        f'gradient_equilibrium {self.gradient_equilibrium!r} is unknown: choose one of '
        f'{", ".join(GRADIENT_EQUILIBRIA)}'
      )
    if self.gradient_equilibrium != 'off':
      exit_factor, onward_factor = equilibrium_factors(index + 1, self.num_exits)
      rescaled = features if self.gradient_equilibrium == 'all' else features[-1:]
      features = features[: len(features) - len(rescaled)] + tuple(
        scale_gradient(x, onward_factor) for x in rescaled
      )
      coarsest = scale_gradient(coarsest, exit_factor)
    if self.shared_channels != 1:
      features = (*features[:-1], partition(features[-1], self.shared_channels))
    return features, self.exits[index](coarsest, train)


def _run(stage: nn.Module, features: Features, train: bool) -> Features:
  return stage(features, train)
