"""Creates multi-exit networks by name."""

import dataclasses
import difflib
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from imta_jax.models.densenet import densenet
from imta_jax.models.efficientnet_lite import efficientnet_lite
from imta_jax.models.googlenet import googlenet
from imta_jax.models.hydranet import hydranet
from imta_jax.models.msdnet import msdnet
from imta_jax.models.multi_exit import MultiExitNetwork
from imta_jax.models.resnet import resnet
from imta_jax.models.vit import vit

ARCHITECTURES: dict[str, Callable[..., tuple[Sequence[nn.Module], Sequence[nn.Module]]]] = {
  'msdnet': msdnet,
  'resnet': resnet,
  'densenet': densenet,
  'googlenet': googlenet,
  'hydranet': hydranet,
  'efficientnet_lite': efficientnet_lite,
  'vit': vit,
}
# Others are refused: float16 would need loss scaling.
DTYPES = (jnp.dtype('float32'), jnp.dtype('bfloat16'))
# What `create` takes for networks of any architecture; Flax adds parent and name.
_NETWORK_FIELDS = {field.name for field in dataclasses.fields(MultiExitNetwork)} - {
  *('stages', 'exits', 'parent', 'name'),
}


def defaults(name: str) -> dict[str, Any]:
  """Returns the fields of `config.model` for an architecture, with their defaults.

  The other arguments of `create` follow from the phase and the data.
  """
  parameters = inspect.signature(ARCHITECTURES[name]).parameters.values()
  own = {p.name: p.default for p in parameters if p.kind != p.KEYWORD_ONLY}
  return {'name': name, 'dtype': 'float32', 'remat': False, **own}


def create(
  name: str,
  *,
  dtype: Any = jnp.float32,
  batch_norm_axis: str | None = None,
  **fields: Any,
) -> MultiExitNetwork:
  """Creates a network.

  Args:
    name: 'msdnet', 'resnet', 'densenet', 'googlenet', 'hydranet', 'efficientnet_lite' or 'vit'.
    dtype: Type of the computation, 'float32' or 'bfloat16'.
    batch_norm_axis: Name of the mapped axis over which batch statistics are averaged; None for
      statistics per device.
    **fields: Fields of MultiExitNetwork, but for stages and exits, and of the architecture, which
      are the arguments of the function of its name.

  Returns:
    A Flax module; `model.apply(variables, images)` returns logits [num_exits, batch, num_classes].

  Raises:
    ValueError: If the name, a field or a value is unknown.

  Example:
    >>> import imta_jax
    >>> import jax
    >>> import jax.numpy as jnp
    >>> model = imta_jax.create_model('msdnet', num_exits=3, num_classes=10)
    >>> variables = imta_jax.initialize(model, seed=0, image_shape=(32, 32, 3))
    >>> jax.jit(model.apply)(variables, jnp.zeros((2, 32, 32, 3))).shape
    (3, 2, 10)
  """
  if name not in ARCHITECTURES:
    raise ValueError(f'model {name!r} is unknown: choose one of {", ".join(ARCHITECTURES)}')
  known = {*_NETWORK_FIELDS, *inspect.signature(ARCHITECTURES[name]).parameters}
  for field in fields:
    if field not in known:
      close = difflib.get_close_matches(field, known, 1)
      hint = f'did you mean {close[0]!r}?' if close else f'it has {", ".join(sorted(known))}'
      raise ValueError(f'model {name!r} has no field {field!r}: {hint}')
  if dtype not in DTYPES:
    raise ValueError(f'dtype {dtype!r} is unknown: choose one of {", ".join(map(str, DTYPES))}')
  of_layers: dict[str, Any] = {'dtype': jnp.dtype(dtype), 'batch_norm_axis': batch_norm_axis}
  of_network = {field: fields.pop(field) for field in _NETWORK_FIELDS & fields.keys()}
  stages, exits = ARCHITECTURES[name](**of_layers, **fields)
  return MultiExitNetwork(stages, exits, **of_layers, **of_network)
