"""Reads an iterator in another thread."""

import queue
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any


class ReadAhead:
  """Reads an iterator; the next item can be fetched by another thread meanwhile."""

  def __init__(self, source: Iterator[Any]):
    """The thread starts with the first `fetch`."""
    self._source = source
    self._requests: queue.SimpleQueue | None = None
    self._next: Future | None = None

  def fetch(self) -> None:
    """Starts to read the next item, unless that has started already, and does not wait for it."""
    if self._next is not None:
      return
    if self._requests is None:
      self._requests = queue.SimpleQueue()
      # A source that waits for ever must not keep the program from its end.
      threading.Thread(target=_work, args=(self._source, self._requests), daemon=True).start()
    self._next = Future()
    self._requests.put(self._next)

  def is_ready(self) -> bool:
    """Whether `take` neither waits nor raises."""
    return self._next is not None and self._next.done() and self._next.exception() is None

  def take(self) -> Any:
    """Returns the next item, None at the end of the source, and raises what the source raises."""
    if self._next is None:
      return next(self._source, None)
    item, self._next = self._next.result(), None
    return item

  def close(self) -> None:
    """Ends the thread as soon as the source has given what it was asked for."""
    if self._requests is not None:
      self._requests.put(None)


def _work(source, requests):
  while (future := requests.get()) is not None:
    try:
      future.set_result(next(source, None))
    except BaseException as error:
      future.set_exception(error)
