"""Reads exports of experiments/export.py."""

import hashlib
import io
import json
import os
from functools import partial
from typing import Any

import numpy as np
from jax import export

from .programs import Stage, Tree
from .promise import Validation

MANIFEST = 'manifest.json'
VALIDATION = 'validation.npz'
FORMAT = 3


def read_export(folder: Any) -> tuple[dict[str, Any], list[Stage], list[Tree], Validation | None]:
  """Reads an export and verifies its checksums.

  Args:
    folder: The export.

  Returns:
    The manifest, the stages, the weights of each stage, and the validation images' scores, if any.

  Raises:
    ValueError: If the folder is not an export, or a file has changed.
  """
  manifest = _read_manifest(folder)
  contents = {
    name: _read_checked(folder, name, checksum) for name, checksum in manifest['sha256'].items()
  }
  programs = [export.deserialize(bytearray(contents[name])) for name in manifest['stages']]
  with np.load(io.BytesIO(contents[manifest['weights']])) as arrays:
    weights = [
      # Weights may be stored in a smaller type than the program takes.
      [
        arrays[f'{index}/{leaf}'].astype(program.in_avals[leaf].dtype)
        for leaf in range(manifest['weights_per_stage'][index])
      ]
      for index, program in enumerate(programs)
    ]
  validation = None
  if VALIDATION in contents:
    with np.load(io.BytesIO(contents[VALIDATION])) as arrays:
      validation = Validation(arrays['scores'], arrays['correct'])
  return manifest, [partial(_call, program) for program in programs], weights, validation


def manifest_checksum(manifest: dict[str, Any]) -> str:
  """The checksum of a manifest, without the field that holds it."""
  return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def thresholds_from_json(thresholds: list[float | None]) -> tuple[float, ...]:
  """Thresholds; null stands for infinity, which JSON does not have."""
  return tuple(np.inf if threshold is None else threshold for threshold in thresholds)


def _read_manifest(folder):
  path = os.path.join(folder, MANIFEST)
  if not os.path.exists(path):
    raise ValueError(f'{folder} is not an export: it has no {MANIFEST}')
  with open(path, 'rb') as file:
    try:
      manifest = json.load(file)
      checksum = manifest.pop('manifest_sha256')
    except (ValueError, KeyError, AttributeError) as error:
      raise ValueError(f'{path} is damaged: export again') from error
  if checksum != manifest_checksum(manifest):
    raise ValueError(f'{path} has changed since it was written: export again')
  if manifest['format'] != FORMAT:
    raise ValueError(f'{folder} has format {manifest["format"]}, expected {FORMAT}: export again')
  return manifest


def _read_checked(folder, name, checksum):
  # A manifest from elsewhere must not make this program read other files.
  if os.path.isabs(name) or '..' in name.replace(os.sep, '/').split('/'):
    raise ValueError(f'{folder} names a file outside of it, {name!r}: do not use this export')
  path = os.path.join(folder, name)
  try:
    with open(path, 'rb') as file:
      content = file.read()
  except OSError as error:
    raise ValueError(f'{path} cannot be read ({error.strerror}): export again') from error
  if hashlib.sha256(content).hexdigest() != checksum:
    raise ValueError(f'{path} has changed since it was written: export again')
  return content


def _call(exported, weights, carry):
  return exported.call(weights, carry)
