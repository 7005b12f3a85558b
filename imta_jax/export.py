"""Exports a trained network to a folder that runs without imta_jax.

    python -m imta_jax.export runs/mnist5k exported
    python -m imta_jax.export runs/cifar100 exported --budget=40e6

The folder contains each stage as StableHLO (from jax.export, for any batch size, for CPUs, GPUs and
TPUs) and in ONNX (for OpenVINO and ONNX Runtime, if onnx is installed), the weights, thresholds for
40 budgets, and adaptive/, which needs JAX, NumPy and flatbuffers:

    import sys; sys.path.insert(0, 'exported')
    from adaptive.engine import AdaptiveClassifier
    answers = AdaptiveClassifier.load('exported', budget=20e6).predict(images)  # uint8
"""

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import math
import types
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath
from jax import export

from imta_jax import command_line
from imta_jax.adaptive import engine
from imta_jax.adaptive.engine import AdaptiveClassifier
from imta_jax.adaptive.exported import SOURCES
from imta_jax.errors import UsageError

PLATFORMS = ('cpu', 'cuda', 'tpu')


def main(arguments: Sequence[str] | None = None) -> None:
  """Runs the command line."""
  flags = {
    'without_engine': {
      'action': 'store_true',
      'help': 'leave out adaptive/, for use where imta_jax is installed',
    },
    'float16': {
      'action': 'store_true',
      'help': 'store kernels in float16, which halves the size; they compute in float32',
    },
  }
  export_network(__doc__, write_export, arguments, flags)


def export_network(
  description: str,
  write: Callable[..., int],
  arguments: Sequence[str] | None = None,
  flags: Mapping[str, Mapping[str, Any]] = types.MappingProxyType({}),
) -> None:
  """Runs the command line of an export.

  Args:
    description: Description of the program.
    write: A function of (classifier, folder, source) and the flags, as keywords, that writes an
      export and returns its size in bytes.
    arguments: The command-line arguments.
    flags: Names of further flags, with what argparse's `add_argument` takes.

  Raises:
    UsageError: If there is no such network, no thresholds are within the budget, or the folder is
      not empty.
  """
  parser = argparse.ArgumentParser(
    description=description, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  command_line.add_network_arguments(parser)
  parser.add_argument(
    'output', type=command_line.output_folder, help='folder to write; must be empty or absent'
  )
  for flag, fields in flags.items():
    parser.add_argument(f'--{flag}', **fields)
  options = parser.parse_args(arguments)
  folder = options.output
  check_empty(folder)
  if (epath.Path(options.network) / engine.MANIFEST).exists():
    raise UsageError(f'{options.network} is an export already: name the workdir of a run')
  classifier = command_line.open_classifier(options.network, **command_line.choices(options))
  chosen = {flag: getattr(options, flag) for flag in flags}
  size = write(classifier, folder, options.network, **chosen)
  print(f'{len(classifier.stages)} stages, {size / 1e6:.1f} MB, in {folder}')


def write_export(
  classifier: AdaptiveClassifier,
  folder: epath.Path,
  source: str = '',
  without_engine: bool = False,
  float16: bool = False,
) -> int:
  """Exports a classifier.

  Args:
    classifier: The classifier to export.
    folder: The folder to write; created if necessary.
    source: The origin of the network, as information in the manifest.
    without_engine: Whether to leave out the code that runs the export without imta_jax.
    float16: Whether to store kernels in float16. Vectors, such as those of batch norm, are small
      and stay as they are.

  Returns:
    The number of bytes written.

  Raises:
    UsageError: If the folder is not empty.
  """
  check_empty(folder)
  weights = [jax.tree.leaves(stage) for stage in classifier.weights]
  contents = {f'stage_{k}.jax': content for k, content in enumerate(_stages(classifier), start=1)}
  fields: dict[str, Any] = {
    'format': engine.FORMAT,
    'stages': list(contents),
    'weights': 'weights.npz',
    'weights_per_stage': [len(leaves) for leaves in weights],
    'variables': [_names(stage) for stage in classifier.weights],
    'platforms': list(PLATFORMS),
  }
  try:
    models = classifier.onnx_models()
  except ValueError as error:
    warnings.warn(f'exported for XLA only, which is slower on CPUs: {error}', stacklevel=2)
  else:
    onnx_stages = {f'stage_{k}.onnx': content for k, content in enumerate(models, start=1)}
    contents |= onnx_stages
    fields['onnx_stages'] = list(onnx_stages)
  contents['weights.npz'] = _npz(
    {
      f'{stage}/{index}': np.asarray(leaf, np.float16 if float16 and leaf.ndim > 1 else leaf.dtype)
      for stage, leaves in enumerate(weights)
      for index, leaf in enumerate(leaves)
    }
  )
  if classifier.validation is not None:
    contents[engine.VALIDATION] = _npz(dataclasses.asdict(classifier.validation))
  if not without_engine:
    contents |= {name: (Path(__file__).parent / name).read_bytes() for name in SOURCES}
  packages = ('imta_jax', 'jax', 'jaxlib', 'numpy')
  return write_folder(classifier, folder, source, contents, fields, packages)


def check_empty(folder: epath.Path) -> None:
  """Raises UsageError if a folder is not empty, or not a folder."""
  if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
    raise UsageError(f'{folder} is not empty: choose another folder')


def write_folder(
  classifier: AdaptiveClassifier,
  folder: epath.Path,
  source: str,
  contents: Mapping[str, bytes],
  fields: Mapping[str, Any],
  packages: Sequence[str],
) -> int:
  """Writes files, and a manifest that describes the files and the classifier.

  Args:
    classifier: The classifier to export.
    folder: The folder to write; created if necessary.
    source: The origin of the network, as information in the manifest.
    contents: The content of each file, by name.
    fields: Further fields of the manifest.
    packages: Packages whose versions the manifest records.

  Returns:
    The number of bytes written.
  """
  manifest = {
    **fields,
    'source': source,
    'image_shape': list(classifier.image.shape),
    'image_dtype': str(np.dtype(classifier.image.dtype)),
    'preprocessing': classifier.preprocessing,
    'class_names': list(classifier.class_names),
    'madds': np.asarray(classifier.madds).tolist(),
    'rule': classifier.rule,
    'temperatures': list(classifier.temperatures),
    'thresholds': _finite(classifier.thresholds.tolist()),
    'operating_points': [
      {
        'budget': float(np.dot(point.exit_fractions, classifier.madds)),
        'thresholds': _finite(point.thresholds),
        'exit_fractions': list(point.exit_fractions),
        'accuracy': point.accuracy,
      }
      for point in classifier.operating_points
    ],
    'versions': {name: metadata.version(name) for name in packages},
    'sha256': {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()},
  }
  # The checksum must equal that of the manifest read back from JSON.
  manifest = json.loads(json.dumps(manifest))
  manifest['manifest_sha256'] = engine.manifest_checksum(manifest)
  # The manifest is written last, so that an incomplete folder is not taken for an export.
  contents = {**contents, engine.MANIFEST: f'{json.dumps(manifest, indent=2)}\n'.encode()}
  for name, content in contents.items():
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content)
  return sum(map(len, contents.values()))


def _stages(classifier: AdaptiveClassifier) -> list[bytes]:
  """Serializes each stage, a function (list of weights, carry) → carry for any batch size."""
  (batch,) = export.symbolic_shape('batch')
  carry = jax.ShapeDtypeStruct((batch, *classifier.image.shape), classifier.image.dtype)
  serialized = []
  for stage, tree in zip(classifier.stages, classifier.weights, strict=True):
    leaves, structure = jax.tree.flatten(tree)

    def run(leaves, carry, stage=stage, structure=structure):
      return stage(jax.tree.unflatten(structure, leaves), carry)

    specs = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves]
    with _without_folders():
      exported = export.export(jax.jit(run), platforms=PLATFORMS)(specs, carry)
    serialized.append(bytes(exported.serialize()))
    carry = jax.tree.unflatten(
      exported.out_tree,
      [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in exported.out_avals],
    )
  return serialized


@contextlib.contextmanager
def _without_folders() -> Iterator[None]:
  """Keeps the folders of this machine out of the source locations in programs."""
  config: Any = jax.config  # The types of jax 0.10 lack this option.
  before = config.jax_hlo_source_file_canonicalization_regex
  config.update('jax_hlo_source_file_canonicalization_regex', '.*/')
  try:
    yield
  finally:
    config.update('jax_hlo_source_file_canonicalization_regex', before)


def _names(tree: Any) -> list[str]:
  """Names the variables of a stage in the order of its leaves: 'params/stages_0/…'."""
  paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
  return [jax.tree_util.keystr(path, simple=True, separator='/') for path in paths]


def _npz(arrays: Mapping[str, Any]) -> bytes:
  content = io.BytesIO()
  np.savez_compressed(content, **arrays)
  return content.getvalue()


def _finite(thresholds: Sequence[float]) -> list[float | None]:
  """Thresholds for JSON, which has no infinity: None, and -1, which every score reaches."""
  return [None if threshold == math.inf else max(-1.0, threshold) for threshold in thresholds]


run = functools.partial(command_line.run, main)

if __name__ == '__main__':
  run()
