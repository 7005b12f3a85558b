"""State dicts of PyTorch → Flax variables, given the names of both."""

from collections.abc import Collection, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from imta_jax.errors import UsageError

_COUNTER = 'num_batches_tracked'


def without_prefix(state: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
  """Drops prefixes that all names share, as 'module.' of DataParallel, '_orig_mod.' of compile."""
  while len({name.partition('.')[0] for name in state}) == 1 and all('.' in name for name in state):
    state = {name.partition('.')[2]: value for name, value in state.items()}
  return state


def to_variables(
  state: Mapping[str, np.ndarray],
  names: Mapping[str, str],
  shapes: Mapping[str, Any],
  *,
  ignored: Collection[str] = (),
  optional: Collection[str] = (),
) -> dict[str, np.ndarray]:
  """Renames, transposes and checks the arrays of a state dict.

  Args:
    state: {their name: array}.
    names: {our name: their name}; ours are 'params/…' or 'batch_stats/…'.
    shapes: {our name: array or its shape and type}.
    ignored: Their names without a counterpart, besides counters of batches.
    optional: Our names that may be missing or have another shape: the last layer's.

  Returns:
    {our name: float32 array}.

  Raises:
    UsageError: If names or shapes differ, or a value is not a finite floating-point number.
  """
  expected = {*names.values(), *ignored}
  surplus = [name for name in state if name not in expected and not name.endswith(_COUNTER)]
  missing = [
    theirs for ours, theirs in names.items() if theirs not in state and ours not in optional
  ]
  if missing or surplus:
    wrong = [f'lacks {name!r}' for name in missing[:1]]
    wrong += [f'also has {name!r}' for name in surplus[:1]]
    raise UsageError(
      f"the checkpoint does not match the network: it {' and '.join(wrong)}; fix the model's "
      'fields, or the names'
    )
  variables = {}
  for ours, theirs in names.items():
    if theirs not in state:
      continue
    value, shape = from_torch(np.asarray(state[theirs]), ours), shapes[ours].shape
    if value.shape != shape and (ours not in optional or value.ndim != len(shape)):
      raise UsageError(
        f'the checkpoint does not match the network: {theirs!r} has shape {value.shape}, '
        f"expected {shape}; fix the model's fields"
      )
    variables[ours] = _finite(theirs, value)
  return variables


def _finite(name, value):
  """Returns an array as float32."""
  # Complex numbers, for example, would be cut to their real parts.
  if jnp.issubdtype(value.dtype, np.floating):
    with np.errstate(over='ignore'):
      value = value.astype(np.float32)
  if value.dtype != np.float32 or not np.isfinite(value).all():
    raise UsageError(
      f'the checkpoint has {name!r} of type {value.dtype}, which is no array of finite '
      'floating-point numbers: use one from before its training diverged'
    )
  return value


def from_torch(value: np.ndarray, ours: str) -> np.ndarray:
  """Transposes a kernel.

  Dense:       [out, in]                   → [in, out]
  Convolution: [out, in, height, width]    → [height, width, in, out]
  Depthwise:   [channels, 1, height, width] → [height, width, channels, 1]
  """
  if value.ndim == 4:
    return value.transpose((2, 3, 0, 1) if '/depthwise/' in ours else (2, 3, 1, 0))
  return value.transpose() if value.ndim == 2 else value


def to_torch(value: np.ndarray) -> np.ndarray:
  """Transposes kernels back, but for those of depthwise convolutions."""
  if value.ndim == 4:
    return value.transpose(3, 2, 0, 1)
  return value.transpose() if value.ndim == 2 else value
