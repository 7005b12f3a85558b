"""Compiler options: CUDA graphs on one GPU, if XLA has them."""

import jax
import pytest

from imta_jax.adaptive import compiler
from imta_jax.training import steps


@pytest.fixture
def on_gpu(monkeypatch):
  """As if the programs of this machine were compiled for GPUs, whose options XLA knows here too."""
  monkeypatch.setattr(compiler.jax, 'default_backend', lambda: 'gpu')
  compiler.compiler_options.cache_clear()
  yield
  compiler.compiler_options.cache_clear()


def test_a_program_of_one_gpu_is_one_graph(on_gpu):
  whole, concurrent = (compiler.compiler_options(name) for name in ('whole', 'concurrent'))
  assert 'CONVOLUTION' in whole['xla_gpu_enable_command_buffer']
  assert concurrent == {**whole, 'xla_gpu_command_buffer_scheduling_mode': 'CONCURRENT'}
  assert compiler.compiler_options() == compiler.compiler_options('partial') == {}
  for name in ('whole', 'concurrent'):
    assert compiler.compiler_options(name, num_devices=2) == {}


def test_options_that_xla_lacks_are_left_out(on_gpu, monkeypatch):
  unknown = {'xla_gpu_enable_command_buffer': 'NO_SUCH_KIND'}
  monkeypatch.setitem(compiler._CUDA_GRAPHS, 'whole', unknown)
  assert compiler.compiler_options('whole') == {}


def test_steps_are_compiled_with_the_graphs_of_the_config(monkeypatch):
  asked = []
  monkeypatch.setattr(steps, 'compiler_options', lambda *arguments: asked.append(arguments) or {})
  steps.on_devices(lambda x: x, (0,), cuda_graphs='concurrent')
  assert asked == [('concurrent', jax.device_count())]
