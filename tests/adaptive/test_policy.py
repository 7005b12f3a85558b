"""Budgeted batch classification: against the published code, and the policy's corners."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from imta_jax.adaptive.policy import (
  BUDGET_PARAMETERS,
  budget_sweep,
  choose_exits,
  exit_scores,
  find_thresholds,
  geometric_shares,
  optimal_sweep,
)


@pytest.fixture(scope='module')
def reference():
  path = Path(__file__).parents[1] / 'data' / 'budgeted_batch_5exit.npz'
  with np.load(path) as arrays:
    return dict(arrays)


def sweep_reference(reference, convert=np.asarray):
  names = ('val_probabilities', 'val_labels', 'test_probabilities', 'test_labels', 'madds')
  return budget_sweep(*(convert(reference[name]) for name in names))


def two_classes(*confidence):
  """Probabilities [exit, image, 2] of class 0, one row an exit."""
  confidence = np.array(confidence, np.float32)
  return np.stack([confidence, 1 - confidence], axis=-1)


def assert_is_reference(points, reference):
  assert len(points) == len(reference['rows']) == 40
  for point, row, thresholds in zip(
    points, reference['rows'], reference['thresholds'], strict=True
  ):
    parameter, validation_accuracy, validation_madds, test_accuracy, test_madds = row
    assert point.parameter == pytest.approx(parameter, rel=1e-12)
    assert 100 * point.validation_accuracy == pytest.approx(validation_accuracy, rel=1e-6)
    assert point.validation_madds == pytest.approx(validation_madds, rel=1e-6)
    assert 100 * point.test_accuracy == pytest.approx(test_accuracy, rel=1e-6)
    assert point.test_madds == pytest.approx(test_madds, rel=1e-6)
    finite = np.abs(thresholds) < 1e8
    expected = np.where(finite, thresholds, np.sign(thresholds) * np.inf)
    np.testing.assert_array_equal(np.array(point.thresholds, np.float32), expected)


def test_all_rows_and_thresholds_are_the_published_codes(reference):
  assert_is_reference(sweep_reference(reference), reference)


def test_jax_arrays_give_the_same(reference):
  assert_is_reference(sweep_reference(reference, jnp.asarray), reference)


def test_find_thresholds_gives_the_sweeps(reference):
  for index in (0, 19, 39):
    shares = geometric_shares(reference['rows'][index, 0], 5)
    thresholds = find_thresholds(jnp.asarray(reference['val_probabilities']), shares)
    expected = reference['thresholds'][index]
    expected = np.where(np.abs(expected) < 1e8, expected, np.sign(expected) * np.inf)
    np.testing.assert_array_equal(thresholds, expected)


def test_budget_parameters_are_the_papers():
  np.testing.assert_allclose(BUDGET_PARAMETERS, np.arange(5, 201, 5) / 100)


def test_exit_fractions_of_the_test_images_add_up_to_the_cost(reference):
  for point in sweep_reference(reference):
    assert sum(point.test_exit_fractions) == pytest.approx(1)
    assert np.dot(point.test_exit_fractions, reference['madds']) == pytest.approx(point.test_madds)


def test_given_parameters_are_kept_in_their_order(reference):
  arrays = [reference[name] for name in ('val_probabilities', 'val_labels')]
  points = budget_sweep(*arrays, *arrays, reference['madds'], parameters=(1.5, 0.5))
  assert [point.parameter for point in points] == [1.5, 0.5]
  assert points[0].test_madds > points[1].test_madds
  assert points[0].test_madds == points[0].validation_madds


@pytest.mark.parametrize(
  ('p', 'expected'),
  [(1.0, [1 / 3, 1 / 3, 1 / 3]), (0.5, [4 / 7, 2 / 7, 1 / 7]), (2.0, [1 / 7, 2 / 7, 4 / 7])],
)
def test_exit_fractions_are_geometric(p, expected):
  np.testing.assert_allclose(geometric_shares(p, 3), expected)


@pytest.mark.parametrize('p', [0, -1.0, float('nan'), float('inf')])
def test_a_parameter_that_is_not_above_zero_is_refused(p):
  with pytest.raises(ValueError, match=f'^budget parameter {p} is out of range'):
    geometric_shares(p, 3)


def test_thresholds_are_the_confidence_of_the_last_image_that_a_share_takes():
  probabilities = two_classes(
    [0.9, 0.6, 0.8, 0.7],
    [0.7, 0.9, 0.8, 0.95],
    [0.9, 0.9, 0.9, 0.9],
  )
  # Exit 1 takes two, images 0 and 2; exit 2 one of the others, the more confident image 3.
  thresholds = find_thresholds(probabilities, [0.5, 0.25, 0.25])
  np.testing.assert_array_equal(thresholds, np.array([0.8, 0.95, -np.inf], np.float32))
  exits = choose_exits(probabilities.max(axis=-1), thresholds)
  np.testing.assert_array_equal(exits, [0, 2, 0, 1])


def test_a_share_of_less_than_one_image_takes_none():
  probabilities = two_classes([0.9, 0.8, 0.7], [0.9, 0.8, 0.7], [0.9, 0.8, 0.7])
  thresholds = find_thresholds(probabilities, [0.3, 0.4, 0.3])
  np.testing.assert_array_equal(thresholds, np.array([np.inf, 0.9, -np.inf], np.float32))
  exits = choose_exits(probabilities.max(axis=-1), thresholds)
  np.testing.assert_array_equal(exits, [1, 2, 2])


def test_images_tied_at_a_threshold_leave_together():
  # One of four shall leave at exit 1, but three are as confident; exit 2 finds one, not two.
  probabilities = two_classes([0.9, 0.9, 0.9, 0.6], [0.6, 0.6, 0.6, 0.8], [0.7, 0.7, 0.7, 0.7])
  thresholds = find_thresholds(probabilities, [0.25, 0.5, 0.25])
  np.testing.assert_array_equal(thresholds, np.array([0.9, 0.8, -np.inf], np.float32))
  exits = choose_exits(probabilities.max(axis=-1), thresholds)
  np.testing.assert_array_equal(exits, [0, 0, 0, 1])


def test_an_image_at_a_threshold_leaves_and_one_just_below_goes_on():
  confidence = np.array([[0.7, 0.69999], [0.1, 0.1]], np.float32)
  np.testing.assert_array_equal(choose_exits(confidence, [0.7, 0.5]), [0, 1])


def test_the_last_exit_takes_all_whatever_its_threshold():
  confidence = np.array([[0.1, 0.2], [0.3, 0.4]])
  np.testing.assert_array_equal(choose_exits(confidence, [0.5, np.inf]), [1, 1])


def test_if_all_are_equally_sure_all_leave_at_the_first_exit():
  probabilities = two_classes([1.0] * 5, [1.0] * 5, [0.9] * 5)
  labels = np.array([0, 0, 0, 1, 1])
  (point,) = budget_sweep(
    probabilities, labels, probabilities, labels, [10, 20, 40], parameters=[1.0]
  )
  assert point.thresholds == (1.0, np.inf, -np.inf)
  assert point.test_exit_fractions == (1, 0, 0)
  assert point.test_madds == point.validation_madds == 10
  assert point.test_accuracy == pytest.approx(0.6)


def test_if_none_is_as_sure_as_in_validation_all_leave_at_the_last_exit():
  validation = two_classes(*[[0.9, 0.95, 0.99, 0.8]] * 3)
  test = two_classes([0.7] * 5, [0.75] * 5, [0.2] * 5)  # At the last exit, class 1.
  (point,) = budget_sweep(
    validation, np.zeros(4, int), test, np.array([0, 1, 1, 1, 1]), [10, 20, 40], parameters=[1.0]
  )
  assert point.test_exit_fractions == (0, 0, 1)
  assert point.test_madds == 40
  assert point.test_accuracy == pytest.approx(0.8)
  assert point.validation_accuracy == 1


def test_a_single_exit_takes_all():
  probabilities = two_classes([0.9, 0.4, 0.3])
  (point,) = budget_sweep(
    probabilities, [0, 0, 1], probabilities, [1, 1, 1], [7.0], parameters=[0.3]
  )
  assert point.thresholds == (-np.inf,)
  assert point.validation_accuracy == pytest.approx(2 / 3)
  assert point.test_accuracy == pytest.approx(2 / 3)
  assert point.test_madds == 7


def test_nan_is_never_confident():
  confidence = np.array([[np.nan, 0.9], [np.nan, 0.1], [np.nan, 0.1]])
  np.testing.assert_array_equal(choose_exits(confidence, [0.5, -np.inf, -np.inf]), [2, 0])
  probabilities = two_classes([np.nan, 0.9, 0.8], [0.7, 0.7, 0.7])
  # Two of three shall leave at exit 1: those that say something.
  thresholds = find_thresholds(probabilities, [0.7, 0.3])
  np.testing.assert_array_equal(thresholds, np.array([0.8, -np.inf], np.float32))
  (point,) = budget_sweep(
    probabilities, [0, 0, 0], probabilities, [0, 0, 0], [10, 20], parameters=[0.4]
  )
  assert point.test_exit_fractions == (pytest.approx(2 / 3), pytest.approx(1 / 3))


@pytest.mark.parametrize(
  ('changes', 'split'),
  [
    ({'validation_labels': np.zeros(4, int)}, 'validation'),
    ({'test_labels': np.zeros(6, int)}, 'test'),
    ({'madds': [1.0, 2.0, 3.0]}, 'validation'),
    ({'test_probabilities': np.full((3, 5, 2), 0.5)}, 'test'),
    ({'validation_probabilities': np.full((2, 5), 0.5)}, 'validation'),
  ],
)
def test_arrays_that_do_not_fit_are_refused(changes, split):
  arrays = {
    'validation_probabilities': np.full((2, 5, 2), 0.5),
    'validation_labels': np.zeros(5, int),
    'test_probabilities': np.full((2, 5, 2), 0.5),
    'test_labels': np.zeros(5, int),
    'madds': [1.0, 2.0],
  }
  assert budget_sweep(**arrays)
  with pytest.raises(ValueError, match=rf'^{split} probabilities of shape \(.* must be \[exit'):
    budget_sweep(**{**arrays, **changes})


def test_thresholds_are_one_for_each_exit():
  confidence = np.zeros((3, 4), np.float32)
  for thresholds in ([0.5], [0.5, 0.5], [[0.5, 0.5, 0.5]], 0.5):
    with pytest.raises(ValueError, match='must be .3., one for each exit'):
      choose_exits(confidence, thresholds)


def test_extreme_parameters_give_the_limits():
  np.testing.assert_allclose(geometric_shares(1e-300, 3), [1, 0, 0], atol=1e-9)
  np.testing.assert_allclose(geometric_shares(1e300, 3), [0, 0, 1], atol=1e-9)
  with pytest.raises(ValueError, match='0 exits cannot share images'):
    geometric_shares(1.0, 0)


PROBABILITIES = np.random.default_rng(0).dirichlet(np.ones(3), (2, 9))


@pytest.mark.parametrize('shares', [(0.5, -0.5), (np.nan, 0.5), (np.inf, 0), (0.5,), (1, 0, 0)])
def test_shares_that_are_none_are_refused(shares):
  with pytest.raises(ValueError, match='must be from 0 to 1, one for each of 2 exits'):
    find_thresholds(PROBABILITIES, shares)


@pytest.mark.parametrize('temperatures', [(1, 0), (1, -1), (1, np.nan), (1, np.inf), (1,), 1])
def test_temperatures_that_are_none_are_refused(temperatures):
  with pytest.raises(ValueError, match='must be above 0, one for each exit'):
    exit_scores(PROBABILITIES, 'calibrated', temperatures)


def test_temperatures_leave_the_precision_as_it_is():
  scores = exit_scores(PROBABILITIES.astype(np.float32), 'calibrated', np.array([0.5, 2.0]))
  assert scores.dtype == np.float32


@pytest.mark.parametrize('madds', [(1, np.nan), (1, np.inf), (0, 1), (-1, 1), (2, 1), ()])
def test_costs_that_are_none_are_refused(madds):
  labels = np.zeros(9, int)
  for sweep in (budget_sweep, optimal_sweep):
    with pytest.raises(ValueError, match='^madds .* must be '):
      sweep(PROBABILITIES, labels, PROBABILITIES, labels, madds, [1.0])


def test_no_images_are_refused():
  labels, none = np.zeros(9, int), np.zeros(0, int)
  with pytest.raises(ValueError, match='there are no test images'):
    budget_sweep(PROBABILITIES, labels, PROBABILITIES[:, :0], none, (1, 2))
