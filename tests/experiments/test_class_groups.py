"""Groups of similar classes."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from etils import epath

from imta_jax import config as config_lib
from imta_jax import evaluate
from imta_jax.errors import UsageError
from imta_jax.training import workdir as layout

RANDOM = np.random.default_rng(0)
_SPEC = importlib.util.spec_from_file_location(
  'class_groups', Path(__file__).parents[2] / 'experiments/class_groups.py'
)
script = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(script)
class_groups = script.class_groups


def make_features(places):
  """Features of four images that lie around the place of each class, and their labels."""
  labels = RANDOM.permutation(np.repeat(np.arange(len(places)), 4))
  features = np.array(places, float)[labels] + RANDOM.normal(0, 0.01, (labels.size, 2))
  return features, labels


def members(groups):
  return {frozenset(np.flatnonzero(np.array(groups) == group)) for group in set(groups)}


def test_near_classes_share_a_group():
  """Also where a class is as far from one centre as a class of another group is."""
  angles = 2 * np.pi * np.array([0, 1, 2, 0, 1, 2]) / 3
  radii = np.array([9, 9, 9, 10, 10, 10])
  places = radii[:, np.newaxis] * np.stack([np.cos(angles), np.sin(angles)], axis=1)
  groups = class_groups(*make_features(places), 6, 3)
  assert members(groups) == {frozenset({0, 3}), frozenset({1, 4}), frozenset({2, 5})}
  assert sorted(set(groups)) == [0, 1, 2]


def test_a_class_lies_at_the_mean_of_its_images():
  """However many they are: their sums would divide the classes otherwise."""
  labels = np.repeat(np.arange(4), [10, 1, 1, 1])
  features = np.array([1.0, 9.0, 2.0, 10.0])[labels, np.newaxis]
  assert members(class_groups(features, labels, 4, 2)) == {frozenset({0, 2}), frozenset({1, 3})}


@pytest.mark.parametrize(('num_classes', 'num_groups'), [(100, 20), (10, 3), (7, 7), (5, 1)])
def test_groups_have_the_same_size(num_classes, num_groups):
  """Although most classes lie in one place."""
  places = RANDOM.normal(size=(num_classes, 2)) * (np.arange(num_classes) % 4 == 0)[:, np.newaxis]
  groups = class_groups(*make_features(places), num_classes, num_groups)
  sizes = np.bincount(groups)
  assert sizes.size == num_groups and sizes.sum() == num_classes
  assert sizes.max() - sizes.min() <= 1


def test_the_features_alone_decide():
  data = make_features(RANDOM.normal(size=(20, 2)))
  assert class_groups(*data, 20, 5) == class_groups(*data, 20, 5)


@pytest.mark.parametrize(
  ('labels', 'num_groups', 'message'),
  [
    ([0, 2, 3], 2, 'class 1 has no image: give features of every class'),
    ([0, 1, 2], 2, 'class 3 has no image'),
    ([0, 1, 2, 3], 5, 'num_groups 5 is out of range: it must be from 1 to 4'),
    ([0, 1, 2, 3], 0, 'num_groups 0 is out of range'),
  ],
)
def test_wrong_arguments_are_refused(labels, num_groups, message):
  with pytest.raises(UsageError, match=f'^{message}'):
    class_groups(np.zeros((len(labels), 2)), np.array(labels), 4, num_groups)


def test_the_script_prints_the_argument_for_a_finished_run(tmp_path, capsys):
  workdir = epath.Path(tmp_path)
  layout.claim(config_lib.default(), workdir, 'abcd')
  with pytest.raises(
    UsageError, match='phase_2_validation.npz cannot be read .*: run the training command'
  ):
    script.main([str(workdir)])
  labels = np.array([0, 1, 2, 3] * 3, np.int32)
  last = 9 * np.eye(4, dtype=np.float32)[[0, 1, 0, 1]][labels]
  first = 9 * np.eye(4, dtype=np.float32)[[0, 0, 1, 1]][labels]
  predictions = evaluate.Predictions(np.stack([first, last]), labels)
  evaluate.save_predictions(predictions, layout.predictions_path(workdir, 'phase_2', 'validation'))
  script.main([str(workdir), '--groups=2'])
  assert capsys.readouterr().out in (
    '--config.model.groups=0,1,0,1\n',
    '--config.model.groups=1,0,1,0\n',
  )
  with pytest.raises(UsageError, match='num_groups 5 is out of range: it must be from 1 to 4'):
    script.main([str(workdir), '--groups=5'])
