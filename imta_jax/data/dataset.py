"""The interface of data sets.

A batch is {'image': float32, 'label': int32}, each [batch, …]; evaluation batches also have a
leading axis over local devices and 'mask', which is False for padding. Training batches are a pure
function of (seed, step), and are drawn on the devices, so that several steps need no host between
them.
"""

import abc
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from imta_jax.errors import UsageError

Batch = dict[str, jax.Array]


class Dataset(abc.ABC):
  """A data set with the splits 'train', 'validation' and 'test'.

  Attributes:
    class_names: One name per class.
    image_shape: (height, width, channels) of the images that a network reads.
    num_images: Number of images in each split.
    steps_per_epoch: Training batches per epoch; images that do not fill a batch are skipped.
    source_axes: The axis over local devices of what `draw` reads, for `steps.on_devices`.
  """

  class_names: Sequence[str]
  image_shape: tuple[int, int, int]
  num_images: dict[str, int]
  steps_per_epoch: int
  source_axes: Any

  @abc.abstractmethod
  def train_reader(self, phase: int, first_step: int) -> Callable[[int], Any]:
    """Starts to read training batches.

    Args:
      phase: Index of the training phase, each of which shuffles and crops anew.
      first_step: The step from which the phase is read, counted from 0.

    Returns:
      A function that takes a step, not before that of the last call, and returns what this step and
      those after it draw their batches from, for `draw`: up to the end of its epoch and to the next
      multiple of `config.steps_per_dispatch`, or of 1 if images are streamed.
    """

  @abc.abstractmethod
  def draw(self, source: Any, step: jax.Array) -> Batch:
    """Draws this device's part of a training batch; to be called inside a mapped step.

    Args:
      source: From the function that `train_reader` returns, the part of this device.
      step: The number of the step, counted from 0.

    Returns:
      The batch of this device.
    """

  @abc.abstractmethod
  def evaluation_batches(self, split: str) -> Iterator[Batch]:
    """Yields batches with every image of a split exactly once, over all hosts together."""

  @abc.abstractmethod
  def fingerprint(self) -> int:
    """Returns a checksum of the data, the same on any number of hosts and devices.

    It covers the names of the classes and what is in each split: pixels and labels of images in
    memory, names, sizes and samples of files that are streamed.
    """


def shuffle_number(phase: int, epoch: int) -> int:
  """Returns a number for the random draws of an epoch that no epoch of another phase has."""
  return phase * 2**20 + epoch


def check_labels(labels: np.ndarray, num_classes: int, name: str) -> None:
  """Checks that labels are classes.

  Raises:
    UsageError: On the first label that is no class; `name` is what the labels belong to.
  """
  wrong = labels[(labels < 0) | (labels >= num_classes)]
  if wrong.size:
    raise UsageError(
      f'{name} has the label {wrong[0]}, but its classes are 0 to {num_classes - 1}: correct the '
      'labels, or choose a split that has labels'
    )
