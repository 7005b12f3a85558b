"""Inline Subnetwork Collaboration (ISC), Section 3.2 of the paper.

Each exit passes its logits to the next exit, through `stop_gradient`, so that the training of a
later exit does not disturb an earlier one.

    first = CollaborativeClassifier(num_classes, 'off')(embedding_1)
    second = CollaborativeClassifier(num_classes, 'network')(embedding_2, first)
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

COLLABORATIONS = ('off', 'identity', 'network')


class CollaborativeClassifier(nn.Module):
  """The last layer of an exit: a dense layer that can also read the previous exit's logits.

  Attributes:
    num_classes: Number of classes.
    collaboration: 'off': only the dense layer. 'identity': the previous logits are added to its
      output, which makes it a residual. 'network': the previous logits pass through a dense layer
      as wide as the embedding, batch norm and ReLU; the result is concatenated to the embedding.
    stop_collaboration_gradient: Whether the previous logits are constants in the backward pass, as
      in the paper; the published code does not stop the gradient.
    dtype: Type of the computation up to the dense layer, which computes the logits in float32:
      rounded to bfloat16, a percent of them would tie. Parameters are float32.
    batch_norm_axis: Name of the mapped axis over which batch statistics are averaged, or None.

  Example:
    >>> import imta_jax
    >>> import jax
    >>> import jax.numpy as jnp
    >>> embedding, previous_logits = jnp.ones((4, 16)), jnp.zeros((4, 10))
    >>> classifier = imta_jax.CollaborativeClassifier(num_classes=10, collaboration='network')
    >>> variables = classifier.init(jax.random.key(0), embedding, previous_logits)
    >>> classifier.apply(variables, embedding, previous_logits).shape
    (4, 10)
    >>> variables['params']['dense']['kernel'].shape  # Reads 16 + 16 features.
    (32, 10)
  """

  num_classes: int
  collaboration: str = 'off'
  stop_collaboration_gradient: bool = True
  dtype: Any = jnp.float32
  batch_norm_axis: str | None = None

  @nn.compact
  def __call__(
    self, embedding: jax.Array, previous_logits: jax.Array | None = None, train: bool = False
  ) -> jax.Array:
    """Computes the logits of one exit.

    Args:
      embedding: [batch, width].
      previous_logits: [batch, num_classes] of the previous exit; None at the first exit.
      train: Whether batch norm uses and records the statistics of the batch.

    Returns:
      [batch, num_classes], float32.

    Raises:
      ValueError: If `collaboration` is not one of COLLABORATIONS.
    """
    if self.collaboration not in COLLABORATIONS:
      raise ValueError(
        f'collaboration {self.collaboration!r} is unknown: '
        f'choose one of {", ".join(COLLABORATIONS)}'
      )
    collaborates = self.collaboration != 'off' and previous_logits is not None
    if collaborates and self.stop_collaboration_gradient:
      previous_logits = jax.lax.stop_gradient(previous_logits)
    if collaborates and self.collaboration == 'network':
      transferred = self._dense(embedding.shape[-1], self.dtype, 'transfer_dense')(previous_logits)
      transferred = nn.BatchNorm(
        use_running_average=not train,
        momentum=0.9,
        epsilon=1e-5,
        dtype=self.dtype,
        axis_name=self.batch_norm_axis,
        name='transfer_norm',
      )(transferred)
      embedding = jnp.concatenate([embedding, nn.relu(transferred)], axis=-1)
    logits = self._dense(self.num_classes, jnp.float32, 'dense')(embedding)
    if collaborates and self.collaboration == 'identity':
      logits += previous_logits
    return logits

  def _dense(self, features, dtype, name):
    uniform = nn.initializers.variance_scaling(1 / 3, 'fan_in', 'uniform')  # ±1/sqrt(inputs)
    return nn.Dense(features, dtype=dtype, kernel_init=uniform, name=name)
