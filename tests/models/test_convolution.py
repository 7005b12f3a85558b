"""Every form of a convolution against XLA's convolution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imta_jax.models import convolution
from imta_jax.models.convolution import convolve, convolve_pair


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
    ((8, 8), 24, 24, 3, 1),
    ((8, 8), 6, 6, 3, 2),
    ((7, 12), 6, 12, 3, 2),
    ((8, 8), 24, 24, 3, 2),
    ((7, 7), 8, 4, 3, 1),
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


FORMS = {
  'as one': convolution._pair_as_one,
  'chosen': convolve_pair,
}


@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('size', [(8, 8), (7, 6), (2, 3)])
def test_a_pair_is_two_convolutions_side_by_side(size, form):
  random = np.random.default_rng(0)
  half = tuple(-(-side // 2) for side in size)
  operands = [
    random.standard_normal(shape, np.float32)
    for shape in ((2, *size, 3), (2, *half, 5), (3, 3, 3, 4), (3, 3, 5, 2))
  ]

  def expected(fine, x, fine_kernel, kernel):
    results = reference(fine, fine_kernel, 2, 1), reference(x, kernel, 1, 1)
    return jnp.concatenate(results, axis=-1)

  y, pullback = jax.vjp(FORMS[form], *operands)
  expected_y, expected_pullback = jax.vjp(expected, *operands)
  np.testing.assert_allclose(y, expected_y, atol=1e-4)
  gradient = random.standard_normal(y.shape, np.float32)
  for ours, theirs in zip(pullback(gradient), expected_pullback(gradient), strict=True):
    np.testing.assert_allclose(ours, theirs, atol=2e-4)


@pytest.mark.parametrize(('batch', 'num_convolutions'), [(64, 1), (4096, 2)])
def test_accelerators_join_a_pair_while_that_is_little_work(batch, num_convolutions):
  shapes = ((batch, 16, 16, 24), (batch, 8, 8, 48), (3, 3, 24, 12), (3, 3, 48, 12))
  operands = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
  lowered = convolve_pair.trace(*operands).lower(lowering_platforms=('cuda',))
  assert lowered.as_text().count('stablehlo.convolution') == num_convolutions
