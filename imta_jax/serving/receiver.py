"""Receives the files of requests, within bounds of size, number, time and memory."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import Message

# Requests in memory may together be this many times as large as a single one.
_REQUESTS_IN_MEMORY = 16
# The closing boundary of a form and what may follow it.
_TAIL_BYTES = 4096


class Receiver:
  """Receives the files of requests; what is out of bounds is refused with an HTTPException."""

  def __init__(self, max_files: int, max_megabytes: float, max_seconds: float):
    """Sets the bounds.

    Args:
      max_files: Maximum number of files per request.
      max_megabytes: Maximum size of a request.
      max_seconds: How long a body may take to arrive.
    """
    self._max_files, self._max_megabytes, self._max_seconds = max_files, max_megabytes, max_seconds
    self._bytes = 0  # Of all requests; only the event loop's thread counts them.

  @contextlib.asynccontextmanager
  async def receive(self, request: Request) -> AsyncIterator[tuple[bool, list[tuple[str, bytes]]]]:
    """Receives a request, which counts as in memory until the context ends.

    Yields:
      Whether the request is a form, and its (name, content) pairs.
    """
    size, tail = 0, bytearray()

    async def receive() -> Message:
      nonlocal size
      message = await request.receive()
      body = message.get('body', b'')
      size += len(body)
      self._bytes += len(body)
      tail.extend(body)
      del tail[:-_TAIL_BYTES]
      if message['type'] == 'http.disconnect':
        raise HTTPException(400, 'the client has disconnected')
      self._check_size(size)
      return message

    try:
      yield await self._receive_in_time(Request(request.scope, receive), tail)
    finally:
      self._bytes -= size

  def _check_size(self, size):
    limit = self._max_megabytes
    if size > 1e6 * limit:
      raise HTTPException(413, f'the request is too large: at most {limit:g} MB are accepted')
    if self._bytes > 1e6 * limit * _REQUESTS_IN_MEMORY:
      pending = f'{self._bytes / 1e6:.0f} MB of requests are pending'
      raise HTTPException(503, f'{pending}: try again later', {'Retry-After': '1'})

  async def _receive_in_time(self, request, tail):
    try:
      async with asyncio.timeout(self._max_seconds):
        return await self._files(request, tail)
    except TimeoutError as error:
      late = f'the request did not arrive within {self._max_seconds:g} seconds'
      raise HTTPException(408, late, {'Connection': 'close'}) from error

  async def _files(self, request, tail):
    encoding = request.headers.get('content-encoding', '').strip() or 'identity'
    if encoding.lower() != 'identity':
      raise HTTPException(415, f'content encoding {encoding!r}: send the file as it is')
    content_type = request.headers.get('content-type', '')
    kind = content_type.lower()
    if kind.startswith('multipart/form-data'):
      try:
        async with request.form(max_files=self._max_files) as form:
          items = form.multi_items()
          for field, value in items:
            if isinstance(value, str):
              expected = 'send files alone, and options like budget= in the URL'
              raise HTTPException(422, f'part {field!r} of the form has no filename=: {expected}')
          files = [(file.filename or field, await file.read()) for field, file in items]
      except FormParserError as error:  # Which older versions of Starlette let through.
        raise HTTPException(400, f'the form is corrupt: {error}') from error
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
