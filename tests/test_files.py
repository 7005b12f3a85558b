"""Files of any owner are read, as in containers and on shared file systems."""

import os
import pwd

from etils import epath

from imta_jax import files
from imta_jax.files import size_and_time


def test_size_and_time(tmp_path, monkeypatch):
  monkeypatch.delattr(pwd, 'getpwuid')
  path = epath.Path(tmp_path) / 'a'
  path.write_bytes(b'12345')
  os.utime(path, (7, 8.5))
  assert size_and_time(path) == (5, 8)


def test_workdirs_of_unknown_owners_are_read(tmp_path, monkeypatch):
  monkeypatch.delattr(pwd, 'getpwuid')
  path = epath.Path(tmp_path) / 'config.json'
  files.write_whole(path, b'{}')
  assert files.read_whole(path, 'fix it') == b'{}'
