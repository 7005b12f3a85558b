"""One run at a time trains in a workdir; a killed one refuses nobody."""

import os
import re
import signal
import subprocess
import sys

import jax
import pytest
from etils import epath

from imta_jax.errors import UsageError
from imta_jax.training import workdir_lock

HOLDER = """
import sys, time
from etils import epath
from imta_jax.training import workdir_lock
with workdir_lock.hold(epath.Path(sys.argv[1])):
  print('held', flush=True)
  time.sleep(100)
"""


def test_a_second_run_is_refused_until_the_first_is_killed(tmp_path):
  workdir = epath.Path(tmp_path / 'new/run')
  command = [sys.executable, '-c', HOLDER, workdir]
  with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as first:
    try:
      assert first.stdout.readline() == 'held\n'
      with pytest.raises(UsageError) as caught, workdir_lock.hold(workdir):
        pytest.fail('two runs hold the lock')
      expected = rf'workdir {re.escape(str(workdir))} is in use by process {first.pid} on .*: wait'
      assert re.match(expected, str(caught.value))
    finally:
      first.send_signal(signal.SIGKILL)
  with workdir_lock.hold(workdir):
    assert (workdir / '.lock').read_text().startswith(f'process {os.getpid()} on ')


def test_the_first_host_holds_the_lock_for_all(tmp_path, monkeypatch):
  with workdir_lock.hold(epath.Path(tmp_path)):
    monkeypatch.setattr(jax, 'process_index', lambda: 1)
    with workdir_lock.hold(epath.Path(tmp_path)):
      pass


def test_a_workdir_that_is_a_file_is_refused(tmp_path):
  path = tmp_path / 'file'
  path.write_text('')
  with (
    pytest.raises(UsageError, match=r'file/.lock cannot be read or written \(File exists'),
    workdir_lock.hold(epath.Path(path)),
  ):
    pass
