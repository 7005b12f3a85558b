"""The HTTP service under abuse: random requests, bombs, clients that stall, stopping under load."""

import asyncio
import contextlib
import io
import json
import socket
import struct
import threading
import time
import urllib.parse
import zlib

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from imta_jax.adaptive.engine import AdaptiveClassifier, OperatingPoint, runner
from imta_jax.data.image_files import ImageError, read_image

httpx = pytest.importorskip('httpx')
pytest.importorskip('starlette')
pytest.importorskip('uvicorn')

from live_server import listening  # noqa: E402

from imta_jax import serve  # noqa: E402
from imta_jax.serving.decoder import Decoder  # noqa: E402

SHAPE = (8, 8, 1)
CHEAP, DEAR = 1234567.0, 3e6
WAIT = 0.5  # Seconds.


def png(width=8, height=8):
  content = io.BytesIO()
  Image.new('L', (width, height)).save(content, 'PNG')
  return content.getvalue()


GOOD = png()


@pytest.fixture(scope='module')
def network():
  """Two dense stages, which are quick to compile."""

  def first(weights, images):
    features = images.reshape(len(images), -1) / 255
    return features, features @ weights

  def second(weights, carry):
    features, logits = carry
    return (), features @ weights + logits

  random = np.random.default_rng(0)
  weights = [random.normal(size=(64, 3)).astype(np.float32) for _ in range(2)]
  return AdaptiveClassifier(
    [first, second],
    weights,
    (np.inf, -np.inf),
    jax.ShapeDtypeStruct(SHAPE, np.uint8),
    operating_points=[
      OperatingPoint((-np.inf, -np.inf), (1.0, 0.0), 0.5),
      OperatingPoint((np.inf, -np.inf), (0.0, 1.0), 0.9),
    ],
    madds=(CHEAP, DEAR),
    class_names=('ant', 'bee', 'cat'),
    batch_sizes=(1, 4),
  )


@pytest.fixture(scope='module', autouse=True)
def programs_are_timed_once():
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(runner, '_SECONDS_A_TURN', 1e-9)
    yield


def app_of(network, **limits):
  return serve.create_app(network, serve.Limits(max_batch=4, **limits))


@pytest.fixture(scope='module')
def send(network):
  """A function that sends a request (method, url, ...) to a service and waits for its answer."""
  app = app_of(network, max_queue=8, max_body_mb=0.3, max_megapixels=0.01)
  service = app.router.lifespan_context(app)
  client = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url='http://test')
  with asyncio.Runner() as loop:
    loop.run(service.__aenter__())
    yield lambda *args, **options: loop.run(client.request(*args, **options))
    loop.run(service.__aexit__(None, None, None))


# Decoding


def decode_with(read, max_pixels, *requests):
  """Decodes requests at the same time; a request is a list of (width, height)."""

  async def scenario():
    decoder = Decoder(read, max_pixels)
    contents = [[png(*size) for size in sizes] for sizes in requests]
    try:
      return await asyncio.gather(*map(decoder.decode, contents))
    finally:
      decoder.close()

  return asyncio.run(asyncio.wait_for(scenario(), 30))


class Gauge:
  """Reads the size of an image; notes how many pixels are read at the same time at most."""

  def __init__(self):
    self.most, self.order = 0, []
    self._pixels, self._lock = 0, threading.Lock()

  def __call__(self, file):
    width, height = Image.open(file).size
    with self._lock:
      self._pixels += width * height
      self.most = max(self.most, self._pixels)
      self.order.append((width, height))
    time.sleep(0.01)
    with self._lock:
      self._pixels -= width * height
    return width, height


def test_images_in_decoding_have_a_bounded_number_of_pixels():
  gauge = Gauge()
  sizes = [(20, 20), (2, 2), (10, 10), (20, 15), (1, 1), (20, 20)]
  assert decode_with(gauge, 400, sizes) == [sizes]
  assert gauge.most <= 400
  assert decode_with(gauge, 400, *[sizes] * 5) == [sizes] * 5
  assert 400 < gauge.most <= 800


def test_a_request_waits_for_few_images_of_another():
  gauge = Gauge()
  decode_with(gauge, 400, [(20, 20)] * 20, [(20, 19)] * 20, [(20, 18)], [(2, 2)])
  assert gauge.order.index((20, 18)) < 6
  assert gauge.order.index((2, 2)) < 6


def test_a_small_image_is_decoded_while_a_large_one_is():
  small_is_done = threading.Event()

  def read(file):
    if Image.open(file).width == 2:
      small_is_done.set()
    else:
      assert small_is_done.wait(20)

  decode_with(read, 400, [(20, 20)] * 20, [(2, 2)])
  assert small_is_done.is_set()


def test_a_request_that_is_cancelled_leaves_its_room_to_others():
  async def scenario():
    decoder = Decoder(lambda file: time.sleep(0.01), 400)
    for _ in range(5):
      with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(decoder.decode([png(20, 20)] * 100), 0.03)
    await asyncio.wait_for(decoder.decode([png(20, 20)] * 3), 20)
    decoder.close()

  asyncio.run(scenario())


def test_an_image_that_cannot_be_read_fails_alone():
  def read(file):
    return read_image(file, SHAPE, 'none', 400)

  async def scenario():
    decoder = Decoder(read, 400)
    results = await decoder.decode([b'none', GOOD, GOOD[:45], png(21, 20)])
    decoder.close()
    return results

  none, good, cut, large = asyncio.run(scenario())
  assert good.shape == SHAPE
  assert all(isinstance(error, ImageError) for error in (none, cut, large))
  assert 'exceeds 400 pixels' in str(large)


# Bombs


def png_of(width, height, *chunks):
  """A PNG whose header claims a size, with further chunks (kind, content)."""
  header = struct.pack('>IIBBBBB', width, height, 8, 0, 0, 0, 0)
  rows = zlib.compress(bytes(9 * 8))
  content = b'\x89PNG\r\n\x1a\n'
  for kind, data in ((b'IHDR', header), *chunks, (b'IDAT', rows), (b'IEND', b'')):
    content += struct.pack('>I', len(data)) + kind + data
    content += struct.pack('>I', zlib.crc32(kind + data))
  return content


def animation(frames):
  content = io.BytesIO()
  first, *others = (Image.new('L', (8, 8), index % 256) for index in range(frames))
  first.save(content, 'GIF', save_all=True, append_images=others)
  return content.getvalue()


def tiff(**changes):
  """An 8x8 TIFF of which tags were changed, name=(type, count, value)."""
  tags = {
    'width': (256, 4, 1, 8),
    'height': (257, 4, 1, 8),
    'bits': (258, 3, 1, 8),
    'compression': (259, 3, 1, 1),
    'colors': (262, 3, 1, 1),
    'offset': (273, 4, 1, 8),
    'samples': (277, 3, 1, 1),
    'rows': (278, 4, 1, 8),
    'bytes': (279, 4, 1, 64),
  }
  for name, change in changes.items():
    tags[name] = (tags[name][0], *change)
  entries = b''.join(struct.pack('<HHII', *tag) for tag in tags.values())
  return b'II*\0\x08\0\0\0' + struct.pack('<H', len(tags)) + entries + bytes(4 + 64)


def jpeg(scans):
  """A progressive JPEG, whose last scan is repeated."""
  content = io.BytesIO()
  Image.new('L', (64, 64), 99).save(content, 'JPEG', progressive=True)
  before, last, _ = content.getvalue().rpartition(b'\xff\xda')
  return before + scans * (last + content.getvalue()[len(before) + 2 : -2]) + b'\xff\xd9'


TEXT = (b'zTXt', b'a\0\0' + zlib.compress(bytes(50_000_000), 9))
BOMBS = {
  'a header that claims 2.5 gigapixels': (png_of(50000, 50000), 422, 'too large'),
  'a text of 50 MB': (png_of(8, 8, TEXT), 422, 'cannot be read'),
  'an animation of 1000 frames': (animation(1000), 200, ''),
  'a JPEG of 60 scans': (jpeg(60), 200, ''),
  'a JPEG of 5000 scans': (jpeg(5000), 422, 'scans'),
  'a TIFF as such': (tiff(), 200, ''),
  'a TIFF of 4 billion strips': (tiff(offset=(4, 2**32 - 1, 8)), 422, ''),
  'a TIFF of 4 billion bytes': (tiff(bytes=(4, 1, 2**32 - 1)), 200, ''),
  'a TIFF of 2 billion columns': (tiff(width=(4, 1, 2**31)), 422, 'too large'),
  'a TIFF of 60,000 samples per pixel': (tiff(samples=(3, 1, 60000)), 422, 'not an image'),
}


@pytest.mark.parametrize('name', BOMBS)
def test_bombs_are_refused_before_they_go_off(name, send):
  content, status, expected = BOMBS[name]
  assert len(content) < 100_000
  start = time.monotonic()
  response = send('POST', '/predict', content=content, headers={'Content-Type': 'image/x'})
  assert response.status_code == status, response.text
  if status != 200:
    assert expected in response.json()['error']
  assert time.monotonic() - start < 5


# Random requests


def part(name, filename, content):
  disposition = f'form-data; name="{name}"' + (f'; filename="{filename}"' if filename else '')
  return f'Content-Disposition: {disposition}\r\n\r\n'.encode() + content


def form(parts, boundary=b'frontier'):
  delimiter = b'--' + boundary
  return b''.join(delimiter + b'\r\n' + p + b'\r\n' for p in parts) + delimiter + b'--\r\n'


IMAGES = st.sampled_from([GOOD, tiff(), animation(3), png_of(8, 8), b''])
NAMES = st.text(st.characters(codec='utf-8', exclude_characters='\r\n"'), max_size=8)
PARTS = st.builds(part, NAMES, NAMES, IMAGES | st.binary(max_size=60))
FORMS = st.lists(PARTS, max_size=10).map(form)
NESTED = st.lists(FORMS.map(lambda inner: part('f', 'f', inner)), max_size=3).map(form)


@st.composite
def corrupt(draw, contents):
  """Contents of which some bytes were changed or removed, or that were cut."""
  content = bytearray(draw(contents))
  for _ in range(draw(st.integers(0, 3))):
    start = draw(st.integers(0, len(content)))
    end = draw(st.integers(start, len(content)) | st.just(start + 1))
    content[start:end] = draw(st.binary(max_size=4) | st.sampled_from([b'\r\n', b'--frontier']))
  return bytes(content)


TYPES = st.sampled_from(
  [
    'image/png',
    'application/octet-stream',
    'multipart/form-data',
    'multipart/form-data; boundary=',
    'multipart/form-data; boundary=frontier; charset=nothing',
    'multipart/form-data; boundary=' + 'x' * 300,
    'multipart/mixed; boundary=frontier',
    'text/plain',
  ]
) | st.text(st.characters(codec='latin-1', exclude_categories=['Cc']), max_size=30)
LIKELY = st.just('multipart/form-data; boundary=frontier')
BODIES = st.binary(max_size=300) | corrupt(IMAGES) | corrupt(FORMS) | corrupt(NESTED)
NUMBERS = st.floats().map(str) | st.integers().map(str) | st.text(max_size=5)
QUERIES = st.lists(
  st.tuples(
    st.sampled_from(['budget', 'latency_ms', 'max_loss', '']) | st.text(max_size=5), NUMBERS
  ),
  max_size=2,
)
RAW_QUERIES = st.binary(max_size=12).map(lambda raw: ''.join(f'%{byte:02x}' for byte in raw))
STABLE = settings(derandomize=True, deadline=None, max_examples=100, database=None)


def assert_answered_or_refused(response):
  if response.status_code == 200:
    body = response.json()
    answers = body.get('answers', [body])
    assert answers
    for answer in answers:
      assert answer['class'] in ('ant', 'bee', 'cat') and answer['exit'] in (1, 2)
  else:
    assert 400 <= response.status_code < 500 or response.status_code == 503
    assert '\n' not in response.text
    error = json.loads(response.text)['error']
    assert isinstance(error, str) and error


@STABLE
@given(body=BODIES, content_type=TYPES | LIKELY)
def test_random_bodies_are_answered_or_refused(send, body, content_type):
  headers = {'Content-Type': content_type.encode('latin-1')}
  assert_answered_or_refused(send('POST', '/predict', content=body, headers=headers))


@STABLE
@given(body=corrupt(FORMS | NESTED))
def test_random_forms_are_answered_or_refused(send, body):
  headers = {'Content-Type': 'multipart/form-data; boundary=frontier'}
  assert_answered_or_refused(send('POST', '/predict', content=body, headers=headers))


@STABLE
@given(query=QUERIES | RAW_QUERIES)
def test_random_queries_are_answered_or_refused(send, query):
  headers = {'Content-Type': 'image/png'}
  response = send('POST', '/predict', params=query, content=GOOD, headers=headers)
  assert_answered_or_refused(response)


@STABLE
@given(
  method=st.sampled_from(['GET', 'PUT', 'DELETE', 'PATCH', 'OPTIONS', 'TRACE', 'POST', 'NONE']),
  path=st.sampled_from(['/predict']) | st.text(max_size=9),
)
def test_random_paths_and_methods_are_answered_or_refused(send, method, path):
  url = path if path == '/predict' else f'/x{urllib.parse.quote(path)}'
  assert_answered_or_refused(send(method, url))


@pytest.mark.parametrize('query', ['budget=5', 'latency_ms=1e-9', 'budget=nan'])
def test_the_least_budget_can_be_pasted_back(send, query):
  post = {'content': GOOD, 'headers': {'Content-Type': 'image/png'}}
  response = send('POST', f'/predict?{query}', **post)
  assert response.status_code == 422
  message, least = response.json()['error'].rsplit(' ', 1)
  assert message == f'{query}: too small: the least is'
  name, _ = query.split('=')
  answer = send('POST', f'/predict?{name}={least}', **post)
  assert answer.status_code == 200
  if name == 'budget':
    assert answer.json()['exit'] == 1


# Clients that keep the server waiting


@pytest.fixture(scope='module')
def port(network):
  with listening(app_of(network, max_wait=WAIT, max_body_mb=0.1), 8, WAIT) as (port, _):
    yield port


@contextlib.contextmanager
def connected(port):
  with socket.create_connection(('127.0.0.1', port), timeout=20) as connection:
    yield connection


def read_all(connection):
  """What a server sends until it closes the connection."""
  content = b''
  while received := connection.recv(65536):
    content += received
  return content


def head(length, content_type='image/png'):
  return (
    'POST /predict HTTP/1.1\r\nHost: x\r\n'
    f'Content-Type: {content_type}\r\nContent-Length: {length}\r\n\r\n'
  ).encode()


HEALTH = b'GET /health HTTP/1.1\r\nHost: x\r\n\r\n'
STALLED = {
  'nothing': (b'', b''),
  'half a header': (head(5)[:30], b''),
  'a request and half a header': (HEALTH + HEALTH[:20], b'HTTP/1.1 200 '),
  'half a body': (head(len(GOOD)) + GOOD[:20], b'HTTP/1.1 408 '),
  'half a form': (
    head(999, 'multipart/form-data; boundary=frontier') + form([part('f', 'f', GOOD)])[:50],
    b'HTTP/1.1 408 ',
  ),
  'half of a body that is refused': (head(999, 'text/plain') + b'hello', b'HTTP/1.1 415 '),
}


@pytest.mark.parametrize('name', STALLED)
def test_a_client_that_stalls_is_disconnected(name, port):
  sent, expected = STALLED[name]
  start = time.monotonic()
  with connected(port) as connection:
    connection.sendall(sent)
    received = read_all(connection)
  assert received.startswith(expected) and bool(received) == bool(expected)
  assert 0.9 * WAIT < time.monotonic() - start < 10 * WAIT


def test_a_connection_lasts_as_long_as_it_is_used(port):
  start = time.monotonic()
  with connected(port) as connection:
    while time.monotonic() - start < 2 * WAIT:
      connection.sendall(HEALTH)
      assert connection.recv(65536).startswith(b'HTTP/1.1 200 ')
      time.sleep(WAIT / 10)
    connection.sendall(HEALTH[:20])
    assert read_all(connection) == b''
  assert time.monotonic() - start < 12 * WAIT


@pytest.mark.parametrize('sent', [head(5)[:30], head(999)])
def test_a_client_that_drips_is_disconnected(sent, port):
  start = time.monotonic()
  with connected(port) as connection, contextlib.suppress(OSError):
    connection.sendall(sent)
    while time.monotonic() - start < 20 * WAIT:
      connection.sendall(b'a')
      time.sleep(WAIT / 10)
  assert time.monotonic() - start < 10 * WAIT


def test_a_body_without_end_is_cut_off(port):
  start = time.monotonic()
  with connected(port) as connection, contextlib.suppress(OSError):
    connection.sendall(
      b'POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\n'
      b'Transfer-Encoding: chunked\r\n\r\n'
    )
    while time.monotonic() - start < 20 * WAIT:
      connection.sendall(b'1000\r\n' + bytes(4096) + b'\r\n')
  assert time.monotonic() - start < 10 * WAIT


def test_a_client_that_does_not_read_is_disconnected(port):
  request = head(0, 'x' * 10000)  # Its answer is as long.
  start = time.monotonic()
  with connected(port) as connection, pytest.raises(ConnectionError):
    while time.monotonic() - start < 20:
      connection.sendall(request)


@pytest.mark.parametrize('num_requests', [1, 3])
def test_a_client_that_closes_its_writing_side_gets_its_answers(num_requests, port):
  with connected(port) as connection:
    connection.sendall((head(len(GOOD)) + GOOD) * num_requests)
    connection.shutdown(socket.SHUT_WR)
    start = time.monotonic()
    assert read_all(connection).count(b'"label"') == 4 * num_requests  # One, and each of its top.
  assert time.monotonic() - start < WAIT


def test_connections_are_bounded(port):
  with contextlib.ExitStack() as stack:
    connections = [stack.enter_context(connected(port)) for _ in range(8)]
    for connection in connections:
      connection.sendall(HEALTH)
      assert connection.recv(65536).startswith(b'HTTP/1.1 200 ')
    with connected(port) as further:
      assert read_all(further) == b''
    connections[0].sendall(HEALTH)
    assert connections[0].recv(65536).startswith(b'HTTP/1.1 200 ')
  time.sleep(0.1)
  with connected(port) as connection:
    connection.sendall(HEALTH)
    assert connection.recv(65536).startswith(b'HTTP/1.1 200 ')


def test_requests_in_memory_are_bounded(network):
  app = app_of(network, max_body_mb=0.01)
  with listening(app) as (port, _), contextlib.ExitStack() as stack:
    halves = [stack.enter_context(connected(port)) for _ in range(20)]
    for connection in halves:
      connection.sendall(head(9999) + bytes(9000))
    refused = [c for c in halves if is_readable_soon(c)]
    assert 2 <= len(refused) <= 4  # 16 times 10 kB fit 17 times 9 kB.
    for connection in refused:
      assert connection.recv(65536).startswith(b'HTTP/1.1 503 ')
    for connection in halves:
      connection.close()
    time.sleep(0.2)
    with connected(port) as connection:
      connection.sendall(head(len(GOOD)) + GOOD)
      assert connection.recv(65536).startswith(b'HTTP/1.1 200 ')


def is_readable_soon(connection):
  connection.settimeout(0.1)
  try:
    return bool(connection.recv(1, socket.MSG_PEEK))
  except TimeoutError:
    return False


def test_a_server_that_stops_answers_requests_on_their_way(network):
  """The next request on a connection is answered, and its client told to connect no more."""
  with listening(app_of(network)) as (port, server), contextlib.ExitStack() as stack:
    connections = [stack.enter_context(connected(port)) for _ in range(8)]
    for connection in connections:
      connection.sendall(HEALTH)
      assert b'connection: close' not in connection.recv(65536)
    *active, half, idle = connections
    half.sendall(head(len(GOOD)) + GOOD[:20])
    server.should_exit = True
    deadline = time.monotonic() + 10
    while is_open(port):
      assert time.monotonic() < deadline
    for connection in active:
      connection.sendall(head(len(GOOD)) + GOOD)
    half.sendall(GOOD[20:])
    for connection in (*active, half):
      answer = read_all(connection)
      assert answer.startswith(b'HTTP/1.1 200 ') and b'"label"' in answer
      assert b'\r\nconnection: close\r\n' in answer
    assert read_all(idle) == b''


def is_open(port):
  try:
    socket.create_connection(('127.0.0.1', port)).close()
  except ConnectionError:
    return False
  return True
