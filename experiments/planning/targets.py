"""Accelerators that XLA compiles for; none of them needs to be present.

A target is 'v5e:2x4' (a TPU slice with its topology), 'h100' or 'h100:8' (GPUs of one host), or
'cpu'.
"""

import dataclasses
import importlib.metadata
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from imta_jax.errors import UsageError

# Bytes of memory per chip: Google Cloud's pages on each version.
TPUS = {'v4': 32 * 2**30, 'v5e': 16 * 2**30, 'v5p': 95 * 2**30, 'v6e': 32 * 2**30}


class Gpu(NamedTuple):
  """Properties of a GPU that XLA's compiler needs: NVIDIA's data sheets, SXM form."""

  name: str
  capability: tuple[int, int]
  cores: int
  fpus_per_core: int
  clock_ghz: float
  shared_kibibytes: int
  l2_mebibytes: int
  memory: int
  bandwidth: float


GPUS = {
  'a100': Gpu('NVIDIA A100-SXM4-80GB', (8, 0), 108, 64, 1.41, 164, 40, 80 * 2**30, 2.039e12),
  'h100': Gpu('NVIDIA H100 80GB HBM3', (9, 0), 132, 128, 1.98, 228, 50, 80 * 2**30, 3.35e12),
  'h200': Gpu('NVIDIA H200', (9, 0), 132, 128, 1.98, 228, 50, 141 * 10**9, 4.8e12),
  'b200': Gpu('NVIDIA B200', (10, 0), 148, 128, 1.965, 228, 126, 180 * 10**9, 8.0e12),
}


@dataclasses.dataclass(frozen=True)
class Target:
  """A kind and number of devices to compile for.

  Attributes:
    name: As given on the command line.
    devices: Devices that XLA compiles for.
    memory: Bytes of memory per device; None for the CPU.
    compiler: Name and version of the package with the compiler.
    compiler_options: Compiler options that GPUs need.
  """

  name: str
  devices: Sequence[Any]
  memory: int | None = None
  compiler: str = ''
  compiler_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def prepare_environment() -> None:
  """Keeps JAX from looking for accelerators; must be called before JAX is used."""
  os.environ['JAX_PLATFORMS'] = 'cpu'
  os.environ['TPU_SKIP_MDS_QUERY'] = '1'  # Else libtpu asks a server that only Cloud TPUs have.
  os.environ['ALLOW_MULTIPLE_LIBTPU_LOAD'] = '1'  # Several plans may be compiled at once.
  jax.config.update('jax_platforms', 'cpu')


def open_target(name: str) -> Target:
  """Opens a target.

  Args:
    name: See the module.

  Raises:
    UsageError: If the target is unknown, or its compiler is not installed.
  """
  kind, _, extent = name.partition(':')
  if kind in TPUS:
    compiler = _find_compiler(name, 'tpu', 'libtpu')
    return Target(name, _tpu_devices(name, kind, extent), TPUS[kind], compiler)
  if kind in GPUS:
    compiler = _find_compiler(name, 'cuda', 'jax-cuda13-plugin', 'jax-cuda12-plugin')
    options = {'xla_gpu_autotune_level': 0}  # Autotuning needs the device.
    if GPUS[kind].capability < (9, 0):
      # Without autotuning XLA finds no tiles there for some narrow products of its own.
      options['xla_gpu_enable_triton_gemm'] = False
    return Target(name, _gpu_devices(name, kind, extent), GPUS[kind].memory, compiler, options)
  if name == 'cpu':
    return Target(name, jax.devices('cpu'), compiler=_find_compiler(name, 'cpu', 'jaxlib'))
  raise UsageError(f'--target={name} is unknown: choose one of {", ".join((*TPUS, *GPUS, "cpu"))}')


def _find_compiler(target, extra, *packages):
  """Name and version of the first of the packages that is installed."""
  for package in packages:
    try:
      return f'{package} {importlib.metadata.version(package)}'
    except importlib.metadata.PackageNotFoundError:
      continue
  raise UsageError(
    f"--target={target}: its compiler is not installed: pip install 'imta_jax[{extra}]'"
  )


def _tpu_devices(name, kind, extent):
  if not extent:
    raise UsageError(f'--target={name} lacks a topology, as in v5e:2x4 or v5p:2x2x1')
  # The compiler assumes a whole host unless the slice is declared to be a single chip.
  options = {'chips_per_host_bounds': (1, 1, 1)} if set(extent) <= set('1x') else {}
  try:
    return topologies.get_topology_desc(platform='tpu', topology_name=name, **options).devices
  except Exception as error:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    raise UsageError(f'--target={name} is not a TPU slice: {reason}') from error


def _gpu_devices(name, kind, extent):
  if extent not in ('', *map(str, range(1, 9))):
    raise UsageError(f'--target={name}: the number of GPUs is {extent!r}, it must be from 1 to 8')
  shape = f'1x{extent or 1}x1'
  jax.devices()  # Registers the plug-in.
  return topologies.get_topology_desc(
    platform='cuda', topology_name=shape, topology=shape, target_config=gpu_config(kind)
  ).devices


def gpu_config(kind: str) -> str:
  """Returns XLA's description of a GPU (a GpuTargetConfigProto in text form)."""
  gpu = GPUS[kind]
  major, minor = gpu.capability
  features = 'ACCELERATED_FEATURES' if major >= 9 else 'NONE'
  return f"""
    gpu_device_info {{
      threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
      shared_memory_per_block: {48 * 2**10}
      shared_memory_per_block_optin: {(gpu.shared_kibibytes - 1) * 2**10}
      shared_memory_per_core: {gpu.shared_kibibytes * 2**10}
      core_count: {gpu.cores} fpus_per_core: {gpu.fpus_per_core}
      block_dim_limit_x: {2**31 - 1} block_dim_limit_y: 65535 block_dim_limit_z: 65535
      thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
      registers_per_core_limit: 65536 registers_per_block_limit: 65536
      memory_bandwidth: {int(gpu.bandwidth)} l2_cache_size: {gpu.l2_mebibytes * 2**20}
      clock_rate_ghz: {gpu.clock_ghz} device_memory_size: {gpu.memory}
      cuda_compute_capability {{ major: {major} minor: {minor} feature_extension: {features} }}
      driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0"
      dnn_version: "9.10.0"
    }}
    platform_name: "CUDA"
    dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
    device_description_str: "{gpu.name}"
  """
