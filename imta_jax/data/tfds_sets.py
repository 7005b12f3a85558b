"""Data sets of TFDS: prepared, read whole or streamed; the first corrupt record is named.

TensorFlow is imported only when a function is called; its errors do not name files.
"""

import contextlib
import itertools
import os
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NoReturn

import jax
import numpy as np
from ml_collections import ConfigDict

from imta_jax import runtime
from imta_jax.data import preprocess
from imta_jax.data.arrays import Arrays
from imta_jax.data.dataset import shuffle_number
from imta_jax.data.streamed import steps_per_epoch
from imta_jax.errors import UsageError, first_line

# Number of images in the shuffle buffer of a host, which also shuffles the files.
_SHUFFLE_BUFFER = 16_384

# {split: (TFDS instruction, number of images)}
Splits = Mapping[str, tuple[str, int]]


def open_builder(dataset: ConfigDict) -> tuple[Any, Splits]:
  """Opens a data set, and prepares it if it is not prepared yet.

  Args:
    dataset: The data set's config.

  Returns:
    The TFDS builder, and the splits, with images held out for validation.

  Raises:
    UsageError: If there is no such data set or split, it has no images and labels, it cannot be
      prepared, or no training images are left.
  """
  runtime.import_tensorflow()
  import tensorflow_datasets as tfds

  from imta_jax.data import mnist5k  # noqa: F401  Registers the builder.

  data_dir = dataset.data_dir or os.environ.get('TFDS_DATA_DIR')
  try:
    builder = tfds.builder(dataset.name, data_dir=data_dir)
  except Exception as error:  # Corrupt metadata raises all kinds of exceptions.
    raise UsageError(
      f'config.dataset.name is {dataset.name!r}, which TFDS cannot open in '
      f'{data_dir or "its default folder"} ({first_line(error)}): see '
      'tensorflow.org/datasets/catalog for the names; delete a corrupt data set to prepare it again'
    ) from error
  missing = {'image', 'label'} - set(builder.info.features or ())
  if missing:
    raise UsageError(
      f'config.dataset.name is {dataset.name!r}, which has no feature {sorted(missing)[0]!r}: '
      'choose a data set with the features `image` and `label`'
    )
  if not builder.info.splits:
    _prepare(builder, dataset.name)
  return builder, _find_splits(builder, dataset)


def _prepare(builder, name):
  import tensorflow_datasets as tfds

  if not sys.stderr.isatty():
    tfds.disable_progress_bar()
  try:
    with runtime.watchdog_paused():
      builder.download_and_prepare()
  except Exception as error:
    raise UsageError(
      f'data set {name!r} is not prepared in {builder.data_dir}, and preparing it failed '
      f'({type(error).__name__}: {first_line(error)}): prepare it with `tfds build {name}`, or set '
      'TFDS_DATA_DIR or config.dataset.data_dir'
    ) from error


def _find_splits(builder, dataset):
  for field in ('train_split', 'test_split'):
    if dataset[field] not in builder.info.splits:
      raise UsageError(
        f'config.dataset.{field} is {dataset[field]!r}, which does not exist: {dataset.name} has '
        f'the splits {", ".join(builder.info.splits)}'
      )
  train, held_out = dataset.train_split, dataset.validation_size
  num_train = builder.info.splits[train].num_examples - held_out
  if num_train <= 0:
    raise UsageError(
      f'config.dataset.validation_size is {held_out}, but {dataset.name} has only '
      f'{num_train + held_out} training images: hold out fewer images'
    )
  return {
    'train': (f'{train}[:{num_train}]', num_train),
    'validation': (f'{train}[{num_train}:]', held_out),
    'test': (dataset.test_split, builder.info.splits[dataset.test_split].num_examples),
  }


def read_arrays(builder: Any, splits: Splits) -> Arrays:
  """Reads a whole data set into memory.

  Raises:
    UsageError: If the data set is corrupt; the message names the file.
  """
  import tensorflow as tf
  import tensorflow_datasets as tfds

  images, labels = {}, {}
  for split, (instruction, count) in splits.items():
    try:
      # As one batch, because TFDS would pad images of other shapes.
      batch = builder.as_dataset(split=instruction).batch(count).get_single_element()
    except (tf.errors.OpError, AssertionError) as error:  # TFDS asserts that a folder exists.
      refuse(builder, instruction, error)
    content = tfds.as_numpy(batch)
    images[split], labels[split] = content['image'], content['label'].astype(np.int32)
  return Arrays(list(builder.info.features['label'].names), images, labels)


def refuse(builder: Any, split: Any, error: Exception) -> NoReturn:
  """Ends a run whose data set cannot be read; looks for what is corrupt, which may take an epoch.

  Args:
    builder: The TFDS builder.
    split: The TFDS instruction that was read.
    error: What was raised.

  Raises:
    UsageError: With the first record that is corrupt or, if none is, with the error.
  """
  import tensorflow as tf
  import tensorflow_datasets as tfds

  features = builder.info.features

  def decode(record):
    image = features.deserialize_example(record)['image']
    return tf.ensure_shape(image, features['image'].shape)

  corrupt = f'{builder.data_path} cannot be read ({first_line(error)})'
  adapter = tfds.core.file_adapters.ADAPTER_FOR_FORMAT[builder.info.file_format]
  for file in builder.info.splits[split].file_instructions:
    num_intact = 0
    with contextlib.suppress(tf.errors.OpError):  # Nothing is read after the first error.
      for _ in adapter.make_tf_data(file.filename).map(decode, tf.data.AUTOTUNE):
        num_intact += 1
    if num_intact < file.examples_in_shard:
      corrupt = f'record {num_intact} (counted from 0) of {file.filename} cannot be read'
      break
  raise UsageError(
    f'{corrupt}: restore it from a copy, or delete the data set and prepare it again'
  ) from error


class TfdsReader:
  """Reads this host's part of a prepared data set; see `streamed.Reader`."""

  def __init__(self, builder: Any, splits: Splits, config: ConfigDict):
    self._builder, self._splits, self._config = builder, splits, config
    self._steps_per_epoch = steps_per_epoch(splits['train'][1], config)

  def train_batches(self, phase: int, first_step: int) -> Iterator[dict[str, np.ndarray]]:
    batch_size = self._config.batch_size // jax.process_count()
    num_batches = self._steps_per_epoch

    def open_epoch(epoch, position=0):
      number = [self._config.seed, shuffle_number(phase, epoch)]
      seed = int(np.random.SeedSequence(number).generate_state(1)[0])
      return self._open('train', self._random_crop(seed), batch_size, num_batches, position, seed)

    epoch, position = divmod(first_step, num_batches)
    batches = open_epoch(epoch, position)
    # An epoch takes seconds to start: the next one is opened when the shuffle buffer of this one
    # is no longer refilled.
    filled = max(num_batches - _SHUFFLE_BUFFER // batch_size, 0)
    with ThreadPoolExecutor(1) as pool:
      while True:
        yield from itertools.islice(batches, max(filled - position, 0))
        epoch, position = epoch + 1, 0
        following = pool.submit(open_epoch, epoch)
        yield from batches
        batches = following.result()

  def evaluation_batches(self, split: str) -> Iterator[dict[str, np.ndarray]]:
    dataset = self._config.dataset
    batch_size = self._config.evaluation_batch_size // jax.process_count()
    # All hosts send the same number of batches; hosts with fewer images pad the last ones.
    largest_part = -(-self._splits[split][1] // jax.process_count())
    if split == 'validation' and dataset.augment_validation:
      decode = self._random_crop(self._config.seed)
    else:

      def decode(_, encoded):
        return preprocess.decode_center_crop(encoded, dataset.image_size)

    return self._open(split, decode, batch_size, -(-largest_part // batch_size))

  def files(self, split: str) -> list[tuple]:
    info = self._builder.info
    instructions = info.splits[self._splits[split][0]].file_instructions
    # TFDS records the size of all files together.
    return [(os.path.basename(file.filename), info.dataset_size) for file in instructions]

  def _open(self, split, decode, batch_size, num_batches, position=0, seed=None):
    """Starts to read, and returns an iterator of batches [local devices, batch per device, …].

    Args:
      split: The split.
      decode: Maps the number of an example and its encoded image to the image.
      batch_size: Images per batch.
      num_batches: Batches of the epoch.
      position: Number of batches that are skipped, without decoding their images.
      seed: Shuffles the examples if given.
    """
    import tensorflow as tf

    tf.get_logger().setLevel('ERROR')  # TFDS numbers examples with a function that is deprecated.
    side = self._config.dataset.image_size

    def decode_example(index, example):
      return {
        'image': tf.ensure_shape(decode(index, example['image']), (side, side, 3)),
        'label': tf.cast(example['label'], tf.int32),
        'mask': True,  # False for padding.
      }

    with self._naming_what_is_corrupt(split):
      examples = self._read(split, seed).enumerate().skip(position * batch_size)
      examples = examples.map(decode_example, tf.data.AUTOTUNE)
      if seed is None:
        examples = _padded(examples)
      batches = examples.batch(batch_size, drop_remainder=True).take(num_batches - position)
      batches = batches.prefetch(tf.data.AUTOTUNE).as_numpy_iterator()
    return self._per_device(split, batches)

  def _per_device(self, split, batches):
    with self._naming_what_is_corrupt(split):
      for batch in batches:
        yield {
          name: array.reshape(jax.local_device_count(), -1, *array.shape[1:])
          for name, array in batch.items()
        }

  @contextlib.contextmanager
  def _naming_what_is_corrupt(self, split):
    import tensorflow as tf

    try:
      yield
    except (tf.errors.OpError, AssertionError) as error:  # TFDS asserts that a folder exists.
      refuse(self._builder, self._part(split), error)

  def _part(self, split):
    """Returns the TFDS instruction for this host's part of a split."""
    import tensorflow_datasets as tfds

    return tfds.even_splits(self._splits[split][0], jax.process_count())[jax.process_index()]

  def _read(self, split, seed):
    """Returns this host's encoded examples of a split; their order depends only on the seed."""
    import tensorflow as tf
    import tensorflow_datasets as tfds

    examples = self._builder.as_dataset(
      split=self._part(split),
      decoders={'image': tfds.decode.SkipDecoding()},
      shuffle_files=seed is not None,
      read_config=tfds.ReadConfig(shuffle_seed=seed, try_autocache=False),
    )
    options = tf.data.Options()
    options.deterministic = True
    # Threads that decode fill the batches.
    options.experimental_optimization.map_and_batch_fusion = True
    # One thread more than cores decodes, since threads also wait: for locks, and for records.
    options.threading.private_threadpool_size = (os.cpu_count() or 1) + 1
    # An epoch is read from when it is opened, not from when its first batch is taken.
    options.experimental_warm_start = True
    examples = examples.with_options(options)
    return examples if seed is None else examples.shuffle(_SHUFFLE_BUFFER, seed=seed)

  def _random_crop(self, seed):
    """Returns a function that decodes an image, with a seed that no other image of any host has."""
    import tensorflow as tf

    dataset = self._config.dataset

    def decode(index, encoded):
      number = index * jax.process_count() + jax.process_index()
      image_seed = tf.stack([tf.constant(seed, tf.int64), number])
      return preprocess.decode_random_crop(
        encoded, dataset.image_size, dataset.crop_area, dataset.flip, image_seed
      )

    return decode


def _padded(examples):
  """Appends padding, without end."""
  import tensorflow as tf

  filler = jax.tree.map(lambda spec: tf.zeros(spec.shape, spec.dtype), examples.element_spec)
  return examples.concatenate(tf.data.Dataset.from_tensors(filler).repeat())
