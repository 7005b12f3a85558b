"""TensorFlow, imported where it is needed and without noise: it takes seconds."""

import os
import sys

from imta_jax.errors import UsageError


def import_tensorflow() -> None:
  """Imports TensorFlow, without the greetings that its C++ side prints and without a GPU."""
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
  sys.stderr.flush()
  stderr = os.dup(2)
  with open(os.devnull, 'w') as nowhere:
    os.dup2(nowhere.fileno(), 2)
  try:
    import tensorflow as tf
  except ModuleNotFoundError as error:
    raise UsageError(
      'TensorFlow is not installed, which reads data sets: pip install tensorflow '
      'tensorflow-datasets, or give arrays that imta_jax.prepare wrote elsewhere as '
      'config.dataset.arrays_dir'
    ) from error
  finally:
    os.dup2(stderr, 2)
    os.close(stderr)
  tf.config.set_visible_devices([], 'GPU')  # Their memory is JAX's.
