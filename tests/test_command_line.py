"""What command lines share: types of arguments, and errors of the environment in one line."""

import argparse
import io
import os
import pwd
import subprocess
import sys

import jax
import pytest
from etils import epath

from imta_jax import command_line
from imta_jax.adaptive.engine import MANIFEST, AdaptiveClassifier
from imta_jax.errors import UsageError
from imta_jax.runtime import cache_folder

PROGRAM = """
import sys
from imta_jax import command_line
def main():
  for _ in range(int(sys.argv[1])):
    print('answer')
command_line.run(main)
"""


@pytest.mark.parametrize('text', ['0', '-1', 'inf', 'nan', '1e999', 'x', ''])
def test_positive_numbers_are_finite_and_above_0(text):
  for number in (int, float):
    with pytest.raises(ValueError):
      command_line.positive(number)(text)
  assert command_line.positive(float)('0.5') == 0.5


def test_folders_to_write_are_no_files(tmp_path):
  (tmp_path / 'file').write_text('')
  for path in ('file', 'file/inside'):
    with pytest.raises(argparse.ArgumentTypeError, match='is a file, or in one: name a folder'):
      command_line.output_folder(str(tmp_path / path))
  for path in (tmp_path, tmp_path / 'new', tmp_path / 'new' / 'inside'):
    assert command_line.output_folder(str(path)) == path
  assert str(command_line.output_folder('gs://bucket/folder')) == 'gs://bucket/folder'


def test_files_to_write_are_in_a_folder_that_exists(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'file').write_text('')
  for path in ('.', 'missing/x.json', 'file/x.json', str(tmp_path)):
    with pytest.raises(argparse.ArgumentTypeError, match='not a file in a folder that exists'):
      command_line.output_file(path)
  for path in ('file', 'new.json', str(tmp_path / 'new.json')):
    assert command_line.output_file(path) == path


@pytest.mark.parametrize('num_lines', [1, 10_000], ids=['at the end', 'in between'])
def test_output_to_a_full_disk_ends_with_one_line(num_lines):
  with open('/dev/full', 'w') as full:
    command = [sys.executable, '-c', PROGRAM, str(num_lines)]
    result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=100)
  assert result.returncode == 2
  assert result.stderr == (
    'error: the output cannot be written (No space left on device): make room\n'
  )


def test_a_reader_that_leaves_ends_the_program_quietly():
  command = [sys.executable, '-c', PROGRAM, '10000']
  with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
    process.stdout.close()
    errors = process.stderr.read()
  assert (process.returncode, errors) == (141, b'')  # As after SIGPIPE.


@pytest.mark.parametrize('closed', ['>&-', '2>&-', '>&- 2>&-'])
def test_a_program_runs_with_its_output_closed(closed):
  command = ['sh', '-c', f'exec "$@" {closed}', 'sh', sys.executable, '-c', PROGRAM, '3']
  result = subprocess.run(command, capture_output=True, text=True, timeout=100)
  assert (result.returncode, result.stderr) == (0, '')
  assert result.stdout == ('' if closed.startswith('>') else 'answer\n' * 3)


def ended(main, **options):
  """Runs a program in this process; returns its status."""
  with pytest.raises(SystemExit) as end:
    command_line.run(main, **options)
  return end.value.code


def fail(error):
  raise error


@pytest.mark.parametrize(
  ('encoding', 'written'), [('ascii', b'\\xe9\\u2192\\udc80'), ('cp1252', b'\xe9\\u2192\\udc80')]
)
def test_characters_that_the_output_cannot_encode_are_escaped(encoding, written, monkeypatch):
  streams = {name: io.BytesIO() for name in ('stdout', 'stderr')}
  for name, stream in streams.items():
    monkeypatch.setattr(sys, name, io.TextIOWrapper(stream, encoding, write_through=True))
  assert ended(lambda: print('é→\udc80', end='')) is None
  assert streams['stdout'].getvalue() == written
  assert ended(lambda: fail(UsageError('é→'))) == 2
  assert streams['stderr'].getvalue() == b'error: ' + written[:-6] + b'\n'


def test_usage_errors_are_one_line_whatever_they_quote(capsys):
  assert ended(lambda: fail(UsageError('no file a\nb\x1b[2J')), usage_status=1) == 1
  assert capsys.readouterr().err == 'error: no file a\\nb\\x1b[2J\n'


def test_an_unknown_scheme_is_refused_in_one_line(capsys):
  assert ended(lambda: epath.Path('foo://bar')) == 2
  assert capsys.readouterr().err == (
    'error: foo:// is an unknown scheme: give a folder, or a path in a bucket with gs://\n'
  )


def test_a_platform_without_devices_is_refused_in_one_line():
  program = 'import jax; from imta_jax import command_line; command_line.run(jax.devices)'
  result = subprocess.run(
    [sys.executable, '-c', program],
    env={**os.environ, 'JAX_PLATFORMS': 'rocm'},
    capture_output=True,
    text=True,
    timeout=100,
  )
  assert result.returncode == 2
  assert result.stderr.startswith('error: JAX finds no device for JAX_PLATFORMS=rocm (')
  assert '): unset it, or install' in result.stderr
  assert result.stderr.count('\n') == 1


@pytest.mark.parametrize(
  'error', [AssertionError(), RuntimeError('x'), KeyError(), KeyError('x'), OSError('x')]
)
def test_bugs_keep_their_stack_trace(error):
  with pytest.raises(type(error)):
    command_line.run(lambda: fail(error))


def test_ctrl_c_ends_a_program_quietly(capsys):
  assert ended(lambda: fail(KeyboardInterrupt())) == 130
  assert capsys.readouterr().err == ''


@pytest.mark.parametrize('is_export', [False, True])
def test_arguments_reach_the_network_together(is_export, tmp_path, monkeypatch):
  calls = []
  for name in ('load', 'from_workdir'):
    monkeypatch.setattr(
      AdaptiveClassifier, name, lambda *args, name=name, **fields: calls.append((name, fields))
    )
  limits = {'latency': None, 'max_loss': 0.1, 'confidence': 0.8}
  arguments = [str(tmp_path), '--max_loss=0.1', '--confidence=0.8']
  if is_export:
    (tmp_path / MANIFEST).touch()
    expected = ('load', limits)
  else:
    arguments += ['--phase=1', '--rule=margin', '--sweep=optimal']
    expected = ('from_workdir', {**limits, 'phase': 0, 'rule': 'margin', 'sweep': 'optimal'})
  parser = argparse.ArgumentParser()
  command_line.add_network_arguments(parser)
  options = parser.parse_args(arguments)
  command_line.open_classifier(options.network, **command_line.choices(options))
  assert calls == [expected]


def test_jax_enable_x64_changes_no_type():
  jax.config.update('jax_enable_x64', True)
  try:
    dtypes = []
    ended(lambda: dtypes.append(jax.random.uniform(jax.random.key(0)).dtype))
  finally:
    jax.config.update('jax_enable_x64', False)
  assert dtypes == ['float32']


def test_without_a_home_caches_are_temporary(monkeypatch, tmp_path):
  for name in ('HOME', 'XDG_CACHE_HOME'):
    monkeypatch.delenv(name)
  monkeypatch.setattr(pwd, 'getpwuid', lambda uid: fail(KeyError(uid)))
  monkeypatch.setattr('tempfile.tempdir', str(tmp_path))
  folders = []
  ended(lambda: folders.append(cache_folder('compiled')))
  assert str(folders[0]).startswith(f'{tmp_path}/')
