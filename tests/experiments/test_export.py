"""An export gives the answers of its network, even if imta_jax cannot be imported."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import jax
import numpy as np
import pytest
from etils import epath

from imta_jax import models
from imta_jax.adaptive.engine import AdaptiveClassifier, CalibrationSet, OperatingPoint
from imta_jax.errors import UsageError

SHAPE = (16, 16, 3)
PATH = Path(__file__).parents[2] / 'experiments' / 'export.py'

ELSEWHERE = """
import sys
folder, images, answers = sys.argv[1:]
for name in ('imta_jax', 'flax', 'optax', 'orbax'):
  sys.modules[name] = None
sys.path.insert(0, folder)
import numpy as np
from engine import AdaptiveClassifier
classifier = AdaptiveClassifier.load(folder)
images = np.load(images)
together, alone = classifier.predict(images), classifier.predict(images[:1])
np.savez(answers, together=together.probabilities, exits=together.exits, alone=alone.probabilities)
"""


@pytest.fixture(scope='module')
def export():
  spec = importlib.util.spec_from_file_location('export', PATH)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


@pytest.fixture(scope='module')
def images():
  return np.random.default_rng(0).integers(0, 256, (23, *SHAPE), dtype=np.uint8)


@pytest.fixture(scope='module')
def classifier(random_variables, images):
  model = models.create(
    'msdnet',
    num_exits=3,
    step_mode='even',
    channels=4,
    growth_rate=4,
    scale_factors=(1, 2),
    bottleneck_factors=(1, 2),
    num_classes=5,
    collaboration='network',
  )
  classifier = AdaptiveClassifier.from_model(
    model,
    random_variables(model, SHAPE),
    (0.0, 0.0, 0.0),
    SHAPE,
    mean=(0.5, 0.4, 0.3),
    std=(0.2, 0.3, 0.2),
    operating_points=[OperatingPoint((0.9, np.inf, np.inf), (0.5, 0.0, 0.5), 0.7)],
    madds=(10, 20, 30),
    class_names=list('abcde'),
    preprocessing={'crop': 'none'},
  )
  half = np.median(
    classifier.predict(images).confidences
  )  # Thresholds of 0: all images leave at the first exit.
  classifier.thresholds = np.array([half, half, -np.inf], np.float32)
  return classifier


@pytest.fixture(scope='module')
def exported(export, classifier, tmp_path_factory):
  folder = tmp_path_factory.mktemp('export') / 'exported'
  export.write_export(classifier, epath.Path(folder))
  return folder


def test_another_process_answers_bit_for_bit(classifier, exported, images, tmp_path):
  np.save(tmp_path / 'images.npy', images)
  arguments = [str(exported), str(tmp_path / 'images.npy'), str(tmp_path / 'answers.npz')]
  # Use the same compiler options as this process.
  environment = {**os.environ, 'JAX_DISABLE_MOST_OPTIMIZATIONS': '1'}
  subprocess.run(
    [sys.executable, '-c', ELSEWHERE, *arguments], check=True, cwd=tmp_path, env=environment
  )
  together, alone = classifier.predict(images), classifier.predict(images[:1])
  assert len(set(together.exits)) > 1
  with np.load(tmp_path / 'answers.npz') as answers:
    np.testing.assert_array_equal(answers['exits'], together.exits)
    np.testing.assert_array_equal(answers['together'], together.probabilities)
    np.testing.assert_array_equal(answers['alone'], alone.probabilities)


def test_an_export_contains_everything_about_the_network(classifier, exported):
  loaded = AdaptiveClassifier.load(exported)
  for name in ('image', 'class_names', 'madds', 'preprocessing', 'num_classes'):
    assert getattr(loaded, name) == getattr(classifier, name), name
  np.testing.assert_array_equal(loaded.thresholds[:2], classifier.thresholds[:2])
  assert loaded.operating_points == classifier.operating_points
  np.testing.assert_allclose(AdaptiveClassifier.load(exported, budget=25).thresholds[0], 0.9)


def test_an_export_keeps_rule_and_promise(export, classifier, images, tmp_path):
  folder, random = epath.Path(tmp_path) / 'exported', np.random.default_rng(0)
  correct = random.random((3, 900)) < np.array([[0.8], [0.85], [0.9]])
  fields = {
    'rule': 'calibrated',
    'temperatures': (0.5, 1.5, 2.0),
    'validation': CalibrationSet(random.random((3, 900), np.float32), correct),
  }
  names = ('madds', 'operating_points', 'class_names', 'preprocessing')
  fields |= {name: getattr(classifier, name) for name in names}
  stages, weights, thresholds = classifier.stages, classifier.weights, classifier.thresholds
  other = AdaptiveClassifier(stages, weights, thresholds, classifier.image, **fields)
  export.write_export(other, folder, without_engine=True)
  loaded = AdaptiveClassifier.load(folder)
  expected = other.predict(images)
  np.testing.assert_array_equal(loaded.predict(images).exits, expected.exits)
  assert (expected.exits != classifier.predict(images).exits).any()
  for max_loss in (0.02, 0.2):
    promised = AdaptiveClassifier.load(folder, max_loss=max_loss, confidence=0.8).thresholds
    np.testing.assert_array_equal(promised, other.thresholds_losing(max_loss, 0.8))


def test_kernels_can_be_stored_in_half_the_size(export, classifier, exported, images, tmp_path):
  folder = epath.Path(tmp_path) / 'exported'
  export.write_export(classifier, folder, float16=True)
  size, whole = (
    (path / 'weights.npz').stat().st_size for path in (tmp_path / 'exported', exported)
  )
  assert size < 0.75 * whole  # Vectors, a large part of this network, stay float32.
  loaded = AdaptiveClassifier.load(folder)
  assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(loaded.weights))
  no_exits = np.full(3, np.inf)
  answers, expected = loaded.predict(images, no_exits), classifier.predict(images, no_exits)
  assert (answers.probabilities != expected.probabilities).any()
  np.testing.assert_allclose(answers.probabilities, expected.probabilities, atol=2e-3)


def test_stages_name_no_folder_of_this_machine(exported):
  root = os.fsencode(Path(__file__).parents[2])
  for path in sorted(exported.glob('stage_*.jax')):
    content = path.read_bytes()
    assert b'.py' in content and root not in content


def test_stages_are_for_all_platforms(exported):
  stage = jax.export.deserialize(bytearray((exported / 'stage_2.jax').read_bytes()))
  assert stage.platforms == ('cpu', 'cuda', 'tpu')


@pytest.mark.parametrize(
  'name', ['stage_1.jax', 'stage_3.jax', 'weights.npz', 'engine/runner.py', 'manifest.json']
)
@pytest.mark.parametrize('damage', ['flipped', 'cut', 'missing'])
def test_a_corrupt_export_is_refused_by_name(exported, tmp_path, name, damage):
  shutil.copytree(exported, tmp_path, dirs_exist_ok=True)
  content = bytearray((tmp_path / name).read_bytes())
  if damage == 'flipped':
    content[len(content) // 2] ^= 1
  (tmp_path / name).write_bytes(content[: len(content) // 2] if damage == 'cut' else content)
  if damage == 'missing':
    (tmp_path / name).unlink()
  with pytest.raises(ValueError, match=name):
    AdaptiveClassifier.load(tmp_path)


def test_another_format_is_refused(exported, tmp_path):
  from imta_jax.adaptive.engine import manifest_checksum

  manifest = json.loads((exported / 'manifest.json').read_text())
  del manifest['manifest_sha256']
  manifest['format'] = 99
  manifest['manifest_sha256'] = manifest_checksum(manifest)
  (tmp_path / 'manifest.json').write_text(json.dumps(manifest))
  with pytest.raises(ValueError, match='format 99, expected 3: export again'):
    AdaptiveClassifier.load(tmp_path)


@pytest.mark.parametrize('name', ['/etc/passwd', '../../../dev/zero', 'engine/../../secret'])
def test_an_export_that_names_other_files_is_refused(exported, tmp_path, name):
  from imta_jax.adaptive.engine import manifest_checksum

  manifest = json.loads((exported / 'manifest.json').read_text())
  del manifest['manifest_sha256']
  manifest['sha256'] = {name: '0' * 64}
  manifest['manifest_sha256'] = manifest_checksum(manifest)
  (tmp_path / 'manifest.json').write_text(json.dumps(manifest))
  with pytest.raises(ValueError, match=f"names a file outside of it, '{name}'"):
    AdaptiveClassifier.load(tmp_path)


def test_the_engine_can_be_left_out(export, classifier, images, tmp_path):
  folder = epath.Path(tmp_path) / 'exported'
  export.write_export(classifier, folder, without_engine=True)
  assert not (folder / 'engine').exists()
  answers, expected = AdaptiveClassifier.load(folder).predict(images), classifier.predict(images)
  np.testing.assert_array_equal(answers.exits, expected.exits)
  np.testing.assert_allclose(answers.probabilities, expected.probabilities, rtol=1e-5)


def test_an_export_is_not_exported_again(export, exported, tmp_path):
  with pytest.raises(UsageError, match='is an export already'):
    export.main([str(exported), str(tmp_path / 'other')])
  assert not (tmp_path / 'other').exists()


def test_the_command_line_chooses_phase_thresholds_and_form(export, tmp_path, monkeypatch):
  calls = []

  def open_classifier(network, **choices):
    calls.append((network, {name: c for name, c in choices.items() if c is not None}))
    return types.SimpleNamespace(stages=())

  def write(classifier, folder, source, **flags):
    calls.append((str(folder), flags))
    return 0

  monkeypatch.setattr(export.command_line, 'open_classifier', open_classifier)
  monkeypatch.setattr(export, 'write_export', write)
  flags = ['--phase=2', '--max_loss=0.1', '--confidence=0.8', '--float16']
  export.main([str(tmp_path), f'{tmp_path}/exported', *flags])
  assert calls == [
    (str(tmp_path), {'phase': 2, 'max_loss': 0.1, 'confidence': 0.8}),
    (f'{tmp_path}/exported', {'without_engine': False, 'float16': True}),
  ]


def test_a_folder_that_is_not_empty_is_refused(export, classifier, exported):
  with pytest.raises(UsageError, match='not empty'):
    export.write_export(classifier, epath.Path(exported))
