"""What a training step cannot do without, and the rates of the machine at hand."""

from collections.abc import Callable

import jax
import jax.extend.core
import jax.numpy as jnp

from imta_jax.models.convolution import convolve
from imta_jax.phases import Phase


def work(phase: Phase, batch_size: int, image_shape: tuple[int, int, int]) -> dict[str, float]:
  """Matrix operations and bytes of memory traffic that a step needs on one device.

  Operations, two per multiply-add, of convolutions and dense layers: the forward pass and, for
  layers that are trained, the gradients of the weights and of the layer's input unless that is an
  image. Bytes: the result of each convolution is written once and read once; in phase I it, or its
  gradient, is read twice more. Parameters are read, and those trained are written, with their
  momentum. Caches that hold whole maps can do with fewer bytes.

  Args:
    phase: The phase.
    batch_size: Images per device.
    image_shape: (height, width, channels).

  Returns:
    'operations' and 'bytes'.
  """
  images = jax.ShapeDtypeStruct((batch_size, *image_shape), jnp.float32)
  products = _matrix_products(phase, images)
  forward = sum(madds for _, madds, _ in products)
  activations = sum(size for _, _, size in products) * phase.model.dtype.itemsize
  sizes = {
    name: sum(leaf.size for leaf in jax.tree.leaves(tree))
    for name, tree in phase.state.variables['params'].items()
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
  """(is dense layer, multiply-adds, output elements) of each layer of a forward pass, in order."""
  products = []

  def walk(jaxpr):
    for equation in jaxpr.eqns:
      is_convolution = equation.params.get('name') == convolve.__name__
      if is_convolution or equation.primitive.name == 'dot_general':
        size, kernel = equation.outvars[0].aval.size, equation.invars[1].aval
        madds = size * kernel.size // kernel.shape[-1]
        products.append((not is_convolution, madds, size))
      else:
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
          walk(inner)

  walk(jax.make_jaxpr(phase.model.apply)(phase.state.variables, images).jaxpr)
  return products


def matrix_product(dtype: str) -> tuple[Callable[[int], None], float]:
  """A yardstick for operations: a large matrix product on one device.

  Args:
    dtype: Type of the matrices.

  Returns:
    A function that multiplies a number of times, and the operations per time, two per multiply-add.
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
  """A yardstick for memory traffic: a large sum a + 2 b on one device.

  Returns:
    A function that adds a number of times, and the bytes per time: two arrays read, one written.
  """
  size = 2**26 if jax.default_backend() == 'cpu' else 2**28
  total, addend = jnp.zeros(size), jnp.ones(size)
  # A CPU's first write to new pages is slow, so the sum takes the place of `a`.
  add = jax.jit(lambda a, b: a + 2 * b, donate_argnums=0)

  def run(count):
    nonlocal total
    for _ in range(count):
      total = add(total, addend)
    total.block_until_ready()

  return run, 3 * total.nbytes
