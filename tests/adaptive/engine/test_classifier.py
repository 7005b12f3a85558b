"""The engine against the policy on full logits."""

import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from imta_jax.adaptive.cost import exit_costs
from imta_jax.adaptive.engine import (
  RULES,
  AdaptiveClassifier,
  CalibrationSet,
  OperatingPoint,
  programs,
)
from imta_jax.adaptive.engine.batches import join_on_device, join_on_host
from imta_jax.adaptive.engine.onnx_programs import installed_runtimes
from imta_jax.adaptive.engine.runner import Runner
from imta_jax.adaptive.policy import (
  budget_sweep,
  choose_exits,
  exit_scores,
  find_thresholds,
  geometric_shares,
)

SHAPE = (4, 4, 3)
SIZES = (1, 4, 16)
# Of a network that is best run as one program, and of one that is best run stage by stage.
SMALL, LARGE = (1.0, 2.0, 3.0), (1e9, 2e9, 3e9)


def first_stage(weights, images):
  features = jnp.tanh(images.reshape(-1, 48) @ weights['kernel'])
  return features, features @ weights['classifier']


def later_stage(weights, carry):
  features, logits = carry
  features = jnp.tanh(features @ weights['kernel'])
  return features, 0.5 * logits + features @ weights['classifier']


STAGES = (first_stage, later_stage, later_stage)


@pytest.fixture(scope='module')
def network():
  """Weights of three stages, images, and their probabilities [exit, image, class]."""
  random = np.random.default_rng(1)
  weights = [
    {
      'kernel': random.normal(size=(inputs, 8)).astype(np.float32) / 2,
      'classifier': random.normal(size=(8, 5)).astype(np.float32),
    }
    for inputs in (48, 8, 8)
  ]
  images = random.standard_normal((75, *SHAPE)).astype(np.float32)
  carry, logits = images, []
  for stage, of_stage in zip(STAGES, weights, strict=True):
    carry = stage(of_stage, carry)
    logits.append(np.asarray(carry[1]))
  return weights, images, scipy.special.softmax(logits, axis=-1)


def classifier_of(network, thresholds, stages=STAGES, **fields):
  fields = {'madds': LARGE, 'batch_sizes': SIZES, 'runtime': 'xla'} | fields
  image = jax.ShapeDtypeStruct(SHAPE, np.float32)
  return AdaptiveClassifier(stages, network[0], thresholds, image, **fields)


@pytest.fixture(
  scope='module',
  params=[
    ('xla', 'as one'),
    ('xla', 'by stages'),
    ('xla', 'by stages on the device'),
    ('openvino', 'as one'),
    ('openvino', 'by stages'),
    ('openvino', {0: 2, 2: 3}),  # First → end stage of programs.
    ('openvino', {0: 1, 1: 3}),
    ('onnxruntime', 'by stages'),
  ],
)
def classifier(network, request):
  runtime, how = request.param
  skip_unless_installed(runtime)
  thresholds = find_thresholds(network[2], geometric_shares(1.0, 3))
  madds = SMALL if how == 'as one' else LARGE
  classifier = classifier_of(network, thresholds, madds=madds, runtime=runtime)
  if how == 'by stages on the device':  # As on accelerators.
    classifier._runner.programs.join = join_on_device
  if isinstance(how, dict):
    classifier._runner.plan.program_end = lambda first, *_: how[first]
  return classifier


def skip_unless_installed(runtime):
  if runtime not in ('xla', *installed_runtimes()):
    pytest.skip(f'{runtime} is not installed')


def assert_follows_policy(answers, probabilities, thresholds):
  exits = choose_exits(probabilities.max(axis=-1), thresholds)
  expected = probabilities[exits, np.arange(len(exits))]
  np.testing.assert_array_equal(answers.exits, exits)
  np.testing.assert_array_equal(answers.labels, expected.argmax(axis=-1))
  np.testing.assert_allclose(answers.confidences, expected.max(axis=-1), rtol=1e-4)
  np.testing.assert_allclose(answers.probabilities, expected, atol=1e-5)
  np.testing.assert_array_equal(answers.indices, np.arange(len(exits)))


# Thresholds found on these very images are the confidences of some of them: ties at every exit.
@pytest.mark.parametrize('p', [0.3, 1.0, 1.7])
@pytest.mark.parametrize('count', [1, 3, 17, 75])
def test_every_image_leaves_where_the_policy_says(network, classifier, p, count):
  _, images, probabilities = network
  thresholds = find_thresholds(probabilities, geometric_shares(p, 3))
  answers = classifier.predict(images[:count], thresholds)
  assert_follows_policy(answers, probabilities[:, :count], thresholds)


@pytest.mark.parametrize(
  ('rule', 'madds', 'runtime'),
  [
    *((rule, SMALL, 'xla') for rule in RULES),
    ('agreement', LARGE, 'xla'),
    ('agreement', SMALL, 'openvino'),
    ('agreement', LARGE, 'openvino'),
  ],
)
def test_every_rule_lets_images_leave_where_the_policy_says(network, rule, madds, runtime):
  skip_unless_installed(runtime)
  _, images, probabilities = network
  how = {'rule': rule, 'temperatures': (0.7, 1.0, 1.6)}
  thresholds = find_thresholds(probabilities, geometric_shares(1.0, 3), **how)
  exits = choose_exits(exit_scores(probabilities, **how), thresholds)
  answers = classifier_of(network, thresholds, madds=madds, runtime=runtime, **how).predict(images)
  np.testing.assert_array_equal(answers.exits, exits)
  assert len(set(exits)) == 3
  expected = probabilities[exits, np.arange(len(exits))]
  np.testing.assert_array_equal(answers.labels, expected.argmax(axis=-1))
  np.testing.assert_allclose(answers.probabilities, expected, atol=1e-5)


def test_rules_differ(network):
  leave = {
    rule: exit_scores(network[2], rule, (0.7, 1.0, 1.6)).argsort(axis=1).tobytes() for rule in RULES
  }
  assert len(set(leave.values())) == len(RULES)


def test_a_rule_that_does_not_exist_is_refused(network):
  with pytest.raises(ValueError, match="rule 'hope' is unknown: choose from top_probability, "):
    classifier_of(network, np.zeros(3), rule='hope')
  with pytest.raises(ValueError, match="rule 'hope' is unknown"):
    exit_scores(network[2], 'hope')
  with pytest.raises(ValueError, match='temperatures'):
    classifier_of(network, np.zeros(3), temperatures=(1.0, 2.0))


def test_a_promise_needs_validation_images(network):
  with pytest.raises(ValueError, match='max_loss needs the scores of validation images'):
    classifier_of(network, np.zeros(3)).choose(max_loss=0.01)
  validation = CalibrationSet(np.ones((3, 900), np.float32), np.ones((3, 900), bool))
  classifier = classifier_of(network, np.full(3, np.inf), validation=validation)
  np.testing.assert_array_equal(classifier.choose(max_loss=0.01).thresholds, [0, 0, -np.inf])
  with pytest.raises(ValueError, match='budget and max_loss are given: give only one'):
    classifier.choose(1.0, max_loss=0.01)


def test_one_at_a_time_is_as_together(network, classifier):
  _, images, probabilities = network
  thresholds = classifier.thresholds
  exits = [int(classifier.predict(images[i : i + 1]).exits[0]) for i in range(len(images))]
  np.testing.assert_array_equal(exits, choose_exits(probabilities.max(axis=-1), thresholds))
  assert len(set(exits)) == 3


def test_weights_too_large_for_constants_are_handed_over(network, classifier, monkeypatch):
  monkeypatch.setattr(programs, '_MOST_CONSTANTS', 0)
  image = network[1][:1]
  other = classifier_of(network, classifier.thresholds).predict(image)
  answer = classifier.predict(image)
  assert other.exits == answer.exits
  np.testing.assert_allclose(other.probabilities, answer.probabilities, atol=1e-5)


@pytest.mark.parametrize('leaves_at', [0, 1, 2])
def test_all_images_leave_at_one_exit(network, classifier, leaves_at):
  _, images, probabilities = network
  thresholds = np.full(3, np.inf)
  thresholds[leaves_at] = 0.0
  answers = classifier.predict(images[:20], thresholds)
  assert (answers.exits == leaves_at).all()
  np.testing.assert_allclose(answers.probabilities, probabilities[leaves_at, :20], atol=1e-5)


def test_last_exit_takes_all_whatever_its_threshold(network, classifier):
  answers = classifier.predict(network[1][:9], np.full(3, np.inf))
  assert (answers.exits == 2).all()


def test_image_that_is_no_number_reaches_the_last_exit(network, classifier):
  images = network[1][:6].copy()
  images[2] = np.nan
  answers = classifier.predict(images, np.full(3, -np.inf))
  np.testing.assert_array_equal(answers.exits, [0, 0, 2, 0, 0, 0])
  assert classifier.predict(images[2:3], np.full(3, -np.inf)).exits[0] == 2


def test_who_leaves_early_is_answered_before_others_go_on(network):
  _, images, probabilities = network
  thresholds = find_thresholds(probabilities, [1 / 3] * 3)
  classifier = classifier_of(network, thresholds)
  stages = []
  programs = classifier._runner.programs
  run = programs.run
  programs.run = lambda first, end, *args: stages.append(end - 1) or run(first, end, *args)
  parts = []
  for answers in classifier.predict_as_completed(images[:16]):
    parts.append(answers)
    assert set(stages) <= set(range(answers.exits.max() + 1))
  assert {int(part.exits[0]) for part in parts} == {0, 1, 2}
  indices = np.concatenate([part.indices for part in parts])
  np.testing.assert_array_equal(np.sort(indices), np.arange(16))
  exits = np.concatenate([part.exits for part in parts])
  np.testing.assert_array_equal(exits, classifier.predict(images[:16]).exits[indices])


def test_no_images(classifier):
  answers = classifier.predict(np.zeros((0, *SHAPE), np.float32))
  assert answers.labels.shape == answers.confidences.shape == answers.exits.shape == (0,)
  assert answers.probabilities.shape == (0, 5)
  assert answers.exits.dtype == np.int64


def test_thresholds_an_image(network, classifier):
  _, images, probabilities = network
  thresholds = np.where(np.arange(30)[:, np.newaxis] % 2, [np.inf] * 3, [-np.inf] * 3)
  answers = classifier.predict(images[:30], thresholds)
  np.testing.assert_array_equal(answers.exits, np.where(np.arange(30) % 2, 2, 0))


@pytest.mark.parametrize('sizes', [[75], [1] * 20, [3, 0, 40, 1, 31], [16, 16, 43]])
def test_stream_answers_each_image_once(network, classifier, sizes):
  _, images, probabilities = network
  images = images[: sum(sizes)]
  batches = np.split(images, np.cumsum(sizes)[:-1])
  parts = list(classifier.stream(iter(batches)))
  indices = np.concatenate([part.indices for part in parts])
  np.testing.assert_array_equal(np.sort(indices), np.arange(len(images)))
  exits = np.concatenate([part.exits for part in parts])
  expected = choose_exits(probabilities[:, : len(images)].max(axis=-1), classifier.thresholds)
  np.testing.assert_array_equal(exits, expected[indices])


def test_stream_runs_later_stages_on_full_batches(network):
  sizes = []

  def counted(stage):
    def run(weights, carry):
      jax.debug.callback(lambda x: sizes.append(len(x)), jax.tree.leaves(carry)[0])
      return stage(weights, carry)

    return run

  images = network[1]
  # Two thirds leave at the first exits; what is left of each batch of 16 alone would fill no batch.
  thresholds = find_thresholds(network[2], [0.33, 0.33, 0.34])
  classifier = classifier_of(network, thresholds, [*STAGES[:2], counted(STAGES[2])])
  for _ in classifier.stream(images[start : start + 16] for start in range(0, 75, 16)):
    pass
  jax.effects_barrier()
  assert sizes.count(16) == 1
  assert 25 <= sum(sizes) <= 25 + 16


def test_compiling_again_for_more_images(network, monkeypatch):
  monkeypatch.setattr(Runner, '_time', lambda self, size: np.ones(4))
  classifier = classifier_of(network, [0.5] * 3, madds=SMALL).compile(1)
  thresholds = np.full((16, 3), np.inf, np.float32)
  assert classifier._runner.plan.program_end(0, 16, thresholds, 16) == 1
  assert classifier.compile()._runner.plan.program_end(0, 16, thresholds, 16) == 3


@pytest.fixture
def compilations():
  """Programs compiled since, as a list that grows."""
  seen = []

  def listen(event, seconds, **_):
    if event == '/jax/core/compile/backend_compile_duration':
      seen.append(seconds)

  jax.monitoring.register_event_duration_secs_listener(listen)
  yield seen
  jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.parametrize('join', [join_on_host, join_on_device])
def test_nothing_is_left_to_compile(network, compilations, join):
  _, images, probabilities = network
  classifier = classifier_of(network, find_thresholds(probabilities, [1 / 3] * 3))
  classifier._runner.programs.join = join
  classifier.compile()
  assert compilations
  compilations.clear()
  for count in (1, 2, 5, 16, 21, 75):
    for thresholds in (classifier.thresholds, np.full(3, np.inf), np.full(3, -np.inf)):
      classifier.predict(images[:count], thresholds)
  for _ in classifier.stream(np.split(images, 5)):
    pass
  assert not compilations


def test_images_go_in_the_batches_that_were_quickest(network, monkeypatch):
  _, images, probabilities = network
  times = {1: 1.0, 4: 2.0, 16: 9.0}
  monkeypatch.setattr(Runner, '_time', lambda self, size: np.full(4, times[size]))
  thresholds = find_thresholds(probabilities, [1 / 3] * 3)
  classifier = classifier_of(network, thresholds).compile()
  sizes = []
  programs = classifier._runner.programs
  run = programs.run

  def counted(first, end, carry, thresholds):
    if first == 0:
      sizes.append(len(carry))
    return run(first, end, carry, thresholds)

  programs.run = counted
  assert_follows_policy(classifier.predict(images[:16]), probabilities[:, :16], thresholds)
  assert sizes == [4, 4, 4, 4]


@pytest.mark.parametrize(
  ('largest', 'sizes'), [(1, [1]), (4, [1, 4]), (5, [1, 4, 16]), (99, [1, 4, 16])]
)
def test_compiled_for_no_more_images_than_asked_for(network, monkeypatch, largest, sizes):
  seen = set()
  monkeypatch.setattr(Runner, '_time', lambda self, size: seen.add(size) or np.ones(4))
  classifier_of(network, [0.5] * 3).compile(largest)
  assert seen == set(sizes)


def test_stages_run_only_for_those_who_need_them(network):
  runs = []

  def forbidden(weights, carry):
    jax.debug.callback(lambda: runs.append(1))
    return later_stage(weights, carry)

  stages = [first_stage, forbidden, later_stage]
  classifier = classifier_of(network, [-np.inf, np.inf, np.inf], stages)
  classifier.predict(network[1][:20])
  classifier.predict(network[1][:1])
  jax.effects_barrier()
  assert not runs


def test_a_network_in_half_precision_of_images_in_bytes(tiny_msdnet, random_variables):
  model = tiny_msdnet(num_classes=5, collaboration='network', dtype=jnp.bfloat16)
  variables = random_variables(model, (8, 8, 3))
  mean, std = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
  image = np.random.default_rng(2).integers(0, 256, (1, 8, 8, 3), dtype=np.uint8)
  logits = model.apply(variables, (image / 255 - np.asarray(mean)) / np.asarray(std))
  classifier = AdaptiveClassifier.from_model(
    model, variables, [np.inf] * 2, (8, 8, 3), mean=mean, std=std
  )
  assert classifier.madds == tuple(cost.madds for cost in exit_costs(model, (8, 8, 3)))
  answers = classifier.predict(image)
  assert answers.probabilities.dtype == np.float32
  np.testing.assert_allclose(answers.probabilities, jax.nn.softmax(logits[-1]), atol=0.02)
  # The points of a sweep are operating points.
  probabilities, labels = np.full((2, 4, 5), 0.2), np.arange(4)
  points = budget_sweep(probabilities, labels, probabilities, labels, (10, 20), parameters=(1.0,))
  classifier = AdaptiveClassifier.from_model(
    model, variables, [np.inf] * 2, (8, 8, 3), operating_points=points
  )
  np.testing.assert_allclose(classifier.choose(budget=1e9).thresholds, points[0].thresholds)
  with pytest.raises(ValueError, match='only one of mean and std'):
    AdaptiveClassifier.from_model(model, variables, [np.inf] * 2, (8, 8, 3), mean=mean)


@pytest.mark.parametrize('images', [np.zeros((2, 8, 4, 3), np.float32), np.zeros((2, *SHAPE))])
def test_images_that_do_not_fit(classifier, images):
  with pytest.raises(ValueError, match='must be .*4, 4, 3.* of float32'):
    classifier.predict(images)


def test_thresholds_or_costs_that_do_not_fit(network, classifier):
  for thresholds in (np.zeros(2), np.zeros(1), 0.5, np.zeros((1, 3))):
    with pytest.raises(ValueError, match='must be'):
      classifier.predict(network[1][:4], thresholds)
  with pytest.raises(ValueError, match='one value for each of the 3 exits'):
    classifier_of(network, [0.5, 0.5])
  with pytest.raises(ValueError, match='madds .* one value for each of the 3 exits'):
    classifier_of(network, [0.5] * 3, madds=[1.0])


POINTS = [
  OperatingPoint((0.9, 0.9, -np.inf), (0.2, 0.3, 0.5), 0.7),
  OperatingPoint((0.5, 0.5, -np.inf), (0.6, 0.3, 0.1), 0.6),
  OperatingPoint((0.6, 0.5, -np.inf), (0.5, 0.3, 0.2), 0.6),
]


@pytest.mark.parametrize(
  ('budget', 'first_threshold'),
  [(24.0, 0.9), (100.0, 0.9), (22.9, 0.5), (16.0, 0.5), (15.0, 0.5)],
)
def test_budget_gives_the_most_accurate_setting_within_it(network, budget, first_threshold):
  # Averages with these costs: 23, 15 and 17; of equal accuracy the cheaper one is taken.
  classifier = classifier_of(network, [0.0] * 3, operating_points=POINTS, madds=(10.0, 20.0, 30.0))
  thresholds = classifier.choose(budget=budget).thresholds
  np.testing.assert_allclose(thresholds[0], first_threshold)


def test_budget_that_cannot_be_met(network):
  classifier = classifier_of(network, [0.0] * 3, operating_points=POINTS, madds=(10.0, 20.0, 30.0))
  with pytest.raises(ValueError, match='budget 14: too small: the minimum is 15'):
    classifier.choose(budget=14)
  with pytest.raises(ValueError, match='give only one'):
    classifier.choose(budget=20, latency=1.0)


def test_latency_is_measured_on_this_machine(network):
  def wait():
    time.sleep(0.1)
    return np.float32(0)

  def slow(weights, carry):
    features, logits = later_stage(weights, carry)
    return features, logits + jax.pure_callback(wait, jax.ShapeDtypeStruct((), np.float32))

  stages = [first_stage, slow, later_stage]
  classifier = classifier_of(network, [0.0] * 3, stages, operating_points=POINTS)
  costs = classifier.measure_costs(repeats=3)
  assert 0 < costs[0] < 0.1 <= costs[1] <= costs[2] < costs[1] + 0.1
  classifier.measure_costs = lambda: costs
  np.testing.assert_allclose(classifier.choose(latency=60.0).thresholds[0], 0.9)
  with pytest.raises(ValueError, match='too small'):
    classifier.choose(latency=1e-9)


def test_threads_share_a_classifier(network, classifier):
  _, images, probabilities = network
  expected = choose_exits(probabilities.max(axis=-1), classifier.thresholds)
  wrong = []

  def work(start):
    for _ in range(3):
      exits = classifier.predict(images[start : start + 20]).exits
      if (exits != expected[start : start + 20]).any():
        wrong.append(start)

  threads = [threading.Thread(target=work, args=(start,)) for start in (0, 10, 30, 55)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert not wrong
