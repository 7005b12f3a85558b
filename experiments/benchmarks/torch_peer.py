"""MSDNet and its two training phases in plain PyTorch, as the benchmarks' peer.

Written for the benchmarks from the papers, independently of imta_jax. Parameters have the names of
the published checkpoints, so that `imta_jax.interop.torch.to_state_dict` converts weights.

    network = msdnet(100, 'all', **config.model)
    load(network, to_state_dict(variables, model))
    step = TrainingStep(network, loss_of_phase_one, learning_rate=0.1, momentum=0.9)
    loss = step(images, labels)
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ScaleGradient(torch.autograd.Function):
  """The identity, whose gradient is multiplied by a factor."""

  @staticmethod
  def forward(ctx, x, factor):
    ctx.factor = factor
    return x.view_as(x)

  @staticmethod
  def backward(ctx, gradient):
    return gradient * ctx.factor, None


def conv_norm_relu(inputs: int, outputs: int, kernel_size: int, stride: int = 1) -> list[nn.Module]:
  """Returns a convolution without bias, a batch norm and a ReLU."""
  return [
    nn.Conv2d(inputs, outputs, kernel_size, stride, kernel_size // 2, bias=False),
    nn.BatchNorm2d(outputs),
    nn.ReLU(inplace=True),
  ]


class Net(nn.Module):
  """A sequence of layers; the names of their parameters start with `net`."""

  def __init__(self, *layers: nn.Module):
    super().__init__()
    self.net = nn.Sequential(*layers)

  def forward(self, x: Tensor) -> Tensor:
    return self.net(x)


class FirstLayer(nn.Module):
  """Maps images to the first feature map of every scale."""

  def __init__(self, image_channels: int, widths: Sequence[int], stem: str):
    super().__init__()
    if stem == 'cifar':
      first = Net(*conv_norm_relu(image_channels, widths[0], 3))
    else:
      first = nn.Sequential(
        nn.Conv2d(image_channels, widths[0], 7, 2, 3),
        nn.BatchNorm2d(widths[0]),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(3, 2, 1),
      )
    coarser = [
      Net(*conv_norm_relu(finer, width, 3, 2))
      for finer, width in zip(widths, widths[1:], strict=False)
    ]
    self.layers = nn.ModuleList([first, *coarser])

  def forward(self, maps: list[Tensor]) -> list[Tensor]:
    (x,) = maps
    outputs = []
    for layer in self.layers:
      x = layer(x)
      outputs.append(x)
    return outputs


class ScaleLayer(nn.Module):
  """One scale of a dense layer: concatenates new channels to the feature map of the scale.

  Args:
    conv_normal: Computes new channels from the map of the same scale.
    conv_down: Computes new channels from the map of the next finer scale, or None.
  """

  def __init__(self, conv_normal: nn.Module, conv_down: nn.Module | None):
    super().__init__()
    self.conv_normal = conv_normal
    self.conv_down = conv_down

  def forward(self, same: Tensor, finer: Tensor | None) -> Tensor:
    new = [self.conv_normal(same)]
    if self.conv_down is not None:
      new.insert(0, self.conv_down(finer))
    return torch.cat([same, *new], dim=1)


class DenseLayer(nn.Module):
  """One multi-scale layer, with a scale layer for each scale that it writes, the coarsest ones."""

  def __init__(self, scale_layers: Sequence[ScaleLayer]):
    super().__init__()
    self.layers = nn.ModuleList(scale_layers)

  def forward(self, maps: list[Tensor]) -> list[Tensor]:
    written = len(self.layers)
    finer = [None, *maps][-written - 1 : -1]
    return [
      layer(same, below)
      for layer, same, below in zip(self.layers, maps[-written:], finer, strict=True)
    ]


class Transition(nn.Module):
  """A 1×1 convolution for each scale, which reduces the number of channels."""

  def __init__(self, inputs: Sequence[int], outputs: Sequence[int]):
    super().__init__()
    self.m = nn.ModuleList(
      Net(*conv_norm_relu(*widths, 1)) for widths in zip(inputs, outputs, strict=True)
    )

  def forward(self, maps: list[Tensor]) -> list[Tensor]:
    return [layer(x) for layer, x in zip(self.m, maps, strict=True)]


class Exit(nn.Module):
  """An exit: two convolutions of stride 2, average pooling and a linear layer."""

  def __init__(self, inputs: int, width: int, num_classes: int):
    super().__init__()
    self.m = nn.Sequential(
      Net(*conv_norm_relu(inputs, width, 3, 2)),
      Net(*conv_norm_relu(width, width, 3, 2)),
      nn.AvgPool2d(2),
      nn.Flatten(),
    )
    self.linear = nn.Linear(width, num_classes)


class PhaseOneNetwork(nn.Module):
  """Blocks and exits, with Gradient Equilibrium.

  Args:
    blocks: Modules from feature maps to feature maps, both ordered fine to coarse.
    exits: One for each block; it reads the coarsest map that the block returns.
    gradient_equilibrium: The maps between blocks whose gradients are rescaled: 'all', 'coarsest' or
      'off'.
  """

  def __init__(self, blocks: Sequence[nn.Module], exits: Sequence[Exit], gradient_equilibrium: str):
    super().__init__()
    self.blocks = nn.ModuleList(blocks)
    self.classifier = nn.ModuleList(exits)
    self.gradient_equilibrium = gradient_equilibrium

  def embed(self, images: Tensor) -> list[Tensor]:
    """Returns each exit's embedding [batch, width] of images [batch, channels, height, width]."""
    maps, embeddings = [images], []
    for index, (block, head) in enumerate(zip(self.blocks, self.classifier, strict=True)):
      maps = block(maps)
      coarsest = maps[-1]
      if self.gradient_equilibrium != 'off':
        exits_left = len(self.blocks) - index
        first = 0 if self.gradient_equilibrium == 'all' else len(maps) - 1
        onward = (exits_left - 1) / exits_left
        maps = maps[:first] + [ScaleGradient.apply(x, onward) for x in maps[first:]]
        coarsest = ScaleGradient.apply(coarsest, 1 / exits_left)
      embeddings.append(head.m(coarsest))
    return embeddings

  def forward(self, images: Tensor) -> Tensor:
    """Returns logits [exit, batch, class], float32."""
    embeddings = self.embed(images)
    return torch.stack(
      [head.linear(x).float() for head, x in zip(self.classifier, embeddings, strict=True)]
    )


class PhaseTwoNetwork(nn.Module):
  """The frozen network of phase I, in evaluation mode, with new collaborating classifiers."""

  def __init__(self, net: PhaseOneNetwork, stop_gradient: bool = True):
    super().__init__()
    self.net = net.requires_grad_(False)
    self.stop_gradient = stop_gradient
    widths = [head.linear.in_features for head in net.classifier]
    num_classes = net.classifier[0].linear.out_features
    self.isc_modules = nn.ModuleList(
      nn.Sequential(nn.Linear(num_classes, width), nn.BatchNorm1d(width), nn.ReLU(inplace=True))
      for width in widths[1:]
    )
    self.classifier = nn.ModuleList(
      nn.Linear(2 * width if index else width, num_classes) for index, width in enumerate(widths)
    )

  def train(self, mode: bool = True) -> nn.Module:
    super().train(mode)
    self.net.eval()
    return self

  def embed(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
    """Returns each exit's embedding [batch, width], and the teacher's logits [batch, class]."""
    with torch.no_grad():
      embeddings = self.net.embed(images)
      return embeddings, self.net.classifier[-1].linear(embeddings[-1]).float()

  def classify(self, embeddings: Sequence[Tensor]) -> Tensor:
    """Returns logits [exit, batch, class], float32."""
    logits = [self.classifier[0](embeddings[0])]
    for transfer, linear, x in zip(
      self.isc_modules, self.classifier[1:], embeddings[1:], strict=True
    ):
      previous = logits[-1].detach() if self.stop_gradient else logits[-1]
      logits.append(linear(torch.cat([x, transfer(previous)], dim=1)))
    return torch.stack([x.float() for x in logits])

  def forward(self, images: Tensor) -> Tensor:
    """Returns logits [exit, batch, class], float32."""
    embeddings, _ = self.embed(images)
    return self.classify(embeddings)


def msdnet(
  num_classes: int,
  gradient_equilibrium: str,
  image_channels: int = 3,
  *,
  num_exits: int,
  base: int,
  step: int,
  step_mode: str,
  channels: int,
  growth_rate: int,
  scale_factors: Sequence[int],
  bottleneck_factors: Sequence[int],
  prune: str,
  reduction: float,
  bottleneck: bool,
  stem: str,
) -> PhaseOneNetwork:
  """Makes an MSDNet.

  Args:
    num_classes: Number of classes.
    gradient_equilibrium: See PhaseOneNetwork.
    image_channels: Number of channels of the images.
    num_exits: Number of exits, and of blocks.
    base: Number of layers of the first block.
    step: See `step_mode`.
    step_mode: 'even': `step` layers per further block. 'lin_grow': `step * i + 1` in block i + 1.
    channels: Channels of the first layer, multiplied by the factor of each scale.
    growth_rate: Channels that a layer adds, multiplied by the factor of each scale.
    scale_factors: The factor of each scale, fine to coarse.
    bottleneck_factors: Width of the bottlenecks of each scale, relative to the 3×3 convolution.
    prune: 'max': scales are dropped at equal intervals. 'min': as late as possible.
    reduction: The fraction of the channels that transitions keep; 0 for no transitions.
    bottleneck: Whether a 1×1 convolution precedes each 3×3 convolution.
    stem: 'cifar' or 'imagenet'.

  Returns:
    The network of phase I.
  """
  num_scales = len(scale_factors)
  depths = [base] + [step if step_mode == 'even' else step * i + 1 for i in range(1, num_exits)]
  num_layers = sum(depths)
  interval = math.ceil(num_layers / num_scales)

  def branch(inputs, outputs, source, stride):
    layers = []
    if bottleneck:
      middle = min(inputs, bottleneck_factors[source] * outputs)
      layers = conv_norm_relu(inputs, middle, 1)
      inputs = middle
    return Net(*layers, *conv_norm_relu(inputs, outputs, 3, stride))

  def num_written(layer):
    if prune == 'max':
      return num_scales - (layer - 1) // interval
    return min(num_scales, num_layers - layer + 1)

  widths = {scale: channels * factor for scale, factor in enumerate(scale_factors)}
  unit_width, layer = channels, 0
  blocks, exits = [], []
  for depth in depths:
    layers = [] if blocks else [FirstLayer(image_channels, list(widths.values()), stem)]
    for _ in range(depth):
      layer += 1
      written = range(num_scales - num_written(layer), num_scales)
      read = sorted(widths)
      drops = len(read) > len(written)
      scale_layers, added = [], {}
      for scale in written:
        growth = growth_rate * scale_factors[scale]
        if scale == read[0]:
          scale_layers.append(ScaleLayer(branch(widths[scale], growth, scale, 1), None))
          added[scale] = growth
        else:
          half = growth // 2
          normal = branch(widths[scale], half, scale, 1)
          down = branch(widths[scale - 1], half, scale - 1, 2)
          scale_layers.append(ScaleLayer(normal, down))
          added[scale] = 2 * half
      layers.append(DenseLayer(scale_layers))
      widths = {scale: widths[scale] + added[scale] for scale in written}
      unit_width += growth_rate
      narrows = drops if prune == 'max' else layer in (num_layers // 3, 2 * num_layers // 3)
      if reduction and narrows:
        unit_width = math.floor(reduction * unit_width)
        narrow = {scale: unit_width * scale_factors[scale] for scale in written}
        layers.append(Transition(list(widths.values()), list(narrow.values())))
        widths = narrow
    blocks.append(nn.Sequential(*layers))
    coarsest = widths[num_scales - 1]
    exits.append(Exit(coarsest, 128 if stem == 'cifar' else coarsest, num_classes))
  return PhaseOneNetwork(blocks, exits, gradient_equilibrium)


def load(network: nn.Module, state: Mapping[str, np.ndarray]) -> None:
  """Loads all weights and batch statistics from {name: array}.

  Raises:
    RuntimeError: If an array is missing, unexpected or has another shape.
  """
  tensors = {name: torch.from_numpy(np.array(value)) for name, value in state.items()}
  missing, surplus = network.load_state_dict(tensors, strict=False)
  missing = [name for name in missing if not name.endswith('num_batches_tracked')]
  if missing or surplus:
    raise RuntimeError(f'missing weights: {missing}; unexpected weights: {surplus}')


def loss_of_phase_one(network: PhaseOneNetwork, images: Tensor, labels: Tensor) -> Tensor:
  """Returns the cross-entropy, summed over exits and averaged over images."""
  logits = network(images)
  return sum(F.cross_entropy(x, labels) for x in logits)


def loss_of_phase_two(
  network: PhaseTwoNetwork,
  images: Tensor,
  labels: Tensor,
  *,
  alpha: float,
  temperature: float,
  class_reduction: str,
) -> Tensor:
  """Returns the loss of one-for-all distillation from phase I's last exit.

  Args:
    network: The network of phase II.
    images: [batch, channels, height, width].
    labels: [batch].
    alpha: Weight of the cross-entropy against the distillation, at all exits but the last.
    temperature: Temperature of the distillation.
    class_reduction: 'sum' or 'mean' of the divergence over classes.

  Returns:
    The loss, summed over exits and averaged over images.
  """
  embeddings, teacher_logits = network.embed(images)
  *earlier, last = network.classify(embeddings)
  teacher = F.log_softmax(teacher_logits / temperature, dim=1)
  loss = F.cross_entropy(last, labels)
  for logits in earlier:
    student = F.log_softmax(logits / temperature, dim=1)
    divergence = F.kl_div(student, teacher, reduction='batchmean', log_target=True)
    if class_reduction == 'mean':
      divergence = divergence / logits.shape[1]
    loss = loss + alpha * F.cross_entropy(logits, labels)
    loss = loss + (1 - alpha) * temperature**2 * divergence
  return loss


class TrainingStep:
  """A training step with SGD; calling it returns the loss.

  Args:
    network: The network, on its device.
    loss_of: A function from (network, images, labels) to the loss.
    learning_rate: The constant learning rate.
    momentum: The momentum of SGD.
    nesterov: Whether to use Nesterov momentum.
    weight_decay: The weight decay of all trained parameters.
    dtype: 'float32', or 'bfloat16' for automatic mixed precision.
  """

  def __init__(
    self,
    network: nn.Module,
    loss_of: Callable[[nn.Module, Tensor, Tensor], Tensor],
    *,
    learning_rate: float,
    momentum: float,
    nesterov: bool = True,
    weight_decay: float = 1e-4,
    dtype: str = 'float32',
  ):
    self._network = network.train()
    self._loss_of = loss_of
    self._dtype = dtype
    self._sgd = functools.partial(
      torch.optim.SGD,
      [parameter for parameter in network.parameters() if parameter.requires_grad],
      lr=learning_rate,
      momentum=momentum,
      nesterov=nesterov,
      weight_decay=weight_decay,
    )
    self._optimizer = self._sgd()

  def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
    self._optimizer.zero_grad(set_to_none=True)
    with torch.autocast(images.device.type, torch.bfloat16, enabled=self._dtype == 'bfloat16'):
      loss = self._loss_of(self._network, images, labels)
    loss.backward()
    self._optimizer.step()
    return loss.detach()

  def tune(self, images: Tensor, labels: Tensor) -> str | None:
    """Makes the step fast: channels last, a fused optimizer, compiled loss and gradient.

    Args:
      images: [batch, channels, height, width] in channels-last memory format, which all later
        batches must have, too.
      labels: [batch].

    Returns:
      None, or the reason why nothing was compiled; the step then runs uncompiled.
    """
    self._network.to(memory_format=torch.channels_last)
    self._optimizer = self._sgd(fused=True)
    plain = self._loss_of
    # Without CUDA graphs, networks of many small layers wait for kernel launches.
    mode = 'reduce-overhead' if images.is_cuda else None
    torch.compiler.reset()  # Otherwise a second batch size is compiled for arbitrary sizes.
    self._loss_of = torch.compile(plain, mode=mode, dynamic=False)
    try:
      self(images, labels)
    except Exception as error:  # A missing or broken compiler may raise anything.
      self._loss_of = plain
      return f'{type(error).__name__}: {error}'.strip().splitlines()[0]
    return None
