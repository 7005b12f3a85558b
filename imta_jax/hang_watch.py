"""Ends a run of several hosts in which one hangs; all others would wait for it without end.

A single host is not watched: it waits for nobody, and whoever looks at it can interrupt it.
"""

import contextlib
import faulthandler
from collections.abc import Iterator

import jax

# The longest time between two signs of progress: a validation, or loading, compiling and a step.
_SECONDS_TO_HANG = 1800


@contextlib.contextmanager
def watch() -> Iterator[None]:
  """Ends the process and shows where it is, if `progressed` is not called for half an hour."""
  progressed()
  try:
    yield
  finally:
    faulthandler.cancel_dump_traceback_later()


def progressed() -> None:
  """Tells the watch that this host goes on."""
  if jax.process_count() > 1:
    faulthandler.dump_traceback_later(_SECONDS_TO_HANG, exit=True)


@contextlib.contextmanager
def paused() -> Iterator[None]:
  """Stops the watch for work that may take hours on one host while the others wait."""
  faulthandler.cancel_dump_traceback_later()
  yield
  progressed()
