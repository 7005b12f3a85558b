"""One-for-all distillation: its value and gradients against explicit formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imta_jax.techniques.one_for_all import cross_entropy, one_for_all_loss

NUM_EXITS, BATCH, NUM_CLASSES = 3, 5, 4
OPTIONS = [(0.1, 3.0), (0.9, 1.0), (0.0, 0.7)]


@pytest.fixture(scope='module')
def arrays():
  """Logits [exit, image, class], labels, the teacher's logits."""
  random = np.random.default_rng(0)
  logits = 3 * random.standard_normal((NUM_EXITS, BATCH, NUM_CLASSES), np.float32)
  teacher = 3 * random.standard_normal((BATCH, NUM_CLASSES), np.float32)
  return logits, np.array([0, 3, 1, 1, 2]), teacher


def softmax(x):
  e = np.exp(x.astype(np.float64))
  return e / e.sum(axis=-1, keepdims=True)


def expected_loss(logits, labels, teacher, alpha, temperature, class_reduction):
  total = 0.0
  for i in range(NUM_EXITS):
    for n in range(BATCH):
      cross_entropy = -np.log(softmax(logits[i, n])[labels[n]])
      if i == NUM_EXITS - 1:
        total += cross_entropy / BATCH
        continue
      p, q = softmax(teacher[n] / temperature), softmax(logits[i, n] / temperature)
      divergence = sum(p[c] * (np.log(p[c]) - np.log(q[c])) for c in range(NUM_CLASSES))
      if class_reduction == 'mean':
        divergence /= NUM_CLASSES
      total += (alpha * cross_entropy + (1 - alpha) * temperature**2 * divergence) / BATCH
  return total


@pytest.mark.parametrize('class_reduction', ['sum', 'mean'])
@pytest.mark.parametrize(('alpha', 'temperature'), OPTIONS)
def test_loss_is_the_formula(arrays, alpha, temperature, class_reduction):
  loss = one_for_all_loss(
    *arrays, alpha=alpha, temperature=temperature, class_reduction=class_reduction
  )
  assert loss.shape == () and loss.dtype == jnp.float32
  expected = expected_loss(*arrays, alpha, temperature, class_reduction)
  np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_the_divergence_is_summed_over_classes_unless_told_otherwise(arrays):
  loss = one_for_all_loss(*arrays, alpha=0.3, temperature=2.0)
  np.testing.assert_allclose(loss, expected_loss(*arrays, 0.3, 2.0, 'sum'), rtol=1e-5)


@pytest.mark.parametrize('class_reduction', ['sum', 'mean'])
@pytest.mark.parametrize(('alpha', 'temperature'), OPTIONS)
def test_gradient_is_the_formula(arrays, alpha, temperature, class_reduction):
  logits, labels, teacher = arrays
  gradient = jax.grad(one_for_all_loss)(
    logits,
    labels,
    teacher,
    alpha=alpha,
    temperature=temperature,
    class_reduction=class_reduction,
  )
  of_labels = softmax(logits) - np.eye(NUM_CLASSES)[labels]
  # d/dz of T² KL(teacher / T || z / T) is T (softmax(z / T) - softmax(teacher / T)).
  of_teacher = temperature * (softmax(logits / temperature) - softmax(teacher / temperature))
  if class_reduction == 'mean':
    of_teacher /= NUM_CLASSES
  expected = alpha * of_labels + (1 - alpha) * of_teacher
  expected[-1] = of_labels[-1]  # The last exit learns from the labels alone.
  np.testing.assert_allclose(gradient, expected / BATCH, rtol=1e-4, atol=1e-6)


def test_no_gradient_flows_to_the_teacher(arrays):
  gradient = jax.grad(one_for_all_loss, argnums=2)(*arrays, alpha=0.1, temperature=3.0)
  np.testing.assert_array_equal(gradient, 0)


def test_an_online_teacher_learns_from_the_labels_alone(arrays):
  logits, labels, _ = arrays

  def loss(logits):
    return one_for_all_loss(logits, labels, logits[-1], alpha=0.1, temperature=3.0)

  expected = (softmax(logits[-1]) - np.eye(NUM_CLASSES)[labels]) / BATCH
  np.testing.assert_allclose(jax.grad(loss)(logits)[-1], expected, rtol=1e-4, atol=1e-6)


def test_it_computes_in_float32_whatever_the_logits_are(arrays):
  logits, labels, teacher = arrays
  logits, teacher = (jnp.asarray(x, jnp.bfloat16) for x in (logits, teacher))
  loss = one_for_all_loss(logits, labels, teacher, alpha=0.1, temperature=3.0)
  rounded = np.asarray(logits, np.float32), labels, np.asarray(teacher, np.float32)
  assert loss.dtype == jnp.float32
  np.testing.assert_allclose(loss, expected_loss(*rounded, 0.1, 3.0, 'sum'), rtol=1e-5)


@pytest.mark.parametrize(
  ('option', 'value', 'expected'),
  [
    ('alpha', -0.1, 'between 0 and 1'),
    ('alpha', float('nan'), 'between 0 and 1'),
    ('temperature', 0.0, 'above 0 and finite'),
    ('temperature', float('inf'), 'above 0 and finite'),
    ('class_reduction', 'max', 'sum, mean'),
  ],
)
def test_a_bad_option_is_refused_in_one_line(arrays, option, value, expected):
  options = {'alpha': 0.1, 'temperature': 3.0, option: value}
  with pytest.raises(ValueError) as caught:
    one_for_all_loss(*arrays, **options)
  message = str(caught.value)
  assert message.startswith(f'{option} {value!r} is ')
  assert message.endswith(expected) and '\n' not in message


@pytest.mark.parametrize('change', ['one class', 'other batch', 'labels'])
def test_shapes_that_would_broadcast_are_refused(arrays, change):
  logits, labels, teacher = arrays
  if change == 'one class':
    teacher = teacher[:, :1]
  elif change == 'other batch':
    teacher = teacher[:1]
  else:
    labels = labels[:1]
  with pytest.raises(ValueError, match='do not match logits'):
    one_for_all_loss(logits, labels, teacher, alpha=0.1, temperature=3.0)


@pytest.mark.parametrize('label', [-1, NUM_CLASSES])
def test_a_label_that_is_no_class_makes_the_loss_nan(arrays, label):
  logits, labels, teacher = arrays
  labels = np.array([label, *labels[1:]], np.int32)
  run = jax.jit(lambda *args: one_for_all_loss(*args, alpha=0.0, temperature=3.0))
  assert np.isnan(run(logits, labels, teacher))
  assert np.isnan(cross_entropy(logits, labels)).all()


def test_a_class_that_the_teacher_excludes_counts_as_in_the_limit(arrays):
  logits, labels, teacher = arrays
  excluded, nearly = teacher.copy(), teacher.copy()
  excluded[:, 0], nearly[:, 0] = -np.inf, -1e4
  run = jax.value_and_grad(
    lambda logits, teacher: one_for_all_loss(
      logits, labels, teacher, alpha=0.1, temperature=3.0, class_reduction='mean'
    )
  )
  for actual, expected in zip(run(logits, excluded), run(logits, nearly), strict=True):
    assert np.isfinite(actual).all()
    np.testing.assert_allclose(actual, expected, rtol=1e-6)


def test_a_student_may_exclude_what_its_teacher_excludes(arrays):
  logits, _, teacher = (array.copy() for array in arrays)
  labels = np.full(BATCH, 1)
  logits[:, :, 0], teacher[:, 0] = -np.inf, -np.inf

  def run(logits, labels, teacher):
    return jax.value_and_grad(one_for_all_loss)(logits, labels, teacher, alpha=0.1, temperature=3.0)

  loss, gradient = run(logits, labels, teacher)
  expected_loss, expected_gradient = run(logits[..., 1:], labels - 1, teacher[:, 1:])
  np.testing.assert_allclose(loss, expected_loss, rtol=1e-6)
  np.testing.assert_allclose(gradient[..., 1:], expected_gradient, rtol=1e-5, atol=1e-7)
  np.testing.assert_array_equal(gradient[..., 0], 0)
