"""The network that is exported."""

import sys
from pathlib import Path

import numpy as np
import pytest

from imta_jax.adaptive.engine import AdaptiveClassifier, OperatingPoint

sys.path.insert(0, str(Path(__file__).parents[2] / 'experiments'))

SHAPE = (16, 16, 3)


@pytest.fixture(scope='session')
def images():
  return np.random.default_rng(0).integers(0, 256, (7, *SHAPE), dtype=np.uint8)


@pytest.fixture(scope='session')
def make_classifier(tiny_msdnet, random_variables, images):
  """A function that makes a classifier of two exits, at each of which some images leave."""

  def make(collaboration):
    model = tiny_msdnet(num_classes=5, collaboration=collaboration)
    classifier = AdaptiveClassifier.from_model(
      model,
      random_variables(model, SHAPE),
      (0.0, -np.inf),
      SHAPE,
      mean=(0.5, 0.4, 0.3),
      std=(0.2, 0.3, 0.2),
      operating_points=[OperatingPoint((0.9, np.inf), (0.5, 0.5), 0.7)],
      madds=(10, 20),
      class_names=list('abcde'),
      preprocessing={'crop': 'none'},
    )
    # Between two confidences of the first exit, so that rounding sends no image elsewhere.
    between = np.sort(classifier.predict(images).confidences)[3:5].mean()
    classifier.thresholds = np.array([between, -np.inf], np.float32)
    return classifier

  return make


@pytest.fixture(scope='session')
def classifier(make_classifier):
  return make_classifier('network')
