"""Files as `torch.save` writes them, without PyTorch."""

import collections
import io
import math
import pickle
import sys
import types
import zipfile

import jax.numpy as jnp
import numpy as np
import pytest

_STORAGE_TYPES = {
  np.dtype(np.float32): 'FloatStorage',
  np.dtype(np.float64): 'DoubleStorage',
  np.dtype(np.float16): 'HalfStorage',
  np.dtype(jnp.bfloat16): 'BFloat16Storage',
  np.dtype(np.complex64): 'ComplexFloatStorage',
  np.dtype(np.int64): 'LongStorage',
}


class _Storage:
  def __init__(self, key, elements):
    self.key, self.elements = key, elements


class _Pickler(pickle.Pickler):
  """Pickles arrays as tensors, and collects their storages."""

  def __init__(self, file):
    super().__init__(file, protocol=2)
    self.storages = []

  def persistent_id(self, value):
    if not isinstance(value, _Storage):
      return None
    storage_type = getattr(sys.modules['torch'], _STORAGE_TYPES[value.elements.dtype])
    return ('storage', storage_type, value.key, 'cpu', value.elements.size)

  def reducer_override(self, value):
    if not isinstance(value, np.ndarray):
      return NotImplemented
    elements = np.ascontiguousarray(value).ravel()
    strides = tuple(math.prod(value.shape[axis + 1 :]) for axis in range(value.ndim))
    self.storages.append(_Storage(str(len(self.storages)), elements))
    arguments = (self.storages[-1], 0, value.shape, strides, False, collections.OrderedDict())
    return sys.modules['torch._utils']._rebuild_tensor_v2, arguments


def _fake(module, *names):
  """Makes a module whose classes are pickled by their names."""
  fake = types.ModuleType(module)
  for name in names:
    setattr(fake, name, type(name, (), {'__module__': module}))
  return fake


def _dumps(value):
  file = io.BytesIO()
  pickler = _Pickler(file)
  pickler.dump(value)
  return file.getvalue(), [storage.elements for storage in pickler.storages]


@pytest.fixture
def torch_save(monkeypatch):
  """A function that writes an object, with its arrays as tensors."""
  monkeypatch.setitem(sys.modules, 'torch', _fake('torch', *_STORAGE_TYPES.values()))
  monkeypatch.setitem(sys.modules, 'torch._utils', _fake('torch._utils', '_rebuild_tensor_v2'))

  def save(content, path, is_zip=True):
    pickled, storages = _dumps(content)
    if is_zip:
      with zipfile.ZipFile(path, 'w') as archive:
        archive.writestr('archive/data.pkl', pickled)
        for key, elements in enumerate(storages):
          archive.writestr(f'archive/data/{key}', elements.tobytes())
    else:
      header = (0x1950A86A20F9469CFC6C, 1001, {'little_endian': True})
      keys = [str(key) for key in range(len(storages))]
      parts = [*(_dumps(part)[0] for part in header), pickled, _dumps(keys)[0]]
      parts += [elements.size.to_bytes(8, 'little') + elements.tobytes() for elements in storages]
      path.write_bytes(b''.join(parts))

  return save
