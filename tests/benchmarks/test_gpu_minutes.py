"""The program for a GPU at hand for minutes: it goes on where it was stopped, and stops in time."""

import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / 'experiments/benchmarks'))
import gpu_minutes

COUNT = """
import sys
runs, result = sys.argv[1:]
open(runs, 'a').write('x')
open(result, 'w').close()
"""
# Starts a program that, when it is told to end, writes a file.
START = """
import subprocess, sys
subprocess.run([sys.executable, *sys.argv[1:]])
"""
SAVE = """
import pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[1])
def save(*_):
  time.sleep(0.5)
  (folder / 'saved').touch()
  sys.exit()
signal.signal(signal.SIGTERM, save)
(folder / 'ready').touch()
time.sleep(60)
"""


@pytest.fixture
def programs(tmp_path):
  for name, text in (('count', COUNT), ('start', START), ('save', SAVE)):
    (tmp_path / f'{name}.py').write_text(text)
  return tmp_path


def test_what_has_a_result_is_not_repeated(programs):
  result = programs / 'result'
  part = gpu_minutes.Part(result, [programs / 'count.py', programs / 'runs', result])
  for _ in range(2):
    assert gpu_minutes.run([part], programs, time.monotonic() + 60)
  assert (programs / 'runs').read_text() == 'x'


def test_at_the_end_of_the_time_programs_save_their_states(programs):
  command = [programs / 'start.py', programs / 'save.py', programs]
  part = gpu_minutes.Part(programs / 'result', command)
  for seconds, of_part in ((3, part), (60, part._replace(seconds=3))):
    assert not gpu_minutes.run([of_part], programs, time.monotonic() + seconds)
    assert (programs / 'ready').exists() and (programs / 'saved').exists()
    (programs / 'ready').unlink()
    (programs / 'saved').unlink()
  assert not gpu_minutes.run([part], programs, time.monotonic())  # No time is left to start it.
  assert not (programs / 'ready').exists()


@pytest.mark.parametrize('rehearse', [False, True])
def test_a_rehearsal_has_the_same_parts(rehearse, tmp_path):
  groups = gpu_minutes.all_parts(tmp_path, tmp_path / 'arrays', rehearse)
  assert [len(group) for group in groups] == [4, 1, 1, 1, 1, 1, 1]
  parts = sum(groups, [])
  assert len({part.result for part in parts}) == len(parts)
  assert all(Path(part.command[0]).exists() for part in parts)
