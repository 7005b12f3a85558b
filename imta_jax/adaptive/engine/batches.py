"""Batches of images on their way through the stages, and the queues between them."""

import collections
import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# What a stage reads and writes: (features, logits); the first stage reads images.
Carry = Any


@dataclasses.dataclass(frozen=True)
class Predictions:
  """Predictions for images, each at the exit that it took.

  Attributes:
    indices: [image], the position of each image in the input.
    probabilities: [image, class], float32, at the exit that the image took.
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


def concatenate_sorted(parts: Sequence[Predictions], num_classes: int) -> Predictions:
  """Joins predictions in the order of the images.

  Args:
    parts: Any number of predictions; a single one is already in order.
    num_classes: Number of classes.
  """
  if len(parts) == 1:
    return parts[0]
  no_images = np.zeros(0, np.int64)
  empty = Predictions(no_images, np.zeros((0, num_classes), np.float32), no_images)
  indices, probabilities, exits = (
    np.concatenate([getattr(part, field.name) for part in [empty, *parts]])
    for field in dataclasses.fields(Predictions)
  )
  order = np.argsort(indices)
  return Predictions(indices[order], probabilities[order], exits[order])


class Batch(NamedTuple):
  """A batch of images for a stage.

  Attributes:
    carry: The input of the stage; some of its rows may be padding.
    rows: [image], the row of each image in the carry.
    indices: [image], the position of each image in the input.
    thresholds: [image, exit].
  """

  carry: Carry
  rows: np.ndarray
  indices: np.ndarray
  thresholds: np.ndarray

  def bounds(self) -> np.ndarray:
    """Thresholds [row, exit]; minus infinity for padding."""
    bounds = np.full((capacity(self.carry), *self.thresholds.shape[1:]), -np.inf, np.float32)
    bounds[self.rows] = self.thresholds
    return bounds

  def divide(
    self, carry: Carry, probabilities: jax.Array, exits: np.ndarray
  ) -> tuple[Predictions | None, 'Batch']:
    """Splits the batch into images that have left and images that remain.

    Args:
      carry: The input of the next stage.
      probabilities: [row, class].
      exits: [row], negative if the image remains.

    Returns:
      Predictions, or None if no image has left, and a batch of the remaining images.
    """
    exits = exits[self.rows]
    left = exits >= 0
    answers = None
    if left.any():  # Otherwise the probabilities need not be fetched.
      of_left = np.asarray(probabilities)[self.rows[left]]
      answers = Predictions(self.indices[left], of_left, exits[left])
    stay = ~left
    return answers, Batch(carry, self.rows[stay], self.indices[stay], self.thresholds[stay])


# Joins rows of several carries into one of a given capacity.
Join = Callable[[Sequence[Carry], Sequence[np.ndarray], int], Carry]


class Queue:
  """A queue of images for a stage.

  Attributes:
    count: Number of queued images.
  """

  def __init__(self, join: Join):
    self.count = 0
    self._join = join
    self._parts: collections.deque[Batch] = collections.deque()

  def put(self, part: Batch) -> None:
    """Adds images."""
    if len(part.rows):
      self._parts.append(part)
      self.count += len(part.rows)

  def take(self, size: int) -> Batch:
    """Removes up to `size` images and returns them in a carry of exactly that capacity."""
    taken, room = [], size
    while room and self._parts:
      carry, *fields = self._parts.popleft()
      taken.append(Batch(carry, *(field[:room] for field in fields)))
      rest = Batch(carry, *(field[room:] for field in fields))
      if len(rest.rows):
        self._parts.appendleft(rest)
      room -= len(taken[-1].rows)
    self.count -= size - room
    carries, parts, indices, thresholds = zip(*taken, strict=True)
    if len(carries) == 1 and capacity(carries[0]) == size:
      # The batch does not shrink and no other images are queued, so it needs no copy.
      carry, rows = carries[0], parts[0]
    else:
      carry, rows = self._join(carries, parts, size), np.arange(size - room)
    return Batch(carry, rows, np.concatenate(indices), np.concatenate(thresholds))


def capacity(carry: Carry) -> int:
  """The number of images that a carry can hold."""
  return len(jax.tree.leaves(carry)[0])


def zeros(one: Carry, size: int) -> Carry:
  """A carry of zeros on the device, of capacity `size`, shaped like the carry of one image."""
  return jax.device_put(jax.tree.map(lambda x: np.zeros((size, *x.shape[1:]), x.dtype), one))


def join_on_host(carries: Sequence[Carry], rows: Sequence[np.ndarray], size: int) -> Carry:
  """A `Join` for carries on the host, or on a device that shares its memory."""

  def join(*arrays):
    joined, start = np.zeros((size, *arrays[0].shape[1:]), arrays[0].dtype), 0
    for array, part in zip(arrays, rows, strict=True):
      into = joined[start : start + len(part)]
      np.take(np.asarray(array), part, axis=0, out=into, mode='clip')  # The other modes copy twice.
      start += len(part)
    return joined

  return jax.tree.map(join, *carries)


def join_on_device(carries: Sequence[Carry], rows: Sequence[np.ndarray], size: int) -> Carry:
  """A `Join` for carries that remain on the device."""
  joined, start = None, 0
  for carry, part in zip(carries, rows, strict=True):
    taken = np.full(size, -1, np.int32)
    taken[start : start + len(part)] = part
    joined = _select(carry, np.maximum(taken, 0)) if joined is None else _fill(joined, carry, taken)
    start += len(part)
  return joined


def compile_join_on_device(one: Carry, sizes: Sequence[int]) -> None:
  """Compiles everything that `join_on_device` can need.

  Args:
    one: The carry of one image.
    sizes: All batch sizes.
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
  """Writes rows of a carry into another one wherever the row number is not negative."""

  def fill(into, x):
    is_taken = (rows >= 0).reshape(-1, *[1] * (x.ndim - 1))
    return jnp.where(is_taken, x[jnp.maximum(rows, 0)], into)

  return jax.tree.map(fill, joined, carry)
