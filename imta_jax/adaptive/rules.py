"""Exit rules: how sure a network is of its answer at an exit.

A rule gives each image a score of at most 1; an image leaves at the first exit whose score reaches
the threshold. All take the probabilities p of this exit and q of the exit before, [..., class], and
the temperature T of this exit, NumPy or JAX arrays alike; at the first exit, q is p. The answer is
the class with the highest p, whatever the rule.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

Array = Any  # NumPy or JAX.
Rule = Callable[..., Array]  # (p, q, temperature) → score.


def top_probability(p: Array, q: Array, temperature: float) -> Array:
  """The highest probability, max p_c."""
  del q, temperature
  return p.max(axis=-1)


def margin(p: Array, q: Array, temperature: float) -> Array:
  """The highest probability less the second highest."""
  del q, temperature
  xp = p.__array_namespace__()
  is_first = xp.arange(p.shape[-1]) == p.argmax(axis=-1)[..., None]
  return p.max(axis=-1) - xp.where(is_first, 0, p).max(axis=-1)


def entropy(p: Array, q: Array, temperature: float) -> Array:
  """1 + Σ p_c log p_c / log C: 1 less the entropy as a share of the largest possible one.

  Source: BranchyNet (Teerapittayanon et al., ICPR 2016), where images of low entropy leave.
  """
  del q, temperature
  xp = p.__array_namespace__()
  return 1 + (p * xp.log(xp.where(p == 0, 1, p))).sum(axis=-1) / math.log(p.shape[-1])


def agreement(p: Array, q: Array, temperature: float) -> Array:
  """Σ p_c q_c: the probability that classes drawn at this exit and the one before are the same."""
  del temperature
  return (p * q).sum(axis=-1)


def calibrated(p: Array, q: Array, temperature: float) -> Array:
  """The highest probability after temperature scaling, max p_c^(1/T) / Σ p_c^(1/T).

  Source: On Calibration of Modern Neural Networks (Guo et al., ICML 2017).
  """
  del q
  scaled = p ** (1 / temperature)
  return scaled.max(axis=-1) / scaled.sum(axis=-1)


RULES: dict[str, Rule] = {
  rule.__name__: rule for rule in (top_probability, margin, entropy, agreement, calibrated)
}
DEFAULT_RULE = 'top_probability'


def get_rule(name: str) -> Rule:
  """Returns the rule of a name.

  Raises:
    ValueError: If there is none.
  """
  if name not in RULES:
    raise ValueError(f'rule {name!r} is unknown: choose from {", ".join(RULES)}')
  return RULES[name]


def choose_exits(scores: ArrayLike, thresholds: ArrayLike) -> np.ndarray:
  """The exit, counted from 0, at which each image leaves.

  Args:
    scores: [exit, image], of each image at each exit.
    thresholds: [exit]; an image leaves if its score is at least this.

  Returns:
    [image], integers.

  Raises:
    ValueError: If there is not one threshold for each exit.
  """
  # Compared in the precision of the scores: a threshold is the score of an image, which must leave.
  scores = np.asarray(scores)
  if np.shape(thresholds) != (len(scores),):
    raise ValueError(
      f'thresholds of shape {np.shape(thresholds)} must be [{len(scores)}], one for each exit'
    )
  leaves = scores >= np.asarray(thresholds, scores.dtype)[:, np.newaxis]
  leaves[-1] = True
  return leaves.argmax(axis=0)
