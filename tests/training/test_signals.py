"""Signals: what they do at each moment, handlers are restored, the exit status tells which."""

import os
import signal
import subprocess
import sys

import pytest
from jax.experimental import multihost_utils

from imta_jax.training.signals import StopRequest

SIGNALS = (signal.SIGTERM, signal.SIGINT)

# A lock of C that is taken twice: like a compilation, it lets no handler of Python run.
BUSY = """
import ctypes
import sys
from imta_jax.training.signals import StopRequest
with StopRequest() as stop:
  stop.has_unsaved_steps = sys.argv[1] == 'unsaved'
  print('busy', flush=True)
  lock, libc = ctypes.create_string_buffer(64), ctypes.CDLL(None)
  libc.pthread_mutex_lock(lock)
  libc.pthread_mutex_lock(lock)
"""


@pytest.fixture
def busy():
  """A function that starts a process that is busy for ever, with steps 'saved' or 'unsaved'."""
  processes = []

  def start(steps):
    command = [sys.executable, '-c', BUSY, steps]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    processes.append(process)
    assert process.stdout.readline() == 'busy\n'
    return process

  yield start
  for process in processes:
    process.kill()
    process.communicate()


@pytest.fixture
def restored():
  """The handlers before; restores them, whatever a test has done."""
  previous = {number: signal.getsignal(number) for number in SIGNALS}
  yield previous
  for number, handler in previous.items():
    signal.signal(number, handler)


def test_without_unsaved_steps_a_signal_ends_the_process_at_once(busy):
  process = busy('saved')
  process.send_signal(signal.SIGINT)
  output, _ = process.communicate(timeout=10)
  assert process.returncode == 130
  assert output == 'stopped; run the same command again to resume\n'


def test_with_unsaved_steps_the_second_signal_ends_the_process_at_once(busy):
  process = busy('unsaved')
  process.send_signal(signal.SIGINT)
  assert process.stdout.readline().startswith('stopping: the state is being saved')
  assert process.poll() is None
  process.send_signal(signal.SIGTERM)
  process.communicate(timeout=10)
  assert process.returncode == 143


@pytest.mark.parametrize('number', SIGNALS)
def test_with_unsaved_steps_a_signal_is_noted_and_said_once(number, restored, capsys):
  with StopRequest() as stop:
    stop.has_unsaved_steps = True
    assert not stop.requested()
    os.kill(os.getpid(), number)
    assert stop.requested()
  expected = 'stopping: the state is being saved; a second signal stops at once\n'
  assert capsys.readouterr().out == expected


def test_handlers_are_handed_back_after_a_signal_and_an_error(restored):
  with pytest.raises(RuntimeError), StopRequest() as stop:
    stop.has_unsaved_steps = True
    assert all(signal.getsignal(number) != old for number, old in restored.items())
    os.kill(os.getpid(), signal.SIGTERM)
    raise RuntimeError
  assert {number: signal.getsignal(number) for number in SIGNALS} == restored


@pytest.mark.parametrize(('number', 'status'), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_leaving_says_why_and_exits_with_the_status_of_the_signal(number, status, capsys, restored):
  with StopRequest() as stop:
    stop.has_unsaved_steps = True
    os.kill(os.getpid(), number)
    with pytest.raises(SystemExit) as caught:
      stop.leave('saved')
  assert caught.value.code == status
  assert 'saved\n' in capsys.readouterr().out


def test_only_the_first_host_says_why(capsys, monkeypatch):
  monkeypatch.setattr('jax.process_index', lambda: 1)
  with pytest.raises(SystemExit) as caught:
    StopRequest().leave('saved')
  assert caught.value.code == 143
  assert capsys.readouterr().out == ''


def test_several_hosts_ask_jax_and_leave_signals_alone(monkeypatch, restored):
  monkeypatch.setattr('jax.process_count', lambda: 2)
  monkeypatch.setattr(multihost_utils, 'reached_preemption_sync_point', lambda number: number == 3)
  with StopRequest() as stop:
    assert {number: signal.getsignal(number) for number in SIGNALS} == restored
    # JAX answers yes at one number alone; the request holds, also where a phase ends in between.
    assert [stop.requested() for _ in range(5)] == [False, False, True, True, True]
