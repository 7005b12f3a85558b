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
Requests are refused with status 503 while too many images are pending, and a request of many images
does not hold up others. On SIGTERM, pending requests are answered before the server exits. TLS, and
protection from slow and hostile clients, are left to a reverse proxy such as nginx.
"""

import argparse
import asyncio
import contextlib
import dataclasses
import gc
import sys
import time
from collections.abc import AsyncIterator, Sequence
from functools import partial

try:
  import prometheus_client
  import python_multipart  # noqa: F401
  import uvicorn
  from starlette.applications import Starlette
  from starlette.exceptions import HTTPException
  from starlette.requests import Request
  from starlette.responses import JSONResponse, Response
  from starlette.routing import Route
  from uvicorn.protocols.http.h11_impl import H11Protocol
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
from imta_jax.serving.receiver import receive_files

# Number of classes that an answer names, the most probable first.
_TOP = 5

_LATENCY_BUCKETS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)
# How long pending answers may take once the server is told to stop.
_SECONDS_TO_STOP = 30


def _limit(default, text):
  return dataclasses.field(default=default, metadata={'help': text})


@dataclasses.dataclass(frozen=True)
class Limits:
  """Limits of a server, each of which is an option of the command line."""

  max_batch: int = _limit(64, 'maximum number of images per batch')
  max_delay_ms: float = _limit(2.0, 'how long an image may wait for others, in milliseconds')
  max_queue: int = _limit(256, 'maximum number of pending images; more are refused with status 503')
  max_body_mb: float = _limit(16.0, 'maximum size of a request, in megabytes')
  max_megapixels: float = _limit(32.0, 'maximum size of an image')
  overload_budget: float | None = _limit(
    None,
    'average multiply-adds per image for requests that name no budget, while more than half of '
    '--max_queue is pending',
  )


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
  parser.add_argument('--port', type=positive(int), default=8000, help='default: %(default)s')
  for field in dataclasses.fields(Limits):
    parser.add_argument(
      f'--{field.name}',
      type=positive(int if field.type is int else float),
      default=field.default,
      help=f'{field.metadata["help"]}; default: %(default)s',
    )
  options = parser.parse_args(arguments)
  limits = Limits(**{f.name: getattr(options, f.name) for f in dataclasses.fields(Limits)})
  set_up_compilation_cache()
  chosen = choices(options)
  latency = chosen.pop('latency')
  classifier = open_classifier(options.network, **chosen)
  try:
    app = create_app(classifier, limits, options.confidence)
    classifier.choose(latency=latency)  # In the runtime that is now compiled.
  except ValueError as error:
    raise UsageError(str(error)) from error
  uvicorn.run(
    app,
    host=options.host,
    port=options.port,
    http=_Connection,
    ws='none',
    access_log=False,
    timeout_graceful_shutdown=_SECONDS_TO_STOP,
  )


def create_app(
  classifier: AdaptiveClassifier, limits: Limits = Limits(), confidence: float = 0.95
) -> Starlette:
  """Compiles the network and makes the service, an ASGI application.

  Args:
    classifier: A classifier of uint8 images, with class names.
    limits: See `Limits`.
    confidence: The probability with which max_loss= of a request is kept.

  Raises:
    ValueError: If no thresholds are within the overload budget, or confidence is not between 0 and
      1.
  """
  service = _Service(classifier, limits, confidence)
  return Starlette(
    routes=[
      Route('/predict', service.predict, methods=['POST']),
      Route('/health', service.health),
      Route('/metrics', service.metrics),
    ],
    exception_handlers={HTTPException: _refusal, Exception: _failure},
    lifespan=service.lifespan,
  )


class _Connection(H11Protocol):
  """A connection that answers what it has received before its client closed the writing side."""

  _is_half_closed = False

  def eof_received(self):
    self._is_half_closed = True
    return self._is_answering() and not self.cycle.more_body  # True keeps the connection open.

  def on_response_complete(self):
    super().on_response_complete()
    if self._is_half_closed and not self._is_answering():
      self.transport.close()

  def _is_answering(self):
    return self.cycle is not None and not self.cycle.response_complete


class _Service:
  """The routes."""

  def __init__(self, classifier, limits, confidence):
    self._classifier, self._limits, self._confidence = classifier, limits, confidence
    self._num_pending = 0  # Images; only the event loop's thread counts them.
    if limits.overload_budget is not None:
      try:
        self._overload_thresholds = self._find_thresholds('budget', limits.overload_budget)
      except ValueError as error:
        raise ValueError(f'overload_budget {limits.overload_budget:g}: {error}') from error

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
    ).set_function(lambda: self._num_pending)

    if classifier.validation is not None:  # Counts losses, for requests with max_loss=.
      self._find_thresholds('max_loss', 0.5)
    classifier.compile(limits.max_batch)
    self._milliseconds = 1000 * classifier.measure_costs()
    self._batcher = Batcher(
      classifier, limits.max_batch, limits.max_delay_ms / 1000, self._batch_sizes.observe
    )
    self._decoder = Decoder(
      partial(
        read_image,
        shape=classifier.image.shape,
        crop=classifier.preprocessing.get('crop', 'none'),
        max_pixels=min(int(1e6 * limits.max_megapixels), MAX_PIXELS),
      )
    )

  @contextlib.asynccontextmanager
  async def lifespan(self, app: Starlette) -> AsyncIterator[None]:
    """Lasts as long as the server."""
    del app
    # Garbage collection over all that tracing has left would stop the server for 0.2 s each time.
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
    self._batcher.close()
    self._decoder.close()

  async def health(self, request: Request) -> Response:
    """Answers once the network is compiled: the server does not listen before."""
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
    limits = self._limits
    thresholds = self._requested_thresholds(request.query_params)
    with self._pending(1):
      is_form, files = await receive_files(request, limits.max_body_mb, limits.max_queue)
    if thresholds is None:
      thresholds = self._default_thresholds()
    with self._pending(len(files)):
      images = await self._decode(files)
      futures = self._batcher.submit(images, thresholds)
      results = await asyncio.gather(*map(asyncio.wrap_future, futures))
    names = self._classifier.class_names
    answers = [describe(probabilities, exit, names, _TOP) for probabilities, exit in results]
    for answer in answers:
      self._images.labels(answer['exit']).inc()
    if not is_form:
      return JSONResponse(answers[0])
    named = zip(files, answers, strict=True)
    return JSONResponse({'answers': [{'file': name, **answer} for (name, _), answer in named]})

  @contextlib.contextmanager
  def _pending(self, count):
    """Counts images as pending; refuses them if there are too many."""
    if self._num_pending + count > self._limits.max_queue:
      message = f'{self._num_pending} images are pending: try again later'
      raise HTTPException(503, message, {'Retry-After': '1'})
    self._num_pending += count
    try:
      yield
    finally:
      self._num_pending -= count

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
      return self._find_thresholds(name, limit)
    except ValueError as error:
      raise HTTPException(422, f'{name}={text}: {error}') from error

  def _find_thresholds(self, name, limit):
    if name == 'max_loss':
      return self._classifier.thresholds_losing(limit, self._confidence)
    costs = self._classifier.madds if name == 'budget' else self._milliseconds
    return self._classifier.thresholds_within(limit, costs)

  def _default_thresholds(self):
    is_overloaded = self._num_pending > self._limits.max_queue / 2
    if is_overloaded and self._limits.overload_budget is not None:
      return self._overload_thresholds
    return self._classifier.thresholds


async def _refusal(request, error):
  del request
  return JSONResponse({'error': error.detail}, error.status_code, error.headers)


async def _failure(request, error):
  del request, error  # uvicorn logs it.
  return JSONResponse({'error': 'internal server error'}, 500)


run = partial(command_line.run, main)

if __name__ == '__main__':
  run()
