"""Finds what is damaged in a TFDS data set, since the errors of TensorFlow do not name it."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn

from etils import epath

from imta_jax.errors import UsageError

MEND = 'restore it from a copy, or delete the data set and prepare it again'


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


def refuse(builder: Any, damages: Sequence[Damage], error: Exception, mend: str = MEND) -> NoReturn:
  """Stops a run whose data set cannot be read.

  Args:
    builder: The TFDS builder.
    damages: From `find_damage`.
    error: What was raised when the data set was read.
    mend: What to do about damage, for the message.

  Raises:
    UsageError: With what is damaged or, if no file is, with the error.
  """
  if damages:
    raise UsageError(f'{"; ".join(map(str, damages))}: {mend}') from error
  reason = str(error).strip().splitlines() or [type(error).__name__]
  raise UsageError(f'{builder.data_path} cannot be read ({reason[0]}): {MEND}') from error


def refuse_example(
  builder: Any,
  examples: Iterable[tuple[Any, dict[str, Any]]],
  decode: Callable[[Any, Any], Any],
  error: Exception,
  mend: str = MEND,
) -> NoReturn:
  """Stops a run that has met an image that cannot be decoded.

  Args:
    builder: The TFDS builder.
    examples: (index, encoded example with 'tfds_id'), among which it is.
    decode: What failed; takes an index and an encoded image.
    error: What it raised.
    mend: What to do about damage, for the message.

  Raises:
    UsageError: With the file and the place of the image.
  """
  import tensorflow as tf

  name = None
  try:
    for index, example in examples:
      name = example_name(builder, example['tfds_id'].numpy())
      decode(index, example['image'])
      name = None
  except tf.errors.InvalidArgumentError:
    pass  # Without a name, what failed is not an image but its record.
  if name is None:
    refuse(builder, [], error)
  raise UsageError(f'{name}: its image is damaged: {mend}') from error


def example_name(builder: Any, tfds_id: bytes) -> str:
  """Returns the place of an example: 'record 3 (counted from 0) of /…/cifar10-train.tfrecord-…'."""
  file, _, record = tfds_id.decode().rpartition('__')
  return f'record {record} (counted from 0) of {builder.data_path / file}'
