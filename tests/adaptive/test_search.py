"""The search for thresholds: against all thresholds there are, and what it promises."""

import itertools

import numpy as np
import pytest

from imta_jax.adaptive.policy import BUDGET_PARAMETERS, budget_sweep, choose_exits, optimal_sweep
from imta_jax.adaptive.search import Search


def draw(seed, num_exits, num_images, num_classes=5):
  """Probabilities [exit, image, class] and labels of a network whose later exits are better."""
  random = np.random.default_rng(seed)
  labels = random.integers(0, num_classes, num_images)
  logits = random.standard_normal((num_exits, num_images, num_classes))
  ease = random.uniform(0, 2, num_images)
  for exit in range(num_exits):
    logits[exit, np.arange(num_images), labels] += (1 + 0.5 * exit) * ease
  exponentials = np.exp(logits)
  return (exponentials / exponentials.sum(-1, keepdims=True)).astype(np.float32), labels


def scores_and_correctness(probabilities, labels):
  return probabilities.max(-1), probabilities.argmax(-1) == labels


def brute_force(confidence, correct, madds, budget):
  """The highest accuracy of all thresholds within the budget."""
  images, best = np.arange(confidence.shape[1]), 0.0
  candidates = [(*values, np.inf) for values in confidence[:-1]]
  for thresholds in itertools.product(*candidates):
    exits = choose_exits(confidence, (*thresholds, -np.inf))
    if np.asarray(madds)[exits].mean() <= budget:
      best = max(best, correct[exits, images].mean())
  return best


def new_search(confidence, correct, madds):
  search = Search(confidence, correct, madds)
  for extreme in (-np.inf, np.inf):
    search.add(np.full(len(madds), extreme))
  search.explore()
  return search


@pytest.mark.parametrize('seed', range(5))
def test_one_threshold_is_the_best_there_is(seed):
  confidence, correct = scores_and_correctness(*draw(seed, 2, 40))
  madds = (1.0, 3.0)
  search = new_search(confidence, correct, madds)
  for budget in (1.0, 1.5, 2.0, 2.7, 3.0):
    exits = choose_exits(confidence, search.optimize(budget))
    assert np.asarray(madds)[exits].mean() <= budget
    accuracy = correct[exits, np.arange(40)].mean()
    assert accuracy == brute_force(confidence, correct, madds, budget)


def test_several_thresholds_are_nearly_the_best_there_are():
  reached, madds = [], (1.0, 2.0, 4.0)
  for seed in range(8):
    confidence, correct = scores_and_correctness(*draw(seed, 3, 20))
    search = new_search(confidence, correct, madds)
    for budget in (1.4, 2.0, 3.0):
      exits = choose_exits(confidence, search.optimize(budget))
      best = brute_force(confidence, correct, madds, budget)
      accuracy = correct[exits, np.arange(20)].mean()
      assert np.asarray(madds)[exits].mean() <= budget
      assert best - 0.1 < accuracy <= best
      reached.append(accuracy == best)
  assert np.mean(reached) > 0.7


def test_the_sweep_is_never_below_the_geometric_one_and_grows_with_the_budget():
  validation, test = draw(0, 4, 2_000), draw(1, 4, 2_000)
  madds = (1.0, 2.0, 4.0, 7.0)
  geometric = budget_sweep(*validation, *test, madds)
  budgets = sorted([*(point.validation_madds for point in geometric), 1.0, 7.0])
  points = optimal_sweep(*validation, *test, madds, budgets)
  assert [point.parameter for point in points] == budgets
  for point in points:
    affordable = [g for g in geometric if g.validation_madds <= point.parameter]
    assert point.validation_madds <= point.parameter
    assert point.validation_accuracy >= max((g.validation_accuracy for g in affordable), default=0)
  accuracies = [point.validation_accuracy for point in points]
  assert accuracies == sorted(accuracies)
  # It gains on the images that it has seen, and does not lose on others.
  assert len(geometric) == len(BUDGET_PARAMETERS)
  pairs = [(points[budgets.index(g.validation_madds)], g) for g in geometric]
  assert np.mean([p.validation_accuracy - g.validation_accuracy for p, g in pairs]) > 0.002
  assert np.mean([p.test_accuracy - g.test_accuracy for p, g in pairs]) > -0.002


def test_images_of_the_same_confidence_leave_together():
  confidence = np.array([[0.9, 0.5, 0.5, 0.5], [1.0, 1.0, 1.0, 1.0]], np.float32)
  correct = np.array([[True, True, False, False], [True, True, True, True]])
  search = new_search(confidence, correct, (1.0, 2.0))
  # Letting one of the three images with 0.5 leave would afford the others.
  assert search.optimize(1.75)[0] == np.float32(0.9)
  assert search.optimize(1.25)[0] == -np.inf


def test_images_with_invalid_confidence_do_not_leave_early():
  confidence = np.array([[np.nan, 0.8], [0.7, 0.9]], np.float32)
  correct = np.array([[False, True], [True, True]])
  search = new_search(confidence, correct, (1.0, 2.0))
  thresholds = search.optimize(1.5)
  np.testing.assert_array_equal(choose_exits(confidence, thresholds), [1, 0])


def test_a_budget_below_the_first_exit_is_refused():
  network = draw(0, 3, 50)
  with pytest.raises(
    ValueError, match='budget 99 is below the 100 multiply-adds of the first exit'
  ):
    optimal_sweep(*network, *network, (100, 200, 300), [150, 99])
