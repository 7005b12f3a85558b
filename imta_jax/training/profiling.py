"""A profile of some training steps, for TensorBoard's profiler."""

from collections.abc import Callable

import jax
from etils import epath


class Profile:
  """Profiles steps of a phase on the first host. A context manager around its steps."""

  def __init__(self, folder: epath.Path, steps: range):
    """Prepares a profile.

    Args:
      folder: TensorBoard's folder of the phase.
      steps: The steps to profile, counted from 0; empty for no profile.
    """
    self._folder, self._steps = folder, steps
    self._is_on = False

  def after_step(self, step: int, wait: Callable[[], None]) -> None:
    """Starts or ends the profile when it is time; to be called at least at both of its ends.

    Args:
      step: The number of steps that were dispatched.
      wait: Waits until they are done.
    """
    if not self._steps or step not in (self._steps.start, self._steps.stop):
      return
    wait()
    if step == self._steps.stop:
      self._stop()
    elif jax.process_index() == 0:
      jax.profiler.start_trace(str(self._folder))
      self._is_on = True

  def __enter__(self) -> 'Profile':
    return self

  def __exit__(self, *_: object) -> None:
    self._stop()

  def _stop(self):
    if self._is_on:
      jax.profiler.stop_trace()
      self._is_on = False
