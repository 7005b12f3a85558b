"""Lower bounds of the work of a training step, and the rates at which this machine does it."""

from collections.abc import Callable

import jax
import jax.extend.core
import jax.numpy as jnp

from imta_jax.models.convolution import convolve, convolve_pair
from imta_jax.training.phases import Phase


def work(phase: Phase, batch_size: int, image_shape: tuple[int, int, int]) -> dict[str, float]:
  """Counts the matrix operations and bytes of memory traffic that a step needs on one device.

  Operations: two per multiply-add of convolutions and dense layers. Phase I needs the forward pass,
  the gradients of all weights, and the gradients of all layers' inputs except the images. Phase II
  needs the forward pass and the gradients of the dense layers' weights.

  Bytes: the result of each layer is written once and read once; in phase I, the result or its
  gradient is read twice more. Parameters are read; trained parameters are also written, and their
  momentum is read and written. If the caches hold whole feature maps, fewer bytes suffice.

  Args:
    phase: The phase.
    batch_size: Images per device.
    image_shape: (height, width, channels).

  Returns:
    The numbers of 'operations' and 'bytes'.
  """
  images = jax.ShapeDtypeStruct((batch_size, *image_shape), jnp.float32)
  products = _matrix_products(phase, images)
  forward = sum(madds for _, madds, _ in products)
  activations = sum(size for _, _, size in products) * phase.model.dtype.itemsize
  sizes = {
    name: sum(leaf.size for leaf in jax.tree.leaves(tree))
    for name, tree in phase.state.weights.variables['params'].items()
  }
  if phase.config.trained == 'everything':
    (_, first, _), *_ = products
    operations = 2 * (3 * forward - first)
    traffic = 4 * activations + 4 * 4 * sum(sizes.values())
  else:
    trained = sum(size for name, size in sizes.items() if name.startswith('classifiers_'))
    of_classifiers = sum(madds for is_dense, madds, _ in products if is_dense)
    operations = 2 * (forward + of_classifiers)
    traffic = 2 * activations + 4 * (sum(sizes.values()) + 3 * trained)
  return {'operations': operations, 'bytes': traffic}


def _matrix_products(phase, images):
  """Lists (is dense layer, multiply-adds, output elements) of all layers, in forward order."""
  products = []

  def walk(jaxpr):
    for equation in jaxpr.eqns:
      name, size = equation.params.get('name'), equation.outvars[0].aval.size
      if name == convolve_pair.__name__:
        kernels = [operand.aval for operand in equation.invars[2:]]
        outputs = sum(kernel.shape[-1] for kernel in kernels)
        madds = size // outputs * sum(kernel.size for kernel in kernels)
        products.append((False, madds, size))
      elif name == convolve.__name__ or equation.primitive.name == 'dot_general':
        kernel = equation.invars[1].aval
        madds = size * kernel.size // kernel.shape[-1]
        products.append((name != convolve.__name__, madds, size))
      else:
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
          walk(inner)

  walk(jax.make_jaxpr(phase.model.apply)(phase.state.weights.variables, images).jaxpr)
  return products


def matrix_product(dtype: str) -> tuple[Callable[[int], None], float]:
  """Makes the yardstick for operations: a large matrix product on one device.

  Args:
    dtype: Type of the matrices.

  Returns:
    A function that multiplies a given number of times, and the number of operations per product,
    two per multiply-add.
  """
  size = 2048 if jax.default_backend() == 'cpu' else 8192
  matrix = jnp.full((size, size), 1 / size, dtype)
  multiply = jax.jit(jnp.matmul)

  def run(count):
    product = matrix
    for _ in range(count):
      product = multiply(product, matrix)
    product.block_until_ready()

  return run, 2 * size**3


def triad() -> tuple[Callable[[int], None], float]:
  """Makes the yardstick for memory traffic: a large sum a + 2 b on one device.

  Returns:
    A function that adds a given number of times, and the number of bytes per sum: two arrays are
    read and one is written.
  """
  size = 2**26 if jax.default_backend() == 'cpu' else 2**28
  total, addend = jnp.zeros(size), jnp.ones(size)
  # The sum overwrites `a`, since the first write to new pages is slow on CPU.
  add = jax.jit(lambda a, b: a + 2 * b, donate_argnums=0)

  def run(count):
    nonlocal total
    for _ in range(count):
      total = add(total, addend)
    total.block_until_ready()

  return run, 3 * total.nbytes
