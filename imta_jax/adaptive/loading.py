"""Loads a trained network for inference, wherever it is."""

import os
from typing import Any

from etils import epath

from imta_jax.adaptive.engine import MANIFEST, AdaptiveClassifier
from imta_jax.errors import UsageError


def load(
  path: str | os.PathLike[str],
  budget: float | None = None,
  *,
  latency: float | None = None,
  max_loss: float | None = None,
  confidence: float = 0.95,
  phase: int | None = None,
  rule: str | None = None,
  sweep: str | None = None,
  runtime: str | None = None,
) -> AdaptiveClassifier:
  """Loads a network that a run has trained and evaluated, or an export.

  Its thresholds are the cheapest ones that are as accurate as the last exit on validation images,
  unless a limit chooses others.

  Args:
    path: The workdir of a run, or a folder that `AdaptiveClassifier.save` wrote.
    budget: Average multiply-adds per image.
    latency: Average seconds per image, instead of a budget; see `AdaptiveClassifier.choose`.
    max_loss: By how much the accuracy may lie below that of the last exit, instead of a budget.
    confidence: Probability that `max_loss` is kept.
    phase: Index of the training phase of a workdir, counted from 0; the last one by default.
    rule: Name of the exit rule, for a workdir; see `AdaptiveClassifier.from_workdir`.
    sweep: Where thresholds come from, for a workdir: 'geometric' or 'optimal'; likewise.
    runtime: What runs the network: 'xla', or on CPUs 'openvino' or 'onnxruntime', which start
      sooner and are often faster. By default it is XLA until `AdaptiveClassifier.compile` compares
      those that are installed.

  Returns:
    A classifier of images like its attribute `image`: uint8, unless an export was saved otherwise.

  Raises:
    ValueError: If there is no such network, a file is corrupt, no thresholds are within the
      budget, or the runtime cannot run the network here.

  Example:
    >>> import imta_jax
    >>> classifier = imta_jax.load('experiments/results/cifar100/export', budget=20e6)
    >>> classifier.image.shape, classifier.num_classes
    ((32, 32, 3), 100)
  """
  limits: dict[str, Any] = {'latency': latency, 'max_loss': max_loss, 'confidence': confidence}
  limits['runtime'] = runtime
  of_workdir: dict[str, Any] = {'phase': phase, 'rule': rule, 'sweep': sweep}
  given = {name: value for name, value in of_workdir.items() if value is not None}
  if os.path.exists(os.path.join(path, MANIFEST)):
    if given:
      raise UsageError(
        f'{path} is an export, which has one phase, rule and sweep: leave out {", ".join(given)}'
      )
    return AdaptiveClassifier.load(path, budget, **limits)
  if '://' in os.fspath(path) and (epath.Path(path) / MANIFEST).exists():
    raise UsageError(f'{path} is an export in a bucket: copy it to a local folder first')
  return AdaptiveClassifier.from_workdir(path, budget, **given, **limits)
