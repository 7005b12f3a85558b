"""Convolutions, in the form that is fastest on each platform.

GPUs and TPUs use XLA's convolution. On CPUs it is slow for few channels, which leave vector lanes
idle, and for input gradients of strided convolutions; both are faster as matrix products
(measurements are in experiments/benchmarks).
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

Padding = tuple[tuple[int, int], tuple[int, int]]

# A 3×3 convolution with at most this many weights per tap is faster as a banded product.
_NARROW = 128
# Limits of the number of values that such a product reads (without neighbours) and writes per block
# of outputs: with fewer values, vector lanes are idle; with more, most are multiplied by zero and
# compilation takes longer.
_MIN_INPUTS, _MAX_INPUTS, _MIN_OUTPUTS = 12, 56, 14
# On accelerators, a pair of convolutions is computed as one if at most this many products are with
# zeros. They take a few microseconds there, as every further kernel does.
_MAX_ZEROS = 500_000_000


@partial(jax.jit, static_argnames=('stride', 'padding'))
def convolve(x: jax.Array, kernel: jax.Array, stride: int, padding: int | Padding) -> jax.Array:
  """Computes a convolution.

  Args:
    x: [batch, height, width, inputs].
    kernel: [side, side, inputs, outputs].
    stride: The stride in both directions.
    padding: Number of zeros on every side, or (above, below) and (to the left, to the right).

  Returns:
    [batch, height, width, outputs].
  """
  if kernel.shape[:2] == (1, 1) and stride == 1:
    return _product(x, kernel[0, 0])
  if kernel.shape[:2] == (3, 3) and padding in (1, ((1, 1), (1, 1))):
    return _convolve_3x3(stride, x, kernel)
  return _direct(x, kernel, stride, padding)


@jax.custom_vjp
def _product(x, matrix):
  return jax.lax.dot_general(x, matrix, (((3,), (0,)), ((), ())))


def _product_backward(operands, gradient):
  def differentiate(gradient, *operands):
    return jax.vjp(_product.fun, *operands)[1](gradient)

  def on_cpu(gradient, x, matrix):
    # XLA transposes the first operand, along with what computes it: the smaller one is faster.
    pixels = ((0, 1, 2), (0, 1, 2))
    if x.shape[-1] <= gradient.shape[-1]:
      matrix_gradient = jax.lax.dot_general(x, gradient, (pixels, ((), ())))
    else:
      matrix_gradient = jax.lax.dot_general(gradient, x, (pixels, ((), ()))).T
    return jax.lax.dot_general(gradient, matrix, (((3,), (1,)), ((), ()))), matrix_gradient

  return jax.lax.platform_dependent(gradient, *operands, cpu=on_cpu, default=differentiate)


_product.defvjp(lambda *operands: (_product(*operands), operands), _product_backward)


@jax.jit
def convolve_pair(
  fine: jax.Array, x: jax.Array, fine_kernel: jax.Array, kernel: jax.Array
) -> jax.Array:
  """Computes a 3×3 convolution of stride 2 and one of stride 1, whose results have the same size.

  Args:
    fine: [batch, fine height, fine width, fine inputs], read with stride 2.
    x: [batch, height, width, inputs], half as high and wide, rounded up.
    fine_kernel: [3, 3, fine inputs, fine outputs].
    kernel: [3, 3, inputs, outputs].

  Returns:
    [batch, height, width, fine outputs + outputs].
  """
  return _convolve_pair(fine, x, fine_kernel, kernel)


@jax.custom_vjp
def _convolve_pair(*operands):
  return _in_best_form(lambda form, *operands: form(*operands), operands)


def _pair_backward(operands, gradient):
  def differentiate(form, gradient, *operands):
    return jax.vjp(form, *operands)[1](gradient)

  return _in_best_form(differentiate, operands, gradient)


_convolve_pair.defvjp(lambda *operands: (_convolve_pair(*operands), operands), _pair_backward)


def _in_best_form(function, operands, *more):
  """Calls function(form, *more, *operands) with the best form of `_convolve_pair`."""
  fine, x, fine_kernel, kernel = operands
  weights = fine_kernel.size + kernel.size
  weights_as_one = (
    9 * (4 * fine.shape[-1] + x.shape[-1]) * (fine_kernel.shape[-1] + kernel.shape[-1])
  )
  zeros = x.size // x.shape[-1] * (weights_as_one - weights)
  # Exported networks take batches of any size; those that are large are faster apart.
  few = isinstance(zeros, int) and zeros <= _MAX_ZEROS
  return jax.lax.platform_dependent(
    *more,
    *operands,
    cpu=partial(function, _pair_apart),
    default=partial(function, _pair_as_one if few else _pair_apart),
  )


def _pair_apart(fine, x, fine_kernel, kernel):
  return jnp.concatenate(
    [_convolve_3x3(2, fine, fine_kernel), _convolve_3x3(1, x, kernel)], axis=-1
  )


def _pair_as_one(fine, x, fine_kernel, kernel):
  """Computes both as one convolution, with zeros where an output does not read an input.

  Each 2×2 block of the finer map becomes one pixel with four times the channels.
  """
  batch, height, width, inputs = fine.shape
  fine = jnp.pad(fine, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)))
  blocks = fine.reshape(batch, x.shape[1], 2, x.shape[2], 2, inputs).transpose(0, 1, 3, 2, 4, 5)
  blocks = blocks.reshape(*x.shape[:3], 4 * inputs)
  # Output pixel i reads the rows 2 i - 1 to 2 i + 1: the second row of the block before, and both
  # rows of its own block. Of the six rows of three blocks these are the rows 1 to 3.
  outputs = fine_kernel.shape[-1]
  taps = jnp.pad(fine_kernel, ((1, 2), (1, 2), (0, 0), (0, 0)))
  taps = taps.reshape(3, 2, 3, 2, inputs, outputs).transpose(0, 2, 1, 3, 4, 5)
  taps = taps.reshape(3, 3, 4 * inputs, outputs)
  both = jnp.pad(taps, ((0, 0), (0, 0), (0, x.shape[-1]), (0, kernel.shape[-1]))) + jnp.pad(
    kernel, ((0, 0), (0, 0), (4 * inputs, 0), (outputs, 0))
  )
  return _direct(jnp.concatenate([blocks, x], axis=-1), both, 1)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _convolve_3x3(stride, x, kernel):
  def on_cpu(x, kernel):
    block = _block_width(stride, x, kernel)
    return _banded(x, kernel, stride, block) if block else _direct(x, kernel, stride)

  return jax.lax.platform_dependent(x, kernel, cpu=on_cpu, default=partial(_direct, stride=stride))


def _forward(stride, x, kernel):
  return _convolve_3x3(stride, x, kernel), (x, kernel)


def _backward(stride, residuals, gradient):
  x, kernel = residuals

  def kernel_gradient(x, kernel, gradient):
    return jax.vjp(lambda kernel: _direct(x, kernel, stride), kernel)[1](gradient)[0]

  def input_gradient(x, kernel, gradient):
    return jax.vjp(lambda x: _direct(x, kernel, stride), x)[1](gradient)[0]

  def input_gradient_on_cpu(x, kernel, gradient):
    if stride == 1:  # The gradient convolved with the rotated kernel.
      return _convolve_3x3(1, gradient, kernel[::-1, ::-1].transpose(0, 1, 3, 2))
    block = _block_width(stride, x, kernel)
    form = partial(_banded, block=block) if block else _patches_product
    return jax.vjp(lambda x: form(x, kernel, stride), x)[1](gradient)[0]

  x_gradient = jax.lax.platform_dependent(
    x, kernel, gradient, cpu=input_gradient_on_cpu, default=input_gradient
  )
  return x_gradient, kernel_gradient(x, kernel, gradient)


_convolve_3x3.defvjp(_forward, _backward)


def _direct(x, kernel, stride, padding=1):
  return jax.lax.conv_general_dilated(
    x,
    kernel,
    (stride, stride),
    ((padding, padding), (padding, padding)) if isinstance(padding, int) else padding,
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
  )


def _output_size(size, stride):
  return 1 + (size - 1) // stride


def _block_width(stride, x, kernel):
  """Returns how many outputs `_banded` should compute together; None if it would be slower."""
  inputs, outputs = kernel.shape[2:]
  if inputs * outputs > _NARROW:
    return None
  width = _output_size(x.shape[2], stride)
  for block in range(2, width + 1):
    fits = _MIN_INPUTS <= block * stride * inputs <= _MAX_INPUTS
    if width % block == 0 and fits and block * outputs >= _MIN_OUTPUTS:
      return block
  return None


def _banded(x, kernel, stride, block):
  """Computes `block` neighbouring outputs of a row as a product with a banded matrix.

  Some of the products are with zeros, but whole vectors are read.
  """
  batch, height, width, inputs = x.shape
  outputs = kernel.shape[-1]
  out_height, out_width = _output_size(height, stride), _output_size(width, stride)
  missing = stride * out_width - width
  if missing:
    x = jnp.pad(x, ((0, 0), (0, 0), (0, missing), (0, 0)))
  # [batch, height, blocks, (stride × block + 3 - stride) × inputs]: the inputs of each block
  # and the neighbours that its outputs also read; a block of the whole row has no neighbours.
  blocks = x.reshape(batch, height, out_width // block, stride * block * inputs)
  parts = [blocks]
  if block < out_width:
    parts.insert(0, jnp.pad(blocks[:, :, :-1, -inputs:], ((0, 0), (0, 0), (1, 0), (0, 0))))
    if stride == 1:
      parts.append(jnp.pad(blocks[:, :, 1:, :inputs], ((0, 0), (0, 0), (0, 1), (0, 0))))
  rows = jnp.pad(jnp.concatenate(parts, axis=-1), ((0, 0), (1, 1), (0, 0), (0, 0)))
  last = stride * (out_height - 1) + 1
  patches = jnp.concatenate([rows[:, i : i + last : stride] for i in range(3)], axis=-1)
  # reads[p, j, b]: whether tap j of output b of a block reads its input p.
  reads = np.zeros((stride * (block - 1) + 3, 3, block), x.dtype)
  for tap in range(3):
    reads[stride * np.arange(block) + tap, tap, np.arange(block)] = 1
  if block == out_width:
    reads = reads[1 : stride * block + 1]
  matrix = jnp.einsum('pjb,ijco->ipcbo', reads, kernel)
  product = patches @ matrix.reshape(patches.shape[-1], block * outputs)
  return product.reshape(batch, out_height, out_width, outputs)


def _patches_product(x, kernel, stride):
  """Computes the convolution as a product of patches and kernel; its input gradient is fast."""
  batch, height, width, inputs = x.shape
  padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
  ends = [(size - 1) // stride * stride + 1 for size in (height, width)]
  patches = [
    padded[:, i : i + ends[0] : stride, j : j + ends[1] : stride]
    for i in range(3)
    for j in range(3)
  ]
  return jnp.concatenate(patches, axis=-1) @ kernel.reshape(9 * inputs, -1)
