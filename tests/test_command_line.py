"""What command lines share: types of arguments, and how they end when nothing can be written."""

import argparse
import subprocess
import sys

import pytest

from imta_jax import command_line

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
