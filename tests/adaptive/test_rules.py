"""Exit rules against their formulas, image by image."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from imta_jax.adaptive.rules import DEFAULT_RULE, RULES


def probabilities(seed, num_images=40, num_classes=6):
  logits = 2 * np.random.default_rng(seed).standard_normal((num_images, num_classes))
  odds = np.exp(logits)
  return (odds / odds.sum(axis=-1, keepdims=True)).astype(np.float32)


FORMULAS = {
  'top_probability': lambda p, q, t: max(p),
  'margin': lambda p, q, t: sorted(p)[-1] - sorted(p)[-2],
  'entropy': lambda p, q, t: 1 - sum(-x * math.log(x) for x in p if x > 0) / math.log(len(p)),
  'agreement': lambda p, q, t: sum(x * y for x, y in zip(p, q, strict=True)),
  'calibrated': lambda p, q, t: max(x ** (1 / t) for x in p) / sum(x ** (1 / t) for x in p),
}


@pytest.mark.parametrize('rule', RULES)
@pytest.mark.parametrize('library', [np, jnp])
def test_scores_follow_the_formula(rule, library):
  p, q = probabilities(0), probabilities(1)
  p[0], q[0] = np.eye(6)[2], np.eye(6)[2]  # The network is entirely sure.
  p[1] = 1 / 6  # It knows nothing.
  p[2] = [0.4, 0.4, 0.2, 0, 0, 0]
  scores = RULES[rule](library.asarray(p), library.asarray(q), 1.7)
  expected = [FORMULAS[rule](p, q, 1.7) for p, q in zip(p.tolist(), q.tolist(), strict=True)]
  assert scores.dtype == np.float32
  np.testing.assert_allclose(scores, expected, rtol=2e-5, atol=1e-6)
  assert np.asarray(scores).max() <= 1 + 1e-6
  np.testing.assert_allclose(scores[0], 1, rtol=1e-6)


@pytest.mark.parametrize('rule', RULES)
def test_an_image_that_is_no_number_has_no_score(rule):
  p = probabilities(0)
  p[3] = np.nan
  scores = RULES[rule](p, p, 1.5)
  np.testing.assert_array_equal(np.isnan(scores), np.arange(len(p)) == 3)


def test_the_paper_uses_the_highest_probability():
  assert DEFAULT_RULE == 'top_probability' and set(RULES) == set(FORMULAS)
