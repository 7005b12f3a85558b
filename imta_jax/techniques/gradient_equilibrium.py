"""Gradient Equilibrium (GE), Section 3.1 of the paper.

The gradient that a stage receives is a sum over all later exits, so it grows towards the input. GE
rescales it where an exit branches off; the forward pass does not change.

    exit_factor, onward_factor = equilibrium_factors(exit, num_exits)
    logits = exit_head(scale_gradient(features, exit_factor))
    features = next_stage(scale_gradient(features, onward_factor))
"""

from functools import partial

import jax


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def scale_gradient(x: jax.Array, factor: float) -> jax.Array:
  """Returns `x` unchanged; its gradient is multiplied by `factor` (Eq. 4).

  Args:
    x: An array of any shape.
    factor: Factor of the gradient, a Python number.

  Returns:
    `x` itself.

  Example:
    >>> import imta_jax
    >>> import jax
    >>> jax.grad(lambda x: imta_jax.scale_gradient(x, 0.5) ** 2)(3.0).item()  # Not 6.
    3.0
  """
  del factor
  return x


def _forward(x, factor):
  del factor
  return x, None


def _backward(factor, _, gradient):
  return (gradient * factor,)


scale_gradient.defvjp(_forward, _backward)


def equilibrium_factors(exit: int, num_exits: int) -> tuple[float, float]:
  """Returns the two gradient factors where an exit branches off (the text before Eq. 5).

  The factors along the path from any exit j >= i to the features of stage i multiply to 1/(k-i+1)
  (Eq. 5); the variance of the summed gradients is therefore bounded (Eq. 6).

  Args:
    exit: The index i of the exit, from 1 to `num_exits`.
    num_exits: The number k of exits.

  Returns:
    (1/(k-i+1), (k-i)/(k-i+1)): the factors of the exit's input and of the next stage's input.

  Raises:
    ValueError: If there is no such exit.

  Example:
    >>> import imta_jax
    >>> imta_jax.equilibrium_factors(1, num_exits=5)
    (0.2, 0.8)
    >>> imta_jax.equilibrium_factors(5, num_exits=5)
    (1.0, 0.0)
  """
  if not 1 <= exit <= num_exits:
    raise ValueError(f'exit {exit} does not exist: exits are numbered from 1 to {num_exits}')
  exits_left = num_exits - exit + 1
  return 1 / exits_left, (exits_left - 1) / exits_left
