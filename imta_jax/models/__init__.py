"""Creates multi-exit networks by name."""

import difflib
import inspect
from typing import Any

import jax.numpy as jnp

from imta_jax.models.densenet import densenet
from imta_jax.models.googlenet import googlenet
from imta_jax.models.hydranet import hydranet
from imta_jax.models.msdnet import msdnet
from imta_jax.models.multi_exit import GRADIENT_EQUILIBRIA, MultiExitNetwork
from imta_jax.models.resnet import resnet
from imta_jax.techniques.inline_collaboration import COLLABORATIONS

ARCHITECTURES = {
  'msdnet': msdnet,
  'resnet': resnet,
  'densenet': densenet,
  'googlenet': googlenet,
  'hydranet': hydranet,
}
# Others are refused: float16 would need loss scaling.
DTYPES = (jnp.dtype('float32'), jnp.dtype('bfloat16'))


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
  num_classes: int = 100,
  gradient_equilibrium: str = 'all',
  shared_channels: float = 1.0,
  collaboration: str = 'off',
  stop_collaboration_gradient: bool = True,
  dtype: Any = jnp.float32,
  batch_norm_axis: str | None = None,
  remat: bool = False,
  **fields: Any,
) -> MultiExitNetwork:
  """Creates a network.

  Args:
    name: 'msdnet', 'resnet', 'densenet', 'googlenet' or 'hydranet'.
    num_classes: Number of classes.
    gradient_equilibrium: 'all', 'coarsest' or 'off'; see MultiExitNetwork.
    shared_channels: See MultiExitNetwork.
    collaboration: 'off', 'identity' or 'network'; see MultiExitNetwork.
    stop_collaboration_gradient: See MultiExitNetwork.
    dtype: Type of the computation, 'float32' or 'bfloat16'.
    batch_norm_axis: Name of the mapped axis over which batch statistics are averaged; None for
      statistics per device.
    remat: See MultiExitNetwork.
    **fields: Fields of the architecture; see the function of its name.

  Returns:
    A Flax module; `model.apply(variables, images)` returns logits [num_exits, batch, num_classes].

  Raises:
    ValueError: If the name, a field or a field's value is unknown.
  """
  if name not in ARCHITECTURES:
    raise ValueError(f'model {name!r} is unknown: choose one of {", ".join(ARCHITECTURES)}')
  for field, value, choices in (
    ('gradient_equilibrium', gradient_equilibrium, GRADIENT_EQUILIBRIA),
    ('collaboration', collaboration, COLLABORATIONS),
  ):
    if value not in choices:
      raise ValueError(f'{field} {value!r} is unknown: choose one of {", ".join(choices)}')
  if type(num_classes) is not int or num_classes < 1:
    raise ValueError(f'num_classes {num_classes!r} must be an integer above 0')
  if not 0 <= shared_channels <= 1:
    raise ValueError(f'shared_channels {shared_channels!r} must be from 0 to 1')
  known = [
    field
    for function in (ARCHITECTURES[name], create)
    for field, parameter in inspect.signature(function).parameters.items()
    if parameter.kind != parameter.VAR_KEYWORD
  ]
  for field in fields:
    if field not in known:
      close = difflib.get_close_matches(field, known, 1)
      hint = f'did you mean {close[0]!r}?' if close else f'it has {", ".join(sorted(set(known)))}'
      raise ValueError(f'model {name!r} has no field {field!r}: {hint}')
  if dtype not in DTYPES:
    raise ValueError(f'dtype {dtype!r} is unknown: choose one of {", ".join(map(str, DTYPES))}')
  dtype = jnp.dtype(dtype)
  stages, exits = ARCHITECTURES[name](dtype=dtype, batch_norm_axis=batch_norm_axis, **fields)
  return MultiExitNetwork(
    stages=stages,
    exits=exits,
    num_classes=num_classes,
    gradient_equilibrium=gradient_equilibrium,
    shared_channels=shared_channels,
    collaboration=collaboration,
    stop_collaboration_gradient=stop_collaboration_gradient,
    dtype=dtype,
    batch_norm_axis=batch_norm_axis,
    remat=remat,
  )
