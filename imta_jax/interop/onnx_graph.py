"""Writes functions of JAX arrays as ONNX: plain Conv, Relu, Concat, pooling and MatMul.

Each primitive of the traced function becomes a node. ONNX convolves and pools maps in the order
[batch, channels, height, width]. Tensors therefore keep the order in which they were computed and
are transposed only for nodes that need another one: the maps where they enter a stage and where
they leave it.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.export
import numpy as np
import onnx
from jax.extend import core
from onnx import helper, numpy_helper

from imta_jax.errors import UsageError

OPSET = 17
_IR_VERSION = 8  # The first version of the format with this opset.

_ELEMENTWISE = {
  'abs': 'Abs',
  'add': 'Add',
  'and': 'And',
  'ceil': 'Ceil',
  'div': 'Div',
  'eq': 'Equal',
  'erf': 'Erf',
  'exp': 'Exp',
  'floor': 'Floor',
  'ge': 'GreaterOrEqual',
  'gt': 'Greater',
  'le': 'LessOrEqual',
  'log': 'Log',
  'logistic': 'Sigmoid',
  'lt': 'Less',
  'max': 'Max',
  'min': 'Min',
  'mul': 'Mul',
  'neg': 'Neg',
  'not': 'Not',
  'or': 'Or',
  'pow': 'Pow',
  'sign': 'Sign',
  'sqrt': 'Sqrt',
  'sub': 'Sub',
  'tanh': 'Tanh',
}
# The order of the axes of maps in ONNX: batch, channels, height, width.
_MAPS = (0, 3, 1, 2)
_IDENTITIES = ('copy', 'copy_p', 'optimization_barrier', 'reduce_precision', 'stop_gradient')
_CALLS = ('jit', 'pjit', 'closed_call', 'custom_jvp_call', 'custom_vjp_call')


def to_onnx(
  function: Callable[..., Any],
  weights: Any,
  inputs: Any,
  input_names: Sequence[str],
  output_names: Sequence[str],
  *,
  weight_names: Sequence[str] = (),
  opset: int = OPSET,
  prefix: str = '',
) -> onnx.ModelProto:
  """Writes a function as an ONNX model.

  Args:
    function: A function of (weights, inputs) that returns a tree of arrays.
    weights: A tree of arrays.
    inputs: A tree of shapes and types, whose first axis may be symbolic.
    input_names: One name per leaf of the inputs.
    output_names: One name per array that the function returns.
    weight_names: One name per leaf of the weights, which makes them inputs of the model, too;
      otherwise they are constants in it.
    opset: Version of ONNX's operators, 17 or newer.
    prefix: What the names of nodes and constants begin with.

  Returns:
    The model. bfloat16 becomes float32.

  Raises:
    UsageError: If a part of the function cannot be written in ONNX, such as a loop.
  """
  traced = jax.make_jaxpr(function)(weights, inputs)
  writer = _Writer(opset, prefix, batch=input_names[0])
  leaves = [_constant(leaf) for leaf in jax.tree.leaves(weights)]
  values: list[_Value] = [*leaves]
  if weight_names:
    values = [writer.input(name, leaf) for name, leaf in zip(weight_names, leaves, strict=True)]
  specs = jax.tree.leaves(inputs)
  values += [writer.maps(name, spec) for name, spec in zip(input_names, specs, strict=True)]
  results = writer.run(traced, values)
  for name, value, aval in zip(output_names, results, traced.out_avals, strict=True):
    writer.output(name, value, aval)
  return writer.model()


def write_stages(
  stages: Sequence[Callable[[Any, Any], Any]],
  weights: Sequence[Any],
  image: jax.ShapeDtypeStruct,
  *,
  with_weights: bool = True,
  opset: int = OPSET,
) -> list[onnx.ModelProto]:
  """Writes the stages of a classifier as ONNX models for batches of any size.

  The first stage reads `images`. Stage k, counted from 1, gives `stage_k_map_0` … and, last,
  `stage_k_logits`, which the next stage reads.

  Args:
    stages: See `adaptive.engine.AdaptiveClassifier`.
    weights: The weights of each stage.
    image: Shape and type of an image.
    with_weights: Whether the models contain the weights; otherwise leaf i of the weights of stage k
      is the input `k-1/i`.
    opset: See `to_onnx`.

  Returns:
    One model per stage.

  Raises:
    UsageError: See `to_onnx`.
  """
  (batch,) = jax.export.symbolic_shape('batch')
  carry: Any = jax.ShapeDtypeStruct((batch, *image.shape), image.dtype)
  names, models = ['images'], []
  for index, (stage, of_stage) in enumerate(zip(stages, weights, strict=True)):
    inputs, carry = carry, jax.eval_shape(stage, of_stage, carry)
    count = len(jax.tree.leaves(carry))
    outputs = [f'stage_{index + 1}_map_{number}' for number in range(count - 1)]
    outputs.append(f'stage_{index + 1}_logits')
    leaves = range(len(jax.tree.leaves(of_stage)))
    model = to_onnx(
      stage,
      of_stage,
      inputs,
      names,
      outputs,
      weight_names=() if with_weights else [f'{index}/{leaf}' for leaf in leaves],
      opset=opset,
      prefix=f'stage_{index + 1}/',
    )
    models.append(model)
    names = outputs
  return models


@dataclasses.dataclass(frozen=True)
class _Tensor:
  """A JAX array that a node computes.

  Attributes:
    name: Name of the tensor in the graph.
    axes: For each axis of the tensor, which axis of the array it is.
    is_compact: Whether the tensor may have length 1 along axes on which the array repeats.
  """

  name: str
  axes: tuple[int, ...]
  is_compact: bool = False

  @property
  def ndim(self):
    return len(self.axes)


# A JAX array; constants may be compact as well.
_Value = _Tensor | np.ndarray


class _Writer:
  """Collects the nodes of a graph. The methods `_<primitive>` add those of one equation."""

  def __init__(self, opset, prefix, batch):
    self._opset, self._prefix, self._batch = opset, prefix, batch
    self._nodes: dict[str, onnx.NodeProto] = {}  # By the name of the first result.
    self._inputs: list[onnx.ValueInfoProto] = []
    self._outputs: list[onnx.ValueInfoProto] = []
    self._constants: dict[str, np.ndarray] = {}
    self._widths: dict[str, int] = {}  # Of inputs that are vectors.
    # What is in the graph already: constants by content, transposed tensors by name and axes.
    self._names: dict[Any, str] = {}
    # Sum → the mean of the same terms, and their number.
    self._means: dict[str, tuple[str, int]] = {}
    # What Concat joins: names, axis and sizes.
    self._joined: dict[str, tuple[Sequence[str], int, Sequence[int]]] = {}
    # max(x, 0) → x.
    self._positive: dict[str, str] = {}

  def input(self, name, spec):
    self._inputs.append(_value_info(name, spec))
    if len(spec.shape) == 1:
      (self._widths[name],) = spec.shape
    return _Tensor(name, tuple(range(len(spec.shape))))

  def maps(self, name, spec):
    """Adds an input, in the order of maps: runtimes normalize planes of colours faster."""
    value = self.input(name, spec)
    if value.ndim != len(_MAPS):
      return value
    return _Tensor(self._tensor(value, _MAPS), _MAPS)

  def output(self, name, value, aval):
    self._nodes[name] = helper.make_node('Identity', [self._full(value, aval)], [name], name=name)
    self._outputs.append(_value_info(name, aval))

  def model(self):
    """The model, without nodes that no output needs."""
    needed, nodes = {info.name for info in self._outputs}, []
    for node in reversed(self._nodes.values()):
      if needed.intersection(node.output):
        needed.update(node.input)
        nodes.append(node)
    constants = [
      numpy_helper.from_array(array, name)
      for name, array in self._constants.items()
      if name in needed
    ]
    graph = helper.make_graph(nodes[::-1], 'imta_jax', self._inputs, self._outputs, constants)
    imports = [helper.make_opsetid('', self._opset)]
    return helper.make_model(graph, opset_imports=imports, ir_version=_IR_VERSION)

  def run(self, closed, values):
    """Adds the equations of a traced function, and returns its results."""
    known = dict(zip(closed.jaxpr.constvars, map(_constant, closed.consts), strict=True))
    known |= dict(zip(closed.jaxpr.invars, values, strict=True))

    def read(variable):
      if isinstance(variable, core.Literal):
        aval: Any = variable.aval
        return _constant(np.asarray(variable.val, aval.dtype))
      return known[variable]

    for equation in closed.jaxpr.eqns:
      results = self._apply(equation, [read(variable) for variable in equation.invars])
      known |= dict(zip(equation.outvars, results, strict=True))
    return [read(variable) for variable in closed.jaxpr.outvars]

  def _apply(self, equation, operands):
    name, params = equation.primitive.name, equation.params
    if name in _CALLS:
      inner, *_ = (value for value in params.values() if isinstance(value, core.ClosedJaxpr))
      return self.run(inner, operands)
    if name == 'platform_index':
      return [np.array(params['platforms'].index(None))]  # That of the default.
    if name == 'cond' and isinstance(operands[0], np.ndarray):
      return self.run(params['branches'][operands[0].item()], operands[1:])
    if name in _IDENTITIES:
      return operands
    is_static = all(isinstance(size, int) for out in equation.outvars for size in out.aval.shape)
    if is_static and all(isinstance(operand, np.ndarray) for operand in operands):
      results = equation.primitive.bind(*operands, **params)
      return list(map(_constant, results if equation.primitive.multiple_results else [results]))
    if name in _ELEMENTWISE:
      return [self._elementwise(_ELEMENTWISE[name], *operands)]
    handler = getattr(self, f'_{name}', None)
    if handler is None:
      raise UsageError(f'ONNX has nothing like {name!r}')
    results = handler(equation, *operands)
    return results if isinstance(results, list) else [results]

  def _node(self, kind, inputs, order, is_compact=False, **attributes):
    """Adds a node, and returns its result, whose axes are in the given order."""
    (result,) = self._results(1, kind, inputs, order, **attributes)
    return dataclasses.replace(result, is_compact=is_compact)

  def _results(self, count, kind, inputs, order, **attributes):
    """Adds a node with several results."""
    name = f'{self._prefix}{kind}_{len(self._nodes)}'
    names = [name, *(f'{name}_{index}' for index in range(1, count))]
    self._nodes[name] = helper.make_node(kind, inputs, names, name=name, **attributes)
    return [_Tensor(name, tuple(order)) for name in names]

  def _made(self, name):
    """The node that computes a tensor; an empty one for inputs and constants."""
    return self._nodes.get(name, onnx.NodeProto())

  def _array(self, array):
    """The name of a constant."""
    key = array.tobytes(), array.shape, array.dtype.str
    if key not in self._names:
      self._names[key] = f'{self._prefix}constant_{len(self._constants)}'
      self._constants[self._names[key]] = np.array(array, order='C')
    return self._names[key]

  def _integers(self, *numbers):
    return self._array(np.array(numbers, np.int64))

  def _tensor(self, value, axes=None):
    """The name of a value whose axes are in a given order, by default that of the array."""
    axes = tuple(range(value.ndim)) if axes is None else tuple(axes)
    if isinstance(value, np.ndarray):
      return self._array(value.transpose(axes))
    if value.axes == axes:
      return value.name
    if (value.name, axes) not in self._names:
      order = [value.axes.index(axis) for axis in axes]
      transposed = self._node('Transpose', [value.name], axes, perm=order)
      self._names[value.name, axes] = transposed.name
    return self._names[value.name, axes]

  def _full(self, value, aval, axes=None):
    """As `_tensor`, repeated to the shape of the array."""
    axes = tuple(range(value.ndim)) if axes is None else tuple(axes)
    name = self._tensor(value, axes)
    is_constant = isinstance(value, np.ndarray)
    if value.shape == aval.shape if is_constant else not value.is_compact:
      return name
    sizes = [
      self._integers(size)
      if isinstance(size := aval.shape[axis], int)
      else self._node('Shape', [self._batch], (0,), start=0, end=1).name
      for axis in axes
    ]
    shape = self._node('Concat', sizes, (0,), axis=0).name
    return self._node('Expand', [name, shape], axes).name

  def _elementwise(self, kind, *operands, **attributes):
    if (simple := self._simplify(kind, *operands)) is not None:
      return simple
    ndim = max(operand.ndim for operand in operands)
    axes = _common_axes([operand for operand in operands if operand.ndim == ndim])
    names = [self._tensor(x, axes if x.ndim == ndim else None) for x in operands]
    is_compact = all(getattr(operand, 'is_compact', True) for operand in operands)
    if kind == 'Add' and (joined := self._distribute(kind, names, axes)):
      return joined
    return self._node(kind, names, axes, is_compact, **attributes)

  def _simplify(self, kind, x, y=None, *_):
    """Writes max(x, 0) as Relu, ReLU6 as Clip, and a sum divided by its terms' number as a mean.

    Runtimes compute Relu and Clip with the convolution before them.
    """
    if not isinstance(x, _Tensor):
      x, y = (y, x) if kind == 'Max' else (x, y)
    if not isinstance(x, _Tensor) or not isinstance(y, np.ndarray) or y.size != 1:
      return None
    if kind == 'Max' and y.item() == 0:
      relu = self._distribute('Relu', [x.name], x.axes)
      relu = relu or self._node('Relu', [x.name], x.axes, x.is_compact)
      self._positive[relu.name] = x.name
      return relu
    if kind == 'Min' and x.name in self._positive:
      bounds = (self._array(bound.reshape(())) for bound in (np.zeros_like(y), y))
      return self._node('Clip', [self._positive[x.name], *bounds], x.axes, x.is_compact)
    mean, count = self._means.get(x.name, ('', 0))
    return dataclasses.replace(x, name=mean) if kind == 'Div' and y.item() == count else None

  def _square(self, equation, x):
    return self._elementwise('Mul', x, x)

  def _integer_pow(self, equation, x):
    return self._elementwise('Pow', x, np.array(equation.params['y'], np.float32))

  def _rsqrt(self, equation, x):
    return self._elementwise('Reciprocal', self._elementwise('Sqrt', x))

  def _erfc(self, equation, x):
    return self._elementwise('Sub', np.ones((), np.float32), self._elementwise('Erf', x))

  def _ne(self, equation, x, y):
    return self._elementwise('Not', self._elementwise('Equal', x, y))

  def _clamp(self, equation, low, x, high):
    return self._elementwise('Min', self._elementwise('Max', x, low), high)

  def _select_n(self, equation, which, x, y):
    return self._elementwise('Where', which, y, x)

  def _convert_element_type(self, equation, x):
    return self._elementwise('Cast', x, to=_element_type(equation.outvars[0].aval))

  def _conv_general_dilated(self, equation, x, kernel):
    params = equation.params
    if params['batch_group_count'] != 1 or any(step != 1 for step in params['lhs_dilation']):
      raise UsageError('a transposed convolution is not supported')
    order = params['dimension_numbers']
    x_aval, kernel_aval = (variable.aval for variable in equation.invars)
    return self._node(
      'Conv',
      [self._full(x, x_aval, order.lhs_spec), self._full(kernel, kernel_aval, order.rhs_spec)],
      order.out_spec,
      strides=params['window_strides'],
      pads=_pads(params['padding']),
      dilations=params['rhs_dilation'],
      group=params['feature_group_count'],
    )

  def _reduce_window_max(self, equation, x):
    return self._pool('MaxPool', equation, x)

  def _reduce_window_sum(self, equation, x):
    mean = self._pool('AveragePool', equation, x, count_include_pad=1)
    return self._sum(mean, math.prod(equation.params['window_dimensions']))

  def _pool(self, kind, equation, x, **attributes):
    window, strides, padding = (
      [equation.params[name][axis] for axis in _MAPS[2:]]
      for name in ('window_dimensions', 'window_strides', 'padding')
    )
    x = self._full(x, equation.invars[0].aval, _MAPS)
    attributes |= {'kernel_shape': window, 'strides': strides, 'pads': _pads(padding)}
    return self._node(kind, [x], _MAPS, **attributes)

  def _reduce_sum(self, equation, x):
    sizes = [equation.invars[0].aval.shape[axis] for axis in equation.params['axes']]
    return self._sum(self._reduce('ReduceMean', equation, x), math.prod(sizes))

  def _sum(self, mean, count):
    total = self._elementwise('Mul', mean, np.array(count, np.float32))
    self._means[total.name] = mean.name, count
    return total

  def _reduce_max(self, equation, x):
    return self._reduce('ReduceMax', equation, x)

  def _reduce_min(self, equation, x):
    return self._reduce('ReduceMin', equation, x)

  def _reduce(self, kind, equation, x):
    axes, order = equation.params['axes'], _common_axes([x])
    positions = [order.index(axis) for axis in axes]
    kept = [axis for axis in order if axis not in axes]
    inputs = [self._full(x, equation.invars[0].aval, order)]
    attributes: dict[str, Any] = {'keepdims': 0}
    if self._opset < 18:
      attributes['axes'] = positions
    else:
      inputs.append(self._integers(*positions))
    return self._node(kind, inputs, [sorted(kept).index(axis) for axis in kept], **attributes)

  def _concatenate(self, equation, *operands):
    axes = _common_axes(operands)
    names = [self._full(x, v.aval, axes) for x, v in zip(operands, equation.invars, strict=True)]
    sizes = [variable.aval.shape[equation.params['dimension']] for variable in equation.invars]
    return self._join(names, axes, axes.index(equation.params['dimension']), sizes)

  def _join(self, names, axes, axis, sizes):
    result = self._node('Concat', names, axes, axis=axis)
    self._joined[result.name] = names, axis, sizes
    return result

  def _distribute(self, kind, inputs, axes):
    """Adds a bias to joined convolutions, or takes their ReLU, before they are joined.

    Runtimes compute both with the convolution.
    """
    names, axis, sizes = self._joined.get(inputs[0], ((), 0, ()))
    before = {'Add': 'Conv', 'Relu': 'Add'}[kind]
    if {self._made(name).op_type for name in names} != {before}:
      return None
    if kind == 'Add' and self._width(inputs[1]) != sum(sizes):
      return None
    biases = [self._parts(bias, axes, axis, sizes) for bias in inputs[1:]]
    parts = [
      self._node(kind, [name, *(bias.name for bias in of_part)], axes)
      for name, *of_part in zip(names, *biases, strict=True)
    ]
    return self._join([part.name for part in parts], axes, axis, sizes)

  def _split(self, equation, x):
    axes, sizes = _common_axes([x]), equation.params['sizes']
    name = self._full(x, equation.invars[0].aval, axes)
    return self._parts(name, axes, axes.index(equation.params['axis']), sizes)

  def _parts(self, name, axes, axis, sizes):
    """Splits a tensor; if it is a convolution's, the kernel instead.

    Runtimes split kernels once, when they compile, and maps each time that they run.
    """
    node = self._made(name)
    kind, inputs = node.op_type, node.input
    if kind == 'Conv' and axes[axis] == 3:
      attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
      if attributes.get('group', 1) == 1:
        kernels = self._parts(inputs[1], range(4), 0, sizes)
        return [self._node(kind, [inputs[0], k.name], axes, **attributes) for k in kernels]
    elif kind == 'Relu' or (kind == 'Add' and self._width(inputs[1]) == sum(sizes)):
      operands = [self._parts(operand, axes, axis, sizes) for operand in inputs]
      names = ([part.name for part in parts] for parts in zip(*operands, strict=True))
      return [self._node(kind, inputs, axes) for inputs in names]
    return self._results(len(sizes), 'Split', [name, self._integers(*sizes)], axes, axis=axis)

  def _width(self, name):
    """The number of elements of a bias, which may have got axes; 0 for what is none."""
    if name in self._constants:
      return self._constants[name].size
    node = self._made(name)
    if node.op_type in ('Concat', 'Transpose', 'Unsqueeze'):
      inputs = node.input if node.op_type == 'Concat' else node.input[:1]
      return sum(map(self._width, inputs))
    return self._widths.get(name, 0)

  def _slice(self, equation, x):
    axes, params = _common_axes([x]), equation.params
    starts, sizes = params['start_indices'], equation.invars[0].aval.shape
    steps = params['strides'] or [1] * len(starts)
    # Axes that are taken whole, such as that of the batch, are left alone.
    cut = [
      axis
      for axis, limit in enumerate(params['limit_indices'])
      if (starts[axis], limit, steps[axis]) != (0, sizes[axis], 1)
    ]
    bounds = [[values[axis] for axis in cut] for values in (starts, params['limit_indices'])]
    arguments = [*bounds, [axes.index(axis) for axis in cut], [steps[axis] for axis in cut]]
    inputs = [self._full(x, equation.invars[0].aval, axes)]
    return self._node('Slice', inputs + [self._integers(*row) for row in arguments], axes)

  def _gather(self, equation, x, indices):
    """Reads x[:, i] or x[:, i : j], which JAX traces as gathering if another axis is symbolic."""
    params, aval = equation.params, equation.invars[0].aval
    numbers, sizes = params['dimension_numbers'], [*params['slice_sizes']]
    (axis, *others) = numbers.start_index_map or (0, 1)
    size, sizes[axis] = sizes[axis], aval.shape[axis]
    is_one = isinstance(indices, np.ndarray) and indices.size == 1
    if (
      others
      or not is_one
      or sizes != [*aval.shape]
      or numbers.offset_dims != tuple(range(equation.outvars[0].aval.ndim))
    ):
      raise UsageError('reading several indices, or computed ones, is not supported')
    start = indices.item()
    if numbers.collapsed_slice_dims:
      inputs = [self._full(x, aval), self._array(np.array(start, np.int64))]
      return self._node('Gather', inputs, range(x.ndim - 1), axis=axis)
    axes = _common_axes([x])
    bounds = ([start], [start + size], [axes.index(axis)])
    inputs = [self._full(x, aval, axes), *(self._integers(*row) for row in bounds)]
    return self._node('Slice', inputs, axes)

  def _pad(self, equation, x, value):
    axes = _common_axes([x])
    below, above, between = zip(
      *(equation.params['padding_config'][axis] for axis in axes), strict=True
    )
    if min(*below, *above) < 0 or any(between):
      raise UsageError('padding by less than 0, or between elements, is not supported')
    inputs = [self._full(x, equation.invars[0].aval, axes), self._integers(*below, *above)]
    return self._node('Pad', [*inputs, self._tensor(value)], axes)

  def _transpose(self, equation, x):
    order = equation.params['permutation']
    if isinstance(x, np.ndarray):
      return x.transpose(order)
    return dataclasses.replace(x, axes=tuple(order.index(axis) for axis in x.axes))

  def _reshape(self, equation, x, *_):
    before, after = equation.invars[0].aval, equation.outvars[0].aval
    # Axes of length 1 may lie anywhere.
    order = _common_axes([x])
    longer = [axis for axis in order if before.shape[axis] != 1]
    name = self._full(x, before, order if longer == sorted(longer) else None)
    sizes = [size if isinstance(size, int) else -1 for size in after.shape]
    return self._node('Reshape', [name, self._integers(*sizes)], range(after.ndim))

  _squeeze = _reshape

  def _broadcast_in_dim(self, equation, x, *_):
    """Adds axes of length 1, on which the array repeats."""
    before, after = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
    positions = equation.params['broadcast_dimensions']
    added = [axis for axis in range(len(after)) if axis not in positions]
    if isinstance(x, np.ndarray):
      return np.expand_dims(x, tuple(added))
    repeats = any(after[axis] != 1 for axis in added) or any(
      after[axis] != size for axis, size in zip(positions, before, strict=True)
    )
    is_compact = x.is_compact or repeats
    if not added:
      return dataclasses.replace(x, is_compact=is_compact)
    inputs = [self._tensor(x), self._integers(*added)]
    return self._node('Unsqueeze', inputs, range(len(after)), is_compact)

  def _dot_general(self, equation, x, y):
    (of_x, of_y), (batch_of_x, batch_of_y) = equation.params['dimension_numbers']
    x_aval, y_aval = (variable.aval for variable in equation.invars)
    free_of_x, free_of_y = (
      [axis for axis in range(aval.ndim) if axis not in (*contracted, *batch)]
      for aval, contracted, batch in ((x_aval, of_x, batch_of_x), (y_aval, of_y, batch_of_y))
    )
    if len(of_x) != 1 or len(free_of_y) != 1 or (batch_of_x and len(free_of_x) != 1):
      raise UsageError('a product over several axes is not supported')
    if x_aval.ndim == 4 and not batch_of_x and of_x == (3,):
      return self._convolve_pixels(x, x_aval, y, of_y)
    x = self._full(x, x_aval, (*batch_of_x, *free_of_x, *of_x))
    y = self._full(y, y_aval, (*batch_of_y, *of_y, *free_of_y))
    return self._node('MatMul', [x, y], range(equation.outvars[0].aval.ndim))

  def _convolve_pixels(self, x, x_aval, y, of_y):
    """Writes the product of each pixel's channels and a matrix as a convolution."""
    kernel = self._tensor(y, (1, 0) if of_y == (0,) else (0, 1))
    kernel = self._node('Unsqueeze', [kernel, self._integers(2, 3)], range(4)).name
    return self._node('Conv', [self._full(x, x_aval, _MAPS), kernel], _MAPS)


def _constant(value):
  array = np.asarray(value)
  return array.astype(np.float32) if array.dtype == jax.numpy.bfloat16 else array


def _common_axes(values):
  """The order of axes that spares most transpositions: that of a tensor which has another."""
  usual = tuple(range(values[0].ndim))
  orders = [value.axes for value in values if isinstance(value, _Tensor)]
  return next((order for order in orders if order != usual), usual)


def _pads(padding):
  before, after = zip(*padding, strict=True)
  return [*before, *after]


def _element_type(aval):
  dtype = np.float32 if aval.dtype == jax.numpy.bfloat16 else np.dtype(aval.dtype)
  return helper.np_dtype_to_tensor_dtype(np.dtype(dtype))


def _value_info(name, spec):
  shape = [size if isinstance(size, int) else str(size) for size in spec.shape]
  return helper.make_tensor_value_info(name, _element_type(spec), shape)
