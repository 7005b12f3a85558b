"""Inference that runs only the stages an image needs.

These files need JAX and NumPy alone, but for `from_workdir` and `from_model`: an export carries a
copy of them, which classifies where imta_jax is not installed.

    from engine import AdaptiveClassifier  # In an export; else from imta_jax.adaptive.engine.
    classifier = AdaptiveClassifier.load('exported', budget=20e6)
    answers = classifier.predict(images)

`classifier` is what users see; `runner` runs stages, as `programs` that are compiled, on `batches`
of images, by a `plan`; `exported` reads an export.
"""

from .batches import Answers
from .classifier import AdaptiveClassifier, OperatingPoint
from .exported import FORMAT, MANIFEST, manifest_checksum
from .runner import BATCH_SIZES

__all__ = [
  'BATCH_SIZES',
  'FORMAT',
  'MANIFEST',
  'AdaptiveClassifier',
  'Answers',
  'OperatingPoint',
  'manifest_checksum',
]
