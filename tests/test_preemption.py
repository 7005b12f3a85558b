"""Signals: the first one is recorded, handlers are restored, and the exit status tells which."""

import os
import signal

import pytest
from jax.experimental import multihost_utils

from imta_jax.preemption import StopRequest

SIGNALS = (signal.SIGTERM, signal.SIGINT)


@pytest.fixture
def received():
  """The signals that reach the handlers installed before a StopRequest."""
  numbers = []
  previous = {n: signal.signal(n, lambda number, _: numbers.append(number)) for n in SIGNALS}
  yield numbers
  for number, handler in previous.items():
    signal.signal(number, handler)


@pytest.mark.parametrize('number', SIGNALS)
def test_a_signal_is_noted_and_a_second_one_acts_as_ever(number, received):
  with StopRequest() as stop:
    assert not stop.requested()
    os.kill(os.getpid(), number)
    assert stop.requested()
    assert received == []
    os.kill(os.getpid(), number)
    assert received == [number]
    assert stop.requested()


def test_after_one_signal_the_other_acts_as_ever(received):
  with StopRequest() as stop:
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGINT)
    assert stop.requested()
  assert received == [signal.SIGINT]


@pytest.mark.parametrize('signalled', [False, True])
def test_handlers_are_handed_back(signalled, received):
  before = [signal.getsignal(number) for number in SIGNALS]
  with StopRequest():
    assert all(signal.getsignal(n) != old for n, old in zip(SIGNALS, before, strict=True))
    if signalled:
      os.kill(os.getpid(), signal.SIGTERM)
  assert [signal.getsignal(number) for number in SIGNALS] == before
  assert received == []


def test_handlers_are_handed_back_after_an_error():
  before = signal.getsignal(signal.SIGTERM)
  with pytest.raises(RuntimeError), StopRequest():
    raise RuntimeError
  assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(('number', 'status'), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_leaving_says_why_and_exits_with_the_status_of_the_signal(number, status, capsys, received):
  with StopRequest() as stop:
    os.kill(os.getpid(), number)
    with pytest.raises(SystemExit) as caught:
      stop.leave('saved')
  assert caught.value.code == status
  assert capsys.readouterr().out == 'saved\n'


def test_only_the_first_host_says_why(capsys, monkeypatch):
  monkeypatch.setattr('jax.process_index', lambda: 1)
  with pytest.raises(SystemExit) as caught:
    StopRequest().leave('saved')
  assert caught.value.code == 143
  assert capsys.readouterr().out == ''


def test_several_hosts_ask_jax_and_leave_signals_alone(monkeypatch):
  monkeypatch.setattr('jax.process_count', lambda: 2)
  monkeypatch.setattr(multihost_utils, 'reached_preemption_sync_point', lambda number: number == 3)
  before = [signal.getsignal(number) for number in SIGNALS]
  with StopRequest() as stop:
    assert [signal.getsignal(number) for number in SIGNALS] == before
    assert [stop.requested() for _ in range(3)] == [False, False, True]
