"""Finds what is corrupt in a TFDS data set, since the errors of TensorFlow do not name it."""

from collections.abc import Callable, Iterable
from typing import Any, NoReturn

from etils import epath

from imta_jax.errors import UsageError, first_line

FIX_HINT = 'restore it from a copy, or delete the data set and prepare it again'


def refuse_files(builder: Any, split: Any, error: Exception) -> NoReturn:
  """Stops a run whose data set cannot be read.

  Args:
    builder: The TFDS builder.
    split: The TFDS instruction whose files are checked, record by record.
    error: What was raised when the data set was read.

  Raises:
    UsageError: With the files that are corrupt or, if none is, with the error.
  """
  corrupt = []
  for instruction in builder.info.splits[split].file_instructions:
    path, num_records = instruction.filename, instruction.examples_in_shard
    num_intact = _count_intact(builder, path)
    if num_intact < num_records:
      corrupt.append(
        f'{path} is corrupt: only the first {num_intact} of its {num_records} images can be read'
      )
  _refuse(builder, '; '.join(corrupt), error)


def refuse_example(
  builder: Any,
  examples: Iterable[tuple[Any, dict[str, Any]]],
  decode: Callable[[Any, Any], Any],
  error: Exception,
) -> NoReturn:
  """Stops a run that has read an image that cannot be decoded.

  Args:
    builder: The TFDS builder.
    examples: (index, encoded example with 'tfds_id'), among which it is.
    decode: What failed; takes an index and an encoded image.
    error: What it raised.

  Raises:
    UsageError: With the file and the place of the image.
  """
  import tensorflow as tf

  name = None
  try:
    for index, example in examples:
      file, _, record = example['tfds_id'].numpy().decode().rpartition('__')
      name = f'record {record} (counted from 0) of {builder.data_path / file}'
      decode(index, example['image'])
      name = None
  except (tf.errors.InvalidArgumentError, ValueError):  # ValueError: an image of another shape.
    pass  # Without a name, what failed is not an image but its record.
  _refuse(builder, name and f'{name}: its image is corrupt', error)


def _refuse(builder, corrupt, error):
  corrupt = corrupt or f'{builder.data_path} cannot be read ({first_line(error)})'
  raise UsageError(f'{corrupt}: {FIX_HINT}') from error


def _count_intact(builder, path):
  """Returns the number of records before the first corrupt one."""
  import tensorflow as tf
  import tensorflow_datasets as tfds

  try:
    with epath.Path(path).open('rb') as file:
      file.read(1)
  except (OSError, tf.errors.OpError) as error:
    reason = getattr(error, 'strerror', None) or str(error)
    raise UsageError(f'{path} cannot be read ({reason}): {FIX_HINT}') from error
  adapter = tfds.core.file_adapters.ADAPTER_FOR_FORMAT[builder.info.file_format]
  count = 0
  try:
    for _ in adapter.make_tf_data(path):
      count += 1
  except tf.errors.OpError:
    pass  # Nothing is read after the first error.
  return count
