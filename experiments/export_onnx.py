"""Exports a trained network as ONNX, for ONNX Runtime and other runtimes without JAX.

    pip install 'imta_jax[cpu]'
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

from etils import epath

from imta_jax import command_line, export
from imta_jax.adaptive.engine import AdaptiveClassifier
from imta_jax.errors import UsageError

FORMAT = 'onnx-2'


def main(arguments: Sequence[str] | None = None) -> None:
  """Runs the command line."""
  opset = {
    'type': int,
    'default': 17,
    'choices': range(17, 22),
    'help': "version of ONNX's operators",
  }
  export.export_network(__doc__, write_export, arguments, {'opset': opset})


def write_export(
  classifier: AdaptiveClassifier, folder: epath.Path, source: str = '', opset: int = 17
) -> int:
  """Exports a classifier.

  Args:
    classifier: The classifier to export.
    folder: The folder to write; created if necessary.
    source: The origin of the network, as information in the manifest.
    opset: Version of ONNX's operators, 17 or newer.

  Returns:
    The number of bytes written.

  Raises:
    UsageError: If the folder is not empty, onnx is not installed, or the network cannot be written
      in ONNX.
  """
  export.check_empty(folder)
  try:
    from imta_jax.interop.onnx_graph import write_stages
  except ImportError as error:
    raise UsageError(f"{error}: pip install 'imta_jax[cpu]'") from error
  models = write_stages(classifier.stages, classifier.weights, classifier.image, opset=opset)
  stages = {f'stage_{number}.onnx': model for number, model in enumerate(models, start=1)}
  fields = {
    'format': FORMAT,
    'stages': [
      {
        'file': name,
        'inputs': [value.name for value in model.graph.input],
        'outputs': [value.name for value in model.graph.output],
      }
      for name, model in stages.items()
    ],
  }
  contents = {name: model.SerializeToString() for name, model in stages.items()}
  return export.write_folder(
    classifier, folder, source, contents, fields, ('imta_jax', 'jax', 'onnx')
  )


if __name__ == '__main__':
  command_line.run(main)
