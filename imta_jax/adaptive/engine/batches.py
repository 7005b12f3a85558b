"""Images on their way through the stages: in batches, and waiting for the next."""

import collections
import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# What a stage reads and writes: (features, logits), or the images where the first one reads.
Carry = Any


@dataclasses.dataclass(frozen=True)
class Answers:
  """What was decided about images.

  Attributes:
    indices: [image], the number of each image in the order in which they were given.
    probabilities: [image, class], float32, of the exit that each image took.
    exits: [image], counted from 0.
  """

  indices: np.ndarray
  probabilities: np.ndarray
  exits: np.ndarray

  @property
  def labels(self) -> np.ndarray:
    """[image], the most probable class."""
    return self.probabilities.argmax(axis=-1)

  @property
  def confidences(self) -> np.ndarray:
    """[image], the probability of the label."""
    return self.probabilities.max(axis=-1)


def in_order(parts: Sequence[Answers], num_classes: int) -> Answers:
  """All answers of several parts, by the numbers of the images.

  Args:
    parts: None, or more; those of a single one are in order.
    num_classes: Classes.
  """
  if len(parts) == 1:
    return parts[0]
  nobody = np.zeros(0, np.int64)
  nothing = Answers(nobody, np.zeros((0, num_classes), np.float32), nobody)
  indices, probabilities, exits = (
    np.concatenate([getattr(part, field.name) for part in [nothing, *parts]])
    for field in dataclasses.fields(Answers)
  )
  order = np.argsort(indices)
  return Answers(indices[order], probabilities[order], exits[order])


class Batch(NamedTuple):
  """Images that a stage runs at once.

  Attributes:
    carry: What the stage reads, of all places; some places are no image's.
    rows: [image], its place.
    indices: [image], its number.
    thresholds: [image, exit].
  """

  carry: Carry
  rows: np.ndarray
  indices: np.ndarray
  thresholds: np.ndarray

  def bounds(self, exits: int | slice = slice(None)) -> np.ndarray:
    """Thresholds [place, exit] or [place] of one exit; where there is no image, none stays."""
    thresholds = self.thresholds[:, exits]
    bounds = np.full((capacity(self.carry), *thresholds.shape[1:]), -np.inf, np.float32)
    bounds[self.rows] = thresholds
    return bounds

  def divide(
    self, carry: Carry, probabilities: jax.Array, exits: np.ndarray
  ) -> tuple[Answers | None, 'Batch']:
    """Images that left, and images that stay.

    Args:
      carry: What the next stage reads.
      probabilities: [place, class].
      exits: [place], negative where the image stays.

    Returns:
      Answers, None if no image left, and those who stay, at their places in the carry.
    """
    exits = exits[self.rows]
    left = exits >= 0
    answers = None
    if left.any():  # Else probabilities need not be fetched.
      probabilities = np.asarray(probabilities)[self.rows[left]]
      answers = Answers(self.indices[left], probabilities, exits[left])
    stay = ~left
    return answers, Batch(carry, self.rows[stay], self.indices[stay], self.thresholds[stay])


# Makes one carry of so many places of rows of several.
Join = Callable[[Sequence[Carry], Sequence[np.ndarray], int], Carry]


class Queue:
  """Images that wait for a stage.

  Attributes:
    count: Images that wait.
  """

  def __init__(self, join: Join):
    self.count = 0
    self._join, self._parts = join, collections.deque()

  def put(self, part: Batch) -> None:
    """Adds images."""
    if len(part.rows):
      self._parts.append(part)
      self.count += len(part.rows)

  def take(self, size: int) -> Batch:
    """Removes up to `size` images, which get a carry of exactly `size` places."""
    taken, room = [], size
    while room and self._parts:
      carry, *fields = self._parts.popleft()
      taken.append(Batch(carry, *(field[:room] for field in fields)))
      rest = Batch(carry, *(field[room:] for field in fields))
      if len(rest.rows):
        self._parts.appendleft(rest)
      room -= len(taken[-1].rows)
    self.count -= size - room
    carries, rows, indices, thresholds = zip(*taken, strict=True)
    if len(carries) == 1 and capacity(carries[0]) == size:
      # What has left makes no smaller batch, and nobody waits.
      carry, rows = carries[0], rows[0]
    else:
      carry, rows = self._join(carries, rows, size), np.arange(size - room)
    return Batch(carry, rows, np.concatenate(indices), np.concatenate(thresholds))


def capacity(carry: Carry) -> int:
  """How many images a carry has room for."""
  return len(jax.tree.leaves(carry)[0])


def zeros(one: Carry, size: int) -> Carry:
  """A carry of `size` zeros on the device, shaped like the one of one image."""
  return jax.device_put(jax.tree.map(lambda x: np.zeros((size, *x.shape[1:]), x.dtype), one))


def join_on_host(carries: Sequence[Carry], rows: Sequence[np.ndarray], size: int) -> Carry:
  """A `Join` of carries on the host, or on a device whose memory is the host's."""

  def join(*arrays):
    joined, start = np.zeros((size, *arrays[0].shape[1:]), arrays[0].dtype), 0
    for array, part in zip(arrays, rows, strict=True):
      into = joined[start : start + len(part)]
      np.take(np.asarray(array), part, axis=0, out=into, mode='clip')  # Other modes copy twice.
      start += len(part)
    return joined

  return jax.tree.map(join, *carries)


def join_on_device(carries: Sequence[Carry], rows: Sequence[np.ndarray], size: int) -> Carry:
  """A `Join` of carries that stay where they are."""
  joined, start = None, 0
  for carry, part in zip(carries, rows, strict=True):
    taken = np.full(size, -1, np.int32)
    taken[start : start + len(part)] = part
    joined = _select(carry, np.maximum(taken, 0)) if joined is None else _fill(joined, carry, taken)
    start += len(part)
  return joined


def compile_join_on_device(one: Carry, sizes: Sequence[int]) -> None:
  """Compiles all that `join_on_device` can need.

  Args:
    one: The carry of one image.
    sizes: The batch sizes that there are.
  """
  for before in sizes:
    for size in sizes:
      rows = np.zeros(size, np.int32)
      _fill(_select(zeros(one, before), rows), zeros(one, before), rows)


@jax.jit
def _select(carry, rows):
  """Rows of a carry."""
  return jax.tree.map(lambda x: x[rows], carry)


@partial(jax.jit, donate_argnums=0)
def _fill(joined, carry, rows):
  """Puts rows of a carry in the places of another where the row's number is not negative."""

  def fill(into, x):
    is_taken = (rows >= 0).reshape(-1, *[1] * (x.ndim - 1))
    return jnp.where(is_taken, x[jnp.maximum(rows, 0)], into)

  return jax.tree.map(fill, joined, carry)
