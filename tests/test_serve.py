"""The HTTP service: whose answer is whose, what is refused, and what happens under load."""

import asyncio
import contextlib
import gc
import gzip
import io
import socket
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest
from PIL import Image

from imta_jax import models
from imta_jax.adaptive.engine import (
  AdaptiveClassifier,
  Answers,
  CalibrationSet,
  OperatingPoint,
  runner,
)
from imta_jax.data.image_files import CROPS, read_image

httpx = pytest.importorskip('httpx')
pytest.importorskip('starlette')
pytest.importorskip('uvicorn')

from live_server import listening  # noqa: E402

from imta_jax import serve  # noqa: E402

NAMES = ('ant', 'bee', 'cat', 'dog')
SHAPE = (8, 8, 1)
IMAGES = np.random.default_rng(0).integers(0, 256, (40, *SHAPE), np.uint8)
# Every image leaves at the first exit, or at the last.
CHEAP, DEAR = 1e6, 3e6
PNG = {'Content-Type': 'image/png'}
URL = 'http://127.0.0.1:{}'


@pytest.fixture(autouse=True)
def programs_are_timed_once(monkeypatch):
  monkeypatch.setattr(runner, '_SECONDS_A_TURN', 1e-9)


@pytest.fixture(scope='module')
def new_network(random_variables):
  model = models.create('resnet', depth=8, exits_after=(1,), num_classes=len(NAMES))
  return lambda: AdaptiveClassifier.from_model(
    model,
    random_variables(model, SHAPE),
    (np.inf, -np.inf),
    SHAPE,
    mean=(0.5,),
    std=(0.25,),
    operating_points=[
      OperatingPoint((-np.inf, -np.inf), (1.0, 0.0), 0.5),
      OperatingPoint((np.inf, -np.inf), (0.0, 1.0), 0.9),
    ],
    madds=(CHEAP, DEAR),
    class_names=NAMES,
    preprocessing={'crop': 'none'},
    batch_sizes=(1, 4),
  )


@pytest.fixture(scope='module')
def network(new_network):
  classifier = new_network()
  confidence = classifier.predict(IMAGES, (-np.inf, -np.inf)).confidences
  classifier.thresholds = np.array([np.median(confidence), -np.inf], np.float32)
  return classifier


class Gate:
  """Stands before the network's `predict_as_completed`; notes what goes in, and can be shut."""

  def __init__(self, predict):
    self._predict, self._open = predict, threading.Event()
    self.reached = threading.Event()
    self.batches = []
    self.error = None
    self.open()

  def open(self):
    self._open.set()

  def shut(self):
    self._open.clear()

  def __call__(self, images, thresholds=None):
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


@pytest.fixture
def client_of(network):
  """A function that starts a service and gives a client of it."""

  @contextlib.asynccontextmanager
  async def start(**limits):
    app = serve.create_app(network, serve.Limits(**{'max_batch': 4, **limits}))
    async with app.router.lifespan_context(app):
      transport = httpx.ASGITransport(app, raise_app_exceptions=False)
      async with httpx.AsyncClient(transport=transport, base_url='http://test') as client:
        yield client

  return start


def png(image):
  content = io.BytesIO()
  Image.fromarray(image[..., 0]).save(content, 'PNG')
  return content.getvalue()


PNGS = [png(image) for image in IMAGES]


def post(client, number=0, query='', **options):
  return client.post(f'/predict{query}', **{'content': PNGS[number], 'headers': PNG, **options})


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


async def reached(gate):
  assert await asyncio.to_thread(gate.reached.wait, 30)
  gate.reached.clear()


def test_an_image_is_answered(client_of, network):
  expected = network.predict(IMAGES)

  async def scenario():
    async with client_of() as client:
      assert (await client.get('/health')).status_code == 200
      for number in range(3):
        assert_answers(await post(client, number), expected, number)
      for kind in ('application/octet-stream', 'IMAGE/PNG'):
        headers = {'Content-Type': kind}
        assert_answers(await post(client, 1, headers=headers), expected, 1)

  asyncio.run(scenario())


@pytest.mark.parametrize('crop', CROPS)
def test_images_are_cropped_as_the_network_says(crop, client_of, network, monkeypatch):
  monkeypatch.setitem(network.preprocessing, 'crop', crop)
  image = read_image(io.BytesIO(PNGS[0]), SHAPE, crop)
  assert (image == IMAGES[0]).all() == (crop == 'none')

  async def scenario():
    async with client_of() as client:
      assert_answers(await post(client), network.predict(image[np.newaxis]), 0)

  asyncio.run(scenario())


def test_garbage_collection_leaves_out_what_was_there_at_the_start(client_of):
  async def scenario():
    async with client_of():
      return gc.get_freeze_count()

  assert asyncio.run(scenario()) > 100_000
  assert gc.get_freeze_count() == 0


@pytest.mark.parametrize('late_status', [200, 500])
def test_who_leaves_early_is_answered_early(client_of, network, monkeypatch, late_status):
  expected = network.predict(IMAGES[:2])
  go_on = threading.Event()

  def one_by_one(images, thresholds):
    assert len(images) == 2
    # Whichever of the two requests was decoded first.
    first = int(np.array_equal(images[1], IMAGES[1]))
    for row, number in ((first, [1]), (1 - first, [0])):
      yield Answers(np.array([row]), expected.probabilities[number], expected.exits[number])
      assert go_on.wait(30)
      if late_status == 500:
        raise RuntimeError('broken')

  monkeypatch.setattr(network, 'predict_as_completed', one_by_one)

  async def scenario():
    async with client_of(max_batch=2, max_delay_ms=10000) as client:
      late, early = (asyncio.create_task(post(client, number)) for number in (0, 1))
      assert_answers(await asyncio.wait_for(early, 30), expected, 1)
      assert not late.done()
      go_on.set()
      response = await late
      assert response.status_code == late_status
      if late_status == 200:
        assert_answers(response, expected, 0)

  asyncio.run(scenario())


def test_clients_at_once_get_their_own_images_answers(client_of, network, gate):
  """All images at three budgets, mixed in batches."""
  expected = {
    '': network.predict(IMAGES),
    f'?budget={CHEAP}': network.predict(IMAGES, (-np.inf, -np.inf)),
    f'?budget={DEAR}': network.predict(IMAGES, (np.inf, -np.inf)),
  }

  async def scenario():
    gate.batches.clear()
    async with client_of(max_delay_ms=20) as client:
      gate.batches.clear()
      cases = [(number, query) for number in range(len(IMAGES)) for query in expected]
      responses = await asyncio.gather(*(post(client, *case) for case in cases))
    for (number, query), response in zip(cases, responses, strict=True):
      assert_answers(response, expected[query], number)

  asyncio.run(scenario())
  sizes = [len(images) for images, _ in gate.batches]
  assert sum(sizes) == 3 * len(IMAGES)
  assert max(sizes) == 4
  assert any(len({tuple(row) for row in thresholds}) > 1 for _, thresholds in gate.batches)


def test_a_form_that_was_cut_is_refused(client_of):
  parts = ''.join(
    f'--frontier\r\nContent-Disposition: form-data; name="file"; filename="{n}.png"\r\n\r\n@\r\n'
    for n in range(2)
  ).split('@')
  body = parts[0].encode() + PNGS[0] + parts[1].encode() + PNGS[1] + parts[2].encode()
  headers = {'Content-Type': 'multipart/form-data; boundary=frontier'}

  async def scenario():
    async with client_of() as client:
      whole = await client.post('/predict', content=body + b'--frontier--\r\n', headers=headers)
      assert whole.status_code == 200 and len(whole.json()['answers']) == 2
      cut = await client.post('/predict', content=body, headers=headers)
      assert cut.status_code == 400 and 'before its closing boundary' in cut.json()['error']

  asyncio.run(scenario())


def test_a_form_has_several_images(client_of, network):
  expected = network.predict(IMAGES)

  async def scenario():
    async with client_of() as client:
      files = [('file', (f'{number}.png', PNGS[number])) for number in (7, 3, 9, 1, 2)]
      response = await client.post('/predict', files=files)
      assert response.status_code == 200
      answers = response.json()['answers']
      assert [answer['file'] for answer in answers] == [name for _, (name, _) in files]
      for answer in answers:
        assert_answer(answer, expected, int(answer['file'][0]))

  asyncio.run(scenario())


def test_nothing_is_compiled_once_a_server_listens(new_network, caplog):
  network = new_network()
  app = serve.create_app(network, serve.Limits(max_batch=4))

  async def scenario():
    async with app.router.lifespan_context(app):
      transport = httpx.ASGITransport(app)
      async with httpx.AsyncClient(transport=transport, base_url='http://test') as client:
        with jax_compilations_logged():
          for count in (1, 2, 3, 4, 7, 40):
            cases = [(number, ('', f'?budget={DEAR}')[number % 2]) for number in range(count)]
            await asyncio.gather(*(post(client, *case) for case in cases))

  asyncio.run(scenario())
  assert 'ompil' not in caplog.text


@contextlib.contextmanager
def jax_compilations_logged():
  jax.config.update('jax_log_compiles', True)
  try:
    yield
  finally:
    jax.config.update('jax_log_compiles', False)


@pytest.mark.parametrize(
  'option',
  [
    ('--budget', 12.0),
    ('--latency', 1e4),
    ('--max_loss', 0.05),
    ('--confidence', 1 - 1e-12),
    ('--rule', 'margin'),
    ('--overload_budget', 12.0),
  ],
)
def test_options_of_a_request_combine_with_those_of_the_command_line(
  option, tiny_export, monkeypatch
):
  small = AdaptiveClassifier.load(tiny_export)
  # The first exit errs for one image in 100, of which it is less sure.
  is_hard = np.arange(900) % 100 == 0
  scores = np.where(is_hard, np.float32(0.9), np.float32(0.99))
  opened, apps = [], []

  def open_classifier(folder, rule=None, phase=None, sweep=None, **limits):
    del folder, phase, sweep
    opened.append(
      AdaptiveClassifier(
        small.stages,
        small.weights,
        (0.5, -np.inf),
        small.image,
        madds=small.madds,
        rule=rule or 'top_probability',
        operating_points=[
          OperatingPoint((-np.inf, -np.inf), (1.0, 0.0), 0.5),
          OperatingPoint((0.6, -np.inf), (0.5, 0.5), 0.9),
        ],
        validation=CalibrationSet(np.stack([scores] * 2), np.stack([~is_hard, scores > 0])),
        class_names=small.class_names,
        batch_sizes=(1,),
      ).choose(**limits)
    )
    return opened[0]

  monkeypatch.setattr(serve, 'set_up_compilation_cache', lambda: None)
  monkeypatch.setattr(serve, 'open_classifier', open_classifier)
  monkeypatch.setattr(serve.Server, 'run', lambda server: apps.append(server.config.app))
  name, value = option
  serve.main(['network', f'{name}={value!r}'.replace("'", '')])
  (network,), (app,) = opened, apps
  confidence = value if name == '--confidence' else 0.95
  expected = {
    '': network.thresholds,
    '?budget=12': (-np.inf, -np.inf),
    '?latency_ms=1e7': (0.6, -np.inf),
    '?max_loss=0.05': network.thresholds_losing(0.05, confidence),
  }
  images = np.random.default_rng(0).integers(0, 256, (20, *small.image.shape), np.uint8)

  async def scenario():
    async with app.router.lifespan_context(app):
      transport = httpx.ASGITransport(app)
      async with httpx.AsyncClient(transport=transport, base_url='http://test') as client:
        for query, thresholds in expected.items():
          answers = network.predict(images, np.asarray(thresholds, np.float32))
          for index, image in enumerate(images):
            response = await post(client, query=query, content=png(image))
            assert response.json()['exit'] == answers.exits[index] + 1

  asyncio.run(scenario())
  assert (expected['?max_loss=0.05'][0] > 0) == (name == '--confidence')


def test_new_values_of_max_loss_do_not_hold_up_others(network, monkeypatch):
  random = np.random.default_rng(0)
  validation = CalibrationSet(
    random.random((2, 50_000), np.float32), random.random((2, 50_000)) < 0.9
  )
  monkeypatch.setattr(network, 'validation', validation)
  app = serve.create_app(network)

  async def scenario():
    async with app.router.lifespan_context(app):
      transport = httpx.ASGITransport(app)
      async with httpx.AsyncClient(transport=transport, base_url='http://test') as client:
        start = time.perf_counter()
        for number in range(20):
          query = f'?max_loss={0.01 + number / 1000}'
          assert (await post(client, query=query, content=b'garbage')).status_code == 422
        return time.perf_counter() - start

  assert asyncio.run(scenario()) < 0.5


def test_latencies_are_in_milliseconds(client_of, network, monkeypatch):
  monkeypatch.setattr(network, 'measure_costs', lambda: np.array([0.001, 0.003]))

  async def scenario():
    async with client_of() as client:
      for latency, exit in (('1', 1), ('2.9', 1), ('3', 2)):
        answer = (await post(client, query=f'?latency_ms={latency}')).json()
        assert answer['exit'] == exit
      refusal = await post(client, query='?latency_ms=0.9')
      assert 'too small: the least is 1' in refusal.json()['error']

  asyncio.run(scenario())


def test_budgets_hold_for_a_request_alone(client_of):
  async def scenario():
    async with client_of() as client:
      for query, exit in (
        (f'?budget={CHEAP}', 1),
        (f'?budget={DEAR}', 2),
        ('?budget=2e7', 2),
        ('?latency_ms=10000', 2),
      ):
        assert (await post(client, 0, query)).json()['exit'] == exit

  asyncio.run(scenario())


REFUSED = {
  'budget too small': ({'query': '?budget=5'}, 422, 'too small: the least is 1000000'),
  'latency too small': ({'query': '?latency_ms=1e-9'}, 422, 'too small'),
  'budget no number': ({'query': '?budget=many'}, 422, "'many' is no number"),
  'budget not a number': ({'query': '?budget=nan'}, 422, 'too small'),
  'two budgets': ({'query': '?budget=3e6&latency_ms=3'}, 422, 'one of budget='),
  'unknown query': ({'query': '?buget=3e6'}, 422, 'buget=3e6'),
  'promise without validation': (
    {'query': '?max_loss=0.01'},
    422,
    'needs the scores of validation',
  ),
  'corrupt': ({'content': PNGS[0][:50]}, 422, 'the image: cannot be read'),
  'no image': ({'content': b'hello'}, 422, 'the image: not an image'),
  'empty': ({'content': b''}, 422, 'the image: not an image'),
  'many pixels': (
    {'content': png(np.zeros((50, 41, 1), np.uint8))},
    422,
    '41 x 50 exceeds 2,000 pixels',
  ),
  'many bytes': ({'content': bytes(5001)}, 413, 'at most 0.005 MB'),
  'another type': ({'headers': {'Content-Type': 'text/plain'}}, 415, "'text/plain'"),
  'many images': (
    {'files': [('file', ('a.png', PNGS[0]))] * 9, 'content': None, 'headers': {}},
    400,
    'Maximum number of files is 8',
  ),
  'corrupt among others': (
    {
      'files': [('file', ('a.png', PNGS[0])), ('file', ('b.png', PNGS[1][:50]))],
      'content': None,
      'headers': {},
    },
    422,
    'b.png: cannot be read',
  ),
  'a field beside a file': (
    {'data': {'budget': '3e6'}, 'files': {'a': PNGS[0]}, 'content': None, 'headers': {}},
    422,
    "part 'budget' of the form has no filename=: send files alone, and options like budget= in the",
  ),
  'a file name in another encoding': (
    {
      'content': b'--x\r\nContent-Disposition: form-data; name="f"; filename*=UTF-8\'\'x.png'
      b'\r\n\r\n@\r\n--x--\r\n',
      'headers': {'Content-Type': 'multipart/form-data; boundary=x'},
    },
    422,
    "part 'f' of the form has no filename=",
  ),
  'a compressed body': (
    {'content': gzip.compress(PNGS[0]), 'headers': {**PNG, 'Content-Encoding': 'gzip'}},
    415,
    "content encoding 'gzip': send the file as it is",
  ),
  'a form that is none': (
    {'headers': {'Content-Type': 'multipart/form-data; boundary=x'}},
    400,
    '',
  ),
}


@pytest.mark.parametrize('name', REFUSED)
def test_refusals_have_a_status_and_a_line(name, client_of):
  options, status, expected = REFUSED[name]

  async def scenario():
    async with client_of(max_queue=8, max_body_mb=0.005, max_megapixels=0.002) as client:
      response = await post(client, **options)
      assert response.status_code == status, response.text
      assert expected in response.json()['error']
      assert (await post(client)).status_code == 200

  asyncio.run(scenario())


def test_chunks_without_a_length_are_bounded(client_of):
  sent = []

  async def chunks():
    for _ in range(100):
      sent.append(None)
      yield bytes(1000)

  async def scenario():
    async with client_of(max_body_mb=0.005) as client:
      response = await post(client, content=chunks())
      assert response.status_code == 413

  asyncio.run(scenario())
  assert len(sent) < 10


def test_unknown_paths_and_methods(client_of):
  async def scenario():
    async with client_of() as client:
      assert (await client.get('/nothing')).status_code == 404
      assert (await client.get('/predict')).status_code == 405

  asyncio.run(scenario())


def test_a_full_queue_refuses_and_answers_what_it_has(client_of, network, gate):
  expected = network.predict(IMAGES)

  async def scenario():
    async with client_of(max_queue=6) as client:
      gate.shut()
      gate.reached.clear()
      waiting = [asyncio.create_task(post(client, number)) for number in range(6)]
      await reached(gate)
      await until_unanswered(client, 6)
      for number in (6, 7):
        response = await post(client, number)
        assert response.status_code == 503
        assert int(response.headers['Retry-After']) >= 1
        assert '6 images' in response.json()['error']
      gate.open()
      for number, response in enumerate(await asyncio.gather(*waiting)):
        assert_answers(response, expected, number)
      assert_answers(await post(client, 8), expected, 8)

  asyncio.run(scenario())


async def until_unanswered(client, count):
  for _ in range(500):
    if f'imta_unanswered_images {count:.1f}\n' in (await client.get('/metrics')).text:
      return
    await asyncio.sleep(0.01)
  raise AssertionError(f'not {count} images came to wait')


def test_where_it_is_crowded_the_budget_falls_of_requests_that_name_none(client_of, gate):
  async def scenario():
    async with client_of(max_queue=8, overload_budget=CHEAP) as client:
      dear = f'?budget={DEAR}'
      gate.shut()
      waiting = []
      for count in range(1, 6):
        waiting.append(asyncio.create_task(post(client, 0, dear)))
        await until_unanswered(client, count)
      late = [asyncio.create_task(post(client, number)) for number in (0, 1)]
      late.append(asyncio.create_task(post(client, 0, dear)))
      await until_unanswered(client, 8)
      gate.open()
      await asyncio.gather(*waiting)
      exits = [(await task).json()['exit'] for task in late]
      assert exits == [1, 1, 2]
      later = [(await post(client, number)).json()['exit'] for number in range(len(IMAGES))]
      assert set(later) == {1, 2}

  asyncio.run(scenario())


def test_a_overload_budget_that_nothing_meets_is_refused_at_once(network):
  with pytest.raises(ValueError, match='too small'):
    serve.create_app(network, serve.Limits(overload_budget=3.0))


def test_stopping_answers_what_waits(client_of, network, gate):
  expected = network.predict(IMAGES)

  async def scenario():
    service = client_of()
    client = await service.__aenter__()
    gate.shut()
    waiting = [asyncio.create_task(post(client, number)) for number in range(10)]
    await until_unanswered(client, 10)
    stopping = asyncio.create_task(service.__aexit__(None, None, None))
    await asyncio.sleep(0.05)
    assert not stopping.done()
    gate.open()
    for number, response in enumerate(await asyncio.gather(*waiting)):
      assert_answers(response, expected, number)
    await stopping

  asyncio.run(scenario())


def test_who_leaves_takes_no_answer_of_others_along(client_of, network, gate):
  expected = network.predict(IMAGES)

  async def scenario():
    async with client_of() as client:
      gate.shut()
      gate.reached.clear()
      tasks = [asyncio.create_task(post(client, number)) for number in range(12)]
      await reached(gate)
      await until_unanswered(client, 12)
      left = tasks[::3]
      for task in left:
        task.cancel()
      await asyncio.gather(*left, return_exceptions=True)
      gate.open()
      for number, task in enumerate(tasks):
        if task not in left:
          assert_answers(await task, expected, number)
      await until_unanswered(client, 0)

  asyncio.run(scenario())


def test_a_network_that_fails_fails_its_batch_alone(client_of, gate):
  async def scenario():
    async with client_of() as client:
      gate.error = RuntimeError('out of memory')
      assert (await post(client)).status_code == 500
      gate.error = None
      assert (await post(client)).status_code == 200

  asyncio.run(scenario())


def test_metrics_count(client_of):
  async def scenario():
    async with client_of(max_queue=8) as client:
      for number in range(3):
        await post(client, number, f'?budget={CHEAP}')
      await client.post('/predict', files=[('f', ('a.png', PNGS[0]))] * 2)
      await post(client, content=b'x')
      text = (await client.get('/metrics')).text
    for line in (
      'imta_requests_total{status="200"} 4.0',
      'imta_requests_total{status="422"} 1.0',
      'imta_request_seconds_count 5.0',
      'imta_batch_size_sum 5.0',
      'imta_unanswered_images 0.0',
    ):
      assert f'{line}\n' in text
    images = [line for line in text.splitlines() if line.startswith('imta_images_total')]
    assert sum(float(line.split()[-1]) for line in images) == 5

  asyncio.run(scenario())


def test_connections_that_break_do_no_harm(network, gate):
  expected = network.predict(IMAGES)
  app = serve.create_app(network, serve.Limits(max_batch=4))
  head = (
    'POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: {}\r\n\r\n'
  )
  with listening(app) as (port, _), httpx.Client(base_url=URL.format(port), timeout=30) as client:
    gate.shut()
    gate.reached.clear()
    for content, sent in ((PNGS[0], PNGS[0]), (PNGS[1], PNGS[1][:40]), (PNGS[2], b'')):
      with socket.create_connection(('127.0.0.1', port)) as connection:
        connection.sendall(head.format(len(content)).encode() + sent)
        if sent == content:
          assert gate.reached.wait(30)
    gate.open()
    for number in range(4):
      assert_answers(post(client, number), expected, number)


def test_a_server_that_is_told_to_stop_answers_first(network, gate):
  expected = network.predict(IMAGES)
  app = serve.create_app(network, serve.Limits(max_batch=4))
  with listening(app) as (port, server):
    gate.shut()

    async def scenario():
      async with httpx.AsyncClient(base_url=URL.format(port), timeout=30) as client:
        waiting = [asyncio.create_task(post(client, number)) for number in range(6)]
        await until_unanswered(client, 6)
        server.should_exit = True
        await asyncio.sleep(0.3)  # It looks ten times a second.
        gate.open()
        return await asyncio.gather(*waiting)

    for number, response in enumerate(asyncio.run(scenario())):
      assert_answers(response, expected, number)


def test_what_is_missing_is_told_in_a_line():
  code = "import sys; sys.modules['uvicorn'] = None; import imta_jax.serve"
  result = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=60)
  assert result.returncode == 1
  assert result.stderr == "error: uvicorn is not installed: pip install 'imta_jax[serve]'\n"


@pytest.mark.parametrize('port', ['0', '-1', '65536', 'x'])
def test_a_wrong_port_is_refused_in_one_line(port, capsys):
  with pytest.raises(SystemExit):
    serve.main(['network', f'--port={port}'])
  assert capsys.readouterr().err.splitlines()[-1].endswith(f"--port: invalid port value: '{port}'")
