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

  Raises:
    ValueError: If probabilities are not finite, or labels are no classes of theirs.
  """
  probabilities, labels = np.asarray(probabilities), np.asarray(labels)
  if not np.isfinite(probabilities).all():
    raise ValueError('probabilities are not finite: temperatures cannot be fitted to them')
  num_classes = probabilities.shape[-1]
  if not labels.size or labels.min() < 0 or labels.max() >= num_classes:
    raise ValueError(f'labels must be from 0 to {num_classes - 1}, one for each image')
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
