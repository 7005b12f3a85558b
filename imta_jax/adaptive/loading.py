"""Loads a trained network for inference, wherever it is."""

import os
from typing import Unpack

from etils import epath

from imta_jax.adaptive.engine import MANIFEST, AdaptiveClassifier, Limits
from imta_jax.errors import UsageError

_OF_WORKDIR = ('phase', 'rule', 'sweep')


class Choices(Limits, total=False):
  """See `AdaptiveClassifier.from_workdir`."""

  phase: int
  rule: str
  sweep: str


def load(
  path: str | os.PathLike[str], budget: float | None = None, **choices: Unpack[Choices]
) -> AdaptiveClassifier:
  """Loads a network that a run has trained and evaluated, or an export.

  Its thresholds are the cheapest ones that are as accurate as the last exit on validation images,
  unless a limit chooses others.

  Args:
    path: The workdir of a run, or a folder that `AdaptiveClassifier.save` wrote.
    budget: Average multiply-adds per image; see `AdaptiveClassifier.choose`.
    **choices: `latency`, `max_loss` and `confidence`, see `AdaptiveClassifier.choose`; for a
      workdir also `phase`, `rule` and `sweep`, see `AdaptiveClassifier.from_workdir`.

  Returns:
    A classifier of uint8 images.

  Raises:
    ValueError: If there is no such network, a file is corrupt, or no thresholds are within the
      budget.

  Example:
    >>> import imta_jax
    >>> classifier = imta_jax.load('experiments/results/cifar100/export', budget=20e6)
    >>> classifier.image.shape, classifier.num_classes
    ((32, 32, 3), 100)
  """
  if os.path.exists(os.path.join(path, MANIFEST)):
    if of_workdir := [name for name in _OF_WORKDIR if name in choices]:
      raise UsageError(
        f'{path} is an export, which has one phase, rule and sweep: leave out '
        + ', '.join(of_workdir)
      )
    return AdaptiveClassifier.load(path, budget, **choices)  # type: ignore[misc]  # Limits alone.
  if '://' in os.fspath(path) and (epath.Path(path) / MANIFEST).exists():
    raise UsageError(f'{path} is an export in a bucket: copy it to a local folder first')
  return AdaptiveClassifier.from_workdir(path, budget, **choices)
