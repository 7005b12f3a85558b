"""Sends training steps to the devices: several at once, and some ahead of the last finished one."""

import collections
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from imta_jax.train_state import TrainState

# Steps of about so many seconds are sent at once: long enough that sending them takes a negligible
# part, short enough that a stop request takes effect soon.
_SECONDS_PER_DISPATCH = 0.5
# Enough to keep the devices busy, few enough that their batches fit in memory.
_DISPATCHES_IN_FLIGHT = 2


class Dispatcher:
  """Takes training steps and decides how many to send at once.

  Attributes:
    most: The largest number of steps for the next call.
  """

  def __init__(self, train: Callable, steps_per_dispatch: int | None):
    """Prepares to send steps.

    Args:
      train: The mapped training loop; see `steps.make_train_loop`.
      steps_per_dispatch: From `steps_per_dispatch`.
    """
    self.most = 1
    self._train, self._steps_per_dispatch = train, steps_per_dispatch
    self._in_flight = collections.deque()
    self._num_calls = 0

  def __call__(self, state: TrainState, teacher: Any, source: Any, num_steps: int) -> TrainState:
    """Takes steps; waits for the first two calls, which compile the program and time a step."""
    start = time.monotonic()
    state, done = self._train(state, teacher, source, np.int32(num_steps))
    self._num_calls += 1
    self._in_flight.append(done)
    while len(self._in_flight) > (_DISPATCHES_IN_FLIGHT if self._num_calls > 2 else 0):
      self._in_flight.popleft().block_until_ready()
    if self._num_calls == 2:
      self.most = self._steps_per_dispatch or _choose((time.monotonic() - start) / num_steps)
    return state

  def wait(self) -> None:
    """Waits until all steps are done."""
    while self._in_flight:
      self._in_flight.popleft().block_until_ready()


def steps_per_dispatch(config: ConfigDict) -> int | None:
  """Returns how many steps to send at once; None to choose that by the time that a step takes."""
  if config.steps_per_dispatch is None and jax.default_backend() == 'cpu':
    return 1  # See `steps.make_train_loop`.
  return config.steps_per_dispatch


def _choose(seconds_per_step):
  """The same number of steps on all hosts, which have to take the same steps together."""
  num_steps = np.int32(max(1, _SECONDS_PER_DISPATCH / seconds_per_step))
  return int(multihost_utils.broadcast_one_to_all(num_steps))
