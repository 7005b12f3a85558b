"""Types of arguments that several command lines share."""

import argparse

import pytest

from imta_jax import command_line


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
