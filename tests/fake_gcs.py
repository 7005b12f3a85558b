"""A fake Google Cloud Storage, in the place of the real one.

TensorFlow cannot be told to ask another server. So the fake is the HTTPS proxy of its clients and
answers for Google's servers, with certificates that `FakeGcs.environment` makes the clients trust.
It takes the requests that a run sends through TensorFlow's file system, TensorStore and
google-cloud-storage.
"""

import contextlib
import itertools
import json
import re
import ssl
import threading
from collections.abc import Callable, Iterator
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import trustme


class FakeGcs(ThreadingHTTPServer):
  """A server that has buckets of any name, in memory.

  Attributes:
    environment: Environment variables for the clients.
    objects: {'bucket/name': (generation, content)}.
    fault: Called with each request, as 'GET /storage/v1/b/bucket'; may return a status to answer.
  """

  daemon_threads = True

  def __init__(self, folder: Path):
    """Listens on a free port of the loopback; keys go to a folder."""
    super().__init__(('localhost', 0), _Handler)
    self.objects: dict[str, tuple[int, bytes]] = {}
    self.fault: Callable[[str], HTTPStatus | None] = lambda request: None
    self.generations, self.lock = itertools.count(1), threading.Lock()
    authority = trustme.CA()
    authority.cert_pem.write_to_path(certificate := str(folder / 'authority.pem'))
    self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert('*.googleapis.com').configure_cert(self.context)
    credentials = folder / 'credentials.json'  # As gcloud writes them for a user.
    user = {'client_id': 'id', 'client_secret': 'secret', 'refresh_token': 'token'}
    credentials.write_text(json.dumps({'type': 'authorized_user', **user}))
    self.environment = {
      'https_proxy': f'http://localhost:{self.server_port}',
      'no_proxy': 'localhost,127.0.0.1',
      'CURL_CA_BUNDLE': certificate,  # For TensorFlow.
      'REQUESTS_CA_BUNDLE': certificate,  # For google-cloud-storage.
      'TENSORSTORE_CA_BUNDLE': certificate,
      'GOOGLE_APPLICATION_CREDENTIALS': str(credentials),
      'GOOGLE_CLOUD_PROJECT': 'project',
    }

  def handle_error(self, *_):
    """Says nothing of clients that are gone."""


@contextlib.contextmanager
def fake_gcs(folder: Path) -> Iterator[FakeGcs]:
  """Runs a `FakeGcs` in a thread."""
  with FakeGcs(folder) as server:
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


class _Handler(BaseHTTPRequestHandler):
  protocol_version = 'HTTP/1.1'
  wbufsize = -1

  def do_CONNECT(self):
    self.send_response(HTTPStatus.OK)
    self.end_headers()
    self.wfile.flush()
    self.connection = self.server.context.wrap_socket(self.connection, server_side=True)
    self.rfile, self.wfile = self.connection.makefile('rb'), self.connection.makefile('wb')
    self.close_connection = False  # Python's client connects with HTTP/1.0.

  def handle_expect_100(self):
    super().handle_expect_100()
    self.wfile.flush()  # The client waits for it.
    return True

  def _answer(self):
    url, body = urlsplit(self.path), self._body()
    query = {name: values[-1] for name, values in parse_qs(url.query).items()}
    if status := self.server.fault(f'{self.command} {unquote(self.path)}'):
      self._send(status)
    elif url.path.endswith('/token'):
      self._send_json({'access_token': 'token', 'expires_in': 3600, 'token_type': 'Bearer'})
    else:
      with self.server.lock:
        self._route(url.path, query, body)

  do_GET = do_POST = do_PUT = do_DELETE = _answer

  def _body(self):
    if self.headers['Transfer-Encoding'] != 'chunked':
      return self.rfile.read(int(self.headers['Content-Length'] or 0))
    body = b''
    while size := int(self.rfile.readline(), 16):
      body += self.rfile.read(size)
      self.rfile.readline()
    self.rfile.readline()
    return body

  def _route(self, path, query, body):
    objects = self.server.objects
    upload, api, path = re.fullmatch(
      r'(/upload)?(?:/download)?(/storage/v1/b)?/(.*)', path
    ).groups()
    bucket, *parts = path.split('/')
    if not api:  # TensorFlow downloads from an older interface, which has no 'o/' in its paths.
      return self._download(f'{bucket}/{unquote("/".join(parts))}', query)
    name = f'{bucket}/{unquote(parts[1]) if parts[1:] else query.get("name")}'
    if upload and query['uploadType'] == 'resumable' and 'upload_id' not in query:
      self._send(headers={'Location': f'https://www.googleapis.com{self.path}&upload_id=1'})
    elif upload:
      self._store(name, body, query)
    elif not parts:
      self._send_json({'name': bucket})
    elif not parts[1:]:
      self._list(bucket, query)
    elif query.get('alt') == 'media':
      self._download(name, query)
    elif name not in objects:
      self._send(HTTPStatus.NOT_FOUND)
    elif 'rewriteTo' in parts:
      self._store(f'{parts[4]}/{unquote(parts[6])}', objects[name][1], query)
    elif self.command == 'DELETE':
      del objects[name]
      self._send(HTTPStatus.NO_CONTENT)
    else:
      self._send_json(self._metadata(name))

  def _store(self, name, content, query):
    generation = str(self.server.objects.get(name, (0,))[0])
    if query.get('ifGenerationMatch', generation) != generation:
      self._send(HTTPStatus.PRECONDITION_FAILED)
    else:
      self.server.objects[name] = next(self.server.generations), content
      self._send_json({**self._metadata(name), 'done': True})

  def _download(self, name, query):
    generation, content = self.server.objects.get(name, (0, b''))
    headers = {'x-goog-generation': str(generation)}
    if not generation:
      self._send(HTTPStatus.NOT_FOUND)
    elif query.get('ifGenerationNotMatch') == str(generation):
      self._send(HTTPStatus.NOT_MODIFIED)
    elif 'Range' not in self.headers:
      self._send(content=content, headers=headers)
    else:
      start, end = re.fullmatch(r'bytes=(\d+)-(\d*)', self.headers['Range']).groups()
      part = content[int(start) : int(end or len(content)) + 1]
      headers['Content-Range'] = f'bytes {start}-{int(start) + len(part) - 1}/{len(content)}'
      self._send(HTTPStatus.PARTIAL_CONTENT, part, headers)

  def _list(self, bucket, query):
    prefix = query.get('prefix', '')
    entries = {}  # {name or prefix: whether it is a prefix}
    for path in sorted(self.server.objects):
      if path.startswith(f'{bucket}/{prefix}'):
        rest = path.removeprefix(f'{bucket}/{prefix}')
        head, delimiter, _ = rest.partition(query.get('delimiter', '\0'))
        entries[f'{prefix}{head}{delimiter}'] = bool(delimiter)
    items = [self._metadata(f'{bucket}/{name}') for name in entries if not entries[name]]
    self._send_json({'items': items, 'prefixes': [name for name in entries if entries[name]]})

  def _metadata(self, path):
    bucket, _, name = path.partition('/')
    generation, content = self.server.objects[path]
    sizes = {'size': str(len(content)), 'generation': str(generation), 'metageneration': '1'}
    return {'bucket': bucket, 'name': name, 'updated': '2026-01-01T00:00:00.000Z', **sizes}

  def _send(self, status=HTTPStatus.OK, content=b'', headers=None):
    self.send_response(status)
    for name, value in (headers or {}).items():
      self.send_header(name, value)
    if status != HTTPStatus.NO_CONTENT:
      self.send_header('Content-Length', str(len(content)))
    self.end_headers()
    self.wfile.write(content)

  def _send_json(self, answer):
    self._send(content=json.dumps(answer).encode(), headers={'Content-Type': 'application/json'})

  def log_message(self, *_):
    pass
