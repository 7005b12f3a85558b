"""Every form of a convolution against XLA's convolution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imta_jax.models.convolution import convolve


def reference(x, kernel, stride, padding):
  return jax.lax.conv_general_dilated(
    x,
    kernel,
    (stride, stride),
    [(padding, padding)] * 2,
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
  )


# Narrow and wide, sides that blocks divide and that they do not, odd sizes under stride 2.
@pytest.mark.parametrize(
  ('size', 'inputs', 'outputs', 'side', 'stride'),
  [
    ((8, 8), 6, 6, 3, 1),
    ((5, 6), 2, 3, 3, 1),
    ((7, 7), 2, 2, 3, 1),
    ((8, 8), 24, 12, 3, 1),
    ((8, 8), 24, 24, 3, 1),
    ((8, 8), 6, 6, 3, 2),
    ((7, 12), 6, 12, 3, 2),
    ((8, 8), 24, 24, 3, 2),
    ((7, 9), 3, 5, 3, 2),
    ((7, 7), 8, 4, 3, 1),
    ((8, 7), 4, 4, 3, 2),
    ((14, 28), 2, 4, 3, 2),
    ((6, 66), 1, 2, 3, 1),
    ((8, 8), 5, 4, 1, 1),
    ((8, 8), 5, 4, 1, 2),
    ((14, 14), 3, 4, 7, 2),
  ],
)
def test_result_and_gradients(size, inputs, outputs, side, stride):
  random = np.random.default_rng(0)
  x = random.standard_normal((2, *size, inputs), np.float32)
  kernel = random.standard_normal((side, side, inputs, outputs), np.float32)
  expected, expected_pullback = jax.vjp(
    lambda x, kernel: reference(x, kernel, stride, side // 2), x, kernel
  )
  y, pullback = jax.vjp(lambda x, kernel: convolve(x, kernel, stride, side // 2), x, kernel)
  np.testing.assert_allclose(y, expected, atol=1e-4)
  gradient = random.standard_normal(y.shape, np.float32)
  for ours, theirs in zip(pullback(gradient), expected_pullback(gradient), strict=True):
    np.testing.assert_allclose(ours, theirs, atol=2e-4)


def test_half_precision_stays_half():
  x, kernel = jnp.ones((1, 8, 8, 4), jnp.bfloat16), jnp.ones((3, 3, 4, 4), jnp.bfloat16)
  y, pullback = jax.vjp(lambda x, kernel: convolve(x, kernel, 1, 1), x, kernel)
  assert {array.dtype for array in (y, *pullback(y))} == {jnp.dtype('bfloat16')}
  np.testing.assert_array_equal(y[0, 1:-1, 1:-1], 36.0)


def test_other_platforms_get_the_convolution_itself():
  lowered = convolve.trace(jnp.ones((1, 8, 8, 4)), jnp.ones((3, 3, 4, 4)), 1, 1).lower(
    lowering_platforms=('tpu',)
  )
  assert 'stablehlo.convolution' in lowered.as_text()
  assert 'dot_general' not in lowered.as_text()
