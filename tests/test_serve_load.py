"""A server under the load of many clients: each request gets its own answer."""

import collections
import contextlib
import io
import itertools
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from imta_jax.adaptive.engine import AdaptiveClassifier

httpx = pytest.importorskip('httpx')
pytest.importorskip('uvicorn')

EXPORT = Path(__file__).parents[1] / 'experiments/results/mnist5k/export'
NUM_CLIENTS, NUM_REQUESTS = 32, 400


@contextlib.contextmanager
def serving(*flags):
  """Runs the server in a process of its own; yields its address."""
  with socket.create_server(('127.0.0.1', 0)) as free:
    port = free.getsockname()[1]
  command = [sys.executable, '-m', 'imta_jax.serve', EXPORT, f'--port={port}', *flags]
  process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
  try:
    for _ in range(600):
      with contextlib.suppress(httpx.TransportError):
        httpx.get(f'http://127.0.0.1:{port}/health').raise_for_status()
        break
      assert process.poll() is None
      time.sleep(0.5)
    yield f'http://127.0.0.1:{port}'
  finally:
    process.terminate()
    process.wait(60)


@pytest.fixture(scope='module')
def network():
  """Noise as PNG files, and the budget and answers of three operating points."""
  classifier = AdaptiveClassifier.load(EXPORT)
  images = np.random.default_rng(0).integers(0, 256, (50, *classifier.image.shape), np.uint8)
  files = []
  for image in images:
    file = io.BytesIO()
    Image.fromarray(image[..., 0]).save(file, 'png')
    files.append(file.getvalue())
  averages = sorted(np.dot(p.exit_fractions, classifier.madds) for p in classifier.operating_points)
  answers = {
    float(budget): classifier.predict(
      images, classifier.thresholds_within(budget, classifier.madds)
    )
    for budget in (averages[0], averages[len(averages) // 2], averages[-1])
  }
  return files, answers


def is_right(result, answers, index):
  return (
    result['label'] == answers.labels[index]
    and result['exit'] == answers.exits[index] + 1
    and abs(result['confidence'] - answers.confidences[index]) < 1e-4
  )


def send_all(url, files, queries):
  """Sends requests from many clients; refused ones are repeated.

  Args:
    url: Address of the server.
    files: Images.
    queries: Query → the answers that count as right.

  Returns:
    The numbers of 'right', 'wrong', 'refused' (503) and 'failed' answers.
  """
  numbers = iter(range(NUM_REQUESTS))

  def work(_):
    counts = collections.Counter()
    with httpx.Client(timeout=60, headers={'Content-Type': 'image/png'}) as client:
      for number in numbers:
        # Each image is sent with each query.
        index = number % len(files)
        query = list(queries)[(number + number // len(files)) % len(queries)]
        for _ in itertools.count():
          response = client.post(f'{url}/predict{query}', content=files[index])
          if response.status_code != 503:
            break
          counts['refused'] += 1
          time.sleep(0.05)
        if response.status_code != 200:
          counts['failed'] += 1
        else:
          right = any(is_right(response.json(), answers, index) for answers in queries[query])
          counts['right' if right else 'wrong'] += 1
    return counts

  with ThreadPoolExecutor(NUM_CLIENTS) as pool:
    return sum(pool.map(work, range(NUM_CLIENTS)), collections.Counter())


@pytest.mark.slow
def test_every_client_gets_the_answer_of_its_image_and_budget(network):
  files, answers = network
  with serving(f'--max_queue={NUM_CLIENTS // 4}') as url:
    counts = send_all(url, files, {f'?budget={b!r}': [answers[b]] for b in answers})
  assert counts['right'] == NUM_REQUESTS
  assert counts['wrong'] == counts['failed'] == 0
  assert counts['refused'] > 0


@pytest.mark.slow
def test_an_overloaded_server_answers_at_one_of_its_two_budgets(network):
  files, answers = network
  cheapest, *_, dearest = answers
  flags = (f'--budget={dearest!r}', f'--overload_budget={cheapest!r}', '--max_queue=40')
  with serving(*flags) as url:
    counts = send_all(url, files, {'': [answers[dearest], answers[cheapest]]})
  assert counts['right'] == NUM_REQUESTS and not counts['wrong'] + counts['failed']
