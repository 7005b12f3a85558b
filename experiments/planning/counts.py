"""What a compiled program launches, moves and sends, counted from what its compiler writes."""

import collections
import dataclasses
import math
import re

import numpy as np

# Instructions that compute nothing: they name, group or view what is there.
_FREE = {
  'after-all', 'bitcast', 'constant', 'get-tuple-element', 'iota', 'opt-barrier', 'parameter',
  'partition-id', 'replica-id', 'tuple',
}  # fmt: skip
_COLLECTIVES = (
  'all-gather', 'all-reduce', 'all-to-all', 'collective-broadcast', 'collective-permute',
  'ragged-all-to-all', 'reduce-scatter',
)  # fmt: skip
# Instructions that read a part of their first operand, and those that read of each operand the part
# that is read of their result.
_SLICES = {'slice', 'dynamic-slice', 'gather'}
_ELEMENTWISE = {
  'add',
  'bitcast',
  'convert',
  'divide',
  'multiply',
  'negate',
  'reshape',
  'select',
  'subtract',
}
_ITEM_BYTES = {'pred': 1, 'token': 0}

_COMPUTATION = re.compile(r'^(ENTRY )?%?([\w.\-]+) \(.*\{$')
_INSTRUCTION = re.compile(r'^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$')
_OPCODE = re.compile(r' ([a-z][a-z\-]*)\(')
# Type, dimensions, and of the layout: dimensions from minor to major, and tiles and memory space.
_ARRAY = re.compile(r'([a-z]+[0-9]*(?:e\dm\d\w*)?)\[([0-9,]*)\](?:\{([0-9,]*)(?::([^}]*))?\})?')
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_CALLED = re.compile(r'(?:calls|to_apply|body)=%?([\w.\-]+)')
_CONDITION = re.compile(r'condition=%?([\w.\-]+)')


@dataclasses.dataclass(frozen=True)
class Counts:
  """What a program does on one device each time that it runs.

  If it consists of a loop that runs any number of times, as a training loop, all fields but
  `launches_outside` are for one round.

  Attributes:
    launches: Instructions that the device runs one after another: kernels, library calls, copies
      and collectives.
    launches_outside: Those before and after the loop, if there is one.
    bytes: Operands and results of each of these, caches aside; of an operand that is only sliced,
      the slices.
    hbm_bytes: The part of these bytes that lies in the device's main memory, and not on the chip as
      compilers for TPUs arrange; with the padding of tiles.
    collectives: How many of them exchange data between devices.
    collective_bytes: What a device contributes to these.
  """

  launches: int
  launches_outside: int
  bytes: int
  hbm_bytes: int
  collectives: int
  collective_bytes: int


@dataclasses.dataclass(frozen=True)
class _Instruction:
  name: str
  opcode: str
  size: np.ndarray  # [2]: bytes, and those in main memory with padding.
  operands: tuple[str, ...]
  text: str


def count_hlo(text: str) -> Counts:
  """Counts a scheduled HLO program.

  Bodies of loops count as often as they run, if the compiler says how often that is.

  Args:
    text: From `as_text` of a compiled program.
  """
  computations, entry = _parse(text)
  loops = [i for i in computations[entry] if i.opcode == 'while' and not _TRIPS.search(i.text)]

  def walk(name, times, total):
    sizes = {instruction.name: instruction.size for instruction in computations[name]}
    for instruction in computations[name]:
      opcode = instruction.opcode
      if opcode in _FREE or opcode.endswith(('-done', '-update')):
        continue
      if opcode in ('while', 'call', 'conditional', 'async-start'):
        trips = _TRIPS.search(instruction.text) if opcode == 'while' else None
        for called in _CALLED.findall(instruction.text) if instruction not in loops else ():
          if called in computations:
            walk(called, times * (int(trips[1]) if trips else 1), total)
        continue
      read = _bytes_read(instruction, sizes, computations)
      moved, hbm = read + instruction.size
      total['launches'] += times
      total['bytes'] += times * moved
      total['hbm_bytes'] += times * hbm
      if opcode.removesuffix('-start') in _COLLECTIVES:
        total['collectives'] += times
        total['collective_bytes'] += times * read[0]

  total, outside = collections.Counter(), collections.Counter()
  walk(entry, 1, outside)
  for loop in loops:
    for called in (*_CALLED.findall(loop.text), *_CONDITION.findall(loop.text)):
      walk(called, 1, total)
  if loops:
    total['launches_outside'] = outside['launches']
  else:
    total = outside
  fields = (field.name for field in dataclasses.fields(Counts))
  return Counts(**{name: math.ceil(total[name]) for name in fields})


def _bytes_read(instruction, sizes, computations):
  """[2]: bytes of the operands of an instruction, as in `_Instruction.size`."""
  full = [sizes.get(operand, np.zeros(2)) for operand in instruction.operands]
  if instruction.opcode.removesuffix('-start') in _SLICES:
    full[0] = np.minimum(full[0], instruction.size)
  if instruction.opcode != 'fusion':
    return sum(full, np.zeros(2))
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
        parts.append(user.size[0] / max(inner.size[0], 1) * fractions[user.name])
      elif user.opcode in _ELEMENTWISE:
        parts.append(fractions[user.name])
      else:
        parts.append(1.0)
    fractions[inner.name] = min(sum(parts), 1.0)
    if inner.opcode == 'parameter':
      number = int(re.match(r'.*? parameter\((\d+)\)', f' {inner.text}')[1])
      if number < len(full):
        full[number] = full[number] * fractions[inner.name]
  return sum(full, np.zeros(2))


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
    elif found := _INSTRUCTION.match(line):
      name, rest = found.groups()
      opcode = _OPCODE.search(f' {rest}')
      if opcode is None:
        continue
      shape, arguments = f' {rest}'[: opcode.start()], f' {rest}'[opcode.end() :]
      # Operands are named up to the parenthesis that closes the list.
      operands = tuple(re.findall(r'%([\w.\-]+)', arguments.partition(')')[0]))
      arrays = _ARRAY.findall(shape)
      if opcode[1] == 'copy-start':  # What follows is the operand again, and a semaphore.
        arrays = arrays[:1]
      elif opcode[1] == 'slice-start':  # Between the operand and a semaphore.
        arrays = arrays[1:2]
      size = sum((_size(*array) for array in arrays), np.zeros(2))
      current.append(_Instruction(name, opcode[1], size, operands, rest))
  return computations, entry


def _size(kind: str, dimensions: str, minor_to_major: str, attributes: str) -> np.ndarray:
  """[2]: bytes of an array, and those that it takes of main memory."""
  digits = re.search(r'\d+', kind)
  item = _ITEM_BYTES.get(kind, int(digits[0]) / 8 if digits else 0)
  sizes = [int(size) for size in dimensions.split(',') if size]
  padded = list(sizes)
  if tile := re.match(r'T\(([\d,]+)\)', attributes):
    order = [int(axis) for axis in minor_to_major.split(',') if axis]
    # The last tile dimension is that of the most minor dimension.
    for axis, tile_size in zip(order, reversed(tile[1].split(',')), strict=False):
      padded[axis] = math.ceil(padded[axis] / int(tile_size)) * int(tile_size)
  in_main_memory = 'S(' not in attributes
  return item * np.array([math.prod(sizes), in_main_memory * math.prod(padded)])


# Thunks that hold others, or wait.
_CONTAINERS = {'kCommandBuffer', 'kSequential', 'kWhile', 'kConditional', 'kCall'}


def count_thunks(text: str) -> tuple[int, int]:
  """Counts what a GPU launches.

  Args:
    text: What XLA writes to *.thunk_sequence_after_thunk_passes.txt with xla_dump_to: a line for
      each thunk, those of a command buffer (a CUDA graph) indented below it.

  Returns:
    All launches, and those among them that lie in command buffers; if there is a loop, those of one
    round.
  """
  launches = in_buffers = 0
  buffer_indent = None
  lines = text.splitlines()
  starts = [number for number, line in enumerate(lines) if re.match(r'\d+: kWhile', line)]
  if starts:
    lines = lines[starts[0] + 1 :]
    ends = [number for number, line in enumerate(lines) if re.match(r'\d+: ', line)]
    lines = lines[: ends[0]] if ends else lines
  for line in lines:
    if not (found := re.match(r'( *)\d+: (k\w+)', line)):
      continue
    indent, kind = len(found[1]), found[2]
    if buffer_indent is not None and indent <= buffer_indent:
      buffer_indent = None
    if kind == 'kCommandBuffer' and buffer_indent is None:
      buffer_indent = indent
    if kind not in _CONTAINERS and not kind.endswith('Done'):
      launches += 1
      in_buffers += buffer_indent is not None
  return launches, in_buffers
