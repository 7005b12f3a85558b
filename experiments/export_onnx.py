"""Exports a trained network as ONNX, for ONNX Runtime and other runtimes without JAX.

    pip install 'imta_jax[onnx]'
    python experiments/export_onnx.py runs/mnist5k exported_onnx

The folder contains each stage with its weights, for any batch size, and a manifest. The following
code classifies one image without JAX (for several images, remove those that exit from the batch):

    import json, numpy as np, onnxruntime
    manifest = json.load(open('exported_onnx/manifest.json'))
    values = {'images': image[np.newaxis]}  # uint8.
    for stage, threshold in zip(manifest['stages'], manifest['thresholds']):
      session = onnxruntime.InferenceSession('exported_onnx/' + stage['file'])  # Reuse sessions.
      results = session.run(stage['outputs'], {name: values[name] for name in stage['inputs']})
      values = dict(zip(stage['outputs'], results))
      odds = np.exp(results[-1][0] - results[-1][0].max())  # Logits come last.
      probabilities = odds / odds.sum()
      if threshold is not None and probabilities.max() >= threshold:
        break

For an exit rule other than top_probability, its score in imta_jax/adaptive/rules.py, which
works on NumPy arrays, takes the place of probabilities.max(); the manifest names rule and
temperatures.
"""

from collections.abc import Sequence
from typing import Any
from unittest import mock

import jax
from etils import epath
from jax.export import symbolic_shape
from jax.extend.core import jaxpr_as_fun

from imta_jax import command_line, export
from imta_jax.adaptive.engine import AdaptiveClassifier
from imta_jax.errors import UsageError

FORMAT = 'onnx-2'
# The first version of jax that jax2onnx does not support; see setup.py.
_TOO_NEW = (0, 11)


def main(arguments: Sequence[str] | None = None) -> None:
  """Runs the command line."""
  export.export_network(__doc__, write_export, arguments)


def write_export(classifier: AdaptiveClassifier, folder: epath.Path, source: str = '') -> int:
  """Exports a classifier.

  Args:
    classifier: The classifier to export.
    folder: The folder to write; created if necessary.
    source: The origin of the network, as information in the manifest.

  Returns:
    The number of bytes written.

  Raises:
    UsageError: If the folder is not empty, or jax2onnx is not installed or does not support this
      version of jax.
  """
  export.check_empty(folder)
  stages = {f'stage_{number}.onnx': stage for number, stage in enumerate(_convert(classifier), 1)}
  fields = {
    'format': FORMAT,
    'stages': [
      {
        'file': name,
        'inputs': [value.name for value in stage.graph.input],
        'outputs': [value.name for value in stage.graph.output],
      }
      for name, stage in stages.items()
    ],
  }
  contents = {name: stage.SerializeToString() for name, stage in stages.items()}
  packages = ('imta_jax', 'jax', 'jax2onnx', 'onnx')
  return export.write_folder(classifier, folder, source, contents, fields, packages)


def _convert(classifier: AdaptiveClassifier) -> list[Any]:
  """Converts each stage to an onnx.ModelProto.

  Inputs have the names of the corresponding outputs of the previous stage.
  """
  if jax.__version_info__ >= _TOO_NEW:
    raise UsageError(
      f"jax2onnx does not support jax {jax.__version__}: pip install 'imta_jax[onnx]', in an "
      'environment of its own if necessary'
    )
  try:
    from jax2onnx import to_onnx
  except ImportError as error:
    raise UsageError(f"{error}: pip install 'imta_jax[onnx]'") from error
  (batch,) = symbolic_shape('batch')
  carry = jax.ShapeDtypeStruct((batch, *classifier.image.shape), classifier.image.dtype)
  names, converted = ['images'], []
  for number, (stage, weights) in enumerate(
    zip(classifier.stages, classifier.weights, strict=True), start=1
  ):
    leaves, structure = jax.tree.flatten(carry)

    def run(*leaves, stage=stage, weights=weights, structure=structure):
      return stage(weights, jax.tree.unflatten(structure, leaves))

    # The stage is traced here for two reasons: jax2onnx does not support platform_dependent, and
    # when it traces Flax functions itself, it replaces them by its own with other arguments.
    with mock.patch.object(jax.lax, 'platform_dependent', _default):
      traced, carry = jax.make_jaxpr(run, return_shape=True)(*leaves)
    outputs = [f'stage_{number}_map_{index}' for index in range(len(traced.out_avals) - 1)]
    outputs.append(f'stage_{number}_logits')
    converted.append(
      to_onnx(
        jaxpr_as_fun(traced),
        leaves,
        model_name=f'stage_{number}',
        input_names=names,
        output_names=outputs,
      )
    )
    names = outputs
  return converted


def _default(*args, default, **_):
  """Stands in for jax.lax.platform_dependent and takes its default branch."""
  return default(*args)


if __name__ == '__main__':
  command_line.run(main)
