"""What a data set is to the trainer: batches for the local devices.

A batch is {'image': float32, 'label': int32}, each [local devices, batch per device, …]; evaluation
batches also have 'mask', which is false where a batch is padded. Training batches are a pure
function of (seed, step).
"""

import abc
from collections.abc import Iterator, Sequence

import jax

Batch = dict[str, jax.Array]


class Dataset(abc.ABC):
  """A data set with its splits 'train', 'validation' and 'test'.

  Attributes:
    class_names: A name a class.
    image_shape: (height, width, channels) of what a network sees.
    num_images: Images of each split.
    steps_per_epoch: Training batches an epoch; images left over wait for another epoch's shuffle.
  """

  class_names: Sequence[str]
  image_shape: tuple[int, int, int]
  num_images: dict[str, int]
  steps_per_epoch: int

  @abc.abstractmethod
  def train_batches(self, first_step: int) -> Iterator[Batch]:
    """Endless training batches, starting with that of step `first_step`, counted from 0."""

  @abc.abstractmethod
  def evaluation_batches(self, split: str) -> Iterator[Batch]:
    """Every image of a split exactly once, over all hosts together."""
