"""Classifies images over HTTP. Needs the extra `serve`.

    python -m imta_jax.serve runs/mnist5k --port=8000
    curl --data-binary @digits/7/0.png -H 'Content-Type: image/png' localhost:8000/predict
    curl -F file=@digits/7/0.png -F file=@digits/4/0.png 'localhost:8000/predict?budget=2e6'

POST /predict   an image, or several as multipart/form-data; budget= (multiply-adds) or
                latency_ms=, both averages per image, apply to this request alone
GET  /health    200 once the network is compiled
GET  /metrics   for Prometheus

One thread runs the network on all images that arrived while it was busy, whatever their budgets.
Requests are refused with status 503 while too many images are pending. On SIGTERM, pending requests
are answered before the server exits.
"""

import argparse
import asyncio
import collections
import contextlib
import dataclasses
import functools
import gc
import io
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

try:
  import prometheus_client
  import uvicorn
  from python_multipart.multipart import parse_options_header
  from starlette.applications import Starlette
  from starlette.exceptions import HTTPException
  from starlette.requests import Request
  from starlette.responses import JSONResponse, Response
  from starlette.routing import Route
  from starlette.types import Message, Receive
except ModuleNotFoundError as missing:
  sys.exit(f"error: {missing.name} is not installed: pip install 'imta_jax[serve]'")

from imta_jax import command_line
from imta_jax.adaptive.engine import BATCH_SIZES, AdaptiveClassifier
from imta_jax.command_line import (
  add_network_arguments,
  choices,
  describe,
  open_classifier,
  positive,
)
from imta_jax.compilation_cache import set_up_compilation_cache
from imta_jax.data.image_files import ImageError, read_image
from imta_jax.errors import UsageError

# Number of classes that an answer names, the most probable first.
_TOP = 5
# How long pending answers may take once the server is told to stop.
_SECONDS_TO_STOP = 30
# The closing boundary of a form and what may follow it.
_TAIL_BYTES = 4096

_LATENCY_BUCKETS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)


@dataclasses.dataclass(frozen=True)
class Limits:
  """Limits of a server.

  Attributes:
    max_batch: Maximum number of images per batch.
    max_delay_ms: How long an image may wait for others, in milliseconds.
    max_queue: Maximum number of pending images.
    max_body_mb: Maximum size of a request, in megabytes.
    max_megapixels: Maximum size of an image.
    overload_budget: Average multiply-adds per image for requests that name no budget, while more
      than half of max_queue is pending. None changes no budget.
  """

  max_batch: int = 64
  max_delay_ms: float = 2.0
  max_queue: int = 256
  max_body_mb: float = 16.0
  max_megapixels: float = 32.0
  overload_budget: float | None = None


def main(arguments: Sequence[str] | None = None) -> None:
  """Runs the command line.

  Raises:
    UsageError: If there is no such network, or no thresholds are within a budget.
  """
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add_network_arguments(parser)
  parser.add_argument(
    '--host', default='127.0.0.1', help='default: 127.0.0.1, reachable from this machine only'
  )
  parser.add_argument(
    '--port', type=int, choices=range(1, 65536), metavar='PORT', default=8000, help='default: 8000'
  )
  for name, number, text in (
    ('max_batch', int, 'maximum number of images per batch'),
    ('max_delay_ms', float, 'how long an image may wait for others, in milliseconds'),
    ('max_queue', int, 'maximum number of pending images; more are refused with status 503'),
    ('max_body_mb', float, 'maximum size of a request, in megabytes'),
    ('max_megapixels', float, 'maximum size of an image'),
  ):
    default = getattr(Limits, name)
    parser.add_argument(
      f'--{name}', type=positive(number), default=default, help=f'{text}; default: {default:g}'
    )
  parser.add_argument(
    '--overload_budget',
    type=positive(float),
    help='average multiply-adds per image for requests that name no budget, while more than half '
    'of --max_queue is pending; default: no other budget',
  )
  options = parser.parse_args(arguments)
  limits = Limits(**{f.name: getattr(options, f.name) for f in dataclasses.fields(Limits)})
  set_up_compilation_cache()
  classifier = open_classifier(options.network, **choices(options))
  try:
    app = create_app(classifier, limits)
  except ValueError as error:
    raise UsageError(f'--overload_budget: {error}') from error
  uvicorn.run(
    app,
    host=options.host,
    port=options.port,
    access_log=False,
    timeout_graceful_shutdown=_SECONDS_TO_STOP,
  )


def create_app(classifier: AdaptiveClassifier, limits: Limits = Limits()) -> Starlette:
  """Makes the service, an ASGI application.

  Args:
    classifier: A classifier of uint8 images, with class names.
    limits: See `Limits`.

  Raises:
    ValueError: If nothing lies within the crowded budget.
  """
  service = _Service(classifier, limits)
  return Starlette(
    routes=[
      Route('/predict', service.predict, methods=['POST']),
      Route('/health', service.health),
      Route('/metrics', service.metrics),
    ],
    exception_handlers={HTTPException: _refusal},
    lifespan=service.run,
  )


class Batcher:
  """Collects images into batches, which its own thread classifies."""

  def __init__(
    self,
    classifier: AdaptiveClassifier,
    max_batch: int,
    max_delay: float,
    observe: Callable[[int], None],
  ):
    """Starts the thread.

    Args:
      classifier: What classifies the images.
      max_batch: Maximum number of images per batch.
      max_delay: Seconds that an image may wait for others.
      observe: Called with the size of each batch.
    """
    self._classifier, self._observe = classifier, observe
    self._max_batch, self._max_delay = max_batch, max_delay
    self._waiting: collections.deque = collections.deque()
    self._closed = False
    self._changed = threading.Condition()
    self._thread = threading.Thread(target=self._work, daemon=True)
    self._thread.start()

  def submit(self, images: Sequence[np.ndarray], thresholds: np.ndarray) -> list[Future]:
    """Queues images.

    Args:
      images: Of the classifier's shape and type.
      thresholds: [exit], for these images.

    Returns:
      [image], futures of (probabilities [class], exit counted from 0).

    Raises:
      RuntimeError: After `close`.
    """
    futures, now = [Future() for _ in images], time.monotonic()
    with self._changed:
      if self._closed:
        raise RuntimeError('closed')
      for image, future in zip(images, futures, strict=True):
        self._waiting.append((image, thresholds, future, now))
      self._changed.notify()
    return futures

  def close(self) -> None:
    """Answers all pending images, then ends the thread."""
    with self._changed:
      self._closed = True
      self._changed.notify()
    self._thread.join()

  def _work(self):
    while batch := self._take():
      # Nobody waits for cancelled requests.
      batch = [entry for entry in batch if entry[2].set_running_or_notify_cancel()]
      if not batch:
        continue
      images, thresholds, futures, _ = zip(*batch, strict=True)
      self._observe(len(images))
      try:
        for part in self._classifier.predict_as_decided(np.stack(images), np.stack(thresholds)):
          for index, *answer in zip(part.indices, part.probabilities, part.exits, strict=True):
            futures[index].set_result(tuple(answer))
      except Exception as error:
        for future in futures:
          if not future.done():
            future.set_exception(error)

  def _take(self):
    """The next batch; an empty one at the end."""
    with self._changed:
      self._changed.wait_for(lambda: self._waiting or self._closed)
      if self._waiting:
        rest = self._waiting[0][-1] + self._max_delay - time.monotonic()
        self._changed.wait_for(
          lambda: len(self._waiting) >= self._max_batch or self._closed, timeout=rest
        )
      count = min(len(self._waiting), self._max_batch)
      return [self._waiting.popleft() for _ in range(count)]


class _Service:
  """The routes."""

  def __init__(self, classifier, limits):
    self._classifier, self._limits = classifier, limits
    self._unanswered = 0  # Images; only the event loop's thread counts them.
    self._thresholds = functools.lru_cache(maxsize=256)(self._find_thresholds)
    if limits.overload_budget is not None:
      self._thresholds('budget', limits.overload_budget)

    self._registry = registry = prometheus_client.CollectorRegistry()
    self._requests = prometheus_client.Counter(
      'imta_requests', 'Prediction requests, by status.', ['status'], registry=registry
    )
    self._images = prometheus_client.Counter(
      'imta_images', 'Classified images, by exit.', ['exit'], registry=registry
    )
    self._seconds = prometheus_client.Histogram(
      'imta_request_seconds',
      'Seconds from the header of a prediction request to its answer.',
      buckets=_LATENCY_BUCKETS,
      registry=registry,
    )
    self._batch_sizes = prometheus_client.Histogram(
      'imta_batch_size', 'Images per batch.', buckets=BATCH_SIZES, registry=registry
    )
    prometheus_client.Gauge(
      'imta_unanswered_images', 'Pending images.', registry=registry
    ).set_function(lambda: self._unanswered)

  @contextlib.asynccontextmanager
  async def run(self, app: Starlette) -> AsyncIterator[None]:
    """Compiles the network; lasts as long as the server."""
    del app
    limits = self._limits
    await asyncio.to_thread(self._classifier.compile, limits.max_batch)
    self._costs = await asyncio.to_thread(self._classifier.measure_costs)
    self._batcher = Batcher(
      self._classifier, limits.max_batch, limits.max_delay_ms / 1000, self._batch_sizes.observe
    )
    self._readers = ThreadPoolExecutor()
    # Garbage collection over all that tracing has left would stop the server for 0.2 s each time.
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
    while self._unanswered:
      await asyncio.sleep(0.01)
    await asyncio.to_thread(self._batcher.close)
    self._readers.shutdown()

  async def health(self, request: Request) -> Response:
    """Says that the server is ready: it listens once the network is compiled."""
    del request
    return JSONResponse({'status': 'ok'})

  async def metrics(self, request: Request) -> Response:
    """Counts, in Prometheus' text format."""
    del request
    content = prometheus_client.generate_latest(self._registry)
    return Response(content, media_type=prometheus_client.CONTENT_TYPE_LATEST)

  async def predict(self, request: Request) -> Response:
    """Classifies the images of a request."""
    start, status = time.perf_counter(), 500
    try:
      response = await self._predict(request)
      status = response.status_code
      return response
    except HTTPException as error:
      status = error.status_code
      raise
    finally:
      self._requests.labels(status).inc()
      self._seconds.observe(time.perf_counter() - start)

  async def _predict(self, request):
    thresholds = self._requested_thresholds(request.query_params)
    self._check_room(1)  # Before a body is read for nothing.
    is_form, files = await self._receive(request)
    self._check_room(len(files))
    if thresholds is None:
      thresholds = self._default_thresholds()
    self._unanswered += len(files)
    try:
      images = await self._read(files)
      futures = self._batcher.submit(images, thresholds)
      answers = await asyncio.gather(*map(asyncio.wrap_future, futures))
    finally:
      self._unanswered -= len(files)
    described = [
      {'file': name, **describe(*answer, self._classifier.class_names, _TOP)}
      for (name, _), answer in zip(files, answers, strict=True)
    ]
    for answer in described:
      self._images.labels(answer['exit']).inc()
    if is_form:
      return JSONResponse({'answers': described})
    del described[0]['file']
    return JSONResponse(described[0])

  def _requested_thresholds(self, query):
    """The thresholds that a request asks for, if it does."""
    if not query:
      return None
    (name, text), *others = query.multi_items()
    if others or name not in ('budget', 'latency_ms', 'max_loss'):
      expected = 'expected one of budget=, latency_ms= and max_loss='
      raise HTTPException(422, f'query {str(query)!r}: {expected}')
    try:
      limit = float(text)
    except ValueError:
      raise HTTPException(422, f'{name}={text!r} is no number') from None
    try:
      return self._thresholds(name, limit)
    except ValueError as error:
      raise HTTPException(422, f'{name}={text}: {error}') from error

  def _find_thresholds(self, name, limit):
    if name == 'budget':
      return self._classifier.thresholds_within(limit, self._classifier.madds)
    if name == 'max_loss':
      return self._classifier.thresholds_losing(limit)
    return self._classifier.thresholds_within(limit, 1000 * self._costs)

  def _default_thresholds(self):
    overload_budget = self._limits.overload_budget
    if overload_budget is not None and self._unanswered > self._limits.max_queue / 2:
      return self._thresholds('budget', overload_budget)
    return self._classifier.thresholds

  def _check_room(self, count):
    max_queue = self._limits.max_queue
    if count > max_queue:
      raise HTTPException(413, f'{count} images in a request: at most {max_queue} are accepted')
    if self._unanswered + count > max_queue:
      raise HTTPException(
        503, f'{self._unanswered} images are pending: try again later', {'Retry-After': '1'}
      )

  async def _receive(self, request):
    """Whether a request is a form, and its (name, content) pairs."""
    content_type = request.headers.get('content-type', '')
    kind = content_type.lower()
    tail = bytearray()
    receive = _bounded(request.receive, self._limits.max_body_mb, tail)
    request = Request(request.scope, receive)
    if kind.startswith('multipart/form-data'):
      async with request.form(max_files=self._limits.max_queue, max_fields=0) as form:
        files = [(file.filename or field, await file.read()) for field, file in form.multi_items()]
      if b'--' + parse_options_header(content_type)[1][b'boundary'] + b'--' not in tail:
        # The parser takes what has come by then for the whole form.
        raise HTTPException(400, 'the form ends before its closing boundary')
      if not files:
        raise HTTPException(422, 'the form has no file')
      return True, files
    if kind.startswith(('image/', 'application/octet-stream')):
      return False, [('the image', await request.body())]
    raise HTTPException(
      415, f'content type {content_type!r}: send image/png or the like, or multipart/form-data'
    )

  async def _read(self, files):
    """Decodes files side by side."""
    read = functools.partial(
      read_image,
      shape=self._classifier.image.shape,
      crop=self._classifier.preprocessing.get('crop', 'none'),
      max_pixels=self._limits.max_megapixels * 1e6,
    )
    loop = asyncio.get_running_loop()
    images = await asyncio.gather(
      *(loop.run_in_executor(self._readers, read, io.BytesIO(content)) for _, content in files),
      return_exceptions=True,
    )
    for (name, _), image in zip(files, images, strict=True):
      if isinstance(image, ImageError):
        raise HTTPException(422, f'{name}: {image}')
      if isinstance(image, BaseException):
        raise image
    return images


def _bounded(receive: Receive, megabytes: float, tail: bytearray) -> Receive:
  """Receives a request until its body is too large or its client has disconnected.

  Args:
    receive: Receives a part of it.
    megabytes: Maximum size of the body.
    tail: Is filled with the end of the body.
  """
  received = 0

  async def receive_some() -> Message:
    nonlocal received
    message = await receive()
    received += len(message.get('body', b''))
    tail.extend(message.get('body', b''))
    del tail[:-_TAIL_BYTES]
    if received > 1e6 * megabytes:
      raise HTTPException(413, f'the request is too large: at most {megabytes:g} MB are accepted')
    if message['type'] == 'http.disconnect':
      raise HTTPException(400, 'the client has disconnected')
    return message

  return receive_some


async def _refusal(request, error):
  del request
  return JSONResponse({'error': error.detail}, error.status_code, error.headers)


if __name__ == '__main__':
  command_line.run(main)
