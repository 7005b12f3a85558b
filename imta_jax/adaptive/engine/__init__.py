"""Inference that runs only the stages that an image needs.

Except for `from_workdir` and `from_model`, these files need only JAX and NumPy: an export carries a
copy of them and so runs where imta_jax is not installed.

    from engine import AdaptiveClassifier  # In an export; else from imta_jax.adaptive.engine.
    classifier = AdaptiveClassifier.load('exported', budget=20e6)
    answers = classifier.predict(images)

`classifier` is the interface for users. `rules` define which images leave, and `guarantee` chooses
thresholds that lose little accuracy. `runner` runs stages, compiled as `programs`, on `batches`
of images, in the sizes that `plan` chooses. `exported` reads an export, whose
files are `untrusted`.
"""

from .batches import Answers
from .classifier import AdaptiveClassifier, OperatingPoint
from .exported import FORMAT, MANIFEST, VALIDATION, manifest_checksum
from .guarantee import CalibrationSet
from .rules import DEFAULT_RULE, RULES
from .runner import BATCH_SIZES

__all__ = [
  'BATCH_SIZES',
  'DEFAULT_RULE',
  'FORMAT',
  'MANIFEST',
  'RULES',
  'VALIDATION',
  'AdaptiveClassifier',
  'Answers',
  'OperatingPoint',
  'CalibrationSet',
  'manifest_checksum',
]
