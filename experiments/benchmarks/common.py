"""Shared by the benchmarks: phases set up as in training, the PyTorch peer, timing and tables."""

import dataclasses
import functools
import importlib.metadata
import importlib.util
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from imta_jax import config as config_lib
from imta_jax import runtime
from imta_jax.data import image_folder, in_memory, streamed
from imta_jax.data.dataset import Batch
from imta_jax.errors import UsageError
from imta_jax.interop.torch import to_state_dict
from imta_jax.models.multi_exit import MultiExitNetwork
from imta_jax.runtime import set_up_compilation_cache
from imta_jax.training import phases, steps, train_state
from imta_jax.training.packing import pack

# Number of training images, before any are held out for validation, and number of classes.
DATASETS = {
  'cifar10': (50_000, 10),
  'cifar100': (50_000, 100),
  'imagenet2012': (1_281_167, 1000),
  'mnist5k': (4_000, 10),
}
# A network and its variables.
Network = tuple[MultiExitNetwork, Mapping[str, Any]]
# Seconds that a turn takes, approximately, if its number of runs is not given.
_SECONDS_PER_TURN = 0.5


@dataclasses.dataclass(frozen=True)
class Task:
  """A phase, set up as in training, and noise to train on.

  Attributes:
    phase: The phase; its variables are perturbed, so that none has a special value such as 0.
    predecessor: Network and variables of the previous phase, or None for the first phase.
    images: [batch, height, width, channels], float32, on the host.
    labels: [batch], int32.
  """

  phase: phases.Phase
  predecessor: Network | None
  images: np.ndarray
  labels: np.ndarray

  @property
  def network(self) -> Network:
    """Network and variables of the phase."""
    return self.phase.model, self.phase.state.weights.variables

  def train_loop(self, cuda_graphs: str) -> tuple[Callable, train_state.TrainState, Any, Batch]:
    """Returns the mapped training loop, and the state, teacher and batches on the devices.

    The loop takes these and a number of steps, as in training: 1 on CPUs. Its steps alternate
    between two batches, so that nothing that depends on images is computed once for all steps.
    """
    batch = {
      name: array.reshape(jax.local_device_count(), -1, *array.shape[1:])
      for name, array in (('image', self.images), ('label', self.labels))
    }
    source = jax.pmap(lambda x: jax.tree.map(lambda x: jnp.stack([x, x[::-1]]), x))(batch)

    def draw(source, step):
      return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, step % 2, 0, False), source)

    on_cpu = jax.default_backend() == 'cpu'
    loop = steps.make_train_loop(
      self.phase.train_step, draw, dtype=self.phase.model.dtype, one_step=on_cpu
    )
    axes = (None, None, 0, None)
    loop = steps.on_devices(loop, axes, donated=(0,), cuda_graphs=cuda_graphs)
    state = jax.tree.map(jnp.copy, self.phase.state)  # The loop takes its memory.
    return loop, *runtime.replicate((state, pack(self.phase.teacher))), source


def make_task(config: ConfigDict, index: int, batch_size: int) -> Task:
  """Makes the task of a phase.

  Args:
    config: A complete config.
    index: The phase, counted from 0.
    batch_size: Images per step, on all devices together.

  Raises:
    UsageError: If the config, the phase or the batch size is invalid.
  """
  if batch_size < 1 or batch_size % jax.device_count():
    raise UsageError(f'batch size {batch_size} is not a multiple of {jax.device_count()} devices')
  random = np.random.default_rng(config.seed)
  perturb = functools.partial(_perturb, random)
  phase, predecessor = set_up_without_data(config, index, batch_size, perturb)
  shape, num_classes = config_lib.image_shape(config), phase.model.num_classes
  images = random.standard_normal((batch_size, *shape), np.float32)
  labels = random.integers(num_classes, size=batch_size, dtype=np.int32)
  return Task(phase, predecessor, images, labels)


def set_up_without_data(
  config: ConfigDict,
  index: int,
  batch_size: int,
  change: Callable[[np.ndarray], np.ndarray] = lambda variable: variable,
) -> tuple[phases.Phase, Network | None]:
  """Sets up a phase as training does, without its data set.

  Args:
    config: A complete config whose data set is in `DATASETS`, or a folder of images.
    index: The phase, counted from 0.
    batch_size: Images per step, on all devices together.
    change: Function that is applied to each variable of each phase.

  Returns:
    The phase, and network and variables of the previous phase, or None for the first phase.

  Raises:
    UsageError: If the config or the phase is invalid.
  """
  if not 0 <= index < len(config.phases):
    raise UsageError(f'phase {index + 1} does not exist: the config has 1 to {len(config.phases)}')
  config = config.copy_and_resolve_references()
  config.batch_size = batch_size
  _, num_classes = _dataset(config)
  phase, predecessor = None, None
  for number in range(index + 1):
    if phase is not None:
      predecessor = phase.model, phase.state.weights.variables
    phase = phases.Phase(
      config,
      number,
      predecessor,
      num_classes=num_classes,
      image_shape=config_lib.image_shape(config),
      steps_per_epoch=num_train_images(config) // batch_size,
    )
    changed = {
      name: pack(jax.tree.map(change, getattr(phase.state, name).tree))
      for name in ('trained', 'frozen', 'batch_stats')
    }
    phase.state = phase.state.replace(**changed)
  return phase, predecessor


def abstract_train_loop(
  config: ConfigDict, phase: phases.Phase, devices: Sequence[jax.Device], *, one_step: bool
) -> tuple[Any, tuple]:
  """Returns the mapped training loop of a phase for devices that need not be present.

  Args:
    config: The phase's config.
    phase: The phase.
    devices: The devices to compile for.
    one_step: Whether the loop takes one step, as on CPUs.

  Returns:
    The loop, which can be lowered, and the shapes of its arguments.
  """
  shape, num_devices = config_lib.image_shape(config), len(devices)
  if config.dataset.in_memory:
    draw, axes = functools.partial(in_memory.draw_batch, config), in_memory.SOURCE_AXES
    num_images = num_train_images(config)
    source = (
      jax.ShapeDtypeStruct((num_images, *shape), np.uint8),
      jax.ShapeDtypeStruct((num_images,), np.int32),
      jax.eval_shape(functools.partial(in_memory.plan_epoch, config, num_images), np.int32(0)),
      jax.ShapeDtypeStruct((num_devices,), np.int32),
    )
  else:
    draw, axes = functools.partial(streamed.draw_batch, config), streamed.SOURCE_AXES
    leading = (num_devices, 1, config.batch_size // num_devices)
    source = {
      'image': jax.ShapeDtypeStruct((*leading, *shape), np.uint8),
      'label': jax.ShapeDtypeStruct(leading, np.int32),
    }
  loop = steps.make_train_loop(phase.train_step, draw, dtype=phase.model.dtype, one_step=one_step)
  loop = steps.on_devices(loop, (None, None, axes, None), donated=(0,), devices=devices)
  state, teacher = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), (phase.state, pack(phase.teacher))
  )
  return loop, (state, teacher, source, jax.ShapeDtypeStruct((), np.int32))


def num_train_images(config: ConfigDict) -> int:
  """Returns the number of images that a config trains on."""
  return _dataset(config)[0] - config.dataset.validation_size


def _perturb(random, leaf):
  """Adds noise to a variable, too little to change the scale of the network's activations."""
  fan_in = leaf.size // leaf.shape[-1]
  return leaf + random.uniform(-0.1, 0.1, leaf.shape).astype(np.float32) / np.sqrt(fan_in)


def _dataset(config):
  """Returns the numbers of training images, with those for validation, and of classes."""
  if config.dataset.name == image_folder.NAME:
    folder = image_folder.scan(config.dataset.data_dir)
    num_images = len(folder.paths['train']) + config.dataset.validation_size
    return num_images, len(folder.class_names)
  try:
    return DATASETS[config.dataset.name]
  except KeyError:
    raise UsageError(
      f'config.dataset.name is {config.dataset.name!r}, but the benchmarks only have the sizes of '
      f'{", ".join(DATASETS)}'
    ) from None


def ours(task: Task, cuda_graphs: str) -> Callable[[int], None]:
  """Returns a function that runs a given number of training steps and waits for them."""
  train, state, teacher, source = task.train_loop(cuda_graphs)

  def run(count):
    nonlocal state
    on_cpu = jax.default_backend() == 'cpu'
    for num_steps in [1] * count if on_cpu else [count]:
      state, _ = train(state, teacher, source, np.int32(num_steps))
    jax.block_until_ready(state)

  return run


def is_installed(package: str) -> bool:
  """Returns whether a package is installed."""
  return importlib.util.find_spec(package) is not None


def peer_network(
  config: ConfigDict, phase: ConfigDict, network: Network, predecessor: Network | None
) -> Any:
  """Returns a network in PyTorch, with the same weights, on the device.

  Args:
    config: A complete config.
    phase: The config of the phase.
    network: Network and variables.
    predecessor: Those of the previous phase, or None for the first phase.

  Raises:
    UsageError: If the peer does not implement this network.
  """
  import torch_peer

  fields = {**config.model}
  if fields.pop('name') != 'msdnet' or phase.collaboration not in ('off', 'network'):
    raise UsageError("the peer implements only MSDNet with collaboration 'off' or 'network'")
  del fields['dtype'], fields['remat']
  model, variables = network
  peer = torch_peer.msdnet(
    model.num_classes, phase.gradient_equilibrium, len(config.dataset.mean), **fields
  )
  state = to_state_dict(variables, model)
  if phase.collaboration == 'network':
    peer = torch_peer.PhaseTwoNetwork(peer, phase.stop_collaboration_gradient)
    model, variables = predecessor
    teacher = to_state_dict(variables, model)
    state = {f'net.{name}': value for name, value in teacher.items()} | state
  torch_peer.load(peer, state)
  return peer.to(torch_device())


def torch_device() -> str:
  """Returns the name of PyTorch's device, of the same kind as the one that JAX uses."""
  return 'cuda' if jax.default_backend() == 'gpu' else 'cpu'


def to_torch(task: Task) -> tuple[Any, Any]:
  """Returns images [batch, channels, height, width] and labels as tensors on the device."""
  import torch

  images = torch.from_numpy(np.ascontiguousarray(task.images.transpose(0, 3, 1, 2)))
  labels = torch.from_numpy(task.labels.astype(np.int64))
  return images.to(torch_device()), labels.to(torch_device())


def check_peer(config: ConfigDict, index: int) -> float:
  """Compares the peer's logits of all exits with ours, in float32 on four images.

  Args:
    config: A complete config.
    index: The phase, counted from 0.

  Returns:
    The largest difference, relative to the largest logit.

  Raises:
    RuntimeError: If the difference is not below 1e-4.
  """
  import torch

  config = config.copy_and_resolve_references()
  config.model.dtype = 'float32'
  task = make_task(config, index, 4)
  with jax.default_matmul_precision('highest'):
    model, variables = task.network
    logits = np.asarray(jax.jit(model.apply)(variables, task.images))
  precision = torch.get_float32_matmul_precision()
  torch.set_float32_matmul_precision('highest')
  with torch.inference_mode(), torch.backends.cudnn.flags(allow_tf32=False):
    peer = peer_network(config, task.phase.config, task.network, task.predecessor).eval()
    peers = peer(to_torch(task)[0]).cpu().numpy()
  torch.set_float32_matmul_precision(precision)
  difference = float(np.abs(logits - peers).max() / np.abs(logits).max())
  if not difference < 1e-4:
    raise RuntimeError(
      f'the logits of the peer differ from ours by {difference:.1e} of the largest logit'
    )
  return difference


def interleave(
  contestants: Mapping[str, Callable[[int], None]], repeats: int, count: int | None = None
) -> dict[str, list[float]]:
  """Times functions in turns, A B A B, so that other load on the machine affects all alike.

  Args:
    contestants: Functions that run something a given number of times and wait until it is done.
    repeats: Number of turns per function.
    count: Number of runs per turn; by default as many as take about half a second.

  Returns:
    For each function, the average seconds per run of each turn.
  """
  counts = {}
  for name, run in contestants.items():
    run(1)  # Compile.
    start = time.perf_counter()
    run(1)
    seconds = time.perf_counter() - start
    counts[name] = count or max(1, round(_SECONDS_PER_TURN / seconds))
  timings = {name: [] for name in contestants}
  for _ in range(repeats):
    for name, run in contestants.items():
      run(1)  # Refill the caches and wake the threads.
      start = time.perf_counter()
      run(counts[name])
      timings[name].append((time.perf_counter() - start) / counts[name])
  return timings


def spread(values: Sequence[float], digits: int) -> str:
  """Formats the median of values, with the lowest and the highest if they differ."""
  low, middle, high = min(values), statistics.median(values), max(values)
  extremes = f' ({low:,.{digits}f}–{high:,.{digits}f})' if low < high else ''
  return f'{middle:,.{digits}f}{extremes}'


def set_up() -> None:
  """Lets JAX and PyTorch share the device, and keeps compiled programs between runs.

  Must be called before JAX or PyTorch computes anything.
  """
  os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')
  set_up_compilation_cache()
  jax.devices()  # Load the CUDA libraries that JAX needs before PyTorch loads its own.
  if is_installed('torch'):
    import torch

    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision('high')  # TF32, as JAX computes float32 on GPUs.


def machine() -> str:
  """Describes this machine: devices, processor and versions."""
  cpu = platform.processor()
  if Path('/proc/cpuinfo').exists():
    lines = Path('/proc/cpuinfo').read_text().splitlines()
    names = [line.partition(':')[2].strip() for line in lines if line.startswith('model name')]
    cpu = names[0] if names else cpu
  versions = [f'Python {platform.python_version()}']
  for name in ('jax', 'flax', 'torch'):
    if importlib.util.find_spec(name):
      versions.append(f'{name} {importlib.metadata.version(name)}')
  accelerator = f'{jax.device_count()} × {jax.devices()[0].device_kind}'
  return f'{accelerator}; {os.cpu_count()} cores of {cpu or "a processor"}; {", ".join(versions)}'


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
  """Returns a Markdown table with aligned columns."""
  cells = [list(map(str, row)) for row in (header, *rows)]
  widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
  lines = ['| ' + ' | '.join(map(str.ljust, row, widths)) + ' |' for row in cells]
  lines.insert(1, '| ' + ' | '.join('-' * width for width in widths) + ' |')
  return '\n'.join(lines)


def write_json(path: str | None, content: Any) -> None:
  """Writes results to a file, if a path is given."""
  if path:
    Path(path).write_text(json.dumps(content, indent=2) + '\n', encoding='utf-8')
