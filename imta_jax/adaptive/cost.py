"""Multiply-adds and parameters up to each exit, by the rule of the paper's networks.

Counted: the multiply-adds of a convolution without its bias, one per element of a ReLU, the kernel
area per output element of a pooling layer, and the weights plus biases of a dense layer. All else,
such as batch norm and concatenation, is free. The count is taken from the traced computation, so it
works for any network written in JAX.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from imta_jax.models.convolution import convolve, convolve_pair
from imta_jax.models.depthwise import convolve_depthwise
from imta_jax.models.multi_exit import MultiExitNetwork

# The names under which traced computations call them.
_CONVOLVE, _CONVOLVE_PAIR, _DEPTHWISE = (
  function.__name__  # type: ignore[attr-defined]
  for function in (convolve, convolve_pair, convolve_depthwise)
)


@dataclasses.dataclass(frozen=True)
class ExitCost:
  """The cost of an image that leaves at an exit.

  Attributes:
    madds: Multiply-adds of all stages and exits up to and including this one.
    params: Parameters of the same layers.
  """

  madds: int
  params: int


def exit_costs(
  model: MultiExitNetwork, input_shape: Sequence[int], variables: Any = None
) -> list[ExitCost]:
  """The cumulative cost of every exit, for one image.

  Args:
    model: The network.
    input_shape: (height, width, channels) of an image.
    variables: Variables of the network, if available: that saves a trace.

  Returns:
    One cost per exit.

  Example:
    >>> import imta_jax
    >>> model = imta_jax.create_model('msdnet', num_exits=2)
    >>> imta_jax.exit_costs(model, (32, 32, 3))
    [ExitCost(madds=6859876, params=299704), ExitCost(madds=11656904, params=544208)]
  """
  images = jax.ShapeDtypeStruct((1, *input_shape), jnp.float32)
  if variables is None:
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
  features = jax.eval_shape(partial(model.apply, method='start'), variables, images)
  logits, madds, params, costs = None, 0, 0, []
  for index in range(model.num_exits):
    run_stage = partial(_run_stage, model, index)
    jaxpr, (features, logits) = jax.make_jaxpr(run_stage, return_shape=True)(
      variables, features, logits
    )
    madds += _count(jaxpr.jaxpr)
    for part in ('stages', 'exits', 'classifiers'):
      leaves = jax.tree.leaves(variables['params'].get(f'{part}_{index}', {}))
      params += sum(leaf.size for leaf in leaves)
    costs.append(ExitCost(madds, params))
  return costs


def count_madds(function: Callable[..., Any], *args: Any) -> int:
  """Multiply-adds of a function of arrays, by the module's rule.

  Args:
    function: The function to count; it is traced, not run.
    *args: Its arguments: arrays, `jax.ShapeDtypeStruct`, or trees of these.

  Returns:
    The count for the whole batch.
  """
  return _count(jax.make_jaxpr(function)(*args).jaxpr)


def _run_stage(model, index, variables, features, logits):
  return model.apply(variables, index, features, logits, method='run_stage')


def _count(jaxpr: core.Jaxpr) -> int:
  total = 0
  dense_outputs = set()
  for equation in jaxpr.eqns:
    name = equation.primitive.name
    out: Any = equation.outvars[0].aval if equation.outvars else None
    inputs: list[Any] = [variable.aval for variable in equation.invars]
    if equation.params.get('name') == _CONVOLVE:
      # Counted as a convolution, in whatever form it is computed.
      total += out.size * math.prod(inputs[1].shape[:3])
    elif equation.params.get('name') == _CONVOLVE_PAIR:
      pixels = out.size // out.shape[-1]
      total += pixels * sum(kernel.size for kernel in inputs[2:])
    elif equation.params.get('name') == _DEPTHWISE:
      total += out.size * math.prod(inputs[1].shape[:2])
    elif name == 'conv_general_dilated':
      kernel = inputs[1].shape
      _, *inputs_and_area = equation.params['dimension_numbers'].rhs_spec
      total += out.size * math.prod(kernel[axis] for axis in inputs_and_area)
    elif name == 'dot_general':
      (contracted, _), _ = equation.params['dimension_numbers']
      total += out.size * math.prod(inputs[0].shape[axis] for axis in contracted)
      dense_outputs.add(equation.outvars[0])
    elif name == 'add' and not dense_outputs.isdisjoint(
      v for v in equation.invars if isinstance(v, core.Var)
    ):
      total += out.size  # A dense layer's bias.
    elif name == 'max' and any(isinstance(v, core.Literal) and v.val == 0 for v in equation.invars):
      total += out.size  # ReLU.
    elif name in ('reduce_window_max', 'reduce_window_sum'):
      total += out.size * math.prod(equation.params['window_dimensions'])
    else:
      repeats = equation.params.get('length', 1) if name == 'scan' else 1
      total += repeats * sum(map(_count, core.jaxprs_in_params(equation.params)))
  return total
