"""One-for-all knowledge distillation (OFA), Section 3.3 of the paper.

The last exit, which is the most accurate one, teaches all other exits.
"""

import jax
import jax.numpy as jnp
import optax

CLASS_REDUCTIONS = ('sum', 'mean')


def one_for_all_loss(
  logits: jax.Array,
  labels: jax.Array,
  teacher_logits: jax.Array,
  *,
  alpha: float,
  temperature: float,
  class_reduction: str = 'sum',
) -> jax.Array:
  """Computes the loss of a network whose last exit teaches the other exits (Eq. 7 and 8).

  Summed over the exits i = 1 … k and averaged over images,

      L_i = alpha CE_i + (1 - alpha) T² KL(softmax(teacher / T) || softmax(logits_i / T)),  i < k
      L_k = CE_k

  The factor T² makes the scale of the gradient independent of T (Hinton et al., 2015).

  Args:
    logits: [num_exits, batch, num_classes].
    labels: [batch], class indices; if one is none, the loss is NaN, since values inside a compiled
      function cannot be refused.
    teacher_logits: [batch, num_classes]; treated as constants in the backward pass. Some may be
      minus infinity: then the probability of the class is 0.
    alpha: Weight of the labels, from 0 to 1; the weight of the teacher is 1 - alpha.
    temperature: The temperature T, above 0 and finite.
    class_reduction: 'sum' for the divergence; 'mean' divides it by the number of classes, as the
      published code does.

  Returns:
    The loss, a float32 scalar.

  Raises:
    ValueError: If an argument is out of range, or shapes do not match.

  Example:
    >>> import imta_jax
    >>> import jax.numpy as jnp
    >>> logits = jnp.array([[[0.0, 0.0]], [[0.0, 2.0]]])  # 2 exits, 1 image, 2 classes.
    >>> labels, teacher_logits = jnp.array([1]), logits[-1]
    >>> round(imta_jax.one_for_all_loss(
    ...   logits, labels, teacher_logits, alpha=0.1, temperature=3.0
    ... ).item(), 3)
    0.622
  """
  if not 0 <= alpha <= 1:
    raise ValueError(f'alpha {alpha} is out of range: it must be between 0 and 1')
  if not 0 < temperature < float('inf'):
    raise ValueError(f'temperature {temperature} is out of range: it must be above 0 and finite')
  if class_reduction not in CLASS_REDUCTIONS:
    raise ValueError(
      f'class_reduction {class_reduction!r} is unknown: choose one of {", ".join(CLASS_REDUCTIONS)}'
    )
  if teacher_logits.shape != logits.shape[1:] or labels.shape != logits.shape[1:-1]:
    raise ValueError(
      f'labels {labels.shape} and teacher_logits {teacher_logits.shape} do not match logits '
      f'{logits.shape}: they must be [batch] and [batch, num_classes]'
    )
  logits = logits.astype(jnp.float32)
  teacher_logits = jax.lax.stop_gradient(teacher_logits.astype(jnp.float32))
  label_loss = cross_entropy(logits, labels)
  log_targets = jax.nn.log_softmax(teacher_logits / temperature)
  divergence = optax.losses.kl_divergence_with_log_targets(
    jax.nn.log_softmax(logits[:-1] / temperature),
    log_targets,
    where=log_targets != -jnp.inf,  # In the limit p log p is 0; computed it would be NaN.
  ).mean(axis=-1)
  if class_reduction == 'mean':
    divergence /= logits.shape[-1]
  distilled = alpha * label_loss[:-1] + (1 - alpha) * temperature**2 * divergence
  return distilled.sum() + label_loss[-1]


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
  """Computes the cross-entropy of each exit, averaged over images.

  Args:
    logits: [num_exits, batch, num_classes].
    labels: [batch], class indices; if one is none, the result is NaN.

  Returns:
    [num_exits], in the type of the logits.
  """
  losses = optax.softmax_cross_entropy_with_integer_labels(
    logits, jnp.broadcast_to(labels, logits.shape[:-1])
  )
  # As an index, -1 would be the last class.
  are_classes = (labels >= 0) & (labels < logits.shape[-1])
  return jnp.where(are_classes, losses, jnp.nan).mean(axis=-1)
