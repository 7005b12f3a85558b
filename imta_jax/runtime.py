"""The process around the computation: devices, caches, TensorFlow, and the watchdog of hosts."""

import contextlib
import ctypes
import faulthandler
import os
import sys
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from imta_jax.errors import UsageError

# Name of the mapped axis over devices, used by data, steps and batch norm.
AXIS = 'batch'
# The longest time between two signs of progress: a validation, or loading, compiling and a step.
_SECONDS_TO_HANG = 1800
# Parameters of glibc's mallopt.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def device_numbers() -> np.ndarray:
  """Returns the index of each local device among all devices, [local devices], for pmap."""
  local = jax.local_device_count()
  return jax.process_index() * local + np.arange(local, dtype=np.int32)


def replicated() -> NamedSharding:
  """The sharding of arrays that every device has: that of pmap's results with `out_axes=None`.

  A pmapped function that takes its own results and other arrays of this sharding is compiled once.
  """
  return NamedSharding(Mesh(np.asarray(jax.devices()), (AXIS,)), PartitionSpec())


def replicate(tree: Any) -> Any:
  """Copies a tree of arrays to every device.

  Args:
    tree: Arrays on the host or on one device, the same on every host.

  Returns:
    The same tree, replicated over all devices.
  """
  return jax.device_put(tree, replicated())


def cache_folder(name: str) -> epath.Path:
  """Returns the cache folder imta_jax/<name> in XDG_CACHE_HOME, by default ~/.cache."""
  home = os.environ.get('XDG_CACHE_HOME') or '~/.cache'
  return epath.Path(home).expanduser() / 'imta_jax' / name


def set_up_compilation_cache() -> None:
  """Keeps compiled programs between runs, in JAX_COMPILATION_CACHE_DIR if that is set."""
  if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
    jax.config.update('jax_compilation_cache_dir', str(cache_folder('compiled')))
  if 'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS' not in os.environ:
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.1)


def keep_freed_memory() -> None:
  """Keeps freed memory in the process: new pages for every image take a fifth of its decoding.

  Where the C library is not glibc, nothing happens.
  """
  mallopt = getattr(ctypes.CDLL(None), 'mallopt', None) if os.name == 'posix' else None
  if mallopt is not None:
    mallopt(_M_TRIM_THRESHOLD, 2**30)
    mallopt(_M_MMAP_THRESHOLD, 2**25)  # The largest value that is allowed.


def import_tensorflow() -> None:
  """Imports TensorFlow without the messages of its C++ code, and hides GPUs from it."""
  if os.environ.get('TF_CPP_MIN_LOG_LEVEL', '1') == '1':  # JAX has set it to 1.
    os.environ['TF_CPP_MIN_LOG_LEVEL'] = '2'
  sys.stderr.flush()
  stderr = os.dup(2)
  with open(os.devnull, 'w') as nowhere:
    os.dup2(nowhere.fileno(), 2)
  try:
    import tensorflow as tf
  except ModuleNotFoundError as error:
    raise UsageError(
      'TensorFlow is not installed, but reading this data set requires it: pip install '
      "'imta_jax[train]', or set config.dataset.arrays_dir to a folder that imta_jax.data.prepare "
      'wrote on another machine'
    ) from error
  finally:
    os.dup2(stderr, 2)
    os.close(stderr)
  tf.config.set_visible_devices([], 'GPU')  # JAX needs their memory.


@contextlib.contextmanager
def watchdog() -> Iterator[None]:
  """Watchdog: aborts a multi-host run with stack traces after half an hour without progress."""
  progressed()
  try:
    yield
  finally:
    faulthandler.cancel_dump_traceback_later()


def progressed() -> None:
  """Resets the watchdog."""
  if jax.process_count() > 1:
    faulthandler.dump_traceback_later(_SECONDS_TO_HANG, exit=True)


@contextlib.contextmanager
def watchdog_paused() -> Iterator[None]:
  """Pauses the watchdog for work that may take hours on one host while the others wait."""
  faulthandler.cancel_dump_traceback_later()
  yield
  progressed()
