"""The interface of data sets, which yield batches for the local devices.

A batch is {'image': float32, 'label': int32}, each [local devices, batch per device, …]; evaluation
batches also have 'mask', which is False for padding. Training batches are a pure function of (seed,
step).
"""

import abc
from collections.abc import Iterator, Sequence

import jax

Batch = dict[str, jax.Array]


class Dataset(abc.ABC):
  """A data set with the splits 'train', 'validation' and 'test'.

  Attributes:
    class_names: One name per class.
    image_shape: (height, width, channels) of the images that a network reads.
    num_images: Number of images in each split.
    steps_per_epoch: Training batches per epoch; images that do not fill a batch are skipped.
  """

  class_names: Sequence[str]
  image_shape: tuple[int, int, int]
  num_images: dict[str, int]
  steps_per_epoch: int

  @abc.abstractmethod
  def train_batches(self, first_step: int) -> Iterator[Batch]:
    """Yields training batches without end, from step `first_step` on, counted from 0."""

  @abc.abstractmethod
  def evaluation_batches(self, split: str) -> Iterator[Batch]:
    """Yields batches with every image of a split exactly once, over all hosts together."""
