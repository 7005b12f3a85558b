"""Writes a trained network as ONNX, for ONNX Runtime and other runtimes without JAX.

    pip install 'imta_jax[onnx]'
    python experiments/export_onnx.py runs/mnist5k exported_onnx

The folder holds each stage, with its weights and for any batch size, and a manifest. This is how
one image runs (for more, drop those that leave from the batch); it needs no JAX:

    import json, numpy as np, onnxruntime
    manifest = json.load(open('exported_onnx/manifest.json'))
    values = {'images': image[np.newaxis]}  # Unsigned bytes.
    for stage, threshold in zip(manifest['stages'], manifest['thresholds']):
      session = onnxruntime.InferenceSession('exported_onnx/' + stage['file'])  # Keep for the next.
      results = session.run(stage['outputs'], {name: values[name] for name in stage['inputs']})
      values = dict(zip(stage['outputs'], results))
      odds = np.exp(results[-1][0] - results[-1][0].max())  # Of the logits, which come last.
      probabilities = odds / odds.sum()
      if threshold is not None and probabilities.max() >= threshold:
        break
"""

from collections.abc import Sequence
from typing import Any
from unittest import mock

import export
import jax
from etils import epath
from jax.export import symbolic_shape
from jax.extend.core import jaxpr_as_fun

from imta_jax import command_line
from imta_jax.adaptive.engine import AdaptiveClassifier
from imta_jax.errors import UsageError

FORMAT = 'onnx-1'


def main(arguments: Sequence[str] | None = None) -> None:
  """Runs the command line."""
  export.run(__doc__, write_export, arguments)


def write_export(classifier: AdaptiveClassifier, folder: epath.Path, source: str = '') -> int:
  """Writes a classifier.

  Args:
    classifier: The classifier to write.
    folder: The folder to write; created if necessary.
    source: Where the network came from, for readers.

  Returns:
    Bytes written.

  Raises:
    UsageError: If there is something in the folder already, or jax2onnx is not installed.
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
  """Each stage as an onnx.ModelProto, whose inputs are named as the outputs of the one before."""
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

    # jax2onnx knows no choice of platform, and where it traces itself, it replaces functions of
    # Flax by its own, which take other arguments.
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
  """The branch of jax.lax.platform_dependent that is for any platform."""
  return default(*args)


if __name__ == '__main__':
  command_line.run(main)
