"""What type checkers see of the public names, which are imported lazily: for mypy, never run."""

from typing import assert_type

import jax
import numpy as np

import imta_jax


def inference(images: np.ndarray) -> None:
  classifier = imta_jax.load('runs/mnist5k', budget=2e6)
  assert_type(classifier, imta_jax.AdaptiveClassifier)
  assert_type(imta_jax.load('exported').choose(max_loss=0.01), imta_jax.AdaptiveClassifier)
  imta_jax.load('runs/mnist5k', buget=2e6)  # type: ignore[call-arg]
  answers = classifier.predict(images, [0.9, float('-inf')])
  assert_type(answers.labels, np.ndarray)
  assert_type(answers.probabilities, np.ndarray)
  for part in classifier.stream([images]):
    assert_type(part.exits, np.ndarray)


def costs_and_thresholds(probabilities: jax.Array, labels: np.ndarray) -> None:
  model = imta_jax.create_model('msdnet', num_exits=2)
  assert_type(model, imta_jax.MultiExitNetwork)
  costs = imta_jax.exit_costs(model, (32, 32, 3), imta_jax.initialize(model, 0, (32, 32, 3)))
  assert_type(costs[0].madds, int)
  split = (probabilities, labels)
  points = imta_jax.budget_sweep(*split, *split, [cost.madds for cost in costs])
  assert_type(points[0].thresholds, tuple[float, ...])
  best = imta_jax.optimal_sweep(*split, *split, np.array([1e6, 2e6]), np.linspace(1e6, 2e6))
  assert_type(best[0].test_accuracy, float)


def training() -> None:
  (evaluation,) = imta_jax.train_and_evaluate(imta_jax.load_config('mnist5k'), 'runs/mnist5k')
  assert_type(evaluation.accuracies['test', 1], np.ndarray)


def techniques(x: jax.Array, labels: jax.Array) -> None:
  assert_type(imta_jax.scale_gradient(x, imta_jax.equilibrium_factors(1, 2)[0]), jax.Array)
  logits = imta_jax.CollaborativeClassifier(10, 'network')(x, None, train=True)
  assert_type(logits, jax.Array)
  loss = imta_jax.one_for_all_loss(logits, labels, logits[-1], alpha=0.1, temperature=3.0)
  assert_type(loss, jax.Array)
