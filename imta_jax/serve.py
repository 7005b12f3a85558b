"""Classifies images over HTTP. Needs the extra `serve`.

    python -m imta_jax.serve runs/mnist5k --port=8000
    curl --data-binary @digits/7/0.png -H 'Content-Type: image/png' localhost:8000/predict
    curl -F file=@digits/7/0.png -F file=@digits/4/0.png 'localhost:8000/predict?budget=2e6'

POST /predict   an image, or several as multipart/form-data; budget= (multiply-adds) or
                latency_ms=, both averages per image, or max_loss=, with the probability
                --confidence, apply to this request alone
GET  /health    200 once the network is compiled
GET  /metrics   for Prometheus

One thread runs the network on all images that arrived while it was busy, whatever their budgets.
Requests are refused with status 503 while too many images are pending. A request of many or large
images does not hold up others, and clients that keep the server waiting are disconnected. On
SIGTERM, pending requests are answered before the server exits.
"""

import argparse
import asyncio
import contextlib
import dataclasses
import functools
import gc
import sys
import time
from collections.abc import AsyncIterator, Sequence

try:
  import prometheus_client
  import python_multipart  # noqa: F401
  import uvicorn  # noqa: F401
  from starlette.applications import Starlette
  from starlette.exceptions import HTTPException
  from starlette.requests import Request
  from starlette.responses import JSONResponse, Response
  from starlette.routing import Route
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
from imta_jax.data.image_files import MAX_PIXELS, ImageError, read_image
from imta_jax.errors import UsageError
from imta_jax.runtime import set_up_compilation_cache
from imta_jax.serving.batcher import Batcher
from imta_jax.serving.decoder import Decoder
from imta_jax.serving.receiver import Receiver
from imta_jax.serving.server import Server

# Number of classes that an answer names, the most probable first.
_TOP = 5

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
    max_connections: Maximum number of open connections.
    max_wait: How long the server waits for the header of a request, for its body, and for the
      client to read its answer, in seconds each.
    overload_budget: Average multiply-adds per image for requests that name no budget, while more
      than half of max_queue is pending. None changes no budget.
    confidence: The probability with which max_loss= of a request is kept.
  """

  max_batch: int = 64
  max_delay_ms: float = 2.0
  max_queue: int = 256
  max_body_mb: float = 16.0
  max_megapixels: float = 32.0
  max_connections: int = 512
  max_wait: float = 30.0
  overload_budget: float | None = None
  confidence: float = 0.95


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
  parser.add_argument('--port', type=_port, default=8000, help='from 1 to 65535; default: 8000')
  for name, number, text in (
    ('max_batch', int, 'maximum number of images per batch'),
    ('max_delay_ms', float, 'how long an image may wait for others, in milliseconds'),
    ('max_queue', int, 'maximum number of pending images; more are refused with status 503'),
    ('max_body_mb', float, 'maximum size of a request, in megabytes'),
    ('max_megapixels', float, 'maximum size of an image'),
    ('max_connections', int, 'maximum number of open connections; further ones are closed'),
    (
      'max_wait',
      float,
      'how long to wait for the header of a request, for its body, and for the client to read its '
      'answer, in seconds each',
    ),
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
  Server(app, limits.max_connections, limits.max_wait, host=options.host, port=options.port).run()


def _port(text: str) -> int:
  if not 0 < (number := int(text)) < 65536:
    raise ValueError
  return number


_port.__name__ = 'port'  # For argparse's messages.


def create_app(classifier: AdaptiveClassifier, limits: Limits = Limits()) -> Starlette:
  """Makes the service, an ASGI application.

  Args:
    classifier: A classifier of uint8 images, with class names.
    limits: See `Limits`.

  Raises:
    ValueError: If nothing lies within the overload budget.
  """
  service = _Service(classifier, limits)
  return Starlette(
    routes=[
      Route('/predict', service.predict, methods=['POST']),
      Route('/health', service.health),
      Route('/metrics', service.metrics),
    ],
    exception_handlers={HTTPException: _refusal, Exception: _failure},
    lifespan=service.run,
  )


class _Service:
  """The routes."""

  def __init__(self, classifier, limits):
    self._classifier, self._limits = classifier, limits
    self._unanswered = 0  # Images; only the event loop's thread counts them.
    self._receiver = Receiver(limits.max_queue, limits.max_body_mb, limits.max_wait)
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
    if (validation := self._classifier.validation) is not None:
      _ = validation.loss_counts  # Takes long once, then max_loss= takes no time.
    self._costs = await asyncio.to_thread(self._classifier.measure_costs)
    self._batcher = Batcher(
      self._classifier, limits.max_batch, limits.max_delay_ms / 1000, self._batch_sizes.observe
    )
    max_pixels = min(int(1e6 * limits.max_megapixels), MAX_PIXELS)
    read = functools.partial(
      read_image,
      shape=self._classifier.image.shape,
      crop=self._classifier.preprocessing.get('crop', 'none'),
      max_pixels=max_pixels,
    )
    self._decoder = Decoder(read, max_pixels)
    # Garbage collection over all that tracing has left would stop the server for 0.2 s each time.
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
    while self._unanswered:
      await asyncio.sleep(0.01)
    await asyncio.to_thread(self._batcher.close)
    self._decoder.close()

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
    async with self._receiver.receive(request) as (is_form, files):
      answers = await self._answer(files, thresholds)
    if is_form:
      return JSONResponse({'answers': answers})
    del answers[0]['file']
    return JSONResponse(answers[0])

  async def _answer(self, files, thresholds):
    """Describes the answers for files, pairs (name, content)."""
    self._check_room(len(files))
    if thresholds is None:
      thresholds = self._default_thresholds()
    self._unanswered += len(files)
    try:
      images = await self._decode(files)
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
    return described

  async def _decode(self, files):
    images = await self._decoder.decode([content for _, content in files])
    for (name, _), image in zip(files, images, strict=True):
      if isinstance(image, ImageError):
        raise HTTPException(422, f'{name}: {image}')
      if isinstance(image, BaseException):
        raise image
    return images

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
    if name == 'max_loss':
      return self._classifier.thresholds_losing(limit, self._limits.confidence)
    costs = self._classifier.madds if name == 'budget' else 1000 * self._costs
    return self._classifier.thresholds_within(limit, costs)

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


async def _refusal(request, error):
  del request
  return JSONResponse({'error': error.detail}, error.status_code, error.headers)


async def _failure(request, error):
  del request, error  # uvicorn logs it.
  return JSONResponse({'error': 'internal server error'}, 500)


if __name__ == '__main__':
  command_line.run(main)
