"""What several command lines share: types of arguments, the network to run, errors in one line."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from imta_jax.adaptive.engine import MANIFEST, AdaptiveClassifier
from imta_jax.errors import UsageError


def run(main: Callable[[], int | None]) -> None:
  """Runs a program and exits with its status; bad input exits with one line and status 2."""
  try:
    sys.exit(main())
  except UsageError as error:
    print(f'error: {error}', file=sys.stderr)
    sys.exit(2)


def add_network_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the arguments that `open_classifier` takes."""
  parser.add_argument('network', help='workdir of a run, or an exported folder')
  parser.add_argument(
    '--phase', type=positive(int), help='training phase to load, counted from 1; default: the last'
  )
  limits = parser.add_mutually_exclusive_group()
  limits.add_argument('--budget', type=positive(float), help='average multiply-adds per image')
  limits.add_argument(
    '--latency',
    type=positive(float),
    help='average seconds per image, one image at a time; each exit is timed first',
  )


def positive(number: type) -> Callable[[str], Any]:
  """An argparse type: numbers above 0."""

  def parse(text):
    value = number(text)
    if not value > 0:
      raise ValueError
    return value

  parse.__name__ = f'positive {number.__name__}'  # For argparse's messages.
  return parse


def list_of(parse_item: Callable[[str], Any]) -> Callable[[str], list[Any]]:
  """An argparse type: items separated by commas, as in 1,16,256."""

  def parse(text):
    return [parse_item(item) for item in text.split(',')]

  parse.__name__ = f'list of {parse_item.__name__}'
  return parse


def open_classifier(
  network: str,
  budget: float | None = None,
  latency: float | None = None,
  phase: int | None = None,
) -> AdaptiveClassifier:
  """Opens the network that `add_network_arguments` describes.

  Args:
    network: A workdir or an exported folder.
    budget: Average multiply-adds per image.
    latency: Average seconds per image.
    phase: The training phase of a workdir, counted from 1; the last one by default.

  Raises:
    UsageError: If there is none, or no thresholds are within the budget.
  """
  try:
    if os.path.exists(os.path.join(network, MANIFEST)):
      if phase is not None:
        raise UsageError(f'{network} is an export and has a single phase: leave out --phase')
      return AdaptiveClassifier.load(network, budget, latency=latency)
    index = -1 if phase is None else phase - 1
    return AdaptiveClassifier.from_workdir(network, budget, latency=latency, phase=index)
  except ValueError as error:
    raise UsageError(str(error)) from error


def describe(
  probabilities: np.ndarray, exit: int, class_names: Sequence[str], top: int
) -> dict[str, Any]:
  """Describes the answer for an image, ready for JSON.

  Args:
    probabilities: [class].
    exit: Counted from 0.
    class_names: [class].
    top: Number of classes to name, the most probable first.
  """
  best = [
    {
      'label': int(label),
      'class': class_names[label],
      # JSON has no NaN.
      'probability': round(float(p), 6) if np.isfinite(p := probabilities[label]) else None,
    }
    for label in np.argsort(-probabilities, kind='stable')[:top]
  ]
  first = best[0]
  return {
    'label': first['label'],
    'class': first['class'],
    'confidence': first['probability'],
    'exit': int(exit) + 1,
    'top': best,
  }
