"""Depthwise convolutions, in the form that is fastest on each platform.

On CPUs, XLA's own is 10 to 35 times slower than a sum of shifted products, one per tap of the
kernel.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

Padding = tuple[int, int]


@partial(jax.jit, static_argnames=('stride', 'padding'))
def convolve_depthwise(x: jax.Array, kernel: jax.Array, stride: int, padding: Padding) -> jax.Array:
  """Convolves each channel with a kernel of its own.

  Args:
    x: [batch, height, width, channels].
    kernel: [side, side, 1, channels].
    stride: The stride in both directions.
    padding: Number of zeros before and after, in both directions.

  Returns:
    [batch, height, width, channels].
  """
  return _convolve(stride, padding, x, kernel)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _convolve(stride, padding, x, kernel):
  return jax.lax.platform_dependent(
    x,
    kernel,
    cpu=partial(_shifted, stride=stride, padding=padding),
    default=partial(_direct, stride=stride, padding=padding),
  )


def _backward(stride, padding, operands, gradient):
  def direct(x, kernel, gradient):
    form = partial(_direct, stride=stride, padding=padding)
    return jax.vjp(form, x, kernel)[1](gradient)

  def on_cpu(x, kernel, gradient):
    return (
      _input_gradient(x, kernel, gradient, stride, padding),
      _kernel_gradient(x, kernel, gradient, stride, padding),
    )

  return jax.lax.platform_dependent(*operands, gradient, cpu=on_cpu, default=direct)


_convolve.defvjp(
  lambda stride, padding, *operands: (_convolve(stride, padding, *operands), operands), _backward
)


def _direct(x, kernel, stride, padding):
  return jax.lax.conv_general_dilated(
    x,
    kernel,
    (stride, stride),
    (padding, padding),
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    feature_group_count=x.shape[-1],
  )


def _shifted(x, kernel, stride, padding):
  """Adds the products of the shifted map with each tap."""
  total = 0
  for (i, j), shifted in _shifts(x, len(kernel), stride, padding):
    total += shifted * kernel[i, j, 0]
  return total


def _shifts(x, side, stride, padding):
  """Yields each tap with what it reads: the padded map, shifted by the tap, every stride pixels."""
  height, width = ((n + sum(padding) - side) // stride for n in x.shape[1:3])
  padded = jnp.pad(x, ((0, 0), padding, padding, (0, 0)))
  for i in range(side):
    for j in range(side):
      rows, columns = (slice(k, k + stride * n + 1, stride) for k, n in ((i, height), (j, width)))
      yield (i, j), padded[:, rows, columns]


def _input_gradient(x, kernel, gradient, stride, padding):
  """Convolves the gradient with the taps that read each pixel, one phase of the stride at a time.

  With stride 2, pixel 2 m + phase of a padded row is read by the taps phase, phase + 2, … of the
  outputs m, m - 1, …: a convolution of stride 1 with every second tap, rotated. Phases are then
  interleaved.
  """
  sizes = [n + sum(padding) for n in x.shape[1:3]]
  phases = []
  for row in range(stride):
    of_row = []
    for column in range(stride):
      taps = kernel[row::stride, column::stride][::-1, ::-1]
      full = [
        (len_taps - 1, -(-size // stride) - n)
        for len_taps, size, n in zip(taps.shape[:2], sizes, gradient.shape[1:3], strict=True)
      ]
      of_row.append(_correlate(gradient, taps, full))
    phases.append(jnp.stack(of_row, axis=3))
  both = jnp.stack(phases, axis=2)
  batch, rows, _, columns, _, channels = both.shape
  padded = both.reshape(batch, rows * stride, columns * stride, channels)
  before = padding[0]
  return padded[:, before : before + x.shape[1], before : before + x.shape[2]]


def _correlate(x, taps, padding):
  """Convolves with stride 1; padding is (before, after) for rows and for columns."""
  padded = jnp.pad(x, ((0, 0), *padding, (0, 0)))
  height, width = (n - side + 1 for n, side in zip(padded.shape[1:3], taps.shape[:2], strict=True))
  total = 0
  for i in range(taps.shape[0]):
    for j in range(taps.shape[1]):
      total += padded[:, i : i + height, j : j + width] * taps[i, j, 0]
  return total


def _kernel_gradient(x, kernel, gradient, stride, padding):
  """Sums the products of gradient and shifted map: over columns for all taps in one pass, then on."""
  products = [
    (shifted * gradient).astype(jnp.float32)
    for _, shifted in _shifts(x, len(kernel), stride, padding)
  ]
  sums = jax.lax.reduce(
    products, [np.float32(0)] * len(products), lambda a, b: list(map(jnp.add, a, b)), (1,)
  )
  taps = jnp.stack([each.sum((0, 1)) for each in sums])
  return taps.reshape(kernel.shape).astype(kernel.dtype)
