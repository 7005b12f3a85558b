"""What is printed: the speed of an epoch, from all its intervals."""

import itertools

import pytest

from imta_jax.training.console import Reporter
from imta_jax.training.events import Events


def test_the_speed_of_an_epoch_counts_its_intervals_alone(monkeypatch):
  times = itertools.count(step=5)  # Each look at the clock is 5 s after the last.
  monkeypatch.setattr('time.monotonic', lambda: next(times))
  with Reporter().progress('phase_1', Events(0, 12, 6, 2, 1), batch_size=20) as progress:
    progress.start_interval(2)  # The first two steps compile.
    assert progress.update(4, 1.0)['speed/images_per_second'] == pytest.approx(2 * 20 / 5)
    progress.start_interval(4)
    progress.update(6, 1.0)
    assert progress.images_per_second() == pytest.approx(4 * 20 / 10)
    progress.start_interval(6)
    with progress.waiting_for_data():
      pass
    rates = progress.update(12, 1.0)
    assert rates['speed/fraction_waiting_for_data'] == pytest.approx(5 / 15)
    assert progress.images_per_second() == pytest.approx(6 * 20 / 15)


def test_an_interval_without_steps_has_no_speed():
  with Reporter().progress('phase_1', Events(5, 12, 6, 1, 1), batch_size=20) as progress:
    progress.start_interval(6)  # The first step after resuming is not counted, and it is logged.
    assert progress.update(6, 1.0) == {}
    assert progress.images_per_second() is None
