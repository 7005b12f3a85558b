"""The interface of data sets: batches for the local devices.

A batch is {'image': float32, 'label': int32}, each [local devices, batch per device, …]; evaluation
batches also have 'mask', which is false where a batch is padded. Training batches are a pure
function of (seed, step).
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
    steps_per_epoch: Training batches per epoch; an epoch skips the images that fill no batch.
  """

  class_names: Sequence[str]
  image_shape: tuple[int, int, int]
  num_images: dict[str, int]
  steps_per_epoch: int

  @abc.abstractmethod
  def train_batches(self, first_step: int) -> Iterator[Batch]:
    """Endless training batches, starting with the one of step `first_step`, counted from 0."""

  @abc.abstractmethod
  def evaluation_batches(self, split: str) -> Iterator[Batch]:
    """Batches with every image of a split exactly once, over all hosts together."""
