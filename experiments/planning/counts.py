"""Counts launches, memory traffic and collectives of a compiled program."""

import collections
import dataclasses
import math
import re

# Instructions that compute nothing: they name, group or view what is there.
_FREE = {
  'after-all', 'bitcast', 'constant', 'get-tuple-element', 'iota', 'opt-barrier', 'parameter',
  'partition-id', 'replica-id', 'tuple',
}  # fmt: skip
_COLLECTIVES = {
  'all-gather', 'all-reduce', 'all-to-all', 'collective-broadcast', 'collective-permute',
  'ragged-all-to-all', 'reduce-scatter',
}  # fmt: skip
# Instructions that read a part of their first operand, and those that read of each operand the part
# that is read of their result.
_SLICES = {'slice', 'dynamic-slice', 'gather'}
_ELEMENTWISE = {
  'add', 'bitcast', 'convert', 'divide', 'multiply', 'negate', 'reshape', 'select', 'subtract',
}  # fmt: skip

_COMPUTATION = re.compile(r'^(ENTRY )?%?([\w.\-]+) \(.*\{$')
_INSTRUCTION = re.compile(r'^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$')
_OPCODE = re.compile(r' ([a-z][a-z\-]*)\(')
_ARRAY = re.compile(r'([a-z]+[0-9]*(?:e\dm\d\w*)?)\[([0-9,]*)\]')
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_CALLED = re.compile(r'(?:calls|to_apply|body)=%?([\w.\-]+)')
_CONDITION = re.compile(r'condition=%?([\w.\-]+)')


@dataclasses.dataclass(frozen=True)
class _Instruction:
  name: str
  opcode: str
  bytes: float
  operands: tuple[str, ...]
  text: str


def count_hlo(text: str) -> dict[str, int]:
  """Counts what a device does in a training step.

  Args:
    text: A scheduled HLO program, from `as_text` of a compiled one. If it has a loop of an unknown
      number of rounds, the training loop, one round is a step, otherwise the whole program.

  Returns:
    'launches': kernels, library calls, copies and collectives; 'bytes': operands and results of
    these, caches aside, and of an operand that is only sliced, the slices; 'collectives': exchanges
    between devices; 'collective_bytes': what a device contributes to these.
  """
  computations, entry = _parse(text)
  total = dict.fromkeys(('launches', 'bytes', 'collectives', 'collective_bytes'), 0)

  def walk(name, times):
    sizes = {instruction.name: instruction.bytes for instruction in computations[name]}
    for instruction in computations[name]:
      opcode = instruction.opcode
      if opcode in _FREE or opcode.endswith(('-done', '-update')):
        continue
      if opcode in ('while', 'call', 'conditional', 'async-start'):
        trips = _TRIPS.search(instruction.text) if opcode == 'while' else None
        for called in _CALLED.findall(instruction.text):
          if called in computations:
            walk(called, times * (int(trips[1]) if trips else 1))
        continue
      read = _bytes_read(instruction, sizes, computations)
      total['launches'] += times
      total['bytes'] += times * (read + instruction.bytes)
      if opcode.removesuffix('-start') in _COLLECTIVES:
        total['collectives'] += times
        total['collective_bytes'] += times * read

  loops = [i for i in computations[entry] if i.opcode == 'while' and not _TRIPS.search(i.text)]
  roots = [name for i in loops for name in _CALLED.findall(i.text) + _CONDITION.findall(i.text)]
  for root in roots or [entry]:
    walk(root, 1)
  return {name: math.ceil(value) for name, value in total.items()}


def _bytes_read(instruction, sizes, computations):
  """Bytes of the operands of an instruction, as far as it reads them."""
  read = [sizes.get(operand, 0) for operand in instruction.operands]
  if instruction.opcode.removesuffix('-start') in _SLICES:
    read[0] = min(read[0], instruction.bytes)
  if instruction.opcode != 'fusion':
    return sum(read)
  fused = computations.get(_CALLED.search(instruction.text)[1], [])
  users = collections.defaultdict(list)
  for inner in fused:
    for operand in inner.operands:
      users[operand].append(inner)

  fractions = {}  # Of each value, the part that its users read; users come after what they use.
  for inner in reversed(fused):
    parts = [] if users[inner.name] else [1.0]
    for user in users[inner.name]:
      if user.opcode in _SLICES and user.operands[0] == inner.name:
        parts.append(user.bytes / max(inner.bytes, 1) * fractions[user.name])
      else:
        parts.append(fractions[user.name] if user.opcode in _ELEMENTWISE else 1.0)
    fractions[inner.name] = min(sum(parts), 1.0)
    if inner.opcode == 'parameter':
      number = int(re.search(r' parameter\((\d+)\)', inner.text)[1])
      if number < len(read):
        read[number] *= fractions[inner.name]
  return sum(read)


def _parse(text):
  """Computations, lists of instructions by name, and the name of the entry computation."""
  computations, entry, current = {}, None, None
  for line in text.splitlines():
    if current is None:
      if found := _COMPUTATION.match(line):
        current = computations.setdefault(found[2], [])
        entry = found[2] if found[1] else entry
    elif line.startswith('}'):
      current = None
    elif (found := _INSTRUCTION.match(line)) and (opcode := _OPCODE.search(f' {found[2]}')):
      shape, arguments = f' {found[2]}'[: opcode.start()], f' {found[2]}'[opcode.end() :]
      operands = tuple(re.findall(r'%([\w.\-]+)', arguments.partition(')')[0]))
      arrays = _ARRAY.findall(shape)
      # Asynchronous copies: (result, operand, semaphore); slices: (operand, result, semaphore).
      if opcode[1] in ('copy-start', 'slice-start'):
        arrays = arrays[:1] if opcode[1] == 'copy-start' else arrays[1:2]
      size = sum(_bytes(*array) for array in arrays)
      current.append(_Instruction(found[1], opcode[1], size, operands, found[2]))
  return computations, entry


def _bytes(kind, dimensions):
  """Bytes of an array, for example 14 for ('bf16', '7')."""
  bits = {'pred': 8}.get(kind) or int((re.search(r'\d+', kind) or [0])[0])
  return bits / 8 * math.prod(int(size) for size in dimensions.split(',') if size)


# Thunks that contain others, or wait.
_CONTAINERS = {'kCommandBuffer', 'kSequential', 'kWhile', 'kConditional', 'kCall'}


def count_thunks(text: str) -> tuple[int, int]:
  """Counts the CUDA graphs (XLA's command buffers) of a step.

  Args:
    text: XLA's *.thunk_sequence_after_thunk_passes.txt: a line per thunk, those of a command buffer
      or of a loop indented below it.

  Returns:
    The graphs, and the launches outside of them; of the loop if there is one.
  """
  lines = [(len(found[1]), found[2]) for found in re.finditer(r'^( *)\d+: (k\w+)', text, re.M)]
  if (0, 'kWhile') in lines:
    lines = lines[lines.index((0, 'kWhile')) + 1 :]
    lines = lines[: next((i for i, (indent, _) in enumerate(lines) if not indent), None)]
  graphs = outside = 0
  graph_indent = math.inf
  for indent, kind in lines:
    if indent <= graph_indent:
      graph_indent = indent if kind == 'kCommandBuffer' else math.inf
    graphs += kind == 'kCommandBuffer'
    is_launch = kind not in _CONTAINERS and not kind.endswith('Done')
    outside += is_launch and indent <= graph_indent
  return graphs, outside
