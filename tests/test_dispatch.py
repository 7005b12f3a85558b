"""Dispatches: how many steps at once, and how many ahead."""

import jax
import numpy as np
import pytest

from imta_jax import config as config_lib
from imta_jax import dispatch


class Done:
  """Stands for the result of a dispatch; notes when it is waited for."""

  def __init__(self, number, waited):
    self.number, self.waited = number, waited

  def block_until_ready(self):
    self.waited.append(self.number)


@pytest.fixture
def clock(monkeypatch):
  """The seconds that time.monotonic returns, in a list of one."""
  now = [0.0]
  monkeypatch.setattr(dispatch.time, 'monotonic', lambda: now[0])
  return now


def make(clock, seconds_per_step, steps_per_dispatch=None):
  """A dispatcher of a made-up loop; returns it, the calls and what was waited for."""
  calls, waited = [], []

  def train(state, teacher, source, num_steps):
    assert num_steps.dtype == np.int32
    calls.append(int(num_steps))
    clock[0] += num_steps * seconds_per_step
    return state, Done(len(calls), waited)

  return dispatch.Dispatcher(train, steps_per_dispatch), calls, waited


@pytest.mark.parametrize(('seconds', 'most'), [(0.002, 250), (0.2, 2), (0.6, 1), (3.0, 1)])
def test_a_dispatch_takes_half_a_second(seconds, most, clock):
  run, calls, _ = make(clock, seconds)
  assert run.most == 1
  run('state', {}, None, run.most)  # Compiles.
  assert run.most == 1
  run('state', {}, None, run.most)
  assert run.most == pytest.approx(most, abs=1)
  assert calls == [1, 1]


def test_a_given_number_is_kept(clock):
  run, _, _ = make(clock, 3.0, steps_per_dispatch=7)
  for _ in range(3):
    run('state', {}, None, 1)
  assert run.most == 7


def test_all_hosts_take_what_the_first_one_chooses(clock, monkeypatch):
  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  chosen = []

  def broadcast(value):
    chosen.append(int(value))
    return np.int32(3)

  monkeypatch.setattr(dispatch.multihost_utils, 'broadcast_one_to_all', broadcast)
  run, _, _ = make(clock, 0.1)
  for _ in range(2):
    run('state', {}, None, 1)
  assert (chosen, run.most) == ([5], 3)


def test_two_dispatches_are_ahead_of_the_last_finished_one(clock):
  run, _, waited = make(clock, 0.1)
  for _ in range(6):
    run('state', {}, None, 1)
  assert waited == [1, 2, 3, 4]
  run.wait()
  assert waited == [1, 2, 3, 4, 5, 6]


def test_cpus_take_one_step_unless_told_otherwise(monkeypatch):
  config = config_lib.default()
  for platform, given, expected in (
    ('cpu', None, 1),
    ('cpu', 4, 4),
    ('gpu', None, None),
    ('tpu', 4, 4),
  ):
    monkeypatch.setattr(jax, 'default_backend', lambda platform=platform: platform)
    config.steps_per_dispatch = given
    assert dispatch.steps_per_dispatch(config) == expected
