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
  """Adds the arguments of `open_classifier`."""
  parser.add_argument('network', help='workdir of a run, or an export')
  parser.add_argument('--phase', type=positive(int), help="of a workdir's; default: the last")
  limits = parser.add_mutually_exclusive_group()
  limits.add_argument('--budget', type=positive(float), help='average multiply-adds an image')
  limits.add_argument(
    '--latency',
    type=positive(float),
    help='average seconds an image, one at a time; the network is timed for it',
  )


def positive(number: type) -> Callable[[str], Any]:
  """A type of argparse arguments: numbers above 0."""

  def parse(text):
    value = number(text)
    if not value > 0:
      raise ValueError
    return value

  parse.__name__ = f'positive {number.__name__}'  # So argparse calls it.
  return parse


def list_of(parse_item: Callable[[str], Any]) -> Callable[[str], list[Any]]:
  """A type of argparse arguments: items separated by commas, as in 1,16,256."""

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
  """Reads a network, as `add_network_arguments` names it.

  Args:
    network: A workdir or an export.
    budget: Average multiply-adds an image.
    latency: Average seconds an image.
    phase: Of a workdir's, counted from 1; the last one by default.

  Raises:
    UsageError: If there is none, or nothing within the budget.
  """
  try:
    if os.path.exists(os.path.join(network, MANIFEST)):
      if phase is not None:
        raise UsageError(f'{network} is an export, of one phase: leave out --phase')
      return AdaptiveClassifier.load(network, budget, latency=latency)
    index = -1 if phase is None else phase - 1
    return AdaptiveClassifier.from_workdir(network, budget, latency=latency, phase=index)
  except ValueError as error:
    raise UsageError(str(error)) from error


def describe(
  probabilities: np.ndarray, exit: int, class_names: Sequence[str], top: int
) -> dict[str, Any]:
  """What is said about an image, ready for JSON.

  Args:
    probabilities: [class].
    exit: Counted from 0.
    class_names: [class].
    top: How many of the most probable classes to name.
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
