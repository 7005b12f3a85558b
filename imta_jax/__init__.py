"""Adaptive (early-exit) networks in JAX and Flax: train, evaluate and run them.

    import imta_jax

    classifier = imta_jax.load('runs/mnist5k', budget=2e6)  # Multiply-adds per image, on average.
    answers = classifier.predict(images)  # .labels, .confidences, .exits, .probabilities
    classifier.save('exported')  # For JAX, NumPy and flatbuffers alone.

Each name is imported when it is used, so that a loaded export needs no training packages.
"""

from etils import epy as _epy

with _epy.lazy_api_imports(globals()):
  from imta_jax.adaptive.cost import exit_costs
  from imta_jax.adaptive.engine import AdaptiveClassifier
  from imta_jax.adaptive.loading import load
  from imta_jax.adaptive.policy import budget_sweep, optimal_sweep
  from imta_jax.config import load as load_config
  from imta_jax.models import create as create_model
  from imta_jax.models.initial_values import initialize
  from imta_jax.models.multi_exit import MultiExitNetwork
  from imta_jax.techniques.gradient_equilibrium import equilibrium_factors, scale_gradient
  from imta_jax.techniques.inline_collaboration import CollaborativeClassifier
  from imta_jax.techniques.one_for_all import one_for_all_loss
  from imta_jax.training.loop import train_and_evaluate

__version__ = '0.2.0'
__all__ = [
  'AdaptiveClassifier',
  'CollaborativeClassifier',
  'MultiExitNetwork',
  'budget_sweep',
  'create_model',
  'equilibrium_factors',
  'exit_costs',
  'initialize',
  'load',
  'load_config',
  'one_for_all_loss',
  'optimal_sweep',
  'scale_gradient',
  'train_and_evaluate',
]
