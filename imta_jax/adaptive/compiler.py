"""Compiler options for each platform, for training as for inference."""

import functools

import jax

# YNNPACK's fusions make XLA's CPU programs slower to load, by seconds for a large program, and no
# faster.
_CPU_OPTIONS = {'xla_cpu_experimental_ynn_fusion_type': ''}
# What XLA puts into CUDA graphs; convolutions are not in its default, and cut a step into pieces.
# These were compiled, but not run on a GPU yet: nothing takes them by itself.
_WHOLE = {'xla_gpu_enable_command_buffer': 'FUSION,CUBLAS,CUBLASLT,CUDNN,CONVOLUTION'}
_CUDA_GRAPHS = {
  'whole': _WHOLE,
  'concurrent': {**_WHOLE, 'xla_gpu_command_buffer_scheduling_mode': 'CONCURRENT'},
  'partial': {},
}


def graph_options(cuda_graphs: str, num_devices: int = 1) -> dict[str, str]:
  """Compiler options for CUDA graphs.

  Args:
    cuda_graphs: See config.cuda_graphs.
    num_devices: Devices of the program. Those of several have collectives, and keep XLA's default.
  """
  return _CUDA_GRAPHS[cuda_graphs] if num_devices == 1 else {}


@functools.cache
def compiler_options(cuda_graphs: str = 'partial', num_devices: int = 1) -> dict[str, str]:
  """Options that pay on the platform in use; none where its version of XLA lacks them.

  Args:
    cuda_graphs: See `graph_options`.
    num_devices: See `graph_options`.

  Returns:
    Names and values.
  """
  of_platform = {'cpu': _CPU_OPTIONS, 'gpu': graph_options(cuda_graphs, num_devices)}
  options = of_platform.get(jax.default_backend(), {})
  try:
    jax.jit(lambda: 0, compiler_options=options)()
  except jax.errors.JaxRuntimeError:
    return {}
  return options
