"""An export gives the answers of its network, even if imta_jax cannot be imported."""

import copy
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

import imta_jax
from imta_jax import export
from imta_jax.adaptive.engine import (
  AdaptiveClassifier,
  CalibrationSet,
  OperatingPoint,
  manifest_checksum,
)
from imta_jax.errors import UsageError

ELSEWHERE = """
import sys
folder, images, answers = sys.argv[1:]
for name in ('imta_jax', 'flax', 'optax', 'orbax'):
  sys.modules[name] = None
sys.path.insert(0, folder)
import numpy as np
from adaptive.engine import AdaptiveClassifier
classifier = AdaptiveClassifier.load(folder)
images = np.load(images)
together, alone = classifier.predict(images), classifier.predict(images[:1])
np.savez(answers, together=together.probabilities, exits=together.exits, alone=alone.probabilities)
"""


@pytest.fixture(scope='module')
def exported(classifier, tmp_path_factory):
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
  np.testing.assert_array_equal(loaded.thresholds[:1], classifier.thresholds[:1])
  assert loaded.operating_points == classifier.operating_points
  np.testing.assert_allclose(AdaptiveClassifier.load(exported, budget=15).thresholds[0], 0.9)


def test_an_export_keeps_rule_and_guarantee_and_can_leave_out_the_engine(tiny_classifier, tmp_path):
  folder, random = epath.Path(tmp_path) / 'exported', np.random.default_rng(0)
  images = random.integers(0, 256, (50, 2, 2, 1), np.uint8)
  correct = random.random((2, 900)) < np.array([[0.8], [0.9]])
  classifier = AdaptiveClassifier(
    tiny_classifier.stages,
    tiny_classifier.weights,
    tiny_classifier.thresholds,
    tiny_classifier.image,
    rule='calibrated',
    temperatures=(0.5, 2.0),
    validation=CalibrationSet(random.random((2, 900), np.float32), correct),
    **{name: getattr(tiny_classifier, name) for name in ('madds', 'class_names', 'preprocessing')},
  )
  export.write_export(classifier, folder, without_engine=True)
  assert not (folder / 'engine').exists()
  loaded = AdaptiveClassifier.load(folder)
  answers, expected = loaded.predict(images), classifier.predict(images)
  np.testing.assert_array_equal(answers.exits, expected.exits)
  np.testing.assert_allclose(answers.probabilities, expected.probabilities, rtol=1e-5)
  assert (expected.exits != tiny_classifier.predict(images).exits).any()
  for max_loss in (0.02, 0.2):
    guaranteed = AdaptiveClassifier.load(folder, max_loss=max_loss, confidence=0.8).thresholds
    np.testing.assert_array_equal(guaranteed, classifier.thresholds_losing(max_loss, 0.8))


@pytest.mark.parametrize(('threshold', 'exit'), [(-np.inf, 0), (np.inf, 1)])
def test_an_export_keeps_infinite_thresholds(tiny_classifier, tmp_path, threshold, exit):
  classifier = copy.copy(tiny_classifier)
  classifier.thresholds = np.full(2, threshold, np.float32)
  classifier.operating_points = [OperatingPoint((threshold,) * 2, (1 - exit, exit), 0.5)]
  classifier.save(tmp_path)
  for budget in (None, classifier.madds[-1]):
    answers = imta_jax.load(tmp_path, budget).predict(np.zeros((3, *classifier.image.shape), 'u1'))
    np.testing.assert_array_equal(answers.exits, exit)


def test_an_export_keeps_costs_that_are_no_integers(tiny_classifier, tmp_path):
  classifier = copy.copy(tiny_classifier)
  classifier.madds = (0.25, 1.5)
  classifier.save(tmp_path)
  assert imta_jax.load(tmp_path).madds == (0.25, 1.5)


def test_kernels_can_be_stored_in_half_the_size(tiny_classifier, tmp_path):
  folder = epath.Path(tmp_path) / 'exported'
  export.write_export(tiny_classifier, folder, float16=True)
  with np.load(folder / 'weights.npz') as arrays:
    stored = {str(array.dtype): array.ndim for array in arrays.values()}
  assert stored == {'float16': 2, 'float32': 1}
  loaded = AdaptiveClassifier.load(folder).weights
  for leaf, exact in zip(*map(jax.tree.leaves, (loaded, tiny_classifier.weights)), strict=True):
    assert leaf.dtype == np.float32
    np.testing.assert_allclose(leaf, exact, atol=2e-3)


def test_stages_are_for_all_platforms_and_name_no_folder_of_this_machine(exported):
  root = os.fsencode(Path(__file__).parents[2])
  for name in ('stage_1.jax', 'stage_2.jax'):
    content = (exported / name).read_bytes()
    assert jax.export.deserialize(bytearray(content)).platforms == ('cpu', 'cuda', 'tpu')
    assert b'.py' in content and root not in content


@pytest.mark.parametrize(
  ('name', 'fault'),
  [
    ('stage_1.jax', 'flipped'),
    ('weights.npz', 'flipped'),
    ('adaptive/engine/runner.py', 'flipped'),
    ('manifest.json', 'flipped'),
    ('manifest.json', 'truncated'),
    ('weights.npz', 'truncated'),
    ('stage_2.jax', 'missing'),
    ('manifest.json', 'missing'),
  ],
)
def test_a_corrupt_export_is_refused_by_name(exported, tmp_path, name, fault):
  shutil.copytree(exported, tmp_path, dirs_exist_ok=True)
  content = bytearray((tmp_path / name).read_bytes())
  if fault == 'flipped':
    content[len(content) // 2] ^= 1
  (tmp_path / name).write_bytes(content[: len(content) // 2] if fault == 'truncated' else content)
  if fault == 'missing':
    (tmp_path / name).unlink()
  with pytest.raises(ValueError, match=name):
    AdaptiveClassifier.load(tmp_path)


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'format': 99}, 'format 99, expected 3: export again'),
    ({'sha256': {'/etc/passwd': '0' * 64}}, "names a file outside of it, '/etc/passwd'"),
    ({'sha256': {'engine/../../x': '0' * 64}}, "names a file outside of it, 'engine/../../x'"),
  ],
)
def test_another_format_and_files_elsewhere_are_refused(exported, tmp_path, fields, message):
  manifest = json.loads((exported / 'manifest.json').read_text())
  del manifest['manifest_sha256']
  manifest |= fields
  manifest['manifest_sha256'] = manifest_checksum(manifest)
  (tmp_path / 'manifest.json').write_text(json.dumps(manifest))
  with pytest.raises(ValueError, match=message):
    AdaptiveClassifier.load(tmp_path)


def test_an_export_is_not_exported_again_nor_overwritten(classifier, exported, tmp_path):
  with pytest.raises(UsageError, match='is an export already'):
    export.main([str(exported), str(tmp_path / 'other')])
  assert not (tmp_path / 'other').exists()
  with pytest.raises(UsageError, match='not empty'):
    export.write_export(classifier, epath.Path(exported))


def test_the_command_line_chooses_phase_thresholds_and_form(tmp_path, monkeypatch):
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
