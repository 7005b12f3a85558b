"""Collects images of all requests into batches for the network."""

import collections
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future

import numpy as np

from imta_jax.adaptive.engine import AdaptiveClassifier


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
    """
    futures: list[Future] = [Future() for _ in images]
    now = time.monotonic()
    with self._changed:
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
      # Cancelled futures take no result.
      batch = [entry for entry in batch if entry[2].set_running_or_notify_cancel()]
      if not batch:
        continue
      images, thresholds, futures, _ = zip(*batch, strict=True)
      self._observe(len(images))
      try:
        for part in self._classifier.predict_as_completed(np.stack(images), np.stack(thresholds)):
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
