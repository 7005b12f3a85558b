"""Feature partitioning of Deep Feature Surgery (Gong et al., ECCV 2024).

Exits want different things of the features that they share, so their gradients conflict. Where an
exit branches off, a share of the channels takes gradients from this exit alone: later exits read
them through `stop_gradient`. The forward pass does not change.

    logits = exit_head(features)
    features = next_stage(partition(features, 0.5))
"""

import jax
import jax.numpy as jnp


def partition(x: jax.Array, shared_channels: float) -> jax.Array:
  """Returns `x` unchanged; only the first channels receive a gradient.

  The exit that branches off reads `x` itself (feature referencing of the publication's code), so
  it trains all channels.

  Args:
    x: [..., channels], what the next stage reads.
    shared_channels: The share of the channels that later exits train, from 0 to 1; their number is
      rounded.

  Returns:
    `x` itself.

  Raises:
    ValueError: If the share is out of range.
  """
  if not 0 <= shared_channels <= 1:
    raise ValueError(f'shared_channels {shared_channels} is out of range: it must be from 0 to 1')
  shared, own = jnp.split(x, [round(shared_channels * x.shape[-1])], axis=-1)
  return jnp.concatenate([shared, jax.lax.stop_gradient(own)], axis=-1)
