"""Imports TensorFlow without its log messages.

The import takes seconds, so other modules do it only where they need TensorFlow.
"""

import os
import sys

from imta_jax.errors import UsageError


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
      'TensorFlow is not installed, but reading this data set requires it: pip install tensorflow '
      'tensorflow-datasets, or set config.dataset.arrays_dir to a folder that imta_jax.prepare '
      'wrote on another machine'
    ) from error
  finally:
    os.dup2(stderr, 2)
    os.close(stderr)
  tf.config.set_visible_devices([], 'GPU')  # JAX needs their memory.
