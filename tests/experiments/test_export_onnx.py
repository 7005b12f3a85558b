"""An ONNX export gives the answers of its network."""

import hashlib
import importlib.util
import json
import re
import sys
import textwrap
from pathlib import Path

import jax
import numpy as np
import pytest
from etils import epath

from imta_jax import models
from imta_jax.adaptive.engine import AdaptiveClassifier
from imta_jax.errors import UsageError

pytest.importorskip('jax2onnx')
onnxruntime = pytest.importorskip('onnxruntime')

SHAPE = (16, 16, 3)
PATH = Path(__file__).parents[2] / 'experiments' / 'export_onnx.py'


@pytest.fixture(scope='module')
def export_onnx():
  sys.path.insert(0, str(PATH.parent))  # As if the script were run.
  spec = importlib.util.spec_from_file_location('export_onnx', PATH)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  sys.path.remove(str(PATH.parent))
  return module


@pytest.fixture(scope='module')
def images():
  return np.random.default_rng(0).integers(0, 256, (7, *SHAPE), dtype=np.uint8)


# Without collaboration, stages ignore the logits of the previous stage.
@pytest.fixture(scope='module', params=['network', 'off'])
def classifier(request, random_variables, images):
  model = models.create(
    'msdnet',
    num_exits=3,
    step_mode='even',
    channels=4,
    growth_rate=4,
    scale_factors=(1, 2),
    bottleneck_factors=(1, 2),
    num_classes=5,
    collaboration=request.param,
  )
  classifier = AdaptiveClassifier.from_model(
    model,
    random_variables(model, SHAPE),
    (0.0, 0.0, 0.0),
    SHAPE,
    mean=(0.5, 0.4, 0.3),
    std=(0.2, 0.3, 0.2),
    madds=(10, 20, 30),
    class_names=list('abcde'),
  )
  # With thresholds of 0, all images leave at the first exit. A threshold halfway between two
  # confidences makes rounding irrelevant.
  between = np.sort(classifier.predict(images).confidences)[3:5].mean()
  classifier.thresholds = np.array([between, np.inf, np.inf], np.float32)
  return classifier


def test_a_version_of_jax_that_cannot_be_exported_is_refused(
  export_onnx, classifier, monkeypatch, tmp_path
):
  monkeypatch.setattr(jax, '__version_info__', (0, 11, 0))
  with pytest.raises(UsageError, match='jax2onnx does not support jax .*imta_jax.onnx'):
    export_onnx.write_export(classifier, epath.Path(tmp_path / 'exported'))


@pytest.fixture(scope='module')
def exported(export_onnx, classifier, tmp_path_factory):
  if jax.__version_info__ >= (0, 11):
    pytest.skip('jax2onnx does not support this version of jax')
  folder = tmp_path_factory.mktemp('onnx') / 'exported_onnx'
  export_onnx.write_export(classifier, epath.Path(folder))
  return folder


def test_each_stage_gives_our_results(classifier, exported, images):
  manifest = json.loads((exported / 'manifest.json').read_text())
  carry, values = images, {'images': images}
  for stage, weights, row in zip(
    classifier.stages, classifier.weights, manifest['stages'], strict=True
  ):
    session = onnxruntime.InferenceSession(exported / row['file'])
    results = session.run(row['outputs'], {name: values[name] for name in row['inputs']})
    values = dict(zip(row['outputs'], results, strict=True))
    carry = stage(weights, carry)
    for result, ours in zip(results, jax.tree.leaves(carry), strict=True):
      np.testing.assert_allclose(result, ours, rtol=1e-4, atol=1e-4)


def test_the_code_in_the_docstring_gives_our_answers(
  export_onnx, classifier, exported, images, monkeypatch
):
  monkeypatch.chdir(exported.parent)
  code = re.search(r'    import json.*?(?=\n\S)', export_onnx.__doc__, re.DOTALL)[0]
  expected = classifier.predict(images)
  assert len(set(expected.exits)) > 1
  for index, image in enumerate(images):
    names = {'image': image}
    exec(textwrap.dedent(code), names)
    assert names['stage']['file'] == f'stage_{expected.exits[index] + 1}.onnx'
    np.testing.assert_allclose(names['probabilities'], expected.probabilities[index], atol=1e-5)


def test_the_manifest_has_the_checksums_of_all_stages(exported):
  manifest = json.loads((exported / 'manifest.json').read_text())
  sums = {
    path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in exported.glob('*.onnx')
  }
  assert len(sums) == 3
  assert manifest['sha256'] == sums


def test_a_folder_that_is_not_empty_is_refused(export_onnx, classifier, exported):
  with pytest.raises(UsageError, match='not empty'):
    export_onnx.write_export(classifier, epath.Path(exported))
