"""Stops a run on SIGTERM, Ctrl-C or a preemption notice."""

import signal
from types import FrameType

import jax
from jax.experimental import multihost_utils


class StopRequest:
  """Records the first SIGTERM or SIGINT for the training loop; a second one has its usual effect.

  With several hosts, JAX's preemption service is used instead, so that all hosts stop at the same
  step.
  """

  def __init__(self):
    self._noted, self._signal = False, signal.SIGTERM
    self._num_calls = 0
    self._previous = {}

  def __enter__(self) -> 'StopRequest':
    if jax.process_count() == 1:
      for number in (signal.SIGTERM, signal.SIGINT):
        self._previous[number] = signal.signal(number, self._note)
    return self

  def __exit__(self, *_) -> None:
    self._restore()

  def requested(self) -> bool:
    """Whether to stop now; all hosts, which must call this equally often, get the same answer."""
    if jax.process_count() > 1:
      self._num_calls += 1  # JAX stops at a certain number, so none may be left out.
      return multihost_utils.reached_preemption_sync_point(self._num_calls)
    return self._noted

  def leave(self, message: str) -> None:
    """Prints a message on the first host and exits with the status that shells give the signal.

    Raises:
      SystemExit: Always.
    """
    if jax.process_index() == 0:
      print(message, flush=True)
    raise SystemExit(128 + self._signal)

  def _note(self, number: int, frame: FrameType | None) -> None:
    del frame
    self._noted, self._signal = True, number
    self._restore()

  def _restore(self) -> None:
    for number, handler in self._previous.items():
      signal.signal(number, handler)
    self._previous = {}
