"""The cache folder, and the cache of compiled programs in it."""

import os

import jax
from etils import epath


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
