"""What several command lines share: types of arguments, the network to run, errors in one line."""

import argparse
import atexit
import errno
import os
import shutil
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath

from imta_jax.adaptive.engine import DEFAULT_RULE, RULES, AdaptiveClassifier
from imta_jax.adaptive.loading import load
from imta_jax.errors import UsageError, first_line

# That of a program that SIGPIPE ends.
_SIGPIPE_STATUS = 141


def run(main: Callable[[], int | None], usage_status: int = 2) -> None:
  """Runs a program and exits with its status; errors that a user can fix are one line.

  Args:
    main: The program; returns its status, or exits with it.
    usage_status: The status after such an error.
  """
  for name in ('stdout', 'stderr'):
    if getattr(sys, name) is None:  # Closed, as by >&-.
      setattr(sys, name, open(os.devnull, 'w'))  # noqa: SIM115
    getattr(sys, name).reconfigure(errors='backslashreplace')
  if os.path.expanduser('~') == '~':
    os.environ['HOME'] = home = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, home, ignore_errors=True)
    print('HOME is not set: caches and downloaded data sets are not kept', file=sys.stderr)
  warnings.filterwarnings('ignore', module='PIL')  # They do not name the file; errors do.
  warnings.formatwarning = lambda message, *_, **__: f'warning: {message}\n'
  jax.config.update('jax_enable_x64', False)  # It would change random draws, and types of sums.
  try:
    try:
      status = main()
    finally:
      sys.stdout.flush()
    sys.exit(status)
  except KeyboardInterrupt:
    sys.exit(128 + signal.SIGINT)
  except BrokenPipeError:
    _discard_output()
    sys.exit(_SIGPIPE_STATUS)
  except Exception as error:
    message = _explanation(error)
    if message is None:
      raise
    if isinstance(error, OSError):
      _discard_output()
    print(f'error: {printable(message)}', file=sys.stderr)
    sys.exit(usage_status)


def _explanation(error: Exception) -> str | None:
  """The line for a user who can fix an error; None for bugs."""
  if isinstance(error, UsageError):
    return str(error)
  if isinstance(error, OSError):
    is_full = error.errno in (errno.ENOSPC, errno.EDQUOT) and error.filename is None
    return f'the output cannot be written ({error.strerror}): make room' if is_full else None
  if isinstance(error, KeyError) and str(error).endswith("://'"):  # From epath.Path.
    return f'{error.args[0]} is an unknown scheme: give a folder, or a path in a bucket with gs://'
  if isinstance(error, AssertionError | RuntimeError):
    try:
      jax.local_devices()
    except Exception as reason:
      return (
        f'JAX finds no device for JAX_PLATFORMS={os.environ.get("JAX_PLATFORMS")} '
        f'({first_line(reason)}): unset it, or install JAX and drivers for that device'
      )
  return None


def _discard_output() -> None:
  """Keeps Python from flushing standard output again when it ends, which would fail again."""
  os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def printable(text: str) -> str:
  """Escapes line breaks, control characters and bytes of file names that are no text."""
  return ''.join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


# The arguments that `open_classifier` takes besides the network.
_CHOICES = ('phase', 'rule', 'sweep', 'budget', 'latency', 'max_loss', 'confidence', 'runtime')


def add_network_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the arguments of a program that runs a network; `choices` gathers them."""
  parser.add_argument('network', help='workdir of a run, or an exported folder')
  parser.add_argument(
    '--phase', type=positive(int), help='training phase to load, counted from 1; default: the last'
  )
  parser.add_argument(
    '--rule', choices=tuple(RULES), help=f'exit rule, for a workdir; default: {DEFAULT_RULE}'
  )
  parser.add_argument(
    '--sweep',
    choices=('geometric', 'optimal'),
    help="thresholds to choose from, for a workdir: the paper's, or the most accurate ones on "
    'validation images; default: geometric',
  )
  limits = parser.add_mutually_exclusive_group()
  limits.add_argument(
    '--budget',
    type=float,
    help='average multiply-adds per image; default: the cheapest thresholds that are as accurate '
    'as the last exit on validation images',
  )
  limits.add_argument(
    '--latency',
    type=float,
    help='average seconds per image, one image at a time; each exit is timed first',
  )
  limits.add_argument(
    '--max_loss',
    type=float,
    help='by how much the accuracy may lie below that of the last exit, for example 0.01, on '
    'images like the validation images; see docs/thresholds.md',
  )
  parser.add_argument(
    '--confidence',
    type=float,
    default=0.95,
    help='the probability with which --max_loss is kept; default: %(default)s',
  )
  parser.add_argument(
    '--runtime',
    help="what runs the network: 'xla', or on CPUs 'openvino' or 'onnxruntime', which start sooner "
    'and are often faster; default: xla, or for a server the fastest that is installed',
  )


def choices(options: argparse.Namespace) -> dict[str, Any]:
  """Returns the parsed arguments that `open_classifier` takes besides the network."""
  return {name: getattr(options, name) for name in _CHOICES}


def positive(number: type) -> Callable[[str], Any]:
  """An argparse type: finite numbers above 0."""

  def parse(text):
    value = number(text)
    if not 0 < value < float('inf'):
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


def output_folder(text: str) -> epath.Path:
  """An argparse type: a folder to write, which need not exist."""
  local = Path(text)  # In buckets there are no folders, and so none that is a file.
  if any(path.exists() and not path.is_dir() for path in (local, *local.parents)):
    raise argparse.ArgumentTypeError(f'{text} is a file, or in one: name a folder')
  return epath.Path(text)


def output_file(text: str) -> str:
  """An argparse type: a file to write, in a folder that exists."""
  if os.path.isdir(text) or not os.path.isdir(os.path.dirname(text) or '.'):
    raise argparse.ArgumentTypeError(f'{text} is not a file in a folder that exists')
  return text


def open_classifier(network: str, **choices: Any) -> AdaptiveClassifier:
  """Opens a network for inference.

  Args:
    network: A workdir or an exported folder.
    **choices: Those of `load`, but phases are counted from 1. None stands for the default.

  Raises:
    UsageError: If there is no such network, it does not classify image files, or no thresholds are
      within the budget.
  """
  given = {name: value for name, value in choices.items() if value is not None}
  if 'phase' in given:
    given['phase'] -= 1
  try:
    classifier = load(network, **given)
  except ValueError as error:
    raise UsageError(str(error)) from error
  image = classifier.image
  if image.dtype != np.uint8 or image.shape[-1] not in (1, 3):
    raise UsageError(
      f'{network} classifies arrays of {image.dtype} with shape {image.shape}, not image files: '
      'use imta_jax.load'
    )
  return classifier


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
