"""Leaving in time: SIGTERM, Ctrl-C, and notices that the machine will be taken away."""

import signal
from types import FrameType

import jax
from jax.experimental import multihost_utils

# What a shell reports of a program that SIGTERM ended.
_EXIT_STATUS = 128 + signal.SIGTERM


class StopRequest:
  """Notes the first SIGTERM or SIGINT, for the loop to ask about; a second one acts as ever.

  With several hosts JAX's own preemption service listens instead, so that all of them stop at the
  same step.
  """

  def __init__(self):
    self._noted = False
    self._previous = {}

  def __enter__(self) -> 'StopRequest':
    if jax.process_count() == 1:
      for number in (signal.SIGTERM, signal.SIGINT):
        self._previous[number] = signal.signal(number, self._note)
    return self

  def __exit__(self, *_) -> None:
    self._restore()

  def requested(self, step: int) -> bool:
    """Whether to stop after this step: the same answer on every host."""
    if jax.process_count() > 1:
      return multihost_utils.reached_preemption_sync_point(step)
    return self._noted

  def leave(self, message: str) -> None:
    """Ends the program, saying why on the first host.

    Raises:
      SystemExit: Always.
    """
    if jax.process_index() == 0:
      print(message, flush=True)
    raise SystemExit(_EXIT_STATUS)

  def _note(self, number: int, frame: FrameType | None) -> None:
    del number, frame
    self._noted = True
    self._restore()

  def _restore(self) -> None:
    for number, handler in self._previous.items():
      signal.signal(number, handler)
    self._previous = {}
