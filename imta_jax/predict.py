"""Classifies image files.

    python -m imta_jax.predict runs/mnist5k digits
    python -m imta_jax.predict runs/mnist5k digits --budget=2e6 --format=jsonl > answers.jsonl

Answers go to standard output in the order of the files: for each file its exit, counted from 1, and
its most probable classes. Everything else goes to standard error. The exit status is 0 if all files
were classified, 1 if some could not be read, and 2 if the command is wrong.
"""

import argparse
import collections
import functools
import itertools
import json
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from imta_jax import command_line
from imta_jax.adaptive.engine import AdaptiveClassifier
from imta_jax.command_line import (
  add_network_arguments,
  choices,
  describe,
  open_classifier,
  positive,
  printable,
)
from imta_jax.data.image_files import EXTENSIONS, ImageError, find_images, read_image
from imta_jax.errors import UsageError
from imta_jax.runtime import set_up_compilation_cache


def main(arguments: Sequence[str] | None = None) -> int:
  """Runs the command line.

  Returns:
    The exit status.

  Raises:
    UsageError: If there is no such network or no image, or no thresholds are within the budget.
  """
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add_network_arguments(parser)
  parser.add_argument(
    'images', nargs='+', help='image files, and folders to search for image files'
  )
  parser.add_argument(
    '--top', type=positive(int), default=5, help='number of classes to show; default: 5'
  )
  parser.add_argument(
    '--format', choices=('table', 'jsonl'), default='table', help='jsonl: one JSON object per line'
  )
  parser.add_argument(
    '--batch_size', type=positive(int), default=256, help='images per batch; default: 256'
  )
  options = parser.parse_args(arguments)
  set_up_compilation_cache()
  classifier = open_classifier(options.network, **choices(options))
  write = _write_json if options.format == 'jsonl' else _Table(classifier.class_names, options.top)

  exits: collections.Counter[int] = collections.Counter()
  num_unreadable = 0
  start = time.perf_counter()
  for path, outcome in classify_files(classifier, find_images(options.images), options.batch_size):
    if isinstance(outcome, ImageError):
      num_unreadable += 1
      print(printable(f'error: {path}: {outcome}'), file=sys.stderr)
    else:
      answer = describe(*outcome, classifier.class_names, options.top)
      exits[answer['exit']] += 1
      write(path, answer)
  if not exits and not num_unreadable:
    raise UsageError(f'no image in {", ".join(options.images)}: expected {" ".join(EXTENSIONS)}')
  _summarize(exits, num_unreadable, time.perf_counter() - start)
  return 1 if num_unreadable else 0


def classify_files(
  classifier: AdaptiveClassifier, paths: Iterable[str], batch_size: int
) -> Iterator[tuple[str, tuple[np.ndarray, int] | ImageError]]:
  """Classifies files; some batches are read ahead.

  Args:
    classifier: A classifier of uint8 images.
    paths: Files.
    batch_size: Images per batch.

  Yields:
    For each file in order its path and (probabilities [class], exit counted from 0), or the error
    that kept it from being read.
  """
  options = {
    'shape': classifier.image.shape,
    'crop': classifier.preprocessing.get('crop', 'none'),
  }

  def read(path):
    try:
      return read_image(path, **options)
    except ImageError as error:
      return error

  for batch in _read_ahead(read, paths, batch_size):
    images = [outcome for _, outcome in batch if not isinstance(outcome, ImageError)]
    if images:
      answers = classifier.predict(np.stack(images))
      answered = zip(answers.probabilities, answers.exits, strict=True)
    for path, outcome in batch:
      yield path, outcome if isinstance(outcome, ImageError) else next(answered)


def _read_ahead(read, paths, batch_size):
  """Lists of (path, read(path)); the next one is read in threads meanwhile."""
  paths = iter(paths)
  with ThreadPoolExecutor() as pool:

    def start():
      batch = list(itertools.islice(paths, batch_size))
      return batch, pool.map(read, batch)

    batch, outcomes = start()
    while batch:
      following = start()
      yield list(zip(batch, outcomes, strict=True))
      batch, outcomes = following


def _write_json(path, answer):
  print(json.dumps({'file': path, **answer}))


class _Table:
  """Writes a line per image; columns are as wide as the longest class name."""

  def __init__(self, class_names: Sequence[str], top: int):
    self._width = max(len(printable(name)) for name in class_names)
    columns = ('class', *['next'] * (min(top, len(class_names)) - 1))
    cells = [column.ljust(self._width + 8) for column in columns]
    print('  '.join(('exit', *cells, 'file')))

  def __call__(self, path, answer):
    cells = map(self._cell, answer['top'])
    print('  '.join((f'{answer["exit"]:4}', *cells, printable(path))))

  def _cell(self, candidate):
    probability = candidate['probability']
    percent = 'nan' if probability is None else f'{probability:.2%}'
    return f'{printable(candidate["class"]):{self._width}} {percent:>7}'


def _summarize(exits, num_unreadable, seconds):
  num_images = exits.total()
  shares = ', '.join(f'{exit}: {exits[exit] / num_images:.1%}' for exit in sorted(exits))
  print(
    f'{num_images:,} images in {seconds:.1f} s ({num_images / seconds:,.0f} images/s)'
    + (f'; left at exit {shares}' if shares else '')
    + (f'; {num_unreadable:,} could not be read' if num_unreadable else ''),
    file=sys.stderr,
  )


run = functools.partial(command_line.run, main)

if __name__ == '__main__':
  run()
