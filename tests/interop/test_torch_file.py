"""Files of torch.save, read without PyTorch: both formats, and malformed or hostile ones."""

import io
import os
import pickle
import pickletools
import zipfile
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from imta_jax.errors import UsageError
from imta_jax.interop import torch_file
from imta_jax.interop.torch_file import read_state_dict

DATA = Path(__file__).parents[1] / 'data'
FORMATS = ('zip', 'legacy')


@pytest.mark.parametrize('kind', FORMATS)
def test_tensors_of_all_kinds_are_read(kind):
  state = read_state_dict(DATA / f'torch_{kind}.pth')
  base = np.arange(24, dtype=np.float32)
  expected = {
    'whole': base.reshape(2, 3, 4),
    'transposed': base.reshape(4, 6).T,
    'part': base[5:17:3],
    'parameter': base[:2],
    'scalar': np.float32(2.5),
    'empty': np.zeros((0, 3), np.float32),
    'half': base[:4].astype(np.float16) / np.float16(3),
    'bfloat16': base[:4].astype(jnp.bfloat16) / np.array(3, jnp.bfloat16),
    'double': base[:4].astype(np.float64) / 3,
    'long': np.array([-1, 2**40]),
    'bool': np.array([True, False]),
    'complex': base[:2] + 1j * base[2:4],
  }
  # Sparse and meta tensors have no storage.
  assert state.keys() == expected.keys()
  for name, value in expected.items():
    assert state[name].dtype == value.dtype, name
    np.testing.assert_array_equal(state[name], value, err_msg=name)


def refused(path, message):
  with pytest.raises(UsageError, match=message) as caught:
    read_state_dict(path)
  assert '\n' not in str(caught.value) and str(path) in str(caught.value)


@pytest.mark.parametrize('kind', FORMATS)
def test_a_cut_file_is_refused_wherever_it_ends(kind, tmp_path):
  data, path = (DATA / f'torch_{kind}.pth').read_bytes(), tmp_path / 'cut.pth'
  for size in (0, 1, 20, 200, *range(500, len(data), 499), len(data) - 1):
    path.write_bytes(data[:size])
    refused(path, 'is not a checkpoint that can be read without running code')


@pytest.mark.parametrize('kind', FORMATS)
def test_a_changed_byte_is_refused_or_harmless(kind, tmp_path):
  data, path = (DATA / f'torch_{kind}.pth').read_bytes(), tmp_path / 'changed.pth'
  random = np.random.default_rng(0)
  for position in random.integers(len(data), size=300):
    changed = bytearray(data)
    changed[position] ^= int(random.integers(1, 256))
    path.write_bytes(changed)
    try:
      read_state_dict(path)
    except UsageError as error:
      assert '\n' not in str(error)


class Call:
  """Unpickles to the result of a call."""

  def __init__(self, function, *args):
    self.call = function, args

  def __reduce__(self):
    return self.call


def write_zip(path, content, storages=(), compression=zipfile.ZIP_STORED):
  """Writes a pickle, or bytes that are one, and its storages as PyTorch does."""
  with zipfile.ZipFile(path, 'w', compression) as archive:
    data = content if isinstance(content, bytes) else pickle.dumps(content, protocol=2)
    archive.writestr('archive/data.pkl', data)
    for key, value in dict(storages).items():
      archive.writestr(f'archive/data/{key}', value)


def write_legacy(path, content):
  parts = (0x1950A86A20F9469CFC6C, 1001, {'little_endian': True}, content, [])
  path.write_bytes(b''.join(pickle.dumps(part, protocol=2) for part in parts))


@pytest.mark.parametrize('write', [write_zip, write_legacy])
@pytest.mark.parametrize('function', [Path.write_text, os.mkdir])
def test_code_in_a_file_is_never_run(tmp_path, write, function):
  path, target = tmp_path / 'attack.pth', tmp_path / 'executed'
  args = (target, 'text') if function is Path.write_text else (str(target),)
  write(path, {'state_dict': {'weight': Call(function, *args)}})
  refused(path, "has no tensors under .* whose keys are 'state_dict'")
  assert not target.exists()
  pickle.loads(pickle.dumps(Call(function, *args)))
  assert target.exists()  # The attack is one.


def tensor(
  storage_type=b'FloatStorage', kind='storage', count=4, offset=0, shape=(4,), strides=(1,)
):
  """Returns a pickle of {'x': a tensor}."""

  def dumps(value):  # Without PROTO and STOP.
    return pickle.dumps(value, protocol=2)[2:-1]

  pid = b'(' + dumps(kind) + b'ctorch\n' + storage_type + b'\n' + dumps('0') + dumps('cpu')
  pid += dumps(count) + b't'
  arguments = b'(' + pid + b'Q' + dumps(offset) + dumps(shape) + dumps(strides) + b't'
  rebuilt = b'ctorch._utils\n_rebuild_tensor_v2\n' + arguments + b'R'
  return b'\x80\x02}' + dumps('x') + rebuilt + b's.'


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'shape': (5,)}, 'exceeds its storage'),
    ({'offset': 1}, 'exceeds its storage'),
    ({'offset': -1}, 'malformed shape'),
    ({'strides': (2,)}, 'exceeds its storage'),
    ({'shape': (2, 2)}, 'ValueError'),
    ({'shape': (-4,), 'strides': (-1,)}, 'malformed shape'),
    ({'shape': (2.0,)}, 'malformed shape'),
    ({'shape': (5,), 'strides': (0,)}, 'exceeds its storage'),  # As of `expand`.
    ({'shape': (2**39, 2**39), 'strides': (0, 0)}, 'exceeds its storage'),
    ({'shape': (1,) * 100, 'strides': (0,) * 100}, 'ValueError'),
    ({'count': 5}, 'a storage has 16 bytes'),
    ({'count': 10**15}, 'a storage has 16 bytes'),
    ({'storage_type': b'DoubleStorage'}, 'a storage has 16 bytes'),
    ({'storage_type': b'UntypedStorage'}, 'KeyError|TypeError'),
    ({'kind': 'module'}, 'it has more than storages'),
  ],
)
def test_a_tensor_that_its_storage_does_not_hold_is_refused(tmp_path, fields, message):
  path, storages = tmp_path / 'x.pth', {'0': np.arange(4, dtype=np.float32).tobytes()}
  write_zip(path, tensor(), storages)
  np.testing.assert_array_equal(read_state_dict(path)['x'], np.arange(4))
  write_zip(path, tensor(**fields), storages)
  refused(path, message)


def test_parts_larger_than_the_file_are_refused(tmp_path):
  path = tmp_path / 'bomb.pth'
  write_zip(path, tensor(count=10**7), {'0': bytes(4 * 10**7)}, zipfile.ZIP_DEFLATED)
  assert path.stat().st_size < 10**5
  refused(path, 'its parts are larger than the file')


def test_a_high_index_is_refused(tmp_path):
  path = tmp_path / 'bomb.pth'
  write_zip(path, b'\x80\x02}r\xff\xff\xff\xff.')  # 64 GB, if unpickled.
  refused(path, 'an index is out of range')


def test_a_pickle_cannot_change_what_it_names(tmp_path):
  # BUILD with a pair sets attributes of what it finds below: here of each name in turn.
  attributes = b'}U\x05dtypeU\x01xs'
  for name in (b'torch\nBFloat16Storage', b'torch._utils\n_rebuild_tensor_v2', b'os\nsystem'):
    path = tmp_path / 'x.pth'
    write_zip(path, b'\x80\x02c' + name + b'\nN' + attributes + b'\x86b.')
    pickletools.dis(pickle_of(path), io.StringIO())  # It is a pickle.
    refused(path, 'is not a checkpoint|has no tensors')
  assert jnp.bfloat16.dtype == 'bfloat16' and not vars(torch_file._rebuild_tensor)
  assert read_state_dict(DATA / 'torch_zip.pth')


def pickle_of(path):
  with zipfile.ZipFile(path) as archive:
    return archive.read('archive/data.pkl')


def test_what_is_no_file_is_refused_at_once(tmp_path):
  os.mkfifo(tmp_path / 'pipe.pth')
  for name in ('pipe.pth', 'missing.pth'):
    refused(tmp_path / name, f'{name} does not exist or is not a regular file')
