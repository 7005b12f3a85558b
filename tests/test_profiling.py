"""Profiles: the steps that they cover, and their files for TensorBoard."""

import jax
import jax.numpy as jnp
import pytest
from etils import epath

from imta_jax.profiling import Profile


@pytest.fixture
def calls(monkeypatch):
  """A list of the steps and of the calls of JAX's profiler, in order."""
  calls = []
  monkeypatch.setattr(jax.profiler, 'start_trace', lambda folder: calls.append('start'))
  monkeypatch.setattr(jax.profiler, 'stop_trace', lambda: calls.append('stop'))
  return calls


def run(calls, first_step, num_profiled, num_steps):
  with Profile(epath.Path('folder'), first_step, num_profiled) as profile:
    for step in range(first_step + 1, first_step + num_steps + 1):
      calls.append(step)
      profile.after_step(step, lambda: None)


@pytest.mark.parametrize('first_step', [0, 50])
def test_steps_after_the_first_ten_are_profiled(first_step, calls):
  run(calls, first_step, num_profiled=3, num_steps=20)
  start, stop = calls.index('start'), calls.index('stop')
  assert calls[start + 1 : stop] == [first_step + number for number in (11, 12, 13)]


def test_a_phase_that_ends_first_ends_the_profile(calls):
  run(calls, 0, num_profiled=30, num_steps=12)
  assert calls[-1] == 'stop'


def test_without_steps_nothing_is_profiled(calls):
  run(calls, 0, num_profiled=0, num_steps=20)
  assert calls == list(range(1, 21))


def test_tensorboard_finds_the_profile(tmp_path):
  double = jax.jit(lambda x: 2 * x)
  with Profile(epath.Path(tmp_path), 0, 2) as profile:
    for step in range(1, 14):
      profile.after_step(step, double(jnp.ones(3)).block_until_ready)
  assert list(tmp_path.glob('plugins/profile/*/*.xplane.pb'))


@pytest.mark.parametrize('first_step', [0, 50])
def test_dispatches_end_where_the_profile_starts_and_ends(first_step, calls):
  step, calls_expected = first_step, ['wait', 'start', 'wait', 'stop']
  with Profile(epath.Path('folder'), first_step, 3) as profile:
    while step < first_step + 40:
      step += min(8, profile.steps_left(step))
      profile.after_step(step, lambda: calls.append('wait'))
  assert calls == calls_expected
