"""Writes a TFDS data set with smaller training images, which decode faster.

    python -m imta_jax.prepare --config=configs/imagenet.py --shorter_side=256 --output=small
    python -m imta_jax.main --config=configs/imagenet.py --config.dataset.data_dir=small

The copy has the name, splits, files, order and labels of the original. Training images that are
JPEGs with a longer shorter side are resized. All else is copied byte for byte, also the images held
out for validation, so that evaluations are the same. The same command resumes, and verifies what
is there.
"""

import argparse
import io
import itertools
import json
import sys
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

from etils import epath
from PIL import Image

from imta_jax import command_line, files
from imta_jax import config as config_lib
from imta_jax.data import preprocess, tfds_sets
from imta_jax.errors import UsageError


def main(arguments: Sequence[str] | None = None) -> None:
  """Runs the command line.

  Raises:
    UsageError: If the config or the data set is wrong, or the copy cannot be written or differs.
  """
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--config', required=True, help='config file, as in training')
  parser.add_argument(
    '--shorter_side', type=command_line.positive(int), required=True, help='in pixels'
  )
  parser.add_argument('--output', type=epath.Path, required=True, help='TFDS folder, or a bucket')
  options = parser.parse_args(arguments)
  dataset = config_lib.load(options.config).dataset
  if dataset.in_memory:
    raise UsageError(f'{options.config} keeps its images in memory: choose one that streams them')
  builder, splits = tfds_sets.open_builder(dataset)
  folder = options.output / builder.info.full_name
  if folder.resolve() == builder.data_path.resolve():
    raise UsageError(f'--output={options.output} has the original: choose another folder')
  with files.accessing(folder):
    folder.mkdir(parents=True, exist_ok=True)
  info = json.loads((builder.data_path / 'dataset_info.json').read_text())
  for split in info['splits']:
    num_resized = splits['train'][1] if split['name'] == dataset.train_split else 0
    size = _copy_split(builder, split['name'], folder, options.shorter_side, num_resized)
    split['numBytes'] = str(size)
  with files.accessing(folder):
    for path in (builder.data_path / 'features.json', *builder.data_path.glob('*.txt')):
      path.copy(folder / path.name, overwrite=True)
  # Comes last: TFDS takes a folder that has it for complete.
  files.write_whole(folder / 'dataset_info.json', json.dumps(info, indent=2).encode())


def _copy_split(builder: Any, split: str, folder: epath.Path, side: int, num_resized: int) -> int:
  """Copies and verifies the files of a split, whose first images are resized.

  Returns:
    The size of all records in bytes.
  """
  import tensorflow_datasets as tfds
  from rich.progress import track

  adapter = tfds.core.file_adapters.ADAPTER_FOR_FORMAT[builder.info.file_format]
  count = size = checksum = 0
  hidden = not sys.stdout.isatty()
  for source in track(builder.info.splits[split].filepaths, split, transient=True, disable=hidden):
    copy, part = folder / source.name, folder / f'{source.name}.part'
    with files.accessing(copy, f'make room, or restore {source} if that is corrupt'):
      if not copy.exists():
        records = _resized(adapter.make_tf_data(source), side, max(num_resized - count, 0))
        adapter.write_examples(part, enumerate(records))
        part.replace(copy)
    with files.accessing(copy, 'delete it and run the command again'):
      readers = [adapter.make_tf_data(path).as_numpy_iterator() for path in (source, copy)]
      for number, (original, record) in enumerate(itertools.zip_longest(*readers)):
        resized = count < num_resized
        if not (_is_resized(original, record, side) if resized else original == record):
          raise UsageError(
            f'record {number} (counted from 0) of {copy} is not that of the original with a '
            f'shorter side of {side}: delete the copy, or choose another --output'
          )
        count, size, checksum = count + 1, size + len(record), zlib.crc32(record, checksum)
  print(f'{split}: {count:,} images, {size / 1e9:.3f} GB, checksum {checksum:08x}')
  return size


def _resized(records: Any, side: int, number: int) -> Iterator[bytes]:
  """Yields records, the first ones with smaller images, which are resized in parallel."""
  import tensorflow as tf

  def resize(record):
    feature = {'image': tf.io.FixedLenFeature((), tf.string)}
    encoded = tf.io.parse_single_example(record, feature)['image']
    return record, encoded, preprocess.shrink_jpeg(encoded, side)

  first = records.take(number).map(resize, tf.data.AUTOTUNE)
  for record, image, smaller in first.as_numpy_iterator():
    if smaller != image:
      example = tf.train.Example.FromString(record)
      example.features.feature['image'].bytes_list.value[0] = smaller
      record = example.SerializeToString(deterministic=True)
    yield record
  yield from records.skip(number).as_numpy_iterator()


def _is_resized(original: bytes | None, copy: bytes | None, side: int) -> bool:
  """Whether a record has the features of another one, and its image at the expected size."""
  import tensorflow as tf

  if original is None or copy is None:
    return False
  examples = [tf.train.Example.FromString(record) for record in (original, copy)]
  images = [example.features.feature['image'].bytes_list.value.pop() for example in examples]
  (original_side, kind), (copied_side, _) = map(_shorter_side_and_format, images)
  expected = min(original_side, side) if kind == 'JPEG' else original_side
  return examples[0] == examples[1] and copied_side == expected


def _shorter_side_and_format(encoded):
  with Image.open(io.BytesIO(encoded)) as image:
    return min(image.size), image.format


if __name__ == '__main__':
  command_line.run(main)
