"""Profiles: the steps that they cover, and their files for TensorBoard."""

import jax
import jax.numpy as jnp
import pytest
from etils import epath

from imta_jax.training.profiling import Profile


@pytest.fixture
def calls(monkeypatch):
  """A list of the steps and of the calls of JAX's profiler, in order."""
  calls = []
  monkeypatch.setattr(jax.profiler, 'start_trace', lambda folder: calls.append('start'))
  monkeypatch.setattr(jax.profiler, 'stop_trace', lambda: calls.append('stop'))
  return calls


def run(calls, steps, last_step):
  with Profile(epath.Path('folder'), steps) as profile:
    for step in range(1, last_step + 1):
      calls.append(step)
      profile.after_step(step, lambda: calls.append('wait'))


def test_given_steps_are_profiled(calls):
  run(calls, range(2, 4), last_step=5)
  assert calls == [1, 2, 'wait', 'start', 3, 4, 'wait', 'stop', 5]


def test_other_hosts_wait_at_the_same_steps_but_do_not_profile(calls, monkeypatch):
  monkeypatch.setattr(jax, 'process_index', lambda: 1)
  run(calls, range(2, 4), last_step=5)
  assert calls == [1, 2, 'wait', 3, 4, 'wait', 5]


def test_a_phase_that_ends_first_ends_the_profile(calls):
  run(calls, range(2, 30), last_step=4)
  assert calls[-1] == 'stop'


def test_without_steps_nothing_is_profiled(calls):
  run(calls, range(2, 2), last_step=4)
  assert calls == [1, 2, 3, 4]


def test_tensorboard_finds_the_profile(tmp_path):
  double = jax.jit(lambda x: 2 * x)
  with Profile(epath.Path(tmp_path), range(1, 3)) as profile:
    for step in range(1, 5):
      profile.after_step(step, double(jnp.ones(3)).block_until_ready)
  assert list(tmp_path.glob('plugins/profile/*/*.xplane.pb'))
