"""Large data sets, whose images are read, decoded and cropped while the devices compute."""

import collections
import itertools
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache, partial
from typing import Any, Protocol

import jax
import numpy as np
from ml_collections import ConfigDict

from imta_jax import runtime
from imta_jax.data import preprocess
from imta_jax.data.dataset import Batch, Dataset, check_labels
from imta_jax.errors import UsageError

# Number of batches that are decoded, or sent to the devices, before they are needed.
_BATCHES_AHEAD = 2
# The axes over devices of what `draw_batch` reads.
SOURCE_AXES = {'image': 0, 'label': 0}


class Reader(Protocol):
  """What decodes the images of a set, for this host's part of every batch.

  Batches are {'image': uint8 [local devices, batch per device, height, width, 3], 'label': int32,
  'mask': bool}; the mask is False for padding.
  """

  def train_batches(self, phase: int, first_step: int) -> Iterator[dict[str, np.ndarray]]:
    """Yields batches from a step on, without end, as a function of seed, phase and step."""

  def evaluation_batches(self, split: str) -> Iterator[dict[str, np.ndarray]]:
    """Yields all images of a split, the same number of batches on every host."""

  def files(self, split: str) -> list[tuple]:
    """Returns a name and what else tells it from another one, for each file of all hosts."""


class StreamedDataset(Dataset):
  """A data set of encoded images of any size; each host reads its part of every split."""

  source_axes = SOURCE_AXES

  def __init__(
    self,
    reader: Reader,
    class_names: Sequence[str],
    num_images: dict[str, int],
    config: ConfigDict,
  ):
    if len(config.dataset.mean) != 3 or len(config.dataset.std) != 3:
      raise UsageError('config.dataset.mean and std need 3 numbers each: streamed images are RGB')
    runtime.keep_freed_memory()
    self._reader, self._config = reader, config
    self.class_names, self.num_images = class_names, num_images
    self.image_shape = (config.dataset.image_size, config.dataset.image_size, 3)
    self.steps_per_epoch = steps_per_epoch(num_images['train'], config)
    self._steps_per_stack = config.steps_per_dispatch or 1
    self._send = jax.pmap(lambda batch: batch, axis_name=runtime.AXIS)
    self._prepare = jax.pmap(self._normalize, axis_name=runtime.AXIS)

  def train_reader(self, phase: int, first_step: int) -> Callable[[int], dict[str, jax.Array]]:
    stacks = started_ahead(map(self._send, self._train_stacks(phase, first_step)))
    next_stack = lru_cache(maxsize=1)(lambda number: next(stacks))
    return lambda step: next_stack(step // self._steps_per_stack)

  def draw(self, source: dict[str, jax.Array], step: jax.Array) -> Batch:
    return draw_batch(self._config, source, step)

  def evaluation_batches(self, split: str) -> Iterator[Batch]:
    batches = map(partial(self._checked, split), self._reader.evaluation_batches(split))
    return map(self._prepare, started_ahead(map(self._send, batches)))

  def fingerprint(self) -> int:
    files = {split: self._reader.files(split) for split in sorted(self.num_images)}
    return zlib.crc32(repr((list(self.class_names), self.num_images, files)).encode())

  def _train_stacks(self, phase, first_step):
    """Yields batches without end, stacked [local devices, step, image, …].

    Stacks begin at multiples of their size; the batch of the first step fills what lies before it.
    """
    checked = map(partial(self._checked, 'train'), self._reader.train_batches(phase, first_step))
    batches = ({'image': batch['image'], 'label': batch['label']} for batch in checked)
    first = next(batches)
    missing = itertools.repeat(first, first_step % self._steps_per_stack)
    for stack in in_groups(itertools.chain(missing, [first], batches), self._steps_per_stack):
      if len(stack) == 1:
        yield jax.tree.map(lambda array: array[:, None], stack[0])  # Without a copy.
      else:
        yield jax.tree.map(lambda *arrays: np.stack(arrays, axis=1), *stack)

  def _checked(self, split, batch):
    name = f'the {split} split of {self._config.dataset.name}'
    check_labels(batch['label'], len(self.class_names), name)
    return batch

  def _normalize(self, batch):
    dataset = self._config.dataset
    return {**batch, 'image': preprocess.normalize(batch['image'], dataset.mean, dataset.std)}


def in_groups(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
  """Yields lists of `size` items (itertools.batched needs Python 3.12)."""
  items = iter(items)
  return iter(lambda: list(itertools.islice(items, size)), [])


def started_ahead(items: Iterable[Any]) -> Iterator[Any]:
  """Yields items, whose work starts when they are taken, after the next ones have been taken."""
  pending: collections.deque[Any] = collections.deque()
  for item in items:
    pending.append(item)
    if len(pending) > _BATCHES_AHEAD:
      yield pending.popleft()
  yield from pending


def steps_per_epoch(num_train: int, config: ConfigDict) -> int:
  """Returns the training batches per epoch: every host must be able to fill its part of each."""
  return (num_train // jax.process_count()) // (config.batch_size // jax.process_count())


def draw_batch(config: ConfigDict, source: dict[str, jax.Array], step: jax.Array) -> Batch:
  """Takes this device's batch from a stack of them, and normalizes it; see `Dataset.draw`.

  Args:
    config: A complete config.
    source: 'image' and 'label', each [step, image, …].
    step: The number of the step, counted from 0.
  """
  image, label = (
    jax.lax.dynamic_index_in_dim(source[name], step % len(source[name]), keepdims=False)
    for name in ('image', 'label')
  )
  image = preprocess.normalize(image, config.dataset.mean, config.dataset.std)
  return {'image': image, 'label': label}
