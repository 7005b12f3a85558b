"""Programs for CPUs that OpenVINO or ONNX Runtime run, from stages that are written in ONNX.

On CPUs their convolutions are faster than those of XLA. Shapes that are known in advance make
OpenVINO faster still, so it compiles a program per batch size, in a fraction of a second.
"""

import functools
import importlib
import importlib.util
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from .batches import Carry, Join, join_on_host
from .programs import Score, Tree, lower

# Runtime → the packages that it needs.
RUNTIMES = {'openvino': ('onnx', 'openvino'), 'onnxruntime': ('onnx', 'onnxruntime')}

# Programs of small batches take little longer per image, so that few rows are padding.
_BATCH_SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64)
# Batches up to this size are tried on a single thread, too, in turns with all threads. That pays if
# it takes at most this part of the time.
_SMALL, _TURNS, _CLEARLY = 2, 10, 0.9
# With weights of more bytes, each of which OpenVINO copies into each program, there are fewer.
_LARGE, _FEW_BATCH_SIZES = 2**25, (1, 4, 16, 64)

# The types of attributes of the nodes that `read_models` accepts: FLOAT, INT, STRING, FLOATS, INTS.
_PLAIN = (1, 2, 3, 6, 7)


def installed_runtimes() -> list[str]:
  """The runtimes whose packages are installed, the usually fastest first."""
  return [
    runtime
    for runtime, packages in RUNTIMES.items()
    if all(importlib.util.find_spec(package) for package in packages)
  ]


def check_runtime(runtime: str) -> None:
  """Raises ValueError if a runtime does not exist, or cannot be used here."""
  if runtime not in RUNTIMES:
    raise ValueError(f'runtime {runtime!r} is unknown: choose xla, {" or ".join(RUNTIMES)}')
  if jax.default_backend() != 'cpu':
    raise ValueError(f'runtime {runtime!r} is for CPUs: leave it out on a {jax.default_backend()}')
  if runtime not in installed_runtimes():
    raise ValueError(
      f'runtime {runtime!r} is not installed: pip install {" ".join(RUNTIMES[runtime])}'
    )


def read_models(contents: Sequence[bytes]) -> list[Any]:
  """Parses the models of an export.

  Raises:
    ValueError: If one is corrupt, or refers to a file or to operators beyond those of ONNX.
  """
  import onnx
  from google.protobuf.message import DecodeError

  models = []
  for content in contents:
    try:
      model = onnx.load_model_from_string(content)
    except DecodeError as error:
      raise ValueError('a stage in ONNX is corrupt: export again') from error
    domains = {entry.domain for entry in (*model.opset_import, *model.graph.node)}
    attributes = [attribute for node in model.graph.node for attribute in node.attribute]
    has_files = any(array.external_data for array in model.graph.initializer)
    has_parts = any(attribute.type not in _PLAIN for attribute in attributes)
    if domains != {''} or model.functions or has_files or has_parts:
      raise ValueError('a stage in ONNX refers to what is outside of it: do not use this export')
    models.append(model)
  return models


class OnnxPrograms:
  """Programs of a runtime; see `programs.Programs`.

  A carry is a tuple: maps, logits and probabilities.
  """

  stops_early = False
  overhead = 4e6  # Measured as 0.1 ms, in which two cores compute as many multiply-adds.

  def __init__(
    self,
    runtime: str,
    models: Sequence[Any],
    weights: Sequence[Tree],
    scores: Sequence[Score],
    carries: Sequence[Carry],
    batch_sizes: Sequence[int] | None = None,
  ):
    """Prepares the programs.

    Args:
      runtime: One of RUNTIMES; it must be installed.
      models: Of each stage an onnx.ModelProto without weights; see
        imta_jax.interop.onnx_graph.write_stages.
      weights: The weights of each stage.
      scores: The exit rule at each exit; see `rules`.
      carries: [stage], the input of each stage for one image: see `XlaPrograms`.
      batch_sizes: See `Programs`; default: as many as pay.
    """
    leaves = [
      [np.asarray(leaf, _dtype(leaf)) for leaf in jax.tree.leaves(tree)] for tree in weights
    ]
    size = sum(leaf.nbytes for of_stage in leaves for leaf in of_stage)
    default = _BATCH_SIZES if size <= _LARGE else _FEW_BATCH_SIZES
    self.batch_sizes = tuple(sorted(batch_sizes or default))
    self.join: Join = join_on_host
    self._runtime, self._models, self._leaves, self._scores = runtime, models, leaves, scores
    images, *others = carries
    flat = [
      [jax.ShapeDtypeStruct(array.shape, _dtype(array)) for array in jax.tree.leaves(carry)]
      for carry in others
    ]
    self.carries: Sequence[Carry] = [images, *((*arrays, arrays[-1]) for arrays in flat)]
    # [stage], the names of what it reads: the images, or all that the stage before gives.
    self._names = [['images'], *(_results(index, model) for index, model in enumerate(models))]
    self._programs: dict[Any, Callable[..., list[np.ndarray]]] = {}

  def run(
    self, first: int, end: int, carry: Carry, thresholds: np.ndarray, keep: bool = True
  ) -> tuple[Carry, np.ndarray, np.ndarray]:
    *early, results = self._run(first, end, carry, keep)
    probabilities = [*early, results[-1]]
    befores = [carry[-1] if first else probabilities[0], *early]
    scores = [
      score(p, q)
      for score, p, q in zip(self._scores[first:end], probabilities, befores, strict=True)
    ]
    leaves = np.array(scores) >= lower(thresholds[:, first:end]).T
    if end == len(self._models):
      leaves[-1] = True  # NaN included.
    at = leaves.argmax(axis=0)
    exits = np.where(leaves.any(axis=0), first + at, -1)
    chosen = np.array(probabilities)[at, np.arange(len(at))] if early else results[-1]
    return results, chosen, exits

  def compile_joins(self, sizes: Sequence[int]) -> None:
    pass

  def _run(self, first, end, carry, keep):
    """Runs stages; returns the probabilities of all but the last one, and the results of that."""
    arrays = dict(zip(self._names[first], carry if first else (carry,), strict=True))
    size = len(next(iter(arrays.values())))
    if self._runtime == 'onnxruntime':  # Its programs take batches of any size.
      size = min(size, _SMALL + 1)
    program = self._programs.get((first, end, size))
    if program is None:
      names = [*(names[-1] for names in self._names[first + 1 : end]), *self._names[end]]
      model = join_stages(self._models[first:end], self._leaves[first:end], first, names)
      open_program = _openvino_program if self._runtime == 'openvino' else _onnxruntime_program
      program = open_program(model, size, num_threads=0)
      if size <= _SMALL:
        program = _faster(program, open_program(model, size, num_threads=1), arrays)
      self._programs[first, end, size] = program
    results = program(arrays, keep)
    num_early = end - first - 1
    return *results[:num_early], results[num_early:]


def _dtype(array):
  """The type in the models, which compute in float32 what is bfloat16."""
  return np.dtype(np.float32) if array.dtype == jax.numpy.bfloat16 else array.dtype


def _results(index, model):
  """Names of what a stage gives: its outputs, then probabilities."""
  return [*(value.name for value in model.graph.output), f'stage_{index + 1}_probabilities']


def join_stages(
  models: Sequence[Any], weights: Sequence[Sequence[np.ndarray]], first: int, outputs: Sequence[str]
) -> bytes:
  """Joins stages that follow each other, and gives them weights and probabilities.

  Args:
    models: The stages, see `read_models`.
    weights: [stage, leaf].
    first: The number of the first stage, counted from 0.
    outputs: Names of the results: of outputs of the stages, or `stage_k_probabilities`.

  Returns:
    A serialized ONNX model.
  """
  from onnx import TensorProto, helper, numpy_helper

  nodes: list[Any] = []
  constants: list[Any] = []
  values: dict[str, Any] = {}
  for index, (model, leaves) in enumerate(zip(models, weights, strict=True), start=first):
    graph = model.graph
    *_, logits, name = _results(index, model)
    nodes += [*graph.node, helper.make_node('Softmax', [logits], [name], name=name, axis=-1)]
    constants += graph.initializer
    constants += [
      numpy_helper.from_array(leaf, f'{index}/{number}') for number, leaf in enumerate(leaves)
    ]
    values |= {value.name: value for value in graph.output}
    values[name] = helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
  known = {constant.name for constant in constants}
  inputs = [value for value in models[0].graph.input if value.name not in known]
  results = [values[name] for name in outputs]
  graph = helper.make_graph(nodes, 'stages', inputs, results, constants)
  model = models[0]
  return helper.make_model(
    graph, opset_imports=model.opset_import, ir_version=model.ir_version
  ).SerializeToString()


def _faster(program, other, arrays):
  """The other program if it is clearly faster: on a busy machine, times are not exact."""
  seconds: list[list[float]] = [[], []]
  for _ in range(_TURNS):
    for run, of_run in zip((program, other), seconds, strict=True):
      start = time.perf_counter()
      run(arrays, keep=False)
      of_run.append(time.perf_counter() - start)
  return other if min(seconds[1]) < _CLEARLY * min(seconds[0]) else program


@functools.cache
def _openvino_core():
  """OpenVINO's plugins, which must not be unloaded while threads of theirs exist."""
  return import_openvino().Core()


def import_openvino() -> Any:
  """Imports OpenVINO without its telemetry, which it can do without.

  Telemetry forks this process and terminates the fork. A server would stop, since its event loop
  shares with the fork the socket that tells it of signals.
  """
  telemetry = 'openvino_telemetry'
  if telemetry in sys.modules:
    return importlib.import_module('openvino')
  sys.modules[telemetry] = None  # type: ignore[assignment]  # As if it were not installed.
  try:
    return importlib.import_module('openvino')
  finally:
    del sys.modules[telemetry]


def _openvino_program(model, size, num_threads):
  """Compiles a model for a batch size and a number of threads, 0 for all cores.

  Returns:
    A function of arrays by name, and whether results must outlast its next call.
  """
  openvino, core = import_openvino(), _openvino_core()
  network = core.read_model(model)
  inputs = {port.any_name: [size, *list(port.partial_shape)[1:]] for port in network.inputs}
  network.reshape(inputs)
  options = {'PERFORMANCE_HINT': 'LATENCY', 'INFERENCE_NUM_THREADS': num_threads}
  compiled = core.compile_model(network, 'CPU', options)
  request, lock = compiled.create_infer_request(), threading.Lock()
  outputs = [(tuple(port.shape), port.element_type.to_dtype()) for port in compiled.outputs]
  reused = [np.empty(*output) for output in outputs]
  # What the request reads and writes, which must exist as long as it does.
  read: dict[str, Any] = dict.fromkeys(inputs)
  written: list[Any] = [None] * len(outputs)

  def run(arrays, keep):
    results = [np.empty(*output) for output in outputs] if keep else reused
    with lock:
      for name, before in read.items():
        if (array := arrays[name]) is not before:
          read[name] = array = np.require(array, requirements=('C', 'W'))
          request.set_tensor(name, openvino.Tensor(array, shared_memory=True))
      for index, result in enumerate(results):
        if result is not written[index]:
          written[index] = result
          request.set_output_tensor(index, openvino.Tensor(result, shared_memory=True))
      request.infer()
    return results

  return run


def _onnxruntime_program(model, size, num_threads):
  """As `_openvino_program`; the program takes any batch size."""
  import onnxruntime

  del size
  options = onnxruntime.SessionOptions()
  options.intra_op_num_threads = num_threads
  options.log_severity_level = 3  # Weights without readers are left in.
  # Threads that still spin after a stage slow the next stage down.
  options.add_session_config_entry('session.force_spinning_stop', '1')
  session = onnxruntime.InferenceSession(model, options)
  names = [value.name for value in session.get_inputs()]

  def run(arrays, keep):
    del keep
    return session.run(None, {name: np.asarray(arrays[name]) for name in names})

  return run
