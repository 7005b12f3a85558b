"""Many clients at once: is every answer the image's own, how fast, and what if there are too many?

    python experiments/load_test.py runs/mnist5k digits/

Starts servers on this machine and compares what they answer with what the network says of each
image without a server. Needs the extra `serve`. Three lines are of budgets, the fourth of all three
in turn. Then come a server that may let fewer images wait than there are clients, where who is
refused comes again until answered, and one with the dearest budget and the cheapest as its
`--overload_budget`, which so many clients make it fall back on.
"""

import argparse
import collections
import contextlib
import dataclasses
import http.client
import itertools
import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from imta_jax import command_line
from imta_jax.adaptive.engine import AdaptiveClassifier, Answers
from imta_jax.command_line import open_classifier, positive
from imta_jax.compilation_cache import set_up_compilation_cache
from imta_jax.data.image_files import find_images, read_image
from imta_jax.errors import UsageError

_SECONDS_TO_START, _SECONDS_TO_STOP = 300, 60
_SECONDS_TO_COME_AGAIN = 0.05
_COLUMNS = '{:>14} {:>9} {:>8} {:>5} {:>7} {:>6} {:>8} {:>7} {:>7} {:>9}'
_HEADINGS = (
  *('multiply-adds', 'max_queue', 'answered', 'wrong', 'refused', 'failed'),
  *('images/s', 'p50 ms', 'p99 ms', 'mean exit'),
)


def main(arguments: Sequence[str] | None = None) -> None:
  """Runs the command line.

  Raises:
    UsageError: If there is no such network or no image.
  """
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('network', help='workdir of a run, or an exported folder')
  parser.add_argument(
    'images', nargs='+', help='image files, and folders to search for image files'
  )
  parser.add_argument(
    '--clients', type=positive(int), default=32, help='requests at once; default: 32'
  )
  parser.add_argument(
    '--requests', type=positive(int), default=2000, help='requests a line, at most; default: 2000'
  )
  parser.add_argument(
    '--seconds', type=positive(float), default=20.0, help='seconds a line, at most; default: 20'
  )
  options = parser.parse_args(arguments)
  set_up_compilation_cache()
  classifier = open_classifier(options.network)
  paths = list(itertools.islice(find_images(options.images), options.requests))
  if not paths:
    raise UsageError(f'no image in {", ".join(options.images)}')
  crop = classifier.preprocessing['crop']
  images = np.stack([read_image(path, classifier.image.shape, crop) for path in paths])
  contents = [Path(path).read_bytes() for path in paths]

  budgets = budgets_of(classifier)
  expected = {
    budget: classifier.predict(images, classifier.thresholds_within(budget, classifier.madds))
    for budget in budgets
  }
  print(f'{options.clients} clients, {len(images)} images')
  print(_COLUMNS.format(*_HEADINGS))
  each = {f'?budget={budget!r}': [expected[budget]] for budget in budgets}
  roomy, narrow = 2 * options.clients, max(1, options.clients // 4)
  crowded = options.clients + narrow
  cheapest, *_, dearest = budgets
  fall_back = (f'--budget={dearest!r}', f'--overload_budget={cheapest!r}')
  lines = [
    (f'{budget:,.0f}', {query: each[query]}) for budget, query in zip(budgets, each, strict=True)
  ]
  for max_queue, server_options, loads in (
    (roomy, (), [*lines, ('mixed', each)]),
    (narrow, (), [('mixed', each)]),
    (crowded, fall_back, [('overload', {'': [expected[dearest], expected[cheapest]]})]),
  ):
    with serving(options.network, f'--max_queue={max_queue}', *server_options) as port:
      for name, queries in loads:
        load = Load(port, contents, queries, options.seconds)
        cells = load.put(options.clients, options.requests)
        print(_COLUMNS.format(name, max_queue, *cells), flush=True)


def budgets_of(classifier: AdaptiveClassifier) -> list[float]:
  """The averages of multiply-adds of a cheap, a middle and a dear point."""
  averages = sorted(
    float(np.dot(p.exit_fractions, classifier.madds)) for p in classifier.operating_points
  )
  return [averages[index] for index in (0, len(averages) // 2, -1)]


@contextlib.contextmanager
def serving(network: str, *options: str) -> Iterator[int]:
  """A server in a process of its own, at the port that is given; it is told to stop at the end."""
  with socket.create_server(('127.0.0.1', 0)) as free:
    port = free.getsockname()[1]
  command = [sys.executable, '-m', 'imta_jax.serve', network, f'--port={port}', *options]
  process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
  try:
    deadline = time.monotonic() + _SECONDS_TO_START
    while not _listens(port):
      if process.poll() is not None or time.monotonic() > deadline:
        raise UsageError(f'{" ".join(command)} does not start')
      time.sleep(0.2)
    yield port
  finally:
    process.terminate()
    try:
      process.wait(_SECONDS_TO_STOP)
    except subprocess.TimeoutExpired:
      process.kill()


def _listens(port):
  with contextlib.suppress(ConnectionRefusedError), socket.create_connection(('127.0.0.1', port)):
    return True
  return False


@dataclasses.dataclass(frozen=True)
class Outcome:
  """What became of a request.

  Attributes:
    kind: 'right', 'wrong', 'refused' (status 503) or 'failed' (another status, or no answer).
    seconds: From request to answer.
    exit: That the image took, counted from 1; 0 if it was not answered.
  """

  kind: str
  seconds: float
  exit: int = 0


@dataclasses.dataclass(frozen=True)
class Load:
  """Requests, of many clients at once.

  Attributes:
    port: The server's.
    contents: Encoded images.
    expected: {query: answers for the images, any of which are right}.
    seconds: After these no more requests are sent.
  """

  port: int
  contents: list[bytes]
  expected: dict[str, list[Answers]]
  seconds: float

  def put(self, clients: int, requests: int) -> list[str]:
    """Sends requests until there are enough or the time is over.

    Returns:
      A table's cells, those after the first two of _HEADINGS.
    """
    start = time.monotonic()
    numbers = iter(range(requests))
    with ThreadPoolExecutor(clients) as pool:
      workers = [pool.submit(self._work, numbers, start + self.seconds) for _ in range(clients)]
      outcomes = [outcome for worker in workers for outcome in worker.result()]
    elapsed = time.monotonic() - start
    counts = collections.Counter(outcome.kind for outcome in outcomes)
    answered = [outcome for outcome in outcomes if outcome.exit]
    milliseconds = [1000 * outcome.seconds for outcome in answered] or [np.nan]
    return [
      *(f'{n:,}' for n in (len(answered), counts['wrong'], counts['refused'], counts['failed'])),
      f'{len(answered) / elapsed:,.0f}',
      *(f'{x:.1f}' for x in np.percentile(milliseconds, (50, 99))),
      f'{np.mean([outcome.exit for outcome in answered] or [np.nan]):.2f}',
    ]

  def _work(self, numbers, deadline):
    """One client's outcomes."""
    queries, outcomes = list(self.expected), []
    connection = http.client.HTTPConnection('127.0.0.1', self.port, timeout=self.seconds + 10)
    with contextlib.closing(connection):
      for number in numbers:
        # Each image meets each query, should there be time.
        query = queries[(number + number // len(self.contents)) % len(queries)]
        while time.monotonic() < deadline:
          outcomes.append(self._send(connection, number % len(self.contents), query))
          if outcomes[-1].kind != 'refused':
            break
          time.sleep(_SECONDS_TO_COME_AGAIN)
    return outcomes

  def _send(self, connection, index, query):
    start = time.monotonic()
    try:
      connection.request(
        'POST',
        f'/predict{query}',
        self.contents[index],
        {'Content-Type': 'application/octet-stream'},
      )
      response = connection.getresponse()
      answer = json.loads(response.read())
    except (OSError, ValueError, http.client.HTTPException):
      connection.close()
      return Outcome('failed', time.monotonic() - start)
    seconds = time.monotonic() - start
    if response.status != 200:
      return Outcome('refused' if response.status == 503 else 'failed', seconds)
    is_right = any(
      answer['label'] == expected.labels[index]
      and answer['exit'] == expected.exits[index] + 1
      and abs(answer['confidence'] - expected.confidences[index]) < 1e-4
      for expected in self.expected[query]
    )
    return Outcome('right' if is_right else 'wrong', seconds, answer['exit'])


if __name__ == '__main__':
  command_line.run(main)
