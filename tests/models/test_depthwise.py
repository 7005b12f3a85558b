"""The forms of a depthwise convolution against XLA's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imta_jax.models.depthwise import convolve_depthwise


def reference(x, kernel, stride, padding):
  return jax.lax.conv_general_dilated(
    x,
    kernel.transpose(0, 1, 3, 2),
    (stride, stride),
    padding,
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    feature_group_count=x.shape[-1],
  )


# Even and odd sizes, with and without pixels that no output reads.
@pytest.mark.parametrize('size', [(8, 8), (9, 12), (7, 10)])
@pytest.mark.parametrize(
  ('side', 'stride', 'padding'),
  [
    (3, 1, ((1, 1), (1, 1))),
    (5, 1, ((2, 2), (2, 2))),
    (3, 2, ((0, 1), (1, 1))),
    (3, 2, ((0, 0), (0, 0))),
    (5, 2, ((1, 2), (2, 2))),
    (5, 2, ((2, 2), (0, 1))),
  ],
)
def test_result_and_gradients(size, side, stride, padding):
  random = np.random.default_rng(0)
  x = random.standard_normal((2, *size, 5), np.float32)
  kernel = random.standard_normal((side, side, 5, 1), np.float32)
  forms = [
    jax.vjp(lambda x, kernel, form=form: form(x, kernel, stride, padding), x, kernel)
    for form in (convolve_depthwise, reference)
  ]
  (y, pullback), (expected, expected_pullback) = forms
  np.testing.assert_allclose(y, expected, atol=1e-5)
  gradient = random.standard_normal(y.shape, np.float32)
  for ours, theirs in zip(pullback(gradient), expected_pullback(gradient), strict=True):
    np.testing.assert_allclose(ours, theirs, atol=2e-5)


def test_half_precision_stays_half():
  x, kernel = jnp.ones((1, 8, 8, 4), jnp.bfloat16), jnp.ones((3, 3, 4, 1), jnp.bfloat16)
  padding = ((1, 1), (1, 1))
  y, pullback = jax.vjp(lambda x, kernel: convolve_depthwise(x, kernel, 1, padding), x, kernel)
  assert {array.dtype for array in (y, *pullback(y))} == {jnp.dtype('bfloat16')}
  np.testing.assert_array_equal(y[0, 1:-1, 1:-1], 9.0)
