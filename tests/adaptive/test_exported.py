"""Untrusted exports: whatever their bytes, they are refused in one line or give answers."""

import hashlib
import io
import json
import os
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from imta_jax.adaptive import exported
from imta_jax.adaptive.engine import AdaptiveClassifier, manifest_checksum

IMAGES = np.random.default_rng(0).integers(0, 256, (5, 2, 2, 1), np.uint8)


@pytest.fixture
def folder(tiny_export, tmp_path):
  return Path(shutil.copytree(tiny_export, tmp_path / 'exported'))


def change(folder, fields=None, files=None):
  """Changes fields and files of an export, with checksums that are right, as an attacker would."""
  for name, content in (files or {}).items():
    (folder / name).write_bytes(content)
  manifest = json.loads((folder / 'manifest.json').read_text())
  del manifest['manifest_sha256']
  for name in files or {}:
    manifest['sha256'][name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
  for name, value in (fields or {}).items():
    manifest[name] = value
    if value is ...:
      del manifest[name]
  manifest['manifest_sha256'] = manifest_checksum(manifest)
  (folder / 'manifest.json').write_text(json.dumps(manifest))


def refusal(folder):
  """Returns the line that refuses an export."""
  with pytest.raises(ValueError) as caught:
    AdaptiveClassifier.load(folder)
  message = str(caught.value)
  assert '\n' not in message and len(message) < 600
  return message


def npz(**arrays):
  content = io.BytesIO()
  np.savez(content, **arrays)
  return content.getvalue()


def weights_of(folder):
  with np.load(folder / 'weights.npz') as arrays:
    return dict(arrays)


def test_the_original_gives_answers(folder):
  answers = AdaptiveClassifier.load(folder).predict(IMAGES)
  assert set(answers.exits) == {0, 1}
  change(folder, {'class_names': []}, {'weights.npz': npz(**weights_of(folder))})
  changed = AdaptiveClassifier.load(folder)
  np.testing.assert_array_equal(changed.predict(IMAGES).probabilities, answers.probabilities)
  assert changed.class_names == ('0', '1', '2')


NUMBERS = ('weights_per_stage', 'madds', 'temperatures', 'thresholds')
WRONG = [None, {}, [{}], [None, 'x'], [float('nan')] * 2, [1e999, 1], [1]]


@pytest.mark.parametrize(
  ('field', 'value'),
  [
    *((field, ...) for field in exported._SCHEMA),
    *((field, value) for field in NUMBERS for value in WRONG),
    ('thresholds', [0.5, 10**400]),
    ('madds', [-1, 2]),
    ('madds', [True, 2]),
    ('temperatures', [0, 1]),
    ('weights_per_stage', [1, 3]),
    ('weights_per_stage', [1, 10**12]),
    ('weights_per_stage', [1, -1]),
    ('stages', []),
    ('stages', ['stage_1.jax']),
    ('stages', ['stage_2.jax', 'stage_1.jax']),
    ('stages', ['stage_1.jax', 'stage_3.jax']),
    ('weights', 'other.npz'),
    ('image_shape', [2, 2]),
    ('image_shape', [2, 2, 3]),
    ('image_shape', [2, 2, 0]),
    ('image_dtype', 'float32'),
    ('image_dtype', 'object'),
    ('image_dtype', 'nonsense'),
    ('preprocessing', []),
    ('class_names', 'abc'),
    ('class_names', ['a', 'b']),
    ('rule', 'hope'),
    ('rule', ['margin']),
    ('operating_points', None),
    ('operating_points', [3]),
    ('operating_points', [{'thresholds': [1, 2]}]),
    ('operating_points', [{'thresholds': [1], 'exit_fractions': [0, 1], 'accuracy': 1}]),
    ('operating_points', [{'thresholds': [1, 2], 'exit_fractions': [1], 'accuracy': 1}]),
    ('operating_points', [{'thresholds': [1, 2], 'exit_fractions': [0, 7], 'accuracy': 1}]),
    ('operating_points', [{'thresholds': [1, 2], 'exit_fractions': [0, 1], 'accuracy': None}]),
    ('sha256', []),
    ('sha256', {}),
    ('sha256', {'\0': 'x'}),
    ('format', 'x' * 10**6),
    ('format', ...),
  ],
)
def test_a_manifest_of_another_form_is_refused(folder, field, value):
  change(folder, {field: value})
  refusal(folder)


@pytest.mark.parametrize(
  'content',
  [
    b'',
    b'[]',
    b'{}',
    b'\xff\xfe',
    b'[' * 10**6,
  ],
  ids=lambda content: repr(content[:6]),
)
def test_a_manifest_that_is_none_is_refused(folder, content):
  (folder / 'manifest.json').write_bytes(content)
  assert 'manifest.json is corrupt: export again' in refusal(folder)


class Attack:
  """Unpickling it makes a folder."""

  def __init__(self, target):
    self.target = target

  def __reduce__(self):
    return os.mkdir, (self.target,)


@pytest.mark.parametrize('name', ['weights.npz', 'validation.npz'])
@pytest.mark.parametrize(
  'content',
  [b'', b'no archive', npz(), npz(other=np.zeros(3)), npz(**{'0/0': np.array(['a'])})],
  ids=range(5),
)
def test_corrupt_arrays_are_refused(folder, name, content):
  change(folder, files={name: content})
  assert name in refusal(folder)


def test_arrays_never_run_code(folder, tmp_path):
  target = tmp_path / 'executed'
  array = np.array(Attack(str(target)), object)
  content = io.BytesIO()
  np.savez(content, **{**weights_of(folder), '0/0': array})
  change(folder, files={'weights.npz': content.getvalue()})
  assert 'weights.npz' in refusal(folder)
  assert not target.exists()
  with np.load(folder / 'weights.npz', allow_pickle=True) as arrays:
    arrays['0/0']
  assert target.exists()  # The attack is one.


def test_validation_of_other_exits_is_refused(folder):
  scores, correct = np.ones((2, 9), np.float32), np.ones((2, 9), bool)
  for arrays in (
    {'scores': scores},
    {'scores': scores, 'correct': correct[:1]},
    {'scores': scores[:1], 'correct': correct[:1]},
    {'scores': scores[:, :0], 'correct': correct[:, :0]},
    {'scores': scores, 'correct': np.full((2, 9), np.nan)},
    {'scores': scores, 'correct': np.full((2, 9), 7)},
  ):
    change(folder, files={'validation.npz': npz(**arrays)})
    assert re.search('validation.npz (has no valid|does not have the) scores', refusal(folder))


def test_weights_of_other_shapes_are_refused(folder):
  weights = weights_of(folder)
  for wrong in (np.zeros((3, 4), np.float32), np.zeros((), np.float32)):
    change(folder, files={'weights.npz': npz(**{**weights, '1/1': wrong})})
    assert 'weights.npz does not have the weights of stage 2' in refusal(folder)


@pytest.mark.parametrize('content', [b'', b'x' * 99, bytes(10**6)], ids=range(3))
def test_programs_that_are_none_are_refused(folder, content):
  change(folder, files={'stage_2.jax': content})
  assert 'stage_2.jax is not a program: export again' in refusal(folder)


def test_programs_that_call_functions_of_this_process_are_refused(folder):
  def second(weights, carry):
    logits = carry[1] + weights[0] + weights[1][:1].sum()
    calls = jax.ffi.ffi_call('xla_ffi_python_cpu_callback', logits, has_side_effect=True)
    return (), calls(index=np.uint64(0))

  shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((3,), (4, 3))]
  (batch,) = export.symbolic_shape('batch')
  carry = tuple(jax.ShapeDtypeStruct((batch, width), jnp.float32) for width in (4, 3))
  checks = [export.DisabledSafetyCheck.custom_call('xla_ffi_python_cpu_callback')]
  program = export.export(jax.jit(second), disabled_checks=checks)(shapes, carry)
  change(folder, files={'stage_2.jax': bytes(program.serialize())})
  assert "calls foreign functions in 'stage_2.jax': do not use this export" in refusal(folder)


def test_programs_of_another_platform_are_refused(folder):
  shapes = [jax.ShapeDtypeStruct((4, 3), jnp.float32)]
  images = jax.ShapeDtypeStruct(IMAGES.shape, np.uint8)

  def first(weights, images):
    features = images.reshape(5, 4) / 255
    return features, features @ weights[0]

  program = export.export(jax.jit(first), platforms=['tpu'])(shapes, images)
  change(folder, files={'stage_1.jax': bytes(program.serialize())})
  assert 'stage_1.jax is not a program for cpu' in refusal(folder)


def test_links_must_stay_inside(folder, tmp_path):
  expected = AdaptiveClassifier.load(folder).predict(IMAGES).labels
  (folder / 'weights.npz').rename(folder / 'content')
  (folder / 'weights.npz').symlink_to('content')
  np.testing.assert_array_equal(AdaptiveClassifier.load(folder).predict(IMAGES).labels, expected)
  (folder / 'content').rename(tmp_path / 'content')
  (folder / 'weights.npz').unlink()
  (folder / 'weights.npz').symlink_to('../content')
  assert "names a file outside of it, 'weights.npz'" in refusal(folder)
  (folder / 'weights.npz').unlink()
  (folder / 'weights.npz').symlink_to('weights.npz')  # A circle.
  refusal(folder)
  (tmp_path / 'link').symlink_to(folder)
  (folder / 'weights.npz').unlink()
  (tmp_path / 'content').rename(folder / 'weights.npz')
  AdaptiveClassifier.load(tmp_path / 'link')  # The folder itself may be a link.
