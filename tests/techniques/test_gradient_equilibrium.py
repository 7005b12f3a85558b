"""Gradient Equilibrium: its factors, and Eq. 5 for each exit of a network."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imta_jax.techniques.gradient_equilibrium import equilibrium_factors, scale_gradient

NUM_EXITS = 3
PAIRS = [(i, j) for j in range(1, NUM_EXITS + 1) for i in range(1, j + 1)]


def test_scale_gradient_returns_its_input_and_scales_the_gradient():
  x = jnp.array([[1.0, -2.0, 3.0], [0.5, 0.0, -4.0]])
  np.testing.assert_array_equal(scale_gradient(x, 0.3), x)
  gradient = jax.grad(lambda x: (scale_gradient(x, 0.3) ** 3).sum())(x)
  np.testing.assert_allclose(gradient, 0.3 * 3 * x**2, rtol=1e-6)


def test_scale_gradient_works_under_jit_and_vmap_and_keeps_the_dtype():
  x = jnp.arange(4, dtype=jnp.bfloat16)
  gradient = jax.jit(jax.vmap(jax.grad(lambda x: scale_gradient(x, 0.5) * 8)))(x)
  assert gradient.dtype == jnp.bfloat16
  np.testing.assert_array_equal(gradient.astype(np.float32), np.full(4, 4.0))


def test_factors_of_three_exits():
  factors = [equilibrium_factors(exit, 3) for exit in (1, 2, 3)]
  np.testing.assert_allclose(factors, [(1 / 3, 2 / 3), (1 / 2, 1 / 2), (1, 0)])


@pytest.mark.parametrize('num_exits', [1, 2, 5, 8])
def test_factors_multiply_to_one_over_the_exits_left_whichever_exit_the_gradient_comes_from(
  num_exits,
):
  for i in range(1, num_exits + 1):
    for j in range(i, num_exits + 1):
      onward = [equilibrium_factors(exit, num_exits)[1] for exit in range(i, j)]
      product = np.prod(onward) * equilibrium_factors(j, num_exits)[0]
      np.testing.assert_allclose(product, 1 / (num_exits - i + 1))


@pytest.mark.parametrize('exit', [0, 4, -1])
def test_an_exit_that_does_not_exist_is_named(exit):
  with pytest.raises(ValueError, match=rf'exit {exit} does not exist.*1 to 3$'):
    equilibrium_factors(exit, 3)


@pytest.fixture(scope='module')
def results(random_variables, tiny_network):
  """{mode: (per exit, gradients of its loss to parameters and images; logits)}."""
  images = np.random.default_rng(1).standard_normal((2, 7), np.float32)
  by_mode = {}
  for mode in ('off', 'all', 'coarsest'):
    model = tiny_network(gradient_equilibrium=mode)
    params = random_variables(model, (7,))['params']

    @jax.jit
    @partial(jax.grad, argnums=(0, 1), has_aux=True)
    def gradients(params, images, weights, model=model):
      logits = model.apply({'params': params}, images)
      return weights @ (logits**2).sum(axis=(1, 2)), logits

    by_exit = [
      jax.device_get(gradients(params, images, weights))
      for weights in np.eye(NUM_EXITS, dtype=np.float32)
    ]
    by_mode[mode] = [gradient for gradient, _ in by_exit], by_exit[0][1]
  return by_mode


def gradients_of(results, mode, part, exit):
  """Returns gradients of the loss of an exit, counted from 1, to the parameters of a part."""
  params, _ = results[mode][0][exit - 1]
  leaves = jax.tree_util.tree_leaves_with_path(params[part])
  return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}


def assert_ratio(actual, expected, ratio):
  """Checks every gradient, and that some are not zero."""
  assert any(gradient.any() for gradient in expected.values())
  for name, gradient in expected.items():
    tolerance = 1e-5 * np.abs(gradient).max()
    np.testing.assert_allclose(actual[name], ratio * gradient, rtol=1e-4, atol=tolerance)


def test_forward_pass_is_unchanged(results):
  for mode in ('all', 'coarsest'):
    np.testing.assert_allclose(results[mode][1], results['off'][1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(('i', 'j'), PAIRS)
def test_gradient_of_exit_j_to_stage_i_is_divided_by_the_exits_left(results, i, j):
  ratio = 1 / (NUM_EXITS - i + 1)
  part = f'stages_{i - 1}'
  assert_ratio(gradients_of(results, 'all', part, j), gradients_of(results, 'off', part, j), ratio)


@pytest.mark.parametrize('j', range(1, NUM_EXITS + 1))
def test_gradient_of_every_exit_to_the_images_is_divided_by_the_exits(results, j):
  (_, actual), (_, expected) = (results[mode][0][j - 1] for mode in ('all', 'off'))
  assert_ratio({'images': actual}, {'images': expected}, 1 / NUM_EXITS)


@pytest.mark.parametrize('mode', ['all', 'coarsest'])
@pytest.mark.parametrize('j', range(1, NUM_EXITS + 1))
def test_gradient_to_an_exits_own_layers_is_unchanged(results, mode, j):
  for part in (f'exits_{j - 1}', f'classifiers_{j - 1}'):
    assert_ratio(gradients_of(results, mode, part, j), gradients_of(results, 'off', part, j), 1)


@pytest.mark.parametrize('mode', ['off', 'all', 'coarsest'])
def test_an_exit_has_no_gradient_to_later_stages(results, mode):
  for i, j in ((2, 1), (3, 1), (3, 2)):
    for gradient in gradients_of(results, mode, f'stages_{i - 1}', j).values():
      assert not gradient.any()


def test_coarsest_scales_the_coarsest_map_alone(results):
  off = gradients_of(results, 'off', 'stages_1', 3)
  coarsest = gradients_of(results, 'coarsest', 'stages_1', 3)
  to_fine = {name: gradient for name, gradient in off.items() if 'fine' in name}
  to_coarse = {name: gradient for name, gradient in off.items() if 'coarse' in name}
  assert to_fine and to_coarse
  assert_ratio(coarsest, to_fine, 1)
  assert_ratio(coarsest, to_coarse, 1 / 2)


@pytest.mark.parametrize(('i', 'j'), PAIRS)
def test_coarsest_agrees_with_all_exactly_where_an_exit_reads_its_own_stage(results, i, j):
  everything, coarsest = (
    np.concatenate(
      [leaf.ravel() for leaf in gradients_of(results, mode, f'stages_{i - 1}', j).values()]
    )
    for mode in ('all', 'coarsest')
  )
  difference = np.abs(coarsest - everything).max() / np.abs(everything).max()
  if i == j:
    assert difference < 1e-5
  else:
    assert difference > 1e-2
