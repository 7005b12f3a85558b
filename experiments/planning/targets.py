"""Accelerators to plan for: their published figures, and devices that XLA compiles for.

None of them needs to be present. A target is written as 'v5e:2x4' (a TPU slice with its topology),
'h100' or 'h100:8' (GPUs of one host), or 'cpu'.
"""

import dataclasses
import importlib.metadata
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.experimental import topologies

from imta_jax.errors import UsageError


@dataclasses.dataclass(frozen=True)
class Chip:
  """Published figures of an accelerator.

  Attributes:
    rates: Matrix operations per second, by the type that the network computes in.
    bandwidth: Bytes per second of its memory.
    memory: Bytes of its memory.
    interconnect: Bytes per second that it sends to the other chips, in one direction.
    seconds_per_launch: The least time that a kernel takes, or 0 where the program is one kernel: in
      a CUDA graph, and outside, where the host starts it.
    gpu: For GPUs, what XLA's target configuration says of it; see `_target_config`.
  """

  rates: Mapping[str, float]
  bandwidth: float
  memory: float
  interconnect: float
  seconds_per_launch: tuple[float, float] = (0.0, 0.0)
  gpu: Mapping[str, Any] | None = None


def _tpu(rate, bandwidth, gibibytes, interconnect):
  # Matrix units multiply bfloat16; by default JAX rounds float32 to it there.
  rates = {'bfloat16': rate, 'float32': rate}
  return Chip(rates, bandwidth, gibibytes * 2**30, interconnect)


def _gpu(bfloat16, tf32, bandwidth, interconnect, **gpu):
  # By default JAX multiplies float32 as TF32 there.
  rates = {'bfloat16': bfloat16, 'float32': tf32}
  return Chip(rates, bandwidth, gpu['memory'], interconnect, _SECONDS_PER_LAUNCH, gpu)


# A kernel that does nothing takes 1 to 3 µs by common reports. Assumed, not measured: the least of
# that in a CUDA graph, and twice as long where the host starts each kernel.
_SECONDS_PER_LAUNCH = (1e-6, 2e-6)

# TPUs: Google Cloud's pages on each version; the interconnect is half of the bidirectional figure.
# GPUs: NVIDIA's data sheets, SXM form, dense rates; NVLink likewise halved.
CHIPS = {
  'v4': _tpu(275e12, 1.228e12, 32, 150e9),
  'v5e': _tpu(197e12, 0.819e12, 16, 200e9),
  'v5p': _tpu(459e12, 2.765e12, 95, 600e9),
  'v6e': _tpu(918e12, 1.640e12, 32, 400e9),
  'a100': _gpu(
    312e12, 156e12, 2.039e12, 300e9,
    name='NVIDIA A100-SXM4-80GB', capability=(8, 0), cores=108, fpus_per_core=64, clock_ghz=1.41,
    shared_memory_per_core=164, l2_mebibytes=40, memory=80 * 2**30,
  ),
  'h100': _gpu(
    989e12, 495e12, 3.35e12, 450e9,
    name='NVIDIA H100 80GB HBM3', capability=(9, 0), cores=132, fpus_per_core=128, clock_ghz=1.98,
    shared_memory_per_core=228, l2_mebibytes=50, memory=80 * 2**30,
  ),
  'h200': _gpu(
    989e12, 495e12, 4.8e12, 450e9,
    name='NVIDIA H200', capability=(9, 0), cores=132, fpus_per_core=128, clock_ghz=1.98,
    shared_memory_per_core=228, l2_mebibytes=50, memory=141 * 10**9,
  ),
  'b200': _gpu(
    2250e12, 1125e12, 8.0e12, 900e9,
    name='NVIDIA B200', capability=(10, 0), cores=148, fpus_per_core=128, clock_ghz=1.965,
    shared_memory_per_core=228, l2_mebibytes=126, memory=180 * 10**9,
  ),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Target:
  """What to plan for.

  Attributes:
    name: As it was written.
    chip: Published figures of each device; None for the CPU, which has none.
    devices: What XLA compiles for.
    compiler: Name and version of the package that holds the compiler.
    compiler_options: Options of compilation that the target needs.
  """

  name: str
  chip: Chip | None
  devices: Sequence[Any]
  compiler: str
  compiler_options: Mapping[str, Any]


def prepare_environment() -> None:
  """Keeps JAX from looking for accelerators; to be called before JAX is used."""
  os.environ['JAX_PLATFORMS'] = 'cpu'
  os.environ['TPU_SKIP_MDS_QUERY'] = '1'  # Else libtpu asks a server that only Cloud TPUs have.
  os.environ['ALLOW_MULTIPLE_LIBTPU_LOAD'] = '1'  # Several plans may be compiled at once.
  jax.config.update('jax_platforms', 'cpu')


def open_target(name: str) -> Target:
  """Opens a target.

  Args:
    name: See the module.

  Raises:
    UsageError: If there is no such target, or its compiler is not installed.
  """
  kind, _, extent = name.partition(':')
  if kind == 'cpu' and not extent:
    return Target(name, None, jax.devices('cpu'), _find_compiler(name, 'cpu', ('jaxlib',)), {})
  if kind not in CHIPS:
    raise UsageError(f'--target={name} is unknown: choose one of {", ".join((*CHIPS, "cpu"))}')
  chip = CHIPS[kind]
  if chip.gpu is None:
    compiler = _find_compiler(name, 'tpu', ('libtpu',))
    return Target(name, chip, _tpu_devices(name, kind, extent), compiler, {})
  compiler = _find_compiler(name, 'cuda', ('jax-cuda13-plugin', 'jax-cuda12-plugin'))
  # Autotuning would need the device.
  options = {'xla_gpu_autotune_level': 0}
  if chip.gpu['capability'] < (9, 0):
    # Without autotuning XLA finds no tiles there for some narrow products of its own.
    options['xla_gpu_enable_triton_gemm'] = False
  return Target(name, chip, _gpu_devices(name, chip, extent), compiler, options)


def _find_compiler(target, extra, packages):
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
    example = '2x4' if kind in ('v5e', 'v6e') else '2x2x1'
    raise UsageError(f'--target={name} lacks a topology, as in {kind}:{example}')
  # One chip is less than the host that the compiler takes for granted.
  options = {'chips_per_host_bounds': (1, 1, 1)} if set(extent) <= set('1x') else {}
  try:
    topology = topologies.get_topology_desc(platform='tpu', topology_name=name, **options)
  except Exception as error:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    raise UsageError(f'--target={name} is not a TPU slice: {reason}') from error
  return topology.devices


def _gpu_devices(name, chip, extent):
  if extent not in ('', *map(str, range(1, 9))):
    raise UsageError(f'--target={name}: the number of GPUs is {extent!r}, it must be from 1 to 8')
  shape = f'1x{extent or 1}x1'
  jax.devices()  # Registers the plug-in.
  topology = topologies.get_topology_desc(
    platform='cuda', topology_name=shape, topology=shape, target_config=_target_config(chip)
  )
  return topology.devices


def _target_config(chip: Chip) -> str:
  """A GPU as XLA describes it to itself, in text form."""
  gpu = chip.gpu
  major, minor = gpu['capability']
  features = 'ACCELERATED_FEATURES' if major >= 9 else 'NONE'
  return f"""
    gpu_device_info {{
      threads_per_block_limit: 1024
      threads_per_warp: 32
      shared_memory_per_block: {48 * 2**10}
      shared_memory_per_block_optin: {(gpu['shared_memory_per_core'] - 1) * 2**10}
      shared_memory_per_core: {gpu['shared_memory_per_core'] * 2**10}
      threads_per_core_limit: 2048
      core_count: {gpu['cores']}
      fpus_per_core: {gpu['fpus_per_core']}
      block_dim_limit_x: {2**31 - 1}
      block_dim_limit_y: {2**16 - 1}
      block_dim_limit_z: {2**16 - 1}
      thread_dim_limit_x: 1024
      thread_dim_limit_y: 1024
      thread_dim_limit_z: 64
      registers_per_core_limit: {2**16}
      registers_per_block_limit: {2**16}
      memory_bandwidth: {int(chip.bandwidth)}
      l2_cache_size: {gpu['l2_mebibytes'] * 2**20}
      clock_rate_ghz: {gpu['clock_ghz']}
      device_memory_size: {gpu['memory']}
      cuda_compute_capability {{ major: {major} minor: {minor} feature_extension: {features} }}
      driver_version: "13.0.0"
      runtime_version: "13.0.0"
      compile_time_toolkit_version: "13.0.0"
      dnn_version: "9.10.0"
    }}
    platform_name: "CUDA"
    dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
    device_description_str: "{gpu['name']}"
  """
