"""Thresholds compared: against the policy, and the committed comparisons against their claims."""

import argparse
import csv
from pathlib import Path

import numpy as np
import pytest
import thresholds

from imta_jax.adaptive import policy
from imta_jax.adaptive.engine import RULES
from imta_jax.evaluate import Predictions

RESULTS = Path(__file__).parents[2] / 'experiments/results'
MADDS = np.array([1e6, 2e6, 4e6])


@pytest.fixture(scope='module')
def splits():
  random, predictions = np.random.default_rng(0), {}
  for split, count in (('validation', 900), ('test', 700)):
    labels = random.integers(0, 5, count)
    logits = 2 * random.standard_normal((3, count, 5))
    ease = random.uniform(0, 6, count)
    for exit in range(3):
      logits[exit, np.arange(count), labels] += (1 + 0.3 * exit) * ease
    predictions[split] = Predictions(logits.astype(np.float32), labels)
  return predictions


def test_budgets_are_those_of_the_geometric_shares(splits):
  records = thresholds.compare_sweeps(splits, MADDS)
  arrays = [x for split in splits.values() for x in (split.probabilities(), split.labels)]
  points = policy.budget_sweep(*arrays, MADDS)
  assert [record['budget'] for record in records] == [round(p.validation_madds) for p in points]
  for record in records:
    assert record['optimal_validation'] >= record['geometric_validation']
    gain = record['optimal_test'] - record['geometric_test']
    assert record['gain_on_test'] == pytest.approx(gain, abs=2e-4)
    assert record['margin'] >= 0


def test_the_margin_is_that_of_differences_image_by_image(splits):
  test = splits['test']
  images = policy.scores_and_correctness('test', test.probabilities(), test.labels, 3)
  scores, correct = images.scores, images.correct
  points = policy.budget_sweep(
    *(x for split in splits.values() for x in (split.probabilities(), split.labels)), MADDS
  )
  one = correct[policy.choose_exits(scores, points[20].thresholds), np.arange(700)]
  record = thresholds.compare_sweeps(splits, MADDS)[20]
  # At most as large as for two independent samples, and not zero, for some images change.
  independent = 100 * 1.96 * np.sqrt(2 * one.mean() * (1 - one.mean()) / 700)
  assert 0 < record['margin'] < independent


def test_each_rule_and_guarantee_has_a_row(splits):
  rules = thresholds.compare_rules(splits, MADDS)
  assert [record['rule'] for record in rules] == list(RULES)
  guarantees = thresholds.compare_guarantees(splits, MADDS)
  assert len(guarantees) == 6
  for record in guarantees:
    assert record['loss_on_test'] <= 100 * 0.02 + 3 * record['margin']


def test_the_page_says_what_the_records_say(splits, tmp_path):
  records = thresholds.compare_sweeps(splits, MADDS)
  options = argparse.Namespace(workdir='runs/a', output='b')
  page = thresholds.page(
    records,
    thresholds.compare_rules(splits, MADDS),
    thresholds.compare_guarantees(splits, MADDS),
    'digits',
    splits,
    options,
  )
  gain = np.mean([record['gain_on_test'] for record in records])
  assert f'{gain:+.2f} points on test images' in page
  assert 'Chosen on 900 validation images, measured on 700 test images' in page
  thresholds.draw(records, 'digits', tmp_path / 'figure.png')
  assert (tmp_path / 'figure.png').stat().st_size > 10_000


@pytest.mark.parametrize('name', ['mnist5k', 'cifar100'])
def test_committed_thresholds_are_never_worse_on_validation_images(name):
  with (RESULTS / name / 'thresholds/sweeps.csv').open() as file:
    rows = list(csv.DictReader(file))
  assert len(rows) == 40
  assert all(float(r['optimal_validation']) >= float(r['geometric_validation']) for r in rows)
  guide = (RESULTS.parents[1] / 'docs/thresholds.md').read_text(encoding='utf-8')
  gains = [float(r['optimal_validation']) - float(r['geometric_validation']) for r in rows]
  on_test = np.mean([float(r['gain_on_test']) for r in rows])
  assert f'| {np.mean(gains):.2f} points | {on_test:+.2f} points |' in guide
