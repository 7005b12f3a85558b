"""Receives the files of a request."""

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request


async def receive_files(
  request: Request, max_megabytes: float, max_files: int
) -> tuple[bool, list[tuple[str, bytes]]]:
  """Receives a request.

  Args:
    request: An image, or a form of images.
    max_megabytes: Maximum size of the request.
    max_files: Maximum number of files in a form.

  Returns:
    Whether the request is a form, and its (name, content) pairs.

  Raises:
    HTTPException: If the request has another type, is too large or cannot be parsed.
  """
  encoding = request.headers.get('content-encoding', 'identity')
  if encoding != 'identity':
    raise HTTPException(415, f'content encoding {encoding!r}: send the file as it is')
  content_type = request.headers.get('content-type', '')
  kind = content_type.lower()
  if kind.startswith('multipart/form-data'):
    body = await _receive_body(request, max_megabytes)
    return True, await _files_of_form(request, body, max_files)
  if kind.startswith(('image/', 'application/octet-stream')):
    return False, [('the image', await _receive_body(request, max_megabytes))]
  raise HTTPException(
    415, f'content type {content_type!r}: send image/png or the like, or multipart/form-data'
  )


async def _receive_body(request, max_megabytes):
  body = bytearray()
  try:
    async for chunk in request.stream():
      body += chunk
      if len(body) > 1e6 * max_megabytes:
        limit = f'at most {max_megabytes:g} MB are accepted'
        raise HTTPException(413, f'the request is too large: {limit}')
  except ClientDisconnect as error:
    raise HTTPException(400, 'the client has disconnected') from error
  return bytes(body)


async def _files_of_form(request, body, max_files):
  async def receive():
    return {'type': 'http.request', 'body': body}

  try:
    async with Request(request.scope, receive).form(max_files=max_files) as form:
      files = []
      for field, value in form.multi_items():
        if isinstance(value, str):
          expected = 'send files alone, and options like budget= in the URL'
          raise HTTPException(422, f'part {field!r} of the form has no filename=: {expected}')
        files.append((value.filename or field, await value.read()))
  except FormParserError as error:  # Which older versions of Starlette let through.
    raise HTTPException(400, f'the form is corrupt: {error}') from error
  boundary = parse_options_header(request.headers['content-type'])[1][b'boundary']
  if not body.rstrip().endswith(b'--' + boundary + b'--'):  # The parser does not check.
    raise HTTPException(400, 'the form ends before its closing boundary')
  return files
