"""The guarantee is kept as often as stated, over many draws of validation images."""

import functools

import numpy as np
import pytest

from imta_jax.adaptive.guarantee import (
  LEVELS,
  CalibrationSet,
  guaranteed_thresholds,
  loses_less,
)


@functools.cache
def population():
  """Scores and correctness [exit, image] of a great many images; later exits are better."""
  random = np.random.default_rng(0)
  num_exits, num_images = 3, 50_000
  ease = random.uniform(-1.0, 4.0, num_images)
  logits = ease + np.array([[0.0], [0.4], [0.7]]) + random.standard_normal((num_exits, num_images))
  chance = 1 / (1 + np.exp(-logits))
  # The network is surer than it may be, as networks are.
  return chance ** (1 / 3), random.uniform(size=num_images) < chance


@functools.cache
def losses_at_levels():
  """The loss [level, image] of each image at each level, and its mean over the population."""
  scores, correct = population()
  images, losses = np.arange(scores.shape[1]), []
  for level in LEVELS.astype(np.float32):
    leaves = scores >= level
    leaves[-1] = True
    losses.append(1 * correct[-1] - correct[leaves.argmax(axis=0), images])
  return np.array(losses, np.int8), np.mean(losses, axis=1)


def loss_of(thresholds):
  level = np.flatnonzero(LEVELS.astype(np.float32) == thresholds[0])
  return losses_at_levels()[1][level[0]] if level.size else 0.0


@pytest.mark.parametrize(
  ('max_loss', 'confidence'),
  [
    (0.01, 0.8),
    pytest.param(0.03, 0.95, marks=pytest.mark.slow),
  ],
)
def test_guarantees_are_kept(max_loss, confidence):
  (scores, correct), (losses, expected) = population(), losses_at_levels()
  random, num_draws, num_images = np.random.default_rng(1), 300, 600
  broken = naively_broken = saved = 0
  for _ in range(num_draws):
    drawn = random.integers(scores.shape[1], size=num_images)
    validation = CalibrationSet(scores[:, drawn], correct[:, drawn])
    thresholds = guaranteed_thresholds(validation, max_loss, confidence)
    broken += loss_of(thresholds) > max_loss
    saved += np.isfinite(thresholds[0])
    # What one would do without a test: the loosest level that loses no more on these images.
    within = np.flatnonzero(losses[:, drawn].mean(axis=1) <= max_loss)
    naively_broken += expected[within[-1]] > max_loss
  # Three standard deviations of the share over so many draws.
  noise = 3 * np.sqrt(confidence * (1 - confidence) / num_draws)
  assert broken / num_draws <= 1 - confidence + noise
  assert naively_broken / num_draws > 1 - confidence + noise
  assert saved / num_draws > 0.9


@pytest.mark.parametrize('chances', [(0.01, 0.0), (0.11, 0.1), (0.5, 0.49)])
@pytest.mark.parametrize('confidence', [0.8, 0.95])
def test_a_loss_at_the_bound_is_rarely_taken_for_less(chances, confidence):
  random, num_draws = np.random.default_rng(2), 2000
  more, less = chances
  wrong = 0
  for _ in range(num_draws):
    losses = random.choice([1, -1, 0], size=800, p=[more, less, 1 - more - less])
    wrong += loses_less(np.bincount(losses + 1, minlength=3), 0.01, confidence)
  noise = 3 * np.sqrt(confidence * (1 - confidence) / num_draws)
  assert wrong / num_draws <= 1 - confidence + noise


def test_the_capital_is_that_of_the_formula():
  losses, max_loss = np.array([1, 0, 0, -1, 0, 0, 0, 0] * 30), 0.2
  stakes = np.array([0.05, 0.15, 0.35, 0.65, 0.95]) / 0.8
  capital = np.mean([np.prod(1 + stake * (max_loss - losses)) for stake in stakes])
  counts = np.bincount(losses + 1)
  assert loses_less(counts, max_loss, 1 - 1.001 / capital)
  assert not loses_less(counts, max_loss, 1 - 0.999 / capital)


def test_few_images_guarantee_nothing_and_lose_nothing():
  validation = CalibrationSet(np.ones((3, 50), np.float32), np.ones((3, 50), bool))
  np.testing.assert_array_equal(
    guaranteed_thresholds(validation, 0.01, 0.95), [np.inf, np.inf, -np.inf]
  )
  many = CalibrationSet(np.ones((3, 900), np.float32), np.ones((3, 900), bool))
  np.testing.assert_array_equal(guaranteed_thresholds(many, 0.01, 0.95), [0, 0, -np.inf])


def test_the_first_failure_ends_the_search():
  # From 0.9 on all images leave at the second exit, wrongly; from 0.5 on at the first, rightly.
  scores = np.repeat(np.float32([[0.5], [0.9], [0.0]]), 900, axis=1)
  correct = np.repeat([[True], [False], [True]], 900, axis=1)
  first, second, last = guaranteed_thresholds(CalibrationSet(scores, correct), 0.01, 0.95)
  assert 0.9 < first == second < 1 and last == -np.inf


@pytest.mark.parametrize('field', ['max_loss', 'confidence'])
@pytest.mark.parametrize('value', [0, 1, -0.1, 5, np.nan])
def test_what_is_no_fraction_is_refused(field, value):
  validation = CalibrationSet(np.ones((2, 4), np.float32), np.ones((2, 4), bool))
  with pytest.raises(ValueError, match=f'{field} is .*: it must be above 0 and below 1'):
    guaranteed_thresholds(validation, **{'max_loss': 0.01, 'confidence': 0.9, field: value})
