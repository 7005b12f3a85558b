"""Reads untrusted files, in bounded memory and without running their code."""

import json
import zipfile
from collections.abc import Callable
from typing import Any, BinaryIO

import numpy as np

# Numbers compress a few times. A file that grows more, and beyond this size, is made to fill
# memory.
_LARGEST_GROWTH = 10
_HARMLESS = 2**30

# A test of a value, [the schema of each item] or {field: its schema}.
Schema = Callable[[Any], bool] | list | dict


def read_json(content: bytes) -> Any:
  """Parses JSON.

  Raises:
    ValueError: If the content is not JSON, or is nested too deeply.
  """
  try:
    return json.loads(content)
  except RecursionError:
    raise ValueError('too many brackets within brackets') from None


def matches_schema(value: Any, schema: Schema) -> bool:
  """Whether parsed JSON matches: lists of any length, groups with at least these fields."""
  if isinstance(schema, list):
    return isinstance(value, list) and all(matches_schema(item, schema[0]) for item in value)
  if isinstance(schema, dict):
    return isinstance(value, dict) and all(
      name in value and matches_schema(value[name], inner) for name, inner in schema.items()
    )
  return schema(value)


def is_text(value: Any) -> bool:
  """Whether a value is a string."""
  return isinstance(value, str)


def is_number(value: Any) -> bool:
  """Whether a value is a finite number."""
  # Integers of any length are valid JSON, but do not fit a float.
  return type(value) in (int, float) and abs(value) < 1e300


def is_positive(value: Any) -> bool:
  """Whether a value is a finite number above 0."""
  return is_number(value) and value > 0


def is_count(value: Any) -> bool:
  """Whether a value is a number of things, at least 1."""
  return type(value) is int and 0 < value < 2**31


def is_fraction(value: Any) -> bool:
  """Whether a value is a number from 0 to 1."""
  return is_number(value) and 0 <= value <= 1


def is_threshold(value: Any) -> bool:
  """Whether a value is a finite number, or null, which stands for infinity."""
  return value is None or is_number(value)


def read_arrays(file: BinaryIO) -> dict[str, np.ndarray]:
  """Reads all arrays of an .npz file.

  Args:
    file: The file, opened for reading.

  Returns:
    The arrays by name, of numbers or truth values.

  Raises:
    ValueError: If the file is corrupt, contains anything else, or is small but would fill memory.
  """
  try:
    with zipfile.ZipFile(file) as archive:
      check_growth(archive, file)
      arrays = {}
      for entry in archive.infolist():
        with archive.open(entry) as content:
          arrays[entry.filename.removesuffix('.npy')] = _read_array(content)
    return arrays
  except Exception as error:  # Corrupt files make their readers raise all kinds of exceptions.
    reason = ' '.join(str(error).split()) or type(error).__name__
    raise ValueError(reason[:200]) from error


def check_growth(archive: zipfile.ZipFile, file: BinaryIO) -> None:
  """Checks what an archive would take in memory.

  Raises:
    ValueError: If its file is small, but would fill memory.
  """
  packed = file.seek(0, 2)
  unpacked = sum(entry.file_size for entry in archive.infolist())
  if unpacked > max(_HARMLESS, _LARGEST_GROWTH * packed):
    raise ValueError(f'{packed:,} bytes would grow to {unpacked:,}')


def _read_array(file):
  np.lib.format.read_magic(file)
  shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(file)
  if dtype.kind not in 'biuf':
    raise ValueError(f'{dtype} is not a type of numbers')
  # Memory is taken for the bytes that are there, not, as by `np.load`, for the shape in the header.
  return np.frombuffer(file.read(), dtype).reshape(shape, order='F' if is_fortran else 'C')
