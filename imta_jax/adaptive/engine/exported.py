"""Reads exports of experiments/export.py.

Checksums detect corruption, but an export may be untrusted. Therefore its manifest and arrays
are checked in form and size, and no file outside of it is read. Its programs are as
trustworthy as their author: XLA, which reads and runs them, is not made to withstand attacks, and
may crash on bytes that were chosen for it, or never return.
"""

import hashlib
import io
import json
import os
import re
from functools import partial
from typing import Any

import jax
import numpy as np
from jax import export

from . import untrusted
from .guarantee import CalibrationSet
from .programs import Stage, Tree

MANIFEST = 'manifest.json'
VALIDATION = 'validation.npz'
FORMAT = 3

# Bytes of a manifest, and of all other files together.
_LARGEST_MANIFEST = 2**24
_LARGEST = 2**32


def _are_checksums(value):
  return isinstance(value, dict) and all(len(name) < 256 and name.isprintable() for name in value)


_THRESHOLDS = [untrusted.is_threshold]
_SCHEMAS = {
  'stages': [untrusted.is_text],
  'weights': untrusted.is_text,
  'weights_per_stage': [lambda value: type(value) is int],
  'image_shape': [untrusted.is_count],
  'image_dtype': untrusted.is_text,
  'preprocessing': {},
  'class_names': [untrusted.is_text],
  'madds': [untrusted.is_positive],
  'rule': untrusted.is_text,
  'temperatures': [untrusted.is_positive],
  'thresholds': _THRESHOLDS,
  'operating_points': [
    {
      'thresholds': _THRESHOLDS,
      'exit_fractions': [untrusted.is_fraction],
      'accuracy': untrusted.is_fraction,
    }
  ],
  'sha256': _are_checksums,
}

# Programs could call any function that this process has registered, with any arguments. Ours call
# only the one that checks shapes.
_FOREIGN_CALL = re.compile(r'custom_call(?! @shape_assertion\()')


def read_export(
  folder: Any,
) -> tuple[dict[str, Any], list[Stage], list[Tree], CalibrationSet | None]:
  """Reads an export and verifies its checksums.

  Args:
    folder: The export.

  Returns:
    The manifest, the stages, the weights of each stage, and the validation images' scores, if any.

  Raises:
    ValueError: If the folder is not an export, a file has changed, or the files do not match.
  """
  manifest = _read_manifest(folder)
  contents, room = {}, _LARGEST
  for name, checksum in manifest['sha256'].items():
    contents[name] = _read(folder, name, room)
    if hashlib.sha256(contents[name]).hexdigest() != checksum:
      raise _corrupt(folder, name, 'has changed since it was written')
    room -= len(contents[name])
  if not {*manifest['stages'], manifest['weights']} <= contents.keys():
    raise _corrupt(folder, MANIFEST, 'lacks the checksums of stages or weights')
  programs = [_program(folder, name, contents[name]) for name in manifest['stages']]
  name = manifest['weights']
  weights = _weights(folder, name, _arrays(folder, name, contents[name]), programs, manifest)
  _check_chain(folder, manifest, programs, weights)
  validation = None
  if VALIDATION in contents:
    validation = _validation(folder, _arrays(folder, VALIDATION, contents[VALIDATION]), manifest)
  return manifest, [partial(_call, program) for program in programs], weights, validation


def manifest_checksum(manifest: dict[str, Any]) -> str:
  """The checksum of a manifest, without the field that holds it."""
  return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def thresholds_from_json(thresholds: list[float | None]) -> tuple[float, ...]:
  """Thresholds; null stands for infinity, which JSON does not have."""
  return tuple(np.inf if threshold is None else threshold for threshold in thresholds)


def _corrupt(folder, name, reason):
  return ValueError(f'{os.path.join(folder, name)} {reason}: export again')


def _read_manifest(folder):
  if not os.path.exists(os.path.join(folder, MANIFEST)):
    raise ValueError(f'{folder} is not an export: it has no {MANIFEST}')
  content = _read(folder, MANIFEST, _LARGEST_MANIFEST)
  try:
    manifest = untrusted.read_json(content)
    checksum = manifest.pop('manifest_sha256')
    is_as_written = checksum == manifest_checksum(manifest)
  except (ValueError, KeyError, AttributeError, TypeError) as error:
    raise _corrupt(folder, MANIFEST, 'is corrupt') from error
  if not is_as_written:
    raise _corrupt(folder, MANIFEST, 'has changed since it was written')
  if manifest.get('format') != FORMAT:
    raise ValueError(
      f'{folder} has format {str(manifest.get("format"))[:20]}, expected {FORMAT}: export again'
    )
  for field, schema in _SCHEMAS.items():
    if not untrusted.matches_schema(manifest.get(field), schema):
      raise _corrupt(folder, MANIFEST, f'has no valid {field}')
  num_exits, per_exit = len(manifest['stages']), ['madds', 'temperatures', 'thresholds']
  lengths = [len(manifest[field]) for field in (*per_exit, 'weights_per_stage')]
  for point in manifest['operating_points']:
    lengths += [len(point['thresholds']), len(point['exit_fractions'])]
  if not num_exits or set(lengths) != {num_exits}:
    raise _corrupt(folder, MANIFEST, f'does not have one value for each of {num_exits} exits')
  return manifest


def _read(folder, name, largest):
  """Reads a file of the folder; links, too, must not lead out of it."""
  root = os.path.realpath(folder)
  try:
    path = os.path.realpath(os.path.join(root, name))
    if os.path.commonpath([root, path]) != root:
      raise ValueError(f'{folder} names a file outside of it, {name!r}: do not use this export')
    # Reading a pipe would wait, and reading a device might never end.
    if os.path.exists(path) and not os.path.isfile(path):
      raise _corrupt(folder, name, 'is not a regular file')
    if (size := os.path.getsize(path)) > largest:
      raise _corrupt(folder, name, f'is too large, {size:,} of {largest:,} bytes that are left')
    with open(path, 'rb') as file:
      return file.read()
  except OSError as error:
    raise _corrupt(folder, name, f'cannot be read ({error.strerror})') from error


def _arrays(folder, name, content):
  try:
    return untrusted.read_arrays(io.BytesIO(content))
  except ValueError as error:
    raise _corrupt(folder, name, f'is not a file of arrays ({error})') from error


def _program(folder, name, content):
  try:
    program = export.deserialize(bytearray(content))
    has_foreign_calls = _FOREIGN_CALL.search(program.mlir_module())
    platforms = program.platforms
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
    names = [f'{index}/{leaf}' for leaf in range(min(count, len(arrays)))]
    expected = program.in_avals[:count]
    shapes = [np.shape(arrays.get(leaf, np.nan)) for leaf in names]
    are_numbers = all(jax.numpy.issubdtype(aval.dtype, np.number) for aval in expected)
    if len(names) != count or shapes != [aval.shape for aval in expected] or not are_numbers:
      raise _corrupt(folder, name, f'does not have the weights of stage {index + 1}')
    # Weights may be stored in a smaller type than the program takes.
    weights.append(
      [arrays[leaf].astype(aval.dtype) for leaf, aval in zip(names, expected, strict=True)]
    )
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
  scores, correct = (arrays.get(name, np.zeros(())) for name in ('scores', 'correct'))
  num_exits = len(manifest['stages'])
  shapes_fit = scores.ndim == 2 and len(scores) == num_exits and correct.shape == scores.shape
  if not (shapes_fit and scores.size and (scores.dtype.kind, correct.dtype.kind) == ('f', 'b')):
    raise _corrupt(folder, VALIDATION, f'must hold scores and answers of {num_exits} exits')
  return CalibrationSet(scores, correct)


def _call(exported, weights, carry):
  return exported.call(weights, carry)
