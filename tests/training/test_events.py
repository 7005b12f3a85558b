"""Events: a pure function of the step, so that all hosts take the same steps together."""

import dataclasses

import pytest

from imta_jax.training.events import Events

PHASE = Events(
  first_step=0, num_steps=25, steps_per_epoch=10, log_every_steps=4, validate_every_epochs=2
)


def dispatches(events):
  """The steps at which dispatches end."""
  steps = [events.first_step]
  while steps[-1] < events.num_steps:
    steps.append(events.next_after(steps[-1]))
  return steps[1:]


def test_dispatches_end_at_the_first_step_logs_epochs_and_the_end():
  assert dispatches(PHASE) == [1, 4, 8, 10, 12, 16, 20, 24, 25]


def test_dispatches_have_limits_and_end_where_the_profile_does():
  limited = dataclasses.replace(PHASE, log_every_steps=100, steps_per_dispatch=7)
  assert dispatches(limited) == [1, 7, 10, 14, 20, 21, 25]
  resumed = dataclasses.replace(limited, first_step=3, profile_steps=3)
  assert resumed.profile == range(13, 16)
  assert dispatches(resumed) == [4, 7, 10, 13, 14, 16, 20, 21, 25]


def test_what_happens_after_each_step():
  ends = {
    step: (PHASE.logs_at(step), PHASE.ends_epoch_at(step), PHASE.validates_at(step))
    for step in dispatches(PHASE)
  }
  assert ends == {
    1: (False, False, False),
    4: (True, False, False),
    8: (True, False, False),
    10: (True, True, False),
    12: (True, False, False),
    16: (True, False, False),
    20: (True, True, True),
    24: (True, False, False),
    25: (True, True, True),
  }


@pytest.mark.parametrize('first_step', range(25))
def test_a_resumed_phase_has_the_same_events(first_step):
  resumed = dataclasses.replace(PHASE, first_step=first_step)
  expected = {step for step in dispatches(PHASE) if step > first_step}
  assert set(dispatches(resumed)) == (expected - {1}) | {first_step + 1}
