"""Checks that logits and gradients on this device agree with those of a CPU.

    JAX_PLATFORMS=cpu python experiments/benchmarks/agreement.py --write=reference.npz
    python experiments/benchmarks/agreement.py --check=reference.npz

The first command runs on a CPU. It writes the logits of all exits and random projections of phase
I's gradient, in float32, for weights and images that depend on the config's seed. The second
command compares them with the results of this device: in float32 at the highest and at the default
precision, and in bfloat16.
"""

import argparse
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import common
import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from imta_jax import command_line
from imta_jax import config as config_lib
from imta_jax.errors import UsageError

_CONFIG = 'configs/cifar100.py:exits=3'
_IMAGES = 16
# Number of projections per gradient array. A projection is the sum of all elements with random
# signs; its mean square is the squared norm of the array.
_PROJECTIONS = 16
# Types, precisions and the errors below which they agree. The mantissa of TF32 has 10 bits and that
# of bfloat16 has 7, and errors accumulate over the layers.
_MODES = (('float32', 'highest', 1e-3), ('float32', 'default', 3e-2), ('bfloat16', 'default', 0.3))


def main(arguments: Sequence[str] | None = None) -> int:
  """Runs the command line.

  Returns:
    The exit status: 1 if an error is too large.

  Raises:
    UsageError: If the reference cannot be read, or was written for other weights or images.
  """
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument(
    '--config',
    default=_CONFIG,
    help='config file, with --write; default: %(default)s, whose layers are of the same kinds as '
    'those of larger networks, and which compiles sooner',
  )
  action = parser.add_mutually_exclusive_group(required=True)
  action.add_argument('--write', help='file to write the reference to (.npz)')
  action.add_argument('--check', help='reference file to compare with')
  parser.add_argument('--output', type=command_line.output_file, help='JSON file for the errors')
  options = parser.parse_args(arguments)
  if options.write:
    config = config_lib.load_file(options.config)
    Path(options.write).parent.mkdir(parents=True, exist_ok=True)
    result = outcome(config, 'float32', 'highest')
    np.savez_compressed(options.write, config=np.array(options.config), **result)
    return 0
  common.set_up()
  errors = check(options.check)
  print(common.machine())
  print()
  print(
    common.table(
      ('type', 'precision', 'error of the logits', 'error of the gradient', 'agrees'),
      [
        (
          row['dtype'],
          row['precision'],
          f'{row["logits"]:.1e}',
          f'{row["gradient"]:.1e}',
          'yes' if row['agrees'] else 'NO',
        )
        for row in errors
      ],
    )
  )
  common.write_json(options.output, {'machine': common.machine(), 'errors': errors})
  return 0 if all(row['agrees'] for row in errors) else 1


def check(path: str) -> list[dict[str, Any]]:
  """Compares this device with a reference.

  Args:
    path: The reference file, which names its config.

  Returns:
    A record for each type and precision, with the relative errors (norm of the difference divided
    by the norm of the reference) of logits and gradient, and whether they agree.

  Raises:
    UsageError: If the reference cannot be read, or was written for other weights or images.
  """
  try:
    with np.load(path) as file:
      reference = dict(file)
    config = config_lib.load_file(str(reference['config']))
  except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
    raise UsageError(f'--check={path} cannot be read ({error}): write it again') from error
  rows = []
  for dtype, precision, tolerance in _MODES:
    result = outcome(config, dtype, precision)
    if result['checksum'] != reference['checksum']:
      raise UsageError(f'--check={path} was written for another config or seed: write it again')
    errors = {
      name: float(np.linalg.norm(result[name] - reference[name]) / np.linalg.norm(reference[name]))
      for name in ('logits', 'gradient')
    }
    agrees = max(errors.values()) < tolerance
    rows.append({'dtype': dtype, 'precision': precision, **errors, 'agrees': agrees})
  return rows


def outcome(config: ConfigDict, dtype: str, precision: str) -> dict[str, np.ndarray]:
  """Computes logits and projected gradients of a network on this device.

  Args:
    config: A complete config.
    dtype: The type that the network computes in.
    precision: JAX's default precision of matrix products.

  Returns:
    'logits' [exit, image, class] in evaluation mode, 'gradient' [array, projection] of phase I's
    loss, and the 'checksum' of weights and images.
  """
  config = config.copy_and_resolve_references()
  config.model.dtype = dtype
  config.global_batch_norm = False  # A single device computes everything.
  task = common.make_task(config, 0, _IMAGES * jax.device_count())
  model, variables = task.phase.model, jax.device_get(task.phase.state.weights.variables)
  images, labels = task.images[:_IMAGES], task.labels[:_IMAGES]

  @jax.jit
  def logits_of(variables, images):
    return model.apply(variables, images)

  @jax.jit
  def gradient_of(variables, images, labels):
    def loss_of(params):
      logits, _ = model.apply(
        {**variables, 'params': params}, images, train=True, mutable=['batch_stats']
      )
      labels_of_exits = jnp.broadcast_to(labels, logits.shape[:-1])
      losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels_of_exits)
      return losses.mean(-1).sum()

    return jax.grad(loss_of)(variables['params'])

  with jax.default_matmul_precision(precision):
    logits = np.asarray(logits_of(variables, images))
    gradient = jax.tree.leaves(jax.device_get(gradient_of(variables, images, labels)))
  checksum = 0
  for leaf in (*jax.tree.leaves(variables), images, labels):
    checksum = zlib.crc32(np.ascontiguousarray(leaf), checksum)
  return {
    'logits': logits,
    'gradient': np.stack([_project(index, leaf) for index, leaf in enumerate(gradient)]),
    'checksum': np.array(checksum),
  }


def _project(index, leaf):
  """Returns [projection], float64: an array's products with signs that depend on its index."""
  random = np.random.default_rng(index)
  flat = leaf.ravel().astype(np.float64)
  return np.array(
    [flat @ (2.0 * random.integers(2, size=flat.size) - 1) for _ in range(_PROJECTIONS)]
  )


if __name__ == '__main__':
  command_line.run(main)
