"""A profile of some training steps, for TensorBoard's profiler."""

import math
from collections.abc import Callable

import jax
from etils import epath

# The first steps, and what compiling leaves to do, are not typical.
_STEPS_BEFORE = 10


class Profile:
  """Profiles a number of steps of a phase on the first host. A context manager around its steps."""

  def __init__(self, folder: epath.Path, first_step: int, num_steps: int):
    """Prepares a profile.

    Args:
      folder: TensorBoard's folder of the phase.
      first_step: The step that the phase resumes from.
      num_steps: The number of steps to profile; 0 for no profile.
    """
    self._folder, self._start = folder, first_step + _STEPS_BEFORE
    self._end = self._start + (num_steps if jax.process_index() == 0 else 0)
    self._is_on = False

  def steps_left(self, step: int) -> float:
    """Returns how many steps may be dispatched after `step` before `after_step` must be called."""
    if self._start == self._end:
      return math.inf
    return min((edge - step for edge in (self._start, self._end) if edge > step), default=math.inf)

  def after_step(self, step: int, wait: Callable[[], None]) -> None:
    """Starts or ends the profile when it is time; to be called after each dispatch.

    Args:
      step: The number of steps that were dispatched.
      wait: Waits until they are done.
    """
    if self._start < self._end and step in (self._start, self._end):
      wait()
      if step == self._start:
        jax.profiler.start_trace(str(self._folder))
        self._is_on = True
      else:
        self._stop()

  def __enter__(self) -> 'Profile':
    return self

  def __exit__(self, *_) -> None:
    self._stop()

  def _stop(self):
    if self._is_on:
      jax.profiler.stop_trace()
      self._is_on = False
