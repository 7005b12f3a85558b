"""A real server at a port of this machine."""

import contextlib
import socket
import threading

import httpx

from imta_jax import serve


@contextlib.contextmanager
def listening(app, max_connections=64, max_wait=30.0):
  """Yields the port and the server, which is stopped at the end."""
  server = serve.Server(app, max_connections, max_wait, log_level='critical')
  with socket.create_server(('127.0.0.1', 0)) as listener:
    port = listener.getsockname()[1]
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    try:
      httpx.get(f'http://127.0.0.1:{port}/health', timeout=30).raise_for_status()
      yield port, server
    finally:
      server.should_exit = True
      thread.join(30)
  assert not thread.is_alive()
