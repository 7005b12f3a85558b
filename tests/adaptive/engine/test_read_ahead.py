"""Streams whose source waits, fails or is left."""

import threading
import time

import jax
import numpy as np
import pytest

from imta_jax.adaptive.engine import AdaptiveClassifier

IMAGES = np.random.default_rng(0).standard_normal((12, 2, 2, 1)).astype(np.float32)


@pytest.fixture(scope='module')
def classifier():
  """Two dense stages; the images leave at the first one."""

  def first(weights, images):
    features = images.reshape(len(images), -1)
    return features, features @ weights

  def second(weights, carry):
    features, logits = carry
    return (), features @ weights + logits

  weights = [np.ones((4, 3), np.float32)] * 2
  image = jax.ShapeDtypeStruct(IMAGES.shape[1:], IMAGES.dtype)
  return AdaptiveClassifier(
    [first, second], weights, (-np.inf, -np.inf), image, madds=(1e9, 2e9), batch_sizes=(1, 4)
  )


def threads_end(before):
  deadline = time.monotonic() + 10
  while threading.active_count() > before and time.monotonic() < deadline:
    time.sleep(0.01)
  return threading.active_count() <= before


@pytest.mark.parametrize('sizes', [(4, 8), (6, 6), (1, 3, 8)])
def test_answers_do_not_wait_for_the_source(classifier, sizes):
  go_on = threading.Event()

  def source():
    *early, late = np.split(IMAGES, np.cumsum(sizes)[:-1])
    yield from early
    assert go_on.wait(20)
    yield late

  answers = classifier.stream(source())
  np.testing.assert_array_equal(next(answers).indices, range(4))
  assert not go_on.is_set()
  go_on.set()
  rest = np.concatenate([part.indices for part in answers])
  np.testing.assert_array_equal(np.sort(rest), range(4, 12))


def test_what_a_source_raises_comes_after_its_answers(classifier):
  def source():
    yield IMAGES[:4]
    raise OSError('unplugged')

  answers = classifier.stream(source())
  np.testing.assert_array_equal(next(answers).indices, range(4))
  with pytest.raises(OSError, match='unplugged'):
    next(answers)


def test_a_stream_leaves_no_thread_behind(classifier):
  before = threading.active_count()
  list(classifier.stream(np.split(IMAGES, 3)))
  assert threads_end(before)
  left = classifier.stream(np.split(IMAGES, 3))
  next(left)
  left.close()
  assert threads_end(before)


def test_images_that_are_there_need_no_thread(classifier, monkeypatch):
  classifier.predict(IMAGES)
  monkeypatch.setattr(threading.Thread, 'start', lambda self: pytest.fail('a thread starts'))
  np.testing.assert_array_equal(classifier.predict(IMAGES).indices, range(12))
