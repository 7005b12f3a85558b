"""A uvicorn server that waits for no client for ever, and leaves none without a word.

uvicorn waits without end for the rest of a request's header, and for clients that do not read their
answers. When it stops, it closes connections on which the next request may be on its way.
"""

import asyncio
import functools
import socket
from collections.abc import Sequence
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

_CLOSE = (b'connection', b'close')
# How long pending answers may take once the server is told to stop.
_SECONDS_TO_STOP = 30
# How long open connections may then still bring a request.
_SECONDS_TO_LEAVE = 1


class Server(uvicorn.Server):
  """Serves an application over HTTP/1.1.

  On SIGTERM, the server accepts no more connections. Those that are open may bring one more request
  within a second; its answer tells the client that the connection is closed.
  """

  def __init__(self, app: ASGIApp, max_connections: int, max_seconds: float, **options: Any):
    """Prepares the server.

    Args:
      app: The application.
      max_connections: Maximum number of open connections; further ones are closed at once.
      max_seconds: How long a client may take for the header of a request, and for reading answers.
      **options: Of `uvicorn.Config`.
    """
    connection = functools.partial(
      _Connection, max_connections=max_connections, max_seconds=max_seconds
    )
    super().__init__(
      uvicorn.Config(
        app,
        http=connection,
        ws='none',
        access_log=False,
        timeout_graceful_shutdown=_SECONDS_TO_STOP,
        **options,
      )
    )

  async def shutdown(self, sockets: Sequence[socket.socket] | None = None) -> None:
    """Answers what is pending and closes all connections."""
    state = self.server_state
    state.default_headers = [*state.default_headers, _CLOSE]
    await asyncio.sleep(0.001)  # The event loop accepts the connections that clients have made.
    await super().shutdown(sockets)


class _Connection(H11Protocol):
  """A connection that is closed if its client keeps it waiting."""

  def __init__(self, *, max_connections: int, max_seconds: float, **arguments: Any):
    super().__init__(**arguments)
    self._max_connections, self._max_seconds = max_connections, max_seconds
    self._waiting_for_request: asyncio.TimerHandle | None = None
    self._waiting_for_reader: asyncio.TimerHandle | None = None
    self._half_closed = False  # The client sends no more, but reads its answers.

  def connection_made(self, transport):
    super().connection_made(transport)
    self._wait_for_request(_SECONDS_TO_LEAVE if self._is_stopping() else self._max_seconds)
    if len(self.connections) > self._max_connections:
      transport.close()

  def connection_lost(self, exc):
    _cancel(self._waiting_for_request)
    _cancel(self._waiting_for_reader)
    super().connection_lost(exc)

  def eof_received(self):
    """Keeps the connection open until the requests that have arrived are answered."""
    self._half_closed = True
    return not self._is_idle() and not self.cycle.more_body

  def on_response_complete(self):
    self._wait_for_request(self._max_seconds)
    super().on_response_complete()
    if self._half_closed and self._is_idle():
      self.timeout_keep_alive_handler()

  def pause_writing(self):
    self._waiting_for_reader = self.loop.call_later(self._max_seconds, self.transport.abort)
    super().pause_writing()

  def resume_writing(self):
    _cancel(self._waiting_for_reader)
    super().resume_writing()

  def shutdown(self):
    if self._is_idle():
      self._wait_for_request(_SECONDS_TO_LEAVE)
    else:
      self.cycle.default_headers = self.server_state.default_headers
      super().shutdown()

  def _wait_for_request(self, seconds):
    _cancel(self._waiting_for_request)
    self._waiting_for_request = self.loop.call_later(seconds, self._give_up)

  def _give_up(self):
    """Closes the connection unless a request is being answered."""
    if self.transport.is_closing():  # The client does not read what was sent before.
      self.transport.abort()
    elif self._is_idle():
      self.timeout_keep_alive_handler()
      self._wait_for_request(self._max_seconds)

  def _is_idle(self):
    return self.cycle is None or self.cycle.response_complete

  def _is_stopping(self):
    return _CLOSE in self.server_state.default_headers


def _cancel(timer):
  if timer is not None:
    timer.cancel()
