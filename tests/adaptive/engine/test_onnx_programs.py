"""Runtimes other than XLA: which is taken, and which models are refused."""

import json
import shutil
import subprocess
import sys
from functools import partial

import jax
import numpy as np
import pytest

import imta_jax
from imta_jax.adaptive.engine import AdaptiveClassifier, classifier, onnx_programs
from imta_jax.adaptive.engine.runner import Runner
from imta_jax.adaptive.exported import manifest_checksum

onnx = pytest.importorskip('onnx')
RUNTIMES = [
  pytest.param(
    name, marks=pytest.mark.skipif(name not in onnx_programs.installed_runtimes(), reason='missing')
  )
  for name in onnx_programs.RUNTIMES
]


@pytest.mark.parametrize('runtime', RUNTIMES)
def test_an_export_gives_the_same_answers_in_every_runtime(tiny_classifier, tiny_export, runtime):
  images = np.random.default_rng(0).integers(0, 256, (7, *tiny_classifier.image.shape), np.uint8)
  expected = tiny_classifier.predict(images, [0.5, 0])
  exported = imta_jax.load(tiny_export, runtime=runtime)
  answers = exported.predict(images, [0.5, 0])
  np.testing.assert_array_equal(answers.exits, expected.exits)
  np.testing.assert_allclose(answers.probabilities, expected.probabilities, atol=1e-5)


@pytest.mark.parametrize('fastest', ['xla', *RUNTIMES])
def test_compile_takes_the_runtime_that_was_fastest(make_classifier, monkeypatch, images, fastest):
  network = make_classifier('network')
  expected = network.predict(images)

  def seconds(self, size):
    runtime = getattr(self.programs, '_runtime', 'xla')
    return 1.0 if runtime == fastest else 2.0

  monkeypatch.setattr(Runner, 'time_all_stages', seconds)
  monkeypatch.setattr(Runner, 'compile', lambda self, thresholds, largest: None)
  assert network.compile().runtime == fastest
  np.testing.assert_array_equal(network.predict(images).exits, expected.exits)
  chosen = network._runner
  assert network.compile()._runner is chosen  # It is chosen once.


@pytest.mark.parametrize(('seconds', 'is_taken'), [(0.95, False), (0.8, True)])
def test_one_thread_must_be_clearly_faster(monkeypatch, seconds, is_taken):
  now = [0.0]

  def program(seconds):
    def run(arrays, keep):
      now[0] += seconds

    return run

  monkeypatch.setattr(onnx_programs.time, 'perf_counter', lambda: now[0])
  all_threads, one_thread = program(1.0), program(seconds)
  taken = onnx_programs._faster(all_threads, one_thread, {})
  assert taken is (one_thread if is_taken else all_threads)


@pytest.mark.parametrize('runtime', RUNTIMES)
def test_a_network_in_half_precision_computes_in_float32(
  tiny_msdnet, random_variables, images, runtime
):
  fields = {'num_classes': 5, 'collaboration': 'network'}
  shape = images.shape[1:]
  variables = random_variables(tiny_msdnet(**fields), shape)

  def make(dtype, runtime):
    return AdaptiveClassifier.from_model(
      tiny_msdnet(**fields, dtype=dtype),
      variables,
      [np.inf] * 2,
      shape,
      mean=(0.5,) * 3,
      std=(0.2,) * 3,
      runtime=runtime,
      batch_sizes=(1, 4),
    )

  expected = make(jax.numpy.float32, 'xla').predict(images)
  answers = make(jax.numpy.bfloat16, runtime).compile().predict(images)
  np.testing.assert_allclose(answers.probabilities, expected.probabilities, atol=1e-2)


def test_a_network_that_onnx_cannot_hold_runs_in_xla(monkeypatch):
  def stage(weights, images):
    logits = jax.lax.fori_loop(0, 3, lambda _, x: x @ weights, images.reshape(-1, 4))
    return (), logits

  image = jax.ShapeDtypeStruct((2, 2, 1), np.float32)
  make = partial(
    AdaptiveClassifier, [stage], [np.eye(4, dtype='f4')], [0.5], image, madds=[1.0], batch_sizes=[1]
  )
  monkeypatch.setattr(classifier, 'installed_runtimes', lambda: ['openvino'])
  monkeypatch.setattr(classifier, 'check_runtime', lambda runtime: None)
  with pytest.warns(UserWarning, match="cannot be written in ONNX: ONNX has nothing like 'scan'"):
    assert make().compile(1).runtime == 'xla'
  with pytest.raises(ValueError, match='cannot be written in ONNX'):
    make(runtime='openvino')


def test_runtimes_that_cannot_be_used_are_refused(tiny_export, monkeypatch):
  with pytest.raises(
    ValueError, match="'tensorrt' is unknown: choose xla, openvino or onnxruntime"
  ):
    imta_jax.load(tiny_export, runtime='tensorrt')
  monkeypatch.setattr(onnx_programs, 'installed_runtimes', lambda: [])
  with pytest.raises(ValueError, match="'openvino' is not installed: pip install onnx openvino"):
    imta_jax.load(tiny_export, runtime='openvino')
  monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
  with pytest.raises(ValueError, match="'openvino' is for CPUs: leave it out on a gpu"):
    onnx_programs.check_runtime('openvino')


@pytest.fixture
def altered(tiny_export, tmp_path):
  """A copy of an export, and a function that alters its first stage in ONNX."""
  folder = tmp_path / 'export'
  shutil.copytree(tiny_export, folder)

  def alter(change, with_checksum):
    import hashlib

    path = folder / 'stage_1.onnx'
    model = onnx.load_model_from_string(path.read_bytes())
    change(model)
    path.write_bytes(model.SerializeToString())
    if with_checksum:
      manifest = json.loads((folder / 'manifest.json').read_text())
      del manifest['manifest_sha256']
      manifest['sha256'][path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
      manifest['manifest_sha256'] = manifest_checksum(manifest)
      (folder / 'manifest.json').write_text(json.dumps(manifest))
    return folder

  return alter


def refer_to_a_file(model):
  array = model.graph.initializer[0]
  array.data_location = onnx.TensorProto.EXTERNAL
  array.external_data.add(key='location', value='/etc/passwd')


def call_a_foreign_operator(model):
  model.graph.node[0].domain = 'com.example'


def contain_a_graph(model):
  model.graph.node[0].attribute.append(onnx.helper.make_attribute('body', onnx.GraphProto()))


@pytest.mark.parametrize('change', [refer_to_a_file, call_a_foreign_operator, contain_a_graph])
def test_altered_models_are_refused(altered, change):
  with pytest.raises(ValueError, match=r'stage_1\.onnx has changed since it was written'):
    imta_jax.load(altered(change, with_checksum=False))
  folder = altered(change, with_checksum=True)
  with pytest.raises(ValueError, match='refers to what is outside of it: do not use this export'):
    onnx_programs.read_models(imta_jax.load(folder).onnx_models())


def test_a_corrupt_model_is_refused():
  with pytest.raises(ValueError, match='a stage in ONNX is corrupt: export again'):
    onnx_programs.read_models([b'\xff\xff'])


def test_openvino_starts_no_process():
  """Its telemetry would, and terminate it, whereupon the event loop of a server stops."""
  pytest.importorskip('openvino')
  code = (
    'import os, sys, time\n'
    'os.fork = lambda: print("forked")\n'
    'from imta_jax.adaptive.engine.onnx_programs import import_openvino\n'
    'import_openvino().Core()\n'
    'time.sleep(0.5)\n'
    'print("openvino_telemetry" in sys.modules)'
  )
  printed = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
  assert printed.stdout == 'False\n'
