"""What command lines share: the network to run, and errors of the environment in one line."""

import argparse
import copy
import io
import os
import pwd
import sys

import jax
import numpy as np
import pytest
from etils import epath

from imta_jax import command_line
from imta_jax.adaptive.engine import MANIFEST, AdaptiveClassifier
from imta_jax.errors import UsageError
from imta_jax.runtime import cache_folder

# Types of arguments


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
  for path in (tmp_path, tmp_path / 'new' / 'inside'):
    assert command_line.output_folder(str(path)) == path
  assert str(command_line.output_folder('gs://bucket/folder')) == 'gs://bucket/folder'


def test_files_to_write_are_in_a_folder_that_exists(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'file').write_text('')
  for path in ('.', 'missing/x.json', 'file/x.json'):
    with pytest.raises(argparse.ArgumentTypeError, match='not a file in a folder that exists'):
      command_line.output_file(path)
  for path in ('file', 'new.json', str(tmp_path / 'new.json')):
    assert command_line.output_file(path) == path


# The network


@pytest.mark.parametrize('is_export', [False, True])
def test_arguments_reach_the_network_together(is_export, tiny_classifier, tmp_path, monkeypatch):
  calls = []
  for name in ('load', 'from_workdir'):
    monkeypatch.setattr(
      AdaptiveClassifier,
      name,
      lambda *args, name=name, **fields: calls.append((name, fields)) or tiny_classifier,
    )
  limits = {'latency': None, 'max_loss': 0.1, 'confidence': 0.8, 'runtime': 'openvino'}
  arguments = [str(tmp_path), '--max_loss=0.1', '--confidence=0.8', '--runtime=openvino']
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


def test_what_is_no_network_is_refused_in_a_line(tmp_path):
  with pytest.raises(UsageError, match=f'{tmp_path} is not a workdir'):
    command_line.open_classifier(str(tmp_path))
  (tmp_path / MANIFEST).write_text('{}')
  with pytest.raises(UsageError, match='manifest.json is corrupt'):
    command_line.open_classifier(str(tmp_path))
  with pytest.raises(UsageError, match='has one phase, rule and sweep: leave out phase, rule'):
    command_line.open_classifier(str(tmp_path), phase=1, rule='margin', sweep=None)


def test_a_classifier_of_floats_is_not_for_image_files(tiny_classifier, tmp_path):
  classifier = copy.copy(tiny_classifier)
  classifier.image = jax.ShapeDtypeStruct(classifier.image.shape, np.float32)
  classifier.save(tmp_path / 'exported')
  message = r'arrays of float32 with shape \(2, 2, 1\), not image files: use imta_jax.load'
  with pytest.raises(UsageError, match=message):
    command_line.open_classifier(str(tmp_path / 'exported'))


@pytest.mark.parametrize(
  ('limits', 'message'),
  [
    ({'budget': -3}, 'budget -3: too small: the minimum is 18'),
    ({'latency': 1e-12}, 'latency 1e-12: too small'),
    ({'max_loss': 1}, 'it must be above 0 and below 1'),
    ({'max_loss': 0.1, 'confidence': 95}, 'it must be above 0 and below 1'),
  ],
)
def test_limits_that_nothing_meets_are_refused(limits, message, tiny_export):
  with pytest.raises(UsageError, match=message):
    command_line.open_classifier(str(tiny_export), **limits)


# Errors


def ended(main, **options):
  """Runs a program in this process; returns its status."""
  with pytest.raises(SystemExit) as end:
    command_line.run(main, **options)
  return end.value.code


def fail(error):
  raise error


@pytest.mark.parametrize('num_lines', [1, 10_000], ids=['at the end', 'in between'])
def test_output_to_a_full_disk_ends_with_one_line(num_lines, monkeypatch, capsys):
  with open('/dev/full', 'w') as full:
    monkeypatch.setattr(sys, 'stdout', full)
    assert ended(lambda: [print('answer') for _ in range(num_lines)]) == 2
  expected = 'error: the output cannot be written (No space left on device): make room\n'
  assert capsys.readouterr().err == expected


@pytest.mark.parametrize('num_lines', [1, 10_000], ids=['at the end', 'in between'])
def test_a_reader_that_leaves_ends_the_program_quietly(num_lines, monkeypatch, capsys):
  reader, writer = os.pipe()
  os.close(reader)
  with os.fdopen(writer, 'w') as output:
    monkeypatch.setattr(sys, 'stdout', output)
    assert ended(lambda: [print('answer') for _ in range(num_lines)]) == 141  # As after SIGPIPE.
  assert capsys.readouterr().err == ''


def test_a_program_runs_with_its_output_closed(monkeypatch):
  for name in ('stdout', 'stderr'):
    monkeypatch.setattr(sys, name, None)
  assert ended(lambda: print('answer')) is None


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


@pytest.mark.parametrize('error', [AssertionError(), RuntimeError('x')])
def test_a_platform_without_devices_is_refused_in_one_line(error, monkeypatch, capsys):
  monkeypatch.setenv('JAX_PLATFORMS', 'rocm')
  monkeypatch.setattr(jax, 'local_devices', lambda: fail(RuntimeError('no rocm\nat all')))
  assert ended(lambda: fail(error)) == 2
  assert capsys.readouterr().err == (
    'error: JAX finds no device for JAX_PLATFORMS=rocm (no rocm): unset it, or install JAX and '
    'drivers for that device\n'
  )


@pytest.mark.parametrize(
  'error', [AssertionError(), RuntimeError('x'), KeyError('x'), OSError('x'), ValueError('x')]
)
def test_bugs_keep_their_stack_trace(error):
  with pytest.raises(type(error)):
    command_line.run(lambda: fail(error))


def test_ctrl_c_ends_a_program_quietly(capsys):
  assert ended(lambda: fail(KeyboardInterrupt())) == 130
  assert capsys.readouterr().err == ''


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
