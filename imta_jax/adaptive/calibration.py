"""Temperatures that make probabilities honest."""

import numpy as np
import scipy.optimize
import scipy.special

_LARGEST = 20.0


def fit_temperatures(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
  """Fits a temperature per exit: the one with the lowest cross-entropy after scaling.

  Source: On Calibration of Modern Neural Networks (Guo et al., ICML 2017).

  Args:
    probabilities: [exit, image, class], of validation images.
    labels: [image].

  Returns:
    [exit], between 1/20 and 20; 1 changes nothing, and above 1 the network is less sure.
  """
  smallest = np.finfo(np.float32).tiny  # Probabilities can be 0, their logarithms cannot.
  return np.array([_fit(np.log(np.maximum(p, smallest)), labels) for p in probabilities])


def _fit(logits, labels):
  images = np.arange(len(labels))

  def cross_entropy(log_temperature):
    scaled = logits / np.exp(log_temperature)
    return (scipy.special.logsumexp(scaled, axis=-1) - scaled[images, labels]).mean()

  bound = np.log(_LARGEST)
  result = scipy.optimize.minimize_scalar(cross_entropy, bounds=(-bound, bound), method='bounded')
  return float(np.exp(result.x))
