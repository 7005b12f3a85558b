"""Records what the benchmarks' PyTorch network computes, so that its tests need no PyTorch.

    pip install torch && python tests/benchmarks/record_torch_peer.py

To be run after each change of experiments/benchmarks/torch_peer.py.
"""

import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

SOURCE = Path(__file__).parents[2] / 'experiments/benchmarks/torch_peer.py'
RECORD = Path(__file__).parents[1] / 'data/torch_peer.npz'
FIELDS = {
  'num_exits': 3,
  'base': 2,
  'step': 1,
  'step_mode': 'even',
  'channels': 4,
  'growth_rate': 4,
  'scale_factors': (1, 2, 4),
  'bottleneck_factors': (1, 2, 4),
  'prune': 'max',
  'reduction': 0.5,
  'bottleneck': True,
  'stem': 'cifar',
}
OPTIONS = (
  {},
  {'step_mode': 'lin_grow', 'step': 2, 'growth_rate': 5},
  {'prune': 'min', 'num_exits': 4},
  {'bottleneck': False, 'reduction': 0},
  {'stem': 'imagenet', 'scale_factors': (1, 2, 4, 4), 'bottleneck_factors': (1, 2, 4, 4)},
)
GRADIENT_EQUILIBRIUM = ('all', 'coarsest')
OFA = {'alpha': 0.1, 'temperature': 3.0, 'class_reduction': 'sum'}
SGD = {'learning_rate': 1e-2, 'momentum': 0.9, 'nesterov': True, 'weight_decay': 1e-2}
STEPS = 5


def checksum() -> str:
  """Returns the checksum of the recorded code."""
  return hashlib.sha256(SOURCE.read_bytes()).hexdigest()


def draw_batch() -> tuple[np.ndarray, np.ndarray]:
  """Draws images [8, 32, 32, 3], float32, and labels [8]."""
  random = np.random.default_rng(0)
  return random.standard_normal((8, 32, 32, 3), np.float32), random.integers(10, size=8)


def draw_state(shapes: Mapping[str, Sequence[int]]) -> dict[str, np.ndarray]:
  """Draws weights and batch statistics, of which none is special."""
  random = np.random.default_rng(1)
  return {
    name: (
      random.uniform(-0.2, 0.2, shape)
      + (len(shape) == 1 and name.endswith(('weight', 'running_var')))
    ).astype(np.float32)
    for name, shape in sorted(shapes.items())
  }


def sample(array: np.ndarray) -> np.ndarray:
  """Returns up to 256 evenly spaced entries of an array."""
  flat = np.ravel(array)
  return flat[np.linspace(0, flat.size - 1, min(flat.size, 256)).astype(int)]


def shapes_of(network) -> dict[str, list[int]]:
  """Returns {name: shape} of the weights and batch statistics of a PyTorch network."""
  state = network.state_dict()
  return {name: [*x.shape] for name, x in state.items() if 'num_batches_tracked' not in name}


def main() -> None:
  """Writes RECORD."""
  import torch

  sys.path.insert(0, str(SOURCE.parent))
  import torch_peer

  images, labels = draw_batch()
  batch = torch.from_numpy(images.transpose(0, 3, 1, 2).copy()), torch.from_numpy(labels)
  record = {'checksum': checksum()}

  def record_gradients(prefix, network):
    for name, parameter in network.named_parameters():
      if parameter.requires_grad:  # What no exit reads has no gradient, that is, zeros.
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        record[f'{prefix}/gradients/{name}'] = sample(gradient.numpy())

  options = [torch_peer.msdnet(10, 'all', **(FIELDS | changes)) for changes in OPTIONS]
  record['shapes'] = json.dumps([shapes_of(network) for network in options])

  for kind in GRADIENT_EQUILIBRIUM:
    network = torch_peer.msdnet(10, kind, **FIELDS)
    torch_peer.load(network, draw_state(shapes_of(network)))
    record[f'{kind}/logits'] = network.train()(batch[0]).detach().numpy()
    loss = torch_peer.loss_of_phase_one(network, *batch)
    loss.backward()
    record[f'{kind}/loss'] = loss.item()
    record_gradients(kind, network)

  network = torch_peer.PhaseTwoNetwork(torch_peer.msdnet(10, 'all', **FIELDS))
  shapes = shapes_of(network)
  torch_peer.load(network, draw_state(shapes))
  loss = torch_peer.loss_of_phase_two(network.train(), *batch, **OFA)
  loss.backward()
  record['phase_2/shapes'] = json.dumps(shapes)
  record_gradients('phase_2', network)
  step = torch_peer.TrainingStep(
    network, lambda *args: torch_peer.loss_of_phase_two(*args, **OFA), **SGD
  )
  record['phase_2/losses'] = [step(*batch).item() for _ in range(STEPS)]
  np.savez_compressed(RECORD, **record)


if __name__ == '__main__':
  main()
