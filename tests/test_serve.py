"""The HTTP service: whose answer is whose, what is refused, and what happens under load."""

import asyncio
import contextlib
import gc
import gzip
import importlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from imta_jax.adaptive.engine import (
  AdaptiveClassifier,
  CalibrationSet,
  OperatingPoint,
  Predictions,
)
from imta_jax.data.image_files import CROPS, read_image
from imta_jax.errors import UsageError

httpx = pytest.importorskip('httpx')
pytest.importorskip('starlette')
pytest.importorskip('uvicorn')

from imta_jax import serve  # noqa: E402
from imta_jax.serving.batcher import Batcher  # noqa: E402
from imta_jax.serving.decoder import Decoder  # noqa: E402

NAMES = 'abc'
SHAPE = (2, 2, 1)
IMAGES = np.random.default_rng(0).integers(0, 256, (40, *SHAPE), np.uint8)
# Every image leaves at the first exit, or at the last.
CHEAP, DEAR = 12, 24
PNG = {'Content-Type': 'image/png'}
FORM = {'Content-Type': 'multipart/form-data; boundary=frontier'}


def open_network(folder):
  network = AdaptiveClassifier.load(folder)
  network.operating_points = (
    OperatingPoint((-np.inf, -np.inf), (1.0, 0.0), 0.5),
    OperatingPoint((np.inf, -np.inf), (0.0, 1.0), 0.9),
  )
  return network


@pytest.fixture(scope='module')
def network(tiny_export):
  network = open_network(tiny_export)
  confidence = network.predict(IMAGES, (-np.inf, -np.inf)).confidences
  network.thresholds = np.array([np.median(confidence), -np.inf], np.float32)
  network.compile(4)
  network.compile = lambda largest: network  # Once is enough: it times every program.
  return network


@pytest.fixture(scope='module')
def expected(network):
  """The answers for IMAGES, by query."""
  return {
    '': network.predict(IMAGES),
    f'?budget={CHEAP}': network.predict(IMAGES, (-np.inf, -np.inf)),
    f'?budget={DEAR}': network.predict(IMAGES, (np.inf, -np.inf)),
  }


class Gate:
  """Stands before the network's `predict_as_completed`; notes what goes in, and can be shut."""

  def __init__(self, predict):
    self._predict, self._open = predict, threading.Event()
    self.reached, self.batches, self.error = threading.Event(), [], None
    self.open, self.shut = self._open.set, self._open.clear
    self.open()

  def __call__(self, images, thresholds):
    self.reached.set()
    assert self._open.wait(30)
    self.batches.append((images, thresholds))
    if self.error is not None:
      raise self.error
    return self._predict(images, thresholds)


@pytest.fixture
def gate(network, monkeypatch):
  gate = Gate(network.predict_as_completed)
  monkeypatch.setattr(network, 'predict_as_completed', gate)
  return gate


@contextlib.asynccontextmanager
async def client_of(network, confidence=0.95, **limits):
  """Starts a service and yields a client of it."""
  app = serve.create_app(network, serve.Limits(**{'max_batch': 4, **limits}), confidence)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(gc, 'collect', lambda: None)  # Takes half a second for all that tests import.
    async with app.router.lifespan_context(app):
      transport = httpx.ASGITransport(app, raise_app_exceptions=False)
      async with httpx.AsyncClient(transport=transport, base_url='http://test') as client:
        yield client


@pytest.fixture(scope='module')
def send(network):
  """A function that sends a request to a service and waits for its answer."""
  service = client_of(network, max_queue=8, max_body_mb=0.005, max_megapixels=0.002)
  with asyncio.Runner() as loop:
    client = loop.run(service.__aenter__())
    yield lambda **options: loop.run(post(client, **options))
    loop.run(service.__aexit__(None, None, None))


def png(image):
  content = io.BytesIO()
  Image.fromarray(image[..., 0]).save(content, 'PNG')
  return content.getvalue()


PNGS = [png(image) for image in IMAGES]


def post(client, number=0, query='', **options):
  if 'files' not in options:
    options = {'content': PNGS[number], 'headers': PNG, **options}
  return client.post(f'/predict{query}', **options)


def assert_answers(response, expected, index):
  assert response.status_code == 200, response.text
  assert_answer(response.json(), expected, index)


def assert_answer(answer, expected, index):
  assert answer['label'] == expected.labels[index]
  assert answer['class'] == NAMES[answer['label']]
  assert answer['exit'] == expected.exits[index] + 1
  assert answer['confidence'] == pytest.approx(float(expected.confidences[index]), abs=1e-5)
  assert {c['label']: c['probability'] for c in answer['top']} == pytest.approx(
    dict(enumerate(expected.probabilities[index].tolist())), abs=1e-5
  )


async def until_pending(client, count):
  for _ in range(1000):
    if f'imta_unanswered_images {count:.1f}\n' in (await client.get('/metrics')).text:
      return
    await asyncio.sleep(0.01)
  raise AssertionError(f'not {count} images came to wait')


# Answers


def test_an_image_is_answered(network, expected):
  async def scenario():
    async with client_of(network) as client:
      assert gc.get_freeze_count() > 100_000  # Of what was there before.
      assert (await client.get('/health')).status_code == 200
      for number, kind in enumerate(('image/png', 'application/octet-stream', 'IMAGE/PNG')):
        response = await post(client, number, headers={'Content-Type': kind})
        assert_answers(response, expected[''], number)
        assert 'file' not in response.json()
      assert (await client.get('/nothing')).status_code == 404
      assert (await client.get('/predict')).status_code == 405

  asyncio.run(scenario())


@pytest.mark.parametrize('crop', CROPS)
def test_images_are_cropped_as_the_network_says(crop, network, monkeypatch):
  monkeypatch.setitem(network.preprocessing, 'crop', crop)
  image = read_image(io.BytesIO(PNGS[0]), SHAPE, crop)
  assert (image == IMAGES[0]).all() == (crop == 'none')

  async def scenario():
    async with client_of(network) as client:
      assert_answers(await post(client), network.predict(image[np.newaxis]), 0)

  asyncio.run(scenario())


def test_a_form_has_several_images(send, expected):
  files = [('file', (f'{number}.png', PNGS[number])) for number in (7, 3, 9, 1, 2)]
  answers = send(files=files).json()['answers']
  assert [answer['file'] for answer in answers] == [name for _, (name, _) in files]
  for answer in answers:
    assert_answer(answer, expected[''], int(answer['file'][0]))


@pytest.mark.parametrize('late_status', [200, 500])
def test_images_that_exit_early_are_answered_early(network, expected, monkeypatch, late_status):
  answers = expected['']
  go_on = threading.Event()

  def one_by_one(images, thresholds):
    assert len(images) == 2
    # Whichever of the two requests was decoded first.
    first = int(np.array_equal(images[1], IMAGES[1]))
    for row, number in ((first, [1]), (1 - first, [0])):
      yield Predictions(np.array([row]), answers.probabilities[number], answers.exits[number])
      assert go_on.wait(30)
      if late_status == 500:
        raise RuntimeError('broken')

  monkeypatch.setattr(network, 'predict_as_completed', one_by_one)

  async def scenario():
    async with client_of(network, max_batch=2, max_delay_ms=10000) as client:
      late, early = (asyncio.create_task(post(client, number)) for number in (0, 1))
      assert_answers(await asyncio.wait_for(early, 30), answers, 1)
      assert not late.done()
      go_on.set()
      response = await asyncio.wait_for(late, 30)
      assert response.status_code == late_status
      if late_status == 200:
        assert_answers(response, answers, 0)

  asyncio.run(scenario())


def test_concurrent_clients_get_the_answers_of_their_images_and_budgets(network, expected, gate):
  async def scenario():
    async with client_of(network, max_delay_ms=20) as client:
      cases = [(number, query) for number in range(len(IMAGES)) for query in expected]
      responses = await asyncio.gather(*(post(client, *case) for case in cases))
    for (number, query), response in zip(cases, responses, strict=True):
      assert_answers(response, expected[query], number)

  asyncio.run(scenario())
  sizes = [len(images) for images, _ in gate.batches]
  assert sum(sizes) == 3 * len(IMAGES)
  assert max(sizes) == 4
  assert any(len({tuple(row) for row in thresholds}) > 1 for _, thresholds in gate.batches)


def test_nothing_is_compiled_once_a_server_listens(tiny_export, caplog):
  async def scenario():
    async with client_of(open_network(tiny_export)) as client:
      jax.config.update('jax_log_compiles', True)
      try:
        for count in (1, 2, 3, 4, 7, 40):
          cases = [(number, ('', f'?budget={DEAR}')[number % 2]) for number in range(count)]
          await asyncio.gather(*(post(client, *case) for case in cases))
      finally:
        jax.config.update('jax_log_compiles', False)

  asyncio.run(scenario())
  assert 'ompil' not in caplog.text


# Options


def test_the_command_line_sets_the_network_the_limits_and_the_address(tiny_export, monkeypatch):
  calls = []
  monkeypatch.setattr(serve, 'set_up_compilation_cache', lambda: None)
  monkeypatch.setattr(serve, 'create_app', lambda *args: calls.append(args))
  monkeypatch.setattr(serve.uvicorn, 'run', lambda app, **options: calls.append(options))
  monkeypatch.setattr(AdaptiveClassifier, 'measure_costs', lambda self: [1, 1 + len(calls)])
  given = {'max_batch': 3, 'max_delay_ms': 4, 'max_queue': 5, 'max_body_mb': 6}
  given |= {'max_megapixels': 7, 'overload_budget': 8}
  flags = [f'--{name}={value}' for name, value in given.items()]
  serve.main([str(tiny_export), '--max_loss=0.9', '--confidence=0.6', '--port=8123', *flags])
  (network, limits, confidence), address = calls
  assert limits == serve.Limits(**given) and confidence == 0.6
  np.testing.assert_array_equal(network.thresholds, network.thresholds_losing(0.9, 0.6))
  assert (address['host'], address['port']) == ('127.0.0.1', 8123)
  # A latency is measured once the fastest runtime is compiled: then, exits cost 1 and 4.
  with pytest.raises(UsageError, match='latency 2: too small: the minimum is 2.5'):
    serve.main([str(tiny_export), '--latency=2'])


@pytest.mark.parametrize('flag', ['--port=0', '--max_batch=0', '--max_queue=1.5'])
def test_wrong_options_are_refused_in_one_line(flag, capsys):
  with pytest.raises(SystemExit):
    serve.main(['network', flag])
  assert f'{flag.partition("=")[0]}: invalid positive int' in capsys.readouterr().err


def test_limits_that_nothing_meets_are_refused(tiny_export, monkeypatch):
  monkeypatch.setattr(serve, 'set_up_compilation_cache', lambda: None)
  with pytest.raises(UsageError, match='overload_budget 3: too small: the minimum is 18'):
    serve.main([str(tiny_export), '--overload_budget=3'])
  with pytest.raises(UsageError, match='confidence is 95.0: it must be above 0 and below 1'):
    serve.main([str(tiny_export), '--confidence=95'])


def test_limits_of_a_request_replace_those_of_the_server(network, monkeypatch):
  # The first exit errs for one image in 100, of which it is less sure.
  is_hard = np.arange(900) % 100 == 0
  scores = np.where(is_hard, np.float32(0.9), np.float32(0.99))
  validation = CalibrationSet(np.stack([scores] * 2), np.stack([~is_hard, scores > 0]))
  monkeypatch.setattr(network, 'validation', validation)
  monkeypatch.setattr(network, 'measure_costs', lambda: np.array([0.001, 0.003]))
  monkeypatch.setattr(network, 'thresholds', np.array([np.inf, -np.inf], np.float32))

  async def exits(confidence):
    queries = ('', '?budget=12', '?budget=23', '?budget=24', '?latency_ms=2.9', '?latency_ms=3')
    async with client_of(network, confidence) as client:
      responses = [await post(client, query=query) for query in (*queries, '?max_loss=0.05')]
      refusal = await post(client, query='?latency_ms=0.9')
      assert refusal.json() == {'error': 'latency_ms=0.9: too small: the minimum is 1'}
    return [response.json()['exit'] for response in responses]

  assert asyncio.run(exits(0.95)) == [2, 1, 1, 2, 1, 2, 1]
  assert asyncio.run(exits(1 - 1e-15)) == [2, 1, 1, 2, 1, 2, 2]


def test_under_load_the_budget_of_requests_that_name_none_falls(network, gate):
  async def scenario():
    async with client_of(network, max_queue=8, overload_budget=CHEAP) as client:
      gate.shut()
      waiting = []
      for count in range(1, 6):
        waiting.append(asyncio.create_task(post(client, 0, f'?budget={DEAR}')))
        await until_pending(client, count)
      late = [asyncio.create_task(post(client, number)) for number in (0, 1)]
      late.append(asyncio.create_task(post(client, 0, f'?budget={DEAR}')))
      await until_pending(client, 8)
      gate.open()
      await asyncio.gather(*waiting)
      assert [(await task).json()['exit'] for task in late] == [1, 1, 2]
      later = [(await post(client, number)).json()['exit'] for number in range(len(IMAGES))]
      assert set(later) == {1, 2}

  asyncio.run(scenario())


# Refusals


def part(name, content):
  return (
    f'--frontier\r\nContent-Disposition: form-data; {name}\r\n\r\n'.encode() + content + b'\r\n'
  )


def form(*parts):
  return b''.join(parts) + b'--frontier--\r\n'


FILES = [('file', ('a.png', PNGS[0])), ('file', ('b.png', PNGS[1][:45]))]
REFUSED = {
  'budget too small': ({'query': '?budget=5'}, 422, 'budget=5: too small: the minimum is 12'),
  'budget no number': ({'query': '?budget=many'}, 422, "'many' is no number"),
  'budget not a number': ({'query': '?budget=nan'}, 422, 'too small'),
  'two budgets': ({'query': '?budget=3e6&latency_ms=3'}, 422, 'one of budget='),
  'unknown query': ({'query': '?buget=3e6'}, 422, 'buget=3e6'),
  'no fraction': ({'query': '?max_loss=1'}, 422, 'max_loss=1: max_loss is 1.0: it must be'),
  'corrupt': ({'content': PNGS[0][:45]}, 422, 'the image: cannot be read'),
  'empty': ({'content': b''}, 422, 'the image: not an image'),
  'compressed': (
    {'content': gzip.compress(PNGS[0]), 'headers': {**PNG, 'Content-Encoding': 'gzip'}},
    415,
    "content encoding 'gzip': send the file as it is",
  ),
  'many pixels': (
    {'content': png(np.zeros((50, 41, 1), np.uint8))},
    422,
    '41 x 50 exceeds 2,000 pixels',
  ),
  'many bytes': ({'content': bytes(5001)}, 413, 'at most 0.005 MB'),
  'another type': ({'headers': {'Content-Type': 'text/plain'}}, 415, "'text/plain'"),
  'many images': ({'files': FILES[:1] * 9}, 400, 'Maximum number of files is 8'),
  'corrupt among others': ({'files': FILES}, 422, 'b.png: cannot be read'),
  'a field beside a file': (
    {'data': {'budget': '3e6'}, 'files': {'a': PNGS[0]}},
    422,
    "part 'budget' of the form has no filename=: send files alone, and options like budget= in the",
  ),
  'a form that is cut': (
    {'content': part('name="f"; filename="a.png"', PNGS[0]) * 2, 'headers': FORM},
    400,
    'before its closing boundary',
  ),
  'a form that is none': ({'headers': FORM}, 400, ''),
}


@pytest.mark.parametrize('name', REFUSED)
def test_refusals_have_a_status_and_a_line(name, send):
  options, status, expected = REFUSED[name]
  response = send(**options)
  assert response.status_code == status, response.text
  assert expected in response.json()['error']
  assert send().status_code == 200


def test_bodies_without_a_length_are_bounded(send):
  sent = []

  async def chunks():
    for _ in range(100):
      sent.append(None)
      yield bytes(1000)

  assert send(content=chunks()).status_code == 413
  assert len(sent) < 10


PARTS = st.builds(
  part,
  st.sampled_from(['name="f"', 'name="f"; filename="f"', 'filename="f"', '']),
  st.sampled_from([PNGS[0], PNGS[0][:40], b'']) | st.binary(max_size=20),
)


@st.composite
def corrupt(draw):
  """Forms of which some bytes were changed or removed, or that were cut."""
  content = bytearray(form(*draw(st.lists(PARTS, max_size=3))))
  for _ in range(draw(st.integers(0, 3))):
    start = draw(st.integers(0, len(content)))
    end = draw(st.integers(start, len(content)) | st.just(start + 1))
    content[start:end] = draw(st.sampled_from([b'', b'x', b'\r\n', b'--frontier']))
  return bytes(content)


TYPES = ['image/png', 'multipart/form-data', 'multipart/form-data; boundary=', 'text/plain', '\xe9']
NUMBERS = st.floats().map(str) | st.integers().map(str) | st.text(max_size=5)
QUERIES = st.dictionaries(
  st.sampled_from(['budget', 'latency_ms', 'max_loss', '']), NUMBERS, max_size=2
)


@settings(derandomize=True, deadline=None, max_examples=60, database=None)
@given(body=corrupt(), kind=st.just(FORM['Content-Type']) | st.sampled_from(TYPES), query=QUERIES)
def test_random_requests_are_answered_or_refused(send, body, kind, query):
  for options in (
    {'content': body, 'headers': {'Content-Type': kind.encode('latin-1')}},
    {'params': query},
  ):
    response = send(**options)
    assert response.status_code == 200 or 400 <= response.status_code < 500
    assert '\n' not in response.text
    answer = json.loads(response.text)
    assert ('error' in answer) == (response.status_code != 200)


def test_what_is_missing_is_told_in_a_line(monkeypatch):
  monkeypatch.delitem(sys.modules, 'imta_jax.serve')
  monkeypatch.setitem(sys.modules, 'uvicorn', None)
  with pytest.raises(SystemExit) as end:
    importlib.import_module('imta_jax.serve')
  assert end.value.code == "error: uvicorn is not installed: pip install 'imta_jax[serve]'"


# Load and failures


def test_a_full_queue_refuses_and_answers_what_it_has(network, expected, gate):
  async def scenario():
    async with client_of(network, max_queue=6) as client:
      gate.shut()
      waiting = [asyncio.create_task(post(client, number)) for number in range(6)]
      await until_pending(client, 6)
      response = await post(client, 6)
      assert response.status_code == 503
      assert int(response.headers['Retry-After']) >= 1
      assert '6 images' in response.json()['error']
      gate.open()
      for number, response in enumerate(await asyncio.gather(*waiting)):
        assert_answers(response, expected[''], number)
      assert_answers(await post(client, 8), expected[''], 8)

  asyncio.run(scenario())


def test_requests_that_are_being_received_count_as_pending(network):
  arrives = asyncio.Event()

  async def slow():
    yield PNGS[0]
    await arrives.wait()

  async def scenario():
    async with client_of(network, max_queue=2) as client:
      receiving = [asyncio.create_task(post(client, content=slow())) for _ in range(2)]
      await until_pending(client, 2)
      assert (await post(client)).status_code == 503
      arrives.set()
      assert [(await task).status_code for task in receiving] == [200, 200]
      await until_pending(client, 0)

  asyncio.run(scenario())


def test_cancelled_images_take_no_answer_of_others_along(network, expected, gate):
  gate.shut()
  batcher = Batcher(network, max_batch=4, max_delay=0, observe=lambda size: None)
  futures = batcher.submit(IMAGES[:12], network.thresholds)
  assert gate.reached.wait(30)
  cancelled = [future.cancel() for future in futures[::3]]
  assert cancelled == [False, False, True, True]  # The first batch has begun.
  gate.open()
  batcher.close()
  for number, future in enumerate(futures):
    if not future.cancelled():
      probabilities, exit = future.result(timeout=30)
      assert exit == expected[''].exits[number]
      np.testing.assert_allclose(probabilities, expected[''].probabilities[number], atol=1e-5)


def test_a_network_that_fails_fails_its_batch_alone(network, gate):
  async def scenario():
    async with client_of(network) as client:
      gate.error = RuntimeError('out of memory')
      response = await asyncio.wait_for(post(client), 30)
      assert (response.status_code, response.json()) == (500, {'error': 'internal server error'})
      gate.error = None
      assert (await post(client)).status_code == 200

  asyncio.run(scenario())


def test_a_request_waits_for_few_images_of_another():
  order, num_threads = [], os.cpu_count()

  def read(file):
    time.sleep(0.002)
    order.append(file.read())

  async def scenario():
    decoder = Decoder(read)
    many = decoder.decode([b'many'] * 20 * num_threads)
    await asyncio.gather(many, decoder.decode([b'one']))
    decoder.close()

  asyncio.run(scenario())
  assert order.index(b'one') <= 2 * num_threads


def test_metrics_count(network):
  async def scenario():
    async with client_of(network, max_queue=8) as client:
      for number in range(3):
        await post(client, number, f'?budget={CHEAP}')
      await post(client, files=[('f', ('a.png', PNGS[0]))] * 2, query=f'?budget={DEAR}')
      await post(client, content=b'x')
      return (await client.get('/metrics')).text

  text = asyncio.run(scenario())
  for line in (
    'imta_requests_total{status="200"} 4.0',
    'imta_requests_total{status="422"} 1.0',
    'imta_request_seconds_count 5.0',
    'imta_batch_size_sum 5.0',
    'imta_images_total{exit="1"} 3.0',
    'imta_images_total{exit="2"} 2.0',
    'imta_unanswered_images 0.0',
  ):
    assert f'{line}\n' in text


def test_a_process_answers_many_clients_and_before_it_stops(tiny_export):
  network = AdaptiveClassifier.load(tiny_export)
  answers = network.predict(IMAGES)
  with socket.create_server(('127.0.0.1', 0)) as free:
    port = free.getsockname()[1]
  url = f'http://127.0.0.1:{port}'
  flags = [f'--port={port}', '--max_queue=4', '--max_batch=4', '--max_delay_ms=500']
  command = [sys.executable, '-m', 'imta_jax.serve', tiny_export, *flags]
  process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
  with httpx.Client(base_url=url, timeout=30) as client, ThreadPoolExecutor(8) as pool:
    try:
      wait_for(client, process)
      # A client that leaves before its request is complete.
      head = (
        'POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: 99\r\n\r\n'
      )
      with socket.create_connection(('127.0.0.1', port)) as connection:
        connection.sendall(head.encode() + PNGS[0][:40])
      # One that closes its writing side after the request.
      with socket.create_connection(('127.0.0.1', port), timeout=10) as connection:
        connection.sendall(head.replace('99', str(len(PNGS[0]))).encode() + PNGS[0])
        connection.shutdown(socket.SHUT_WR)
        with connection.makefile('rb') as answer:
          assert b'"label"' in answer.read()

      def send(number):
        while (response := post(client, number)).status_code == 503:
          time.sleep(0.02)
        return response

      for number, response in enumerate(pool.map(send, range(20))):
        assert_answers(response, answers, number)
      late = pool.submit(post, client, 0)  # Waits half a second for others.
      time.sleep(0.2)
      process.send_signal(signal.SIGTERM)
      assert_answers(late.result(), answers, 0)
      assert process.wait(30) in (0, -signal.SIGTERM)
      assert 'Traceback' not in process.stderr.read()
    finally:
      process.kill()
      process.wait()


def wait_for(client, process):
  for _ in range(600):
    with contextlib.suppress(httpx.TransportError):
      client.get('/health').raise_for_status()
      return
    assert process.poll() is None, process.stderr.read()
    time.sleep(0.1)
