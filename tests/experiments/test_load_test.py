"""The load test counts wrong, refused and failed answers."""

import http.server
import json
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from imta_jax.adaptive.engine import Answers

sys.path.insert(0, str(Path(__file__).parents[2] / 'experiments'))
from load_test import Load

COUNT = 8
EXITS = np.arange(COUNT) % 3
ANSWERS = Answers(np.arange(COUNT), np.eye(COUNT, 10, dtype=np.float32), EXITS)
OTHERS = Answers(np.arange(COUNT), np.eye(COUNT, 10, k=1, dtype=np.float32), np.full(COUNT, 2))


@pytest.fixture
def server():
  """A server with a wrong label for image 3, status 503 once for 5, and status 500 for 6."""
  refused = []

  class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'

    def do_POST(self):
      index = int(self.rfile.read(int(self.headers['Content-Length'])))
      status = 500 if index == 6 else 200
      if index == 5 and not refused:
        refused.append(index)
        status = 503
      label = 9 if index == 3 else index
      content = json.dumps({'label': label, 'exit': int(EXITS[index]) + 1, 'confidence': 1.0})
      self.send_response(status)
      self.send_header('Content-Length', str(len(content)))
      self.end_headers()
      self.wfile.write(content.encode())

    def log_message(self, *_):
      pass

  server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
  threading.Thread(target=server.serve_forever, daemon=True).start()
  yield server.server_address[1]
  server.shutdown()
  server.server_close()


@pytest.mark.parametrize('expected', [[ANSWERS], [OTHERS, ANSWERS]])
def test_wrong_refused_and_failed_answers_are_counted(server, expected):
  contents = [str(index).encode() for index in range(COUNT)]
  load = Load(server, contents, {'?budget=1.0': expected}, seconds=30.0)
  answered, wrong, refused, failed, *_, mean_exit = load.put(clients=3, requests=COUNT)
  assert (answered, wrong, refused, failed) == ('7', '1', '1', '1')
  assert mean_exit == f'{1 + np.delete(EXITS, 6).mean():.2f}'


def test_answers_of_another_budget_are_wrong(server):
  contents = [str(index).encode() for index in range(COUNT)]
  load = Load(server, contents, {'': [OTHERS]}, seconds=30.0)
  assert load.put(clients=3, requests=COUNT)[:2] == ['7', '7']
