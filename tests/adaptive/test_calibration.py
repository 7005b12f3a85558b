"""Temperatures are found again."""

import numpy as np
import pytest
import scipy.special

from imta_jax.adaptive.calibration import fit_temperatures


def test_a_known_temperature_is_found_at_each_exit():
  random = np.random.default_rng(0)
  logits = 1.5 * random.standard_normal((4000, 10))
  honest = scipy.special.softmax(logits, axis=-1)
  labels = np.array([random.choice(10, p=p) for p in honest])
  temperatures = np.array([0.5, 1.0, 2.5])
  unsure = scipy.special.softmax(logits * temperatures[:, np.newaxis, np.newaxis], axis=-1)
  np.testing.assert_allclose(fit_temperatures(unsure, labels), temperatures, rtol=0.06)


def test_probabilities_of_zero_have_a_temperature():
  probabilities = np.array([[[1, 0, 0], [0, 1, 0], [1, 0, 0]]], np.float32)
  assert 1 < fit_temperatures(probabilities, np.array([0, 1, 2]))[0] <= 20


@pytest.mark.parametrize('label', [-1, 3])
def test_labels_that_are_no_classes_are_refused(label):
  with pytest.raises(ValueError, match='labels must be from 0 to 2'):
    fit_temperatures(np.full((1, 2, 3), 1 / 3), np.array([0, label]))


def test_probabilities_that_are_none_are_refused():
  with pytest.raises(ValueError, match='not finite'):
    fit_temperatures(np.full((1, 2, 3), np.nan), np.array([0, 1]))
