"""The watch over hosts: who is watched, and for how long. In test_hosts.py, hosts do hang."""

import faulthandler

import jax
import pytest

from imta_jax import runtime


@pytest.fixture
def calls(monkeypatch):
  """What the watch asks of Python: seconds until the process ends, None if never."""
  calls = []
  monkeypatch.setattr(
    faulthandler,
    'dump_traceback_later',
    lambda seconds, exit: calls.append(seconds if exit else 'stays'),
  )
  monkeypatch.setattr(faulthandler, 'cancel_dump_traceback_later', lambda: calls.append(None))
  return calls


def test_a_host_of_several_ends_half_an_hour_after_its_last_sign(calls, monkeypatch):
  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  with runtime.watchdog():
    runtime.progressed()
    with runtime.watchdog_paused():
      assert calls == [1800, 1800, None]
    assert calls.pop() == 1800
  assert calls == [1800, 1800, None, None]


def test_the_watch_ends_with_an_error(calls, monkeypatch):
  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  with pytest.raises(RuntimeError), runtime.watchdog():
    raise RuntimeError
  assert calls == [1800, None]


def test_a_single_host_is_not_watched(calls):
  with runtime.watchdog():
    runtime.progressed()
  assert calls == [None]
