"""Checks and times the server's answers to many clients at once.

    python experiments/load_test.py runs/mnist5k digits

Starts servers on this machine and compares their answers with those that the network gives without
a server. Needs the extra `serve`. Prints one row for each of

- three budgets: the cheapest, a medium one and the most expensive;
- requests that alternate between the three budgets ('mixed');
- the same with fewer pending images allowed (`--max_queue`) than there are clients, which repeat
  refused requests until they are answered;
- the most expensive budget with the cheapest one as `--overload_budget` ('overload'), which the
  server falls back on, since so many requests are pending.
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
from imta_jax.data.image_files import find_images, read_image
from imta_jax.errors import UsageError
from imta_jax.runtime import set_up_compilation_cache

_SECONDS_TO_START, _SECONDS_TO_STOP = 300, 60
_SECONDS_BEFORE_RETRY = 0.05
_COLUMNS = '{:>14} {:>9} {:>8} {:>5} {:>7} {:>6} {:>8} {:>7} {:>7} {:>9}'
_HEADINGS = (
  *('multiply-adds', 'max_queue', 'answered', 'wrong', 'refused', 'failed'),
  *('images/s', 'p50 ms', 'p99 ms', 'mean exit'),
)


def main(arguments: Sequence[str] | None = None) -> None:
  """Runs the command line.

  Raises:
    UsageError: If there is no such network or no image, or a server does not start.
  """
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('network', help='workdir of a run, or an exported folder')
  parser.add_argument(
    'images', nargs='+', help='image files, and folders to search for image files'
  )
  parser.add_argument(
    '--clients', type=positive(int), default=32, help='number of concurrent clients; default: 32'
  )
  parser.add_argument(
    '--requests',
    type=positive(int),
    default=2000,
    help='maximum number of requests per row; default: 2000',
  )
  parser.add_argument(
    '--seconds', type=positive(float), default=20.0, help='maximum seconds per row; default: 20'
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
  queries = {f'?budget={budget!r}': [expected[budget]] for budget in budgets}
  large_queue, small_queue = 2 * options.clients, max(1, options.clients // 4)
  overload_queue = options.clients + small_queue
  cheapest, *_, most_expensive = budgets
  fall_back = (f'--budget={most_expensive!r}', f'--overload_budget={cheapest!r}')
  single = [
    (f'{budget:,.0f}', {query: answers})
    for budget, (query, answers) in zip(budgets, queries.items(), strict=True)
  ]
  mixed = ('mixed', queries)
  overload = ('overload', {'': [expected[most_expensive], expected[cheapest]]})
  for max_queue, server_options, loads in (
    (large_queue, (), [*single, mixed]),
    (small_queue, (), [mixed]),
    (overload_queue, fall_back, [overload]),
  ):
    with serving(options.network, f'--max_queue={max_queue}', *server_options) as port:
      for name, answers in loads:
        load = Load(port, contents, answers, options.seconds)
        cells = load.put(options.clients, options.requests)
        print(_COLUMNS.format(name, max_queue, *cells), flush=True)


def budgets_of(classifier: AdaptiveClassifier) -> list[float]:
  """Returns average multiply-adds of the cheapest, a medium and the costliest operating point."""
  averages = sorted(
    float(np.dot(p.exit_fractions, classifier.madds)) for p in classifier.operating_points
  )
  return [averages[index] for index in (0, len(averages) // 2, -1)]


@contextlib.contextmanager
def serving(network: str, *options: str) -> Iterator[int]:
  """Runs a server in its own process and stops it at the end.

  Args:
    network: A workdir or an exported folder.
    *options: Flags of the server.

  Yields:
    The port that the server listens on.

  Raises:
    UsageError: If the server does not start.
  """
  with socket.create_server(('127.0.0.1', 0)) as free:
    port = free.getsockname()[1]
  command = [sys.executable, '-m', 'imta_jax.serve', network, f'--port={port}', *options]
  process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
  try:
    deadline = time.monotonic() + _SECONDS_TO_START
    while not _listens(port):
      if process.poll() is not None or time.monotonic() > deadline:
        raise UsageError(f'the server does not start: {" ".join(command)}')
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
  """The outcome of a request.

  Attributes:
    kind: 'right', 'wrong', 'refused' (status 503) or 'failed' (another status, or no answer).
    seconds: Time from request to answer.
    exit: The exit that the image took, counted from 1; 0 if there was no answer.
  """

  kind: str
  seconds: float
  exit: int = 0


@dataclasses.dataclass(frozen=True)
class Load:
  """Requests from many clients at once.

  Attributes:
    port: The port of the server.
    contents: The encoded images.
    expected: For each query string, one or more answers that count as right.
    seconds: Time after which no more requests are sent.
  """

  port: int
  contents: list[bytes]
  expected: dict[str, list[Answers]]
  seconds: float

  def put(self, clients: int, requests: int) -> list[str]:
    """Sends requests until their number or the time is reached.

    Args:
      clients: Number of concurrent clients.
      requests: Maximum number of requests, without repetitions.

    Returns:
      The cells of a row, without the first two of _HEADINGS.
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
    """Sends the requests of one client and returns their outcomes."""
    queries, outcomes = list(self.expected), []
    connection = http.client.HTTPConnection('127.0.0.1', self.port, timeout=self.seconds + 10)
    with contextlib.closing(connection):
      for number in numbers:
        # Given enough requests, each image is sent with each query.
        query = queries[(number + number // len(self.contents)) % len(queries)]
        while time.monotonic() < deadline:
          outcomes.append(self._send(connection, number % len(self.contents), query))
          if outcomes[-1].kind != 'refused':
            break
          time.sleep(_SECONDS_BEFORE_RETRY)
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
