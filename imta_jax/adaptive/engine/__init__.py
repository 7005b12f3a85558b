"""Inference that runs only the stages that an image needs.

    from imta_jax.adaptive.engine import AdaptiveClassifier
    classifier = AdaptiveClassifier.load('exported', budget=20e6)
    answers = classifier.predict(images)

`classifier` is the interface for users. `runner` runs stages, compiled as `programs`, on `batches`
of images, in the sizes that `plan` chooses. Except for `from_workdir`, `from_model` and `save`, all
of it needs only JAX, NumPy and flatbuffers: an export carries a copy (`adaptive.exported.SOURCES`),
and so runs where imta_jax is not installed.
"""

from ..exported import FORMAT, MANIFEST, VALIDATION, manifest_checksum
from ..guarantee import CalibrationSet
from ..rules import DEFAULT_RULE, RULES
from .batches import Predictions
from .classifier import AdaptiveClassifier, OperatingPoint
from .programs import BATCH_SIZES

__all__ = [
  'BATCH_SIZES',
  'DEFAULT_RULE',
  'FORMAT',
  'MANIFEST',
  'RULES',
  'VALIDATION',
  'AdaptiveClassifier',
  'Predictions',
  'OperatingPoint',
  'CalibrationSet',
  'manifest_checksum',
]
