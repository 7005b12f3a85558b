"""An ONNX export gives the answers of its network."""

import hashlib
import json
import re
import textwrap

import export_onnx
import jax
import numpy as np
import pytest
from etils import epath

onnx = pytest.importorskip('onnx')
onnxruntime = pytest.importorskip('onnxruntime')


# Without collaboration, stages ignore the logits of the previous stage.
@pytest.fixture(scope='module', params=['network', pytest.param('off', marks=pytest.mark.slow)])
def classifier(request, make_classifier):
  return make_classifier(request.param)


@pytest.fixture(scope='module')
def exported(classifier, tmp_path_factory):
  folder = tmp_path_factory.mktemp('onnx') / 'exported_onnx'
  export_onnx.write_export(classifier, epath.Path(folder))
  return folder


def test_each_stage_gives_our_results(classifier, exported, images):
  assert_stages_agree(classifier, exported, images)


def assert_stages_agree(classifier, exported, images):
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
      np.testing.assert_allclose(result, ours, atol=1e-4 * max(1, np.abs(ours).max()))


def test_the_code_in_the_docstring_gives_our_answers(classifier, exported, images, monkeypatch):
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
  assert len(sums) == 2
  assert manifest['sha256'] == sums
