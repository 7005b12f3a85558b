"""Finds what is damaged in a TFDS data set, since the errors of TensorFlow do not name it."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn

from absl import logging
from etils import epath

from imta_jax.errors import UsageError, first_line

MEND = 'restore it from a copy, or delete the data set and prepare it again'
MEND_OR_SKIP = f'{MEND}, or skip damage with config.dataset.skip_damaged=True'


@dataclasses.dataclass(frozen=True)
class Damage:
  """A file that cannot be read to its end.

  Attributes:
    path: The file.
    num_intact: Number of images before the first damaged one; those after it cannot be found.
    num_images: Number of images that it should have.
  """

  path: str
  num_intact: int
  num_images: int

  def __str__(self) -> str:
    return (
      f'{self.path} is damaged: only the first {self.num_intact} of its {self.num_images} images '
      'can be read'
    )


class SkippedDamage:
  """What of a data set is damaged and skipped; a warning says so once.

  Damaged files are read up to their first damaged record.
  """

  def __init__(self, builder: Any):
    self._builder = builder
    self._num_intact = {}  # {damaged file: number of images before the damage}
    self._undecodable = set()

  @property
  def has_files(self) -> bool:
    """Whether a file is damaged."""
    return bool(self._num_intact)

  def is_new(self, damage: Damage) -> bool:
    """Whether a file has more damage than is known."""
    return damage.num_intact != self._num_intact.get(damage.path)

  def add_files(self, damages: Iterable[Damage]) -> None:
    """Skips the rest of damaged files from now on."""
    for damage in damages:
      self._num_intact[damage.path] = damage.num_intact
      logging.warning('%s; the others are skipped.', damage)

  def add_example(self, tfds_id: bytes) -> None:
    """Counts an image that cannot be decoded."""
    if tfds_id not in self._undecodable:
      self._undecodable.add(tfds_id)
      name, count = example_name(self._builder, tfds_id), len(self._undecodable)
      logging.warning('%s: its image is damaged: skipped; damaged so far: %d.', name, count)

  def shorten(self, instructions: list[Any]) -> list[Any]:
    """Leaves out what is damaged, for `ReadConfig.experimental_interleave_sort_fn` of TFDS.

    A file of which nothing is left keeps its place in the order.
    """
    for index, file in enumerate(instructions):
      if file.filename in self._num_intact:
        left = max(0, self._num_intact[file.filename] - file.skip)
        instructions[index] = file.replace(take=min(file.take, left))
    return instructions


def find_damage(builder: Any, split: Any) -> list[Damage]:
  """Reads the files of a split, record by record, and returns those that are damaged.

  Args:
    builder: The TFDS builder.
    split: A TFDS instruction.

  Raises:
    UsageError: If a file cannot be opened; the message names it.
  """
  damages = []
  for instruction in builder.info.splits[split].file_instructions:
    num_intact = _count_intact(builder, instruction.filename)
    if num_intact < instruction.examples_in_shard:
      damages.append(Damage(instruction.filename, num_intact, instruction.examples_in_shard))
  return damages


def _count_intact(builder, path):
  import tensorflow as tf
  import tensorflow_datasets as tfds

  try:
    with epath.Path(path).open('rb') as file:
      file.read(1)
  except (OSError, tf.errors.OpError) as error:
    reason = getattr(error, 'strerror', None) or str(error)
    raise UsageError(f'{path} cannot be read ({reason}): {MEND}') from error
  adapter = tfds.core.file_adapters.ADAPTER_FOR_FORMAT[builder.info.file_format]
  count = 0
  try:
    for _ in adapter.make_tf_data(path):
      count += 1
  except tf.errors.OpError:
    pass  # Nothing is read after the first error.
  return count


def refuse(builder: Any, damages: Sequence[Damage], error: Exception) -> NoReturn:
  """Stops a run whose data set cannot be read.

  Args:
    builder: The TFDS builder.
    damages: From `find_damage`.
    error: What was raised when the data set was read.

  Raises:
    UsageError: With what is damaged or, if no file is, with the error.
  """
  if damages:
    raise UsageError(f'{"; ".join(map(str, damages))}: {MEND_OR_SKIP}') from error
  raise UsageError(f'{builder.data_path} cannot be read ({first_line(error)}): {MEND}') from error


def refuse_example(
  builder: Any,
  examples: Iterable[tuple[Any, dict[str, Any]]],
  decode: Callable[[Any, Any], Any],
  error: Exception,
) -> NoReturn:
  """Stops a run that has met an image that cannot be decoded.

  Args:
    builder: The TFDS builder.
    examples: (index, encoded example with 'tfds_id'), among which it is.
    decode: What failed; takes an index and an encoded image.
    error: What it raised.

  Raises:
    UsageError: With the file and the place of the image.
  """
  name = None
  try:
    for index, example in examples:
      name = example_name(builder, example['tfds_id'].numpy())
      decode(index, example['image'])
      name = None
  except decoding_errors():
    pass  # Without a name, what failed is not an image but its record.
  if name is None:
    refuse(builder, [], error)
  raise UsageError(f'{name}: its image is damaged: {MEND_OR_SKIP}') from error


def decoding_errors() -> tuple[type[Exception], ...]:
  """Returns what decoding an image raises: ValueError if it has another shape than the data set."""
  import tensorflow as tf

  return tf.errors.InvalidArgumentError, ValueError


def example_name(builder: Any, tfds_id: bytes) -> str:
  """Returns the place of an example: 'record 3 (counted from 0) of /…/cifar10-train.tfrecord-…'."""
  file, _, record = tfds_id.decode().rpartition('__')
  return f'record {record} (counted from 0) of {builder.data_path / file}'
