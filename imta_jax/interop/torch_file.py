"""Reads tensors from files of `torch.save`, without PyTorch and without running code from them.

A file is a pickle that refers to storages: the entries of a zip archive since PyTorch 1.6, blocks
behind the pickle in earlier versions. Of the functions and classes that a pickle may name, only
those that rebuild tensors have an effect; all others become placeholders. Arrays are views of the
bytes that were read, each not larger than its storage, so a small file cannot take much memory.
"""

import collections
import io
import math
import os
import pickle
import pickletools
import textwrap
import zipfile
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from imta_jax.errors import UsageError, first_line

_DTYPES = {
  'BFloat16Storage': jnp.bfloat16,
  'BoolStorage': np.bool_,
  'ByteStorage': np.uint8,
  'CharStorage': np.int8,
  'ComplexDoubleStorage': np.complex128,
  'ComplexFloatStorage': np.complex64,
  'DoubleStorage': np.float64,
  'FloatStorage': np.float32,
  'HalfStorage': np.float16,
  'IntStorage': np.int32,
  'LongStorage': np.int64,
  'ShortStorage': np.int16,
}
# Where files keep the weights that are not at the top level.
_KEYS = ('state_dict', 'model_state_dict', 'model', 'net')
# The first object of files of earlier versions.
_MAGIC = 0x1950A86A20F9469CFC6C


def read_state_dict(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
  """Reads the weights of a checkpoint: the tensors under 'state_dict', for example.

  Args:
    path: The file, which must be a local one.

  Returns:
    {name: array}, views with the types of the file.

  Raises:
    UsageError: If the file is cut, is not one of `torch.save`, or has no named tensors.
  """
  path = os.fspath(path)
  if not os.path.isfile(path):  # Reading a pipe would wait.
    raise UsageError(f'{path} does not exist or is not a regular file')
  try:
    is_zip = zipfile.is_zipfile(path)
    with open(path, 'rb') as file:
      content = _read_zip(file) if is_zip else _read_legacy(io.BytesIO(file.read()))
    content = content if isinstance(content, dict) else {}
    for state in (*map(content.get, _KEYS), content):
      tensors = {
        name: value.array()
        for name, value in (state.items() if isinstance(state, dict) else ())
        if isinstance(name, str) and isinstance(value, _Tensor)
      }
      if tensors:
        return tensors
  except Exception as error:
    raise UsageError(
      f'{path} is not a checkpoint that can be read without running code from it '
      f'({type(error).__name__}: {first_line(error)}): save only the state_dict'
    ) from error
  found = ', '.join(repr(key) for key in content if isinstance(key, str)) or 'none'
  raise UsageError(
    f'{path} has no tensors under {", ".join(_KEYS)} or at the top level, whose keys are '
    f'{textwrap.shorten(found, 200, placeholder=" …")}: save a state_dict'
  )


class _Storage:
  """A block of elements, whose bytes follow later."""

  def __init__(self, dtype, num_elements):
    self.dtype, self.num_elements, self.data = np.dtype(dtype), num_elements, b''

  def fill(self, data):
    if len(data) != self.num_elements * self.dtype.itemsize:
      raise ValueError(f'a storage has {len(data)} bytes')
    self.data = data


class _Tensor(NamedTuple):
  """A part of a storage."""

  storage: _Storage
  offset: int
  shape: tuple[int, ...]
  strides: tuple[int, ...]

  def array(self) -> np.ndarray:
    elements = np.frombuffer(self.storage.data, self.storage.dtype)
    if 0 in self.shape:
      return np.empty(self.shape, elements.dtype)
    strides = [stride * elements.itemsize for stride in self.strides]
    return np.lib.stride_tricks.as_strided(
      elements[self.offset :], self.shape, strides, writeable=False
    )


def _rebuild_tensor(storage, offset, shape, strides, *_):
  extent = [size - 1 for size in shape]
  last = sum(size * stride for size, stride in zip(extent, strides, strict=True))
  numbers = (offset, *shape, *strides)
  if not all(type(number) is int and 0 <= number < 2**40 for number in numbers):
    raise ValueError('a tensor has a malformed shape')
  is_outside = 0 not in shape and offset + last >= storage.num_elements
  if is_outside or math.prod(shape) > storage.num_elements:  # Copies of views could be huge.
    raise ValueError('a tensor exceeds its storage')
  return _Tensor(storage, offset, shape, strides)


class _Placeholder:
  """Stands for whatever a pickle names besides tensors: takes all and does nothing.

  Files with NumPy numbers or an argparse.Namespace beside the weights can thus be read.
  """

  def __new__(cls, *args, **kwargs):
    return super().__new__(cls)

  def __init__(self, *args, **kwargs):
    pass

  def _ignore(self, *args):
    pass

  __call__ = __setstate__ = __setitem__ = append = extend = _ignore


class _Unpickler(pickle.Unpickler):
  """Builds dicts of tensors. What a pickle names it cannot change: pickles can set attributes."""

  def __init__(self, file):
    super().__init__(file)
    self.storages: dict[str, _Storage] = {}

  def find_class(self, module: str, name: str) -> Any:
    if (module, name) == ('collections', 'OrderedDict'):
      return collections.OrderedDict
    if module == 'torch._utils' and name in ('_rebuild_tensor', '_rebuild_tensor_v2'):
      return lambda *args: _rebuild_tensor(*args)
    if module == 'torch._utils' and name == '_rebuild_parameter':
      return lambda tensor, *_: tensor
    return name if module == 'torch' and name in _DTYPES else _Placeholder

  def persistent_load(self, pid: Any) -> _Storage:
    kind, storage_type, key, _, num_elements, *view = pid
    if kind != 'storage' or any(view):
      raise pickle.UnpicklingError('it has more than storages')
    return self.storages.setdefault(key, _Storage(_DTYPES[storage_type], num_elements))


def _read_zip(file):
  with zipfile.ZipFile(file) as archive:
    size = file.seek(0, os.SEEK_END)
    if sum(entry.file_size for entry in archive.infolist()) > size:
      raise ValueError('its parts are larger than the file')
    (name,) = (name for name in archive.namelist() if name.split('/')[1:] == ['data.pkl'])
    folder = name.partition('/')[0]
    byte_order = f'{folder}/byteorder'  # Older files lack it.
    if byte_order in archive.namelist() and archive.read(byte_order) != b'little':
      raise ValueError('it is not little-endian')
    content, storages = _unpickle(io.BytesIO(archive.read(name)))
    for key, storage in storages.items():
      storage.fill(archive.read(f'{folder}/data/{key}'))
  return content


def _read_legacy(file):
  magic, _, system = (_unpickle(file)[0] for _ in range(3))
  if magic != _MAGIC or not system['little_endian']:
    raise ValueError('its header is unknown')
  content, storages = _unpickle(file)
  for key in _unpickle(file)[0]:
    storage = storages[key]
    if int.from_bytes(file.read(8), 'little') != storage.num_elements:
      raise ValueError('a storage has another size')
    storage.fill(file.read(storage.num_elements * storage.dtype.itemsize))
  return content


def _unpickle(file):
  """Reads an object, and the storages to which it refers."""
  start, size = file.tell(), file.getbuffer().nbytes
  for opcode, argument, _ in pickletools.genops(file):
    # The unpickler allocates as many entries as the highest index that it stores at.
    if opcode.name in ('PUT', 'BINPUT', 'LONG_BINPUT') and argument > size:
      raise pickle.UnpicklingError('an index is out of range')
  file.seek(start)
  unpickler = _Unpickler(file)
  return unpickler.load(), unpickler.storages
