"""Compiler options for each platform, for training as for inference."""

import functools

import jax

# YNNPACK's fusions make XLA's CPU programs slower to load, by seconds for a large program, and no
# faster.
_COMPILER_OPTIONS = {'cpu': {'xla_cpu_experimental_ynn_fusion_type': ''}}


@functools.cache
def compiler_options() -> dict[str, str]:
  """Options that pay on the platform in use; none where its version of XLA lacks them."""
  options = _COMPILER_OPTIONS.get(jax.default_backend(), {})
  try:
    jax.jit(lambda: 0, compiler_options=options)()
  except jax.errors.JaxRuntimeError:
    return {}
  return options
