"""Reads exports: folders that imta_jax.export writes.

Checksums find corrupt files, but prove nothing about an untrusted export. Its manifest is therefore
checked against a schema, its arrays are never unpickled, no file outside of it is read, and its
programs call no function of this process. Beyond that they are as trustworthy as their author: XLA,
which reads and runs them, is not made to withstand attacks, and they may take any time and memory.
"""

import hashlib
import io
import json
import os
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np
from jax import export

from .guarantee import CalibrationSet

MANIFEST = 'manifest.json'
VALIDATION = 'validation.npz'
FORMAT = 3
# The files of imta_jax that an export carries to run without it.
SOURCES = (
  'adaptive/__init__.py',
  'adaptive/compiler.py',
  'adaptive/exported.py',
  'adaptive/guarantee.py',
  'adaptive/rules.py',
  'adaptive/engine/__init__.py',
  'adaptive/engine/batches.py',
  'adaptive/engine/classifier.py',
  'adaptive/engine/onnx_programs.py',
  'adaptive/engine/plan.py',
  'adaptive/engine/programs.py',
  'adaptive/engine/read_ahead.py',
  'adaptive/engine/runner.py',
)

# A test of a value, [the schema of each item] or {field: its schema}.
Schema = Callable[[Any], bool] | list | dict


def _is_text(value):
  return isinstance(value, str)


def _is_number(value):
  # Integers of any length are valid JSON, but do not fit a float.
  return type(value) in (int, float) and abs(value) < 1e300


def _is_count(value):
  return type(value) is int and 0 < value < 2**31


def _is_positive(value):
  return _is_number(value) and value > 0


def _is_fraction(value):
  return _is_number(value) and 0 <= value <= 1


def _is_threshold(value):
  return value is None or _is_number(value)  # Null stands for infinity, which JSON does not have.


_SCHEMA: dict[str, Schema] = {
  'stages': [_is_text],
  'weights': _is_text,
  'weights_per_stage': [_is_count],
  'image_shape': [_is_count],
  'image_dtype': _is_text,
  'preprocessing': {},
  'class_names': [_is_text],
  'madds': [_is_positive],
  'rule': _is_text,
  'temperatures': [_is_positive],
  'thresholds': [_is_threshold],
  'operating_points': [
    {'thresholds': [_is_threshold], 'exit_fractions': [_is_fraction], 'accuracy': _is_fraction}
  ],
  'sha256': lambda value: isinstance(value, dict) and all(map(_is_text, value.values())),
}

# Programs could call any function that this process has registered, with any arguments. Ours call
# only the one that checks shapes.
_FOREIGN_CALL = re.compile(r'custom_call(?! @shape_assertion\()')


def read_export(
  folder: Any,
) -> tuple[dict[str, Any], list[Callable], list[list], CalibrationSet | None, list[bytes]]:
  """Reads an export and verifies its checksums.

  Args:
    folder: The export.

  Returns:
    The manifest, the stages, the weights of each stage, the validation images' scores, if any, and
    the stages in ONNX, if any.

  Raises:
    ValueError: If the folder is not an export, a file has changed, or the files do not match.
  """
  manifest = _read_manifest(folder)
  contents = {}
  for name, checksum in manifest['sha256'].items():
    contents[name] = _read(folder, name)
    if hashlib.sha256(contents[name]).hexdigest() != checksum:
      raise _corrupt(folder, name, 'has changed since it was written')
  onnx_names = manifest.get('onnx_stages', [])
  if not matches_schema(onnx_names, [_is_text]) or len(onnx_names) not in (
    0,
    len(manifest['stages']),
  ):
    raise _corrupt(folder, MANIFEST, 'has no valid onnx_stages')
  if not {*manifest['stages'], manifest['weights'], *onnx_names} <= contents.keys():
    raise _corrupt(folder, MANIFEST, 'lacks the checksums of stages or weights')
  programs = [_program(folder, name, contents[name]) for name in manifest['stages']]
  name = manifest['weights']
  weights = _weights(folder, name, _arrays(folder, name, contents[name]), programs, manifest)
  _check_chain(folder, manifest, programs, weights)
  validation = None
  if VALIDATION in contents:
    validation = _validation(folder, _arrays(folder, VALIDATION, contents[VALIDATION]), manifest)
  stages: list[Callable] = [partial(_call, program) for program in programs]
  return manifest, stages, weights, validation, [contents[name] for name in onnx_names]


def manifest_checksum(manifest: dict[str, Any]) -> str:
  """The checksum of a manifest, without the field that holds it."""
  return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def thresholds_from_json(thresholds: list[float | None]) -> tuple[float, ...]:
  """Thresholds; null stands for infinity, which JSON does not have."""
  return tuple(np.inf if threshold is None else threshold for threshold in thresholds)


def matches_schema(value: Any, schema: Schema) -> bool:
  """Whether parsed JSON matches: lists of any length, groups with at least these fields."""
  if isinstance(schema, list):
    return isinstance(value, list) and all(matches_schema(item, schema[0]) for item in value)
  if isinstance(schema, dict):
    return isinstance(value, dict) and all(
      name in value and matches_schema(value[name], inner) for name, inner in schema.items()
    )
  return schema(value)


def _corrupt(folder, name, reason):
  return ValueError(f'{os.path.join(folder, name)} {reason}: export again')


def _read_manifest(folder):
  if not os.path.exists(os.path.join(folder, MANIFEST)):
    raise ValueError(f'{folder} is not an export: it has no {MANIFEST}')
  content = _read(folder, MANIFEST)
  try:
    manifest = json.loads(content)
    checksum = manifest.pop('manifest_sha256')
    is_as_written = checksum == manifest_checksum(manifest)
  except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
    raise _corrupt(folder, MANIFEST, 'is corrupt') from error
  if not is_as_written:
    raise _corrupt(folder, MANIFEST, 'has changed since it was written')
  if manifest.get('format') != FORMAT:
    raise ValueError(
      f'{folder} has format {str(manifest.get("format"))[:20]}, expected {FORMAT}: export again'
    )
  for field, schema in _SCHEMA.items():
    if not matches_schema(manifest.get(field), schema):
      raise _corrupt(folder, MANIFEST, f'has no valid {field}')
  num_exits, per_exit = len(manifest['stages']), ['madds', 'temperatures', 'thresholds']
  lengths = [len(manifest[field]) for field in (*per_exit, 'weights_per_stage')]
  for point in manifest['operating_points']:
    lengths += [len(point['thresholds']), len(point['exit_fractions'])]
  if not num_exits or set(lengths) != {num_exits}:
    raise _corrupt(folder, MANIFEST, f'does not have one value for each of {num_exits} exits')
  return manifest


def _read(folder, name):
  """Reads a file of the folder; links, too, must not lead out of it."""
  root = os.path.realpath(folder)
  try:
    path = os.path.realpath(os.path.join(root, name))
    if os.path.commonpath([root, path]) != root:
      raise ValueError(f'{folder} names a file outside of it, {name!r}: do not use this export')
    with open(path, 'rb') as file:
      return file.read()
  except OSError as error:
    raise _corrupt(folder, name, f'cannot be read ({error.strerror})') from error


def _arrays(folder, name, content):
  try:
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
      return dict(arrays)
  except Exception as error:  # Corrupt bytes make the reader raise all kinds of exceptions.
    reason = ' '.join(str(error).split())[:200] or type(error).__name__
    raise _corrupt(folder, name, f'is not a file of arrays ({reason})') from error


def _program(folder, name, content):
  try:
    program = export.deserialize(bytearray(content))
    has_foreign_calls = _FOREIGN_CALL.search(program.mlir_module())
    platforms = program.platforms
  except ImportError:
    raise  # JAX names the missing package.
  except Exception as error:  # Corrupt bytes make the reader raise all kinds of exceptions.
    raise _corrupt(folder, name, 'is not a program') from error
  if has_foreign_calls:
    raise ValueError(f'{folder} calls foreign functions in {name!r}: do not use this export')
  if (platform := export.default_export_platform()) not in platforms:
    raise _corrupt(folder, name, f'is not a program for {platform}')
  return program


def _weights(folder, name, arrays, programs, manifest):
  weights = []
  for index, (program, count) in enumerate(
    zip(programs, manifest['weights_per_stage'], strict=True)
  ):
    expected = program.in_avals[:count]
    try:
      leaves = [arrays[f'{index}/{leaf}'] for leaf in range(len(expected))]
      if len(leaves) != count or [x.shape for x in leaves] != [aval.shape for aval in expected]:
        raise ValueError('shapes differ')
      # Weights may be stored in a smaller type than the program takes.
      weights.append([x.astype(aval.dtype) for x, aval in zip(leaves, expected, strict=True)])
    except (KeyError, ValueError) as error:
      reason = f'does not have the weights of stage {index + 1}'
      raise _corrupt(folder, name, reason) from error
  return weights


def _check_chain(folder, manifest, programs, weights):
  """Checks that each stage takes what the one before returns, and knows as many classes."""
  num_classes = len(manifest['class_names'])
  carry = None
  for name, program, leaves in zip(manifest['stages'], programs, weights, strict=True):
    try:
      if carry is None:
        height, width, channels = manifest['image_shape']
        carry = jax.ShapeDtypeStruct((2, height, width, channels), manifest['image_dtype'])
      carry = jax.eval_shape(program.call, leaves, carry)
      _, logits = carry
      num_classes = num_classes or logits.shape[1]
      is_next = logits.shape == (2, num_classes) and jax.numpy.issubdtype(logits.dtype, np.floating)
    except Exception:  # Structures, shapes and types that differ raise all kinds of exceptions.
      is_next = False
    if not is_next:
      raise _corrupt(folder, name, 'does not fit the images, classes or the stage before it')


def _validation(folder, arrays, manifest):
  try:
    validation = CalibrationSet(arrays['scores'], arrays['correct'])
  except (KeyError, ValueError) as error:
    raise _corrupt(folder, VALIDATION, f'has no valid scores ({error})') from error
  if len(validation.scores) != (num_exits := len(manifest['stages'])):
    raise _corrupt(folder, VALIDATION, f'does not have the scores of {num_exits} exits')
  return validation


def _call(exported, weights, carry):
  return exported.call(weights, carry)
