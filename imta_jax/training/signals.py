"""Stops a run on SIGTERM, Ctrl-C or a preemption notice."""

import os
import signal
import threading
from types import FrameType
from typing import Any, NoReturn

import jax
from jax.experimental import multihost_utils
from rich.console import Console

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
  """Answers SIGTERM and SIGINT with the exit status that shells give the signal.

  While there are steps that no checkpoint has, the first signal waits until the training loop asks
  for it. Otherwise, and on the second signal, the process ends at once, also in the middle of a
  compilation, when Python's own handlers would have to wait.

  With several hosts, JAX's preemption service is used instead, so that all hosts stop at the same
  step.

  Attributes:
    has_unsaved_steps: Whether a signal has to wait; to be set by the training loop.
  """

  def __init__(self, handle_signals: bool = True):
    """Creates a request that nobody has made.

    Args:
      handle_signals: Whether to answer signals; False leaves them to the program around.
    """
    self._handle_signals = handle_signals
    self.has_unsaved_steps = False
    self._noted, self._signal = False, int(signal.SIGTERM)
    self._num_calls = 0
    self._previous: dict[int, Any] = {}  # The handlers before, by signal.

  def __enter__(self) -> 'StopRequest':
    if self._handle_signals and jax.process_count() == 1:
      receiver, self._sender = os.pipe()
      os.set_blocking(self._sender, False)
      # Python writes the number of each signal there when it comes, whatever the main thread does.
      self._previous_sender = signal.set_wakeup_fd(self._sender)
      self._watcher = threading.Thread(target=self._watch, args=(receiver,), daemon=True)
      self._watcher.start()
      for number in _SIGNALS:
        self._previous[number] = signal.signal(number, self._note)
    return self

  def __exit__(self, *_: object) -> None:
    for number, handler in self._previous.items():
      signal.signal(number, handler)
    if self._previous:
      signal.set_wakeup_fd(self._previous_sender)
      os.close(self._sender)  # Ends the thread, which has something to print if a signal just came.
      self._watcher.join()
    self._previous = {}

  def requested(self) -> bool:
    """Whether to stop now; all hosts, which must call this equally often, get the same answer."""
    if jax.process_count() > 1 and not self._noted:
      self._num_calls += 1  # JAX says it at one number alone, so none may be left out.
      self._noted = multihost_utils.reached_preemption_sync_point(self._num_calls)
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

  def _watch(self, receiver: int) -> None:
    num_received = 0
    with os.fdopen(receiver, 'rb', buffering=0) as numbers:
      while number := numbers.read(1):
        if number[0] not in _SIGNALS:
          continue
        num_received += 1
        if num_received > 1 or not self.has_unsaved_steps:
          end_at_once('stopped; run the same command again to resume', 128 + number[0])
        print('stopping: the state is being saved; a second signal stops at once', flush=True)


def end_at_once(message: str, status: int) -> NoReturn:
  """Prints a message and ends the process from any thread, whatever the main one does."""
  Console().show_cursor()  # A progress bar has hidden it.
  print(message, flush=True)
  os._exit(status)
