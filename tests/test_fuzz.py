"""Random input: each gives an error of ours, in one line, or the right answer, and nothing else."""

import hashlib
import json
import math
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict

from imta_jax import config as config_lib
from imta_jax import models
from imta_jax.adaptive.engine import RULES, AdaptiveClassifier, manifest_checksum
from imta_jax.adaptive.policy import (
  budget_sweep,
  choose_exits,
  exit_scores,
  optimal_sweep,
)
from imta_jax.errors import UsageError
from imta_jax.training import train_state
from imta_jax.training.workdir import differences

# The same examples at every run.
FIXED = {
  'derandomize': True,
  'deadline': None,
  'database': None,
  'suppress_health_check': list(HealthCheck),
}
fuzz = settings(max_examples=50, **FIXED)
export_fuzz = settings(max_examples=20, **FIXED)

# ConfigDict takes no dots in names.
NAMES = st.text(st.characters(exclude_characters='.', exclude_categories=['Cs']), max_size=5)
VALUES = st.recursive(
  st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
  lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=2),
  max_leaves=4,
)
# Values that are near to valid ones find more than those that are refused at once.
NUMBERS = (
  st.integers(-2, 9) | st.floats(-1, 2) | st.sampled_from([2**31, 2**64 - 1, 10**400, 1e308])
)


def check_line(error):
  assert '\n' not in str(error) and str(error)


def leaves(tree, path=()):
  """The paths of all groups and values in plain dictionaries and lists."""
  if path:
    yield path
  if isinstance(tree, dict | list):
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for key, value in items:
      yield from leaves(value, (*path, key))


def replace(tree, path, value):
  """Replaces a value in plain dictionaries and lists, in place, if it is still there."""
  *parents, last = path
  for key in parents:
    if not isinstance(tree, dict | list) or (isinstance(tree, list) and key >= len(tree)):
      return
    tree = tree[key] if isinstance(tree, list) else tree.get(key)
  if isinstance(tree, dict) or (isinstance(tree, list) and last < len(tree)):
    tree[last] = value


def build(plain):
  """A config of plain values, whatever they are."""
  phases = plain.get('phases')
  if isinstance(phases, list):
    phases = [ConfigDict(phase) if isinstance(phase, dict) else phase for phase in phases]
  return ConfigDict({**plain, 'phases': phases})


# Without the sizes of the network, for which MODEL_FIELDS below are given small numbers.
CONFIG_PATHS = sorted(
  (
    path
    for path in leaves(config_lib.to_dict(config_lib.default()))
    if path[0] != 'model' or path[1:] in ((), ('name',), ('dtype',))
  ),
  key=str,
)


@fuzz
@given(st.lists(st.tuples(st.sampled_from(CONFIG_PATHS), NUMBERS | VALUES), min_size=1, max_size=3))
@example([(('phases', 0, 'milestones'), [5, -1])])
@example([(('phases', 0, 'epochs'), math.inf)])
@example([(('seed',), 2**64 - 1)])
def test_a_config_is_refused_or_can_be_set_up(changes):
  plain = config_lib.to_dict(config_lib.default())
  for path, value in changes:
    replace(plain, path, value)
  config = build(plain)
  try:
    config_lib.validate(config)
    for phase in config.phases:
      config_lib.create_model(config, phase, 10)
  except UsageError as error:
    check_line(error)
    return
  again = config_lib.from_json(json.dumps(config_lib.to_dict(config)))
  config_lib.validate(again)
  assert differences(config_lib.to_dict(config), config_lib.to_dict(again)) == []
  for phase in config.phases:
    num_steps = phase.steps or max(1, round(phase.epochs))
    schedule = train_state.create_schedule(phase, num_steps, 1, config.batch_size)
    train_state.create_optimizer(phase, schedule).init({'kernel': np.zeros(3, np.float32)})
    assert np.isfinite(schedule(0)) and schedule(0) >= 0
  jax.random.key(config.seed)


MODEL_FIELDS = (
  'num_exits',
  'step_mode',
  'base',
  'step',
  'channels',
  'growth_rate',
  'scale_factors',
  'bottleneck_factors',
  'bottleneck',
  'prune',
  'reduction',
  'stem',
  'dtype',
  'remat',
  'num_classes',
  'name',
)


@fuzz
@given(
  st.sampled_from(sorted(models.ARCHITECTURES)),
  st.dictionaries(
    st.sampled_from(MODEL_FIELDS),
    st.integers(-2, 4)
    | st.lists(st.integers(-2, 4), max_size=4)
    | st.booleans()
    | st.none()
    | st.text(max_size=5)
    | st.floats(-1, 4),
    min_size=1,
    max_size=2,
  ),
)
def test_fields_of_a_model_are_refused_or_make_a_network(name, fields):
  config = config_lib.default()
  config.model = ConfigDict({'name': name, **fields})
  try:
    config_lib.validate(config)
    model = config_lib.create_model(config, config.phases[0], 10)
  except UsageError as error:
    check_line(error)
  else:
    assert model.num_exits >= 1 and model.num_classes == 10


@fuzz
@given(
  st.text(max_size=12)
  | st.lists(
    st.sampled_from(['exits', 'rate', 'name', '=', ',', '5', '-', '.', 'e', '²', ' ', 'nan'])
  ).map(''.join)
)
def test_a_config_argument_is_refused_or_has_its_types(text):
  try:
    values = config_lib.parse_argument(text, exits=7, rate=0.5, name='x')
  except UsageError as error:
    check_line(error)
  else:
    assert [type(values[key]) for key in ('exits', 'rate', 'name')] == [int, float, str]


IMAGES = np.random.default_rng(0).integers(0, 256, (5, 2, 2, 1), np.uint8)
ALL_STAGES = (np.inf, np.inf)


@pytest.fixture(scope='module')
def expected(tiny_export):
  return AdaptiveClassifier.load(tiny_export).predict(IMAGES, ALL_STAGES).probabilities


def check_export(folder, expected):
  try:
    classifier = AdaptiveClassifier.load(folder)
  except ValueError as error:
    check_line(error)
    return
  assert len(classifier.class_names) == 3
  for budget in (1e-9, 18):
    try:
      thresholds = classifier.thresholds_within(budget, classifier.madds)
      assert thresholds.shape == (2,)
    except ValueError as error:
      check_line(error)
  probabilities = classifier.predict(IMAGES, ALL_STAGES).probabilities
  # Costs decide which images are computed together, and with that the order of sums.
  np.testing.assert_allclose(probabilities, expected, rtol=1e-5)


@export_fuzz
@given(data=st.data())
def test_a_manifest_is_refused_or_gives_the_same_answers(tiny_export, expected, tmp_path, data):
  folder = shutil.copytree(tiny_export, tmp_path / 'exported', dirs_exist_ok=True)
  manifest = json.loads((folder / 'manifest.json').read_text())
  del manifest['manifest_sha256']
  for path in data.draw(
    st.lists(st.sampled_from(sorted(leaves(manifest), key=str)), min_size=1, max_size=2)
  ):
    replace(manifest, path, data.draw(NUMBERS | VALUES))
  manifest['manifest_sha256'] = manifest_checksum(manifest)
  (folder / 'manifest.json').write_text(json.dumps(manifest))
  check_export(folder, expected)


@export_fuzz
@given(
  st.sampled_from(['manifest.json', 'weights.npz', 'validation.npz', 'stage_1.jax']),
  st.floats(0, 1, exclude_max=True),
  st.integers(1, 255) | st.none(),
)
def test_bytes_of_an_export_are_refused_or_give_the_same_answers(
  tiny_export, expected, tmp_path_factory, name, place, flip
):
  folder = tmp_path_factory.mktemp('corrupt')
  folder = Path(shutil.copytree(tiny_export, folder, dirs_exist_ok=True))
  content = bytearray((folder / name).read_bytes())
  at = int(place * len(content))
  if flip is None:
    del content[at:]
  else:
    content[at] ^= flip
  (folder / name).write_bytes(content)
  if name.endswith('.npz'):  # With checksums that are right; archives have their own.
    manifest = json.loads((folder / 'manifest.json').read_text())
    del manifest['manifest_sha256']
    manifest['sha256'][name] = hashlib.sha256(content).hexdigest()
    manifest['manifest_sha256'] = manifest_checksum(manifest)
    (folder / 'manifest.json').write_text(json.dumps(manifest))
  check_export(folder, expected)


@st.composite
def networks_outputs(draw, max_images=9):
  """Probabilities [exit, image, class] with ties and zeros, and labels."""
  shape = draw(st.integers(1, 4)), draw(st.integers(1, max_images)), draw(st.integers(2, 4))
  random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
  weights = random.integers(0, draw(st.sampled_from([2, 4, 1000])), shape) + 1e-30
  probabilities = (weights / weights.sum(axis=-1, keepdims=True)).astype(np.float32)
  return probabilities, random.integers(shape[2], size=shape[1])


THRESHOLDS = st.floats(0, 1, width=32) | st.sampled_from([-np.inf, np.inf, np.nan])


@fuzz
@given(networks_outputs(), st.sampled_from(sorted(RULES)), st.data())
def test_exit_rules_decide_image_by_image(outputs, rule, data):
  probabilities, _ = outputs
  temperatures = [data.draw(st.floats(0.05, 20)) for _ in probabilities]
  scores = exit_scores(probabilities, rule, temperatures)
  thresholds = [data.draw(THRESHOLDS) for _ in probabilities]
  exits = choose_exits(scores, thresholds)
  for image in range(len(exits)):
    alone = exit_scores(probabilities[:, image : image + 1], rule, temperatures)[:, 0]
    np.testing.assert_allclose(scores[:, image], alone, rtol=1e-5, atol=1e-6)
    leaves_at = [k for k, t in enumerate(thresholds) if scores[k, image] >= np.float32(t)]
    assert exits[image] == min([*leaves_at, len(thresholds) - 1])
  assert (scores <= 1 + 1e-5).all()


def operate(probabilities, labels, thresholds, madds):
  """Accuracy, cost and exit fractions, image by image."""
  fractions, right = np.zeros(len(madds)), 0
  for image, label in enumerate(labels):
    for index, threshold in enumerate(thresholds):
      p = probabilities[index, image]
      if p.max() >= np.float32(threshold) or index == len(madds) - 1:
        fractions[index] += 1 / len(labels)
        right += p.argmax() == label
        break
  return right / len(labels), fractions @ madds, fractions


@fuzz
@given(
  networks_outputs(max_images=6), st.lists(st.floats(1, 100), min_size=1, max_size=4), st.data()
)
def test_chosen_thresholds_keep_the_budget_and_gain_with_it(outputs, budgets, data):
  probabilities, labels = outputs
  madds = 1 + np.cumsum([data.draw(st.integers(0, 30)) for _ in probabilities])
  budgets = sorted(madds[0] + budget for budget in budgets)
  both = (probabilities, labels, probabilities, labels)
  points = optimal_sweep(*both, madds, budgets)
  for point, budget in zip(points, budgets, strict=True):
    accuracy, cost, fractions = operate(probabilities, labels, point.thresholds, madds)
    assert cost <= budget * (1 + 1e-12)
    assert math.isclose(point.validation_accuracy, accuracy, abs_tol=1e-9)
    assert math.isclose(point.validation_madds, cost, rel_tol=1e-9)
    np.testing.assert_allclose(point.validation_exit_fractions, fractions, atol=1e-9)
    assert math.isclose(sum(point.test_exit_fractions), 1)
  accuracies = [point.validation_accuracy for point in points]
  assert accuracies == sorted(accuracies)
  if len(madds) == 2:  # One threshold: the best one can be found by trying all.
    tried = [
      operate(probabilities, labels, (threshold, -np.inf), madds)
      for threshold in (*probabilities[0].max(axis=-1), np.inf)
    ]
    best = max(accuracy for accuracy, cost, _ in tried if cost <= budgets[0])
    assert math.isclose(accuracies[0], best)
  for point in budget_sweep(*both, madds, (0.1, 1.0, 3.0)):
    accuracy, cost, _ = operate(probabilities, labels, point.thresholds, madds)
    assert math.isclose(point.test_accuracy, accuracy, abs_tol=1e-9)
    assert math.isclose(point.test_madds, cost, rel_tol=1e-9)
