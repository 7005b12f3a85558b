"""Copies of TFDS data sets with smaller training images."""

import io
import itertools
from pathlib import Path

import numpy as np
import pytest
from etils import epath
from PIL import Image

from imta_jax import config as config_lib
from imta_jax import prepare
from imta_jax.data import tfds_sets
from imta_jax.errors import UsageError
from imta_jax.training import loop, signals

SIDE, NUM_TRAIN, NUM_VALIDATION, NUM_TEST, NUM_FILES = 40, 26, 6, 5, 3
CONFIG = """
from imta_jax import config as config_lib

def get_config(argument=''):
  config = config_lib.default()
  config.update(batch_size=8, evaluation_batch_size=8)
  config.dataset.update(
    name='photographs', data_dir={data_dir!r}, validation_size={num_validation},
    image_size=32, in_memory=False, mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2),
  )
  return config
"""


def photograph(number):
  """Returns an image of 24 to 96 pixels; every other one is grey or upright."""
  random = np.random.default_rng(number)
  coarse = random.integers(0, 256, (4, 6, 1 + 2 * (number % 2)), np.uint8)
  size = 3 * (8 + number), 2 * (12 + number)
  image = Image.fromarray(np.broadcast_to(coarse, (4, 6, 3))).resize(size, Image.Resampling.BICUBIC)
  return np.asarray(image).transpose((number // 2 % 2, 1 - number // 2 % 2, 2))


@pytest.fixture(scope='module')
def original(prepare_numbered, tmp_path_factory):
  folder = tmp_path_factory.mktemp('original')
  feature = {'shape': (None, None, 3), 'encoding_format': 'jpeg'}
  counts = {'train': NUM_TRAIN, 'test': NUM_TEST}
  prepare_numbered('photographs', folder, feature, counts, photograph, NUM_FILES)
  return folder


@pytest.fixture
def config_file(original, tmp_path):
  path = tmp_path / 'config.py'
  path.write_text(CONFIG.format(data_dir=str(original), num_validation=NUM_VALIDATION))
  return path


@pytest.fixture
def copy(config_file, tmp_path):
  return run(config_file, tmp_path / 'copy')


def run(config_file, folder, side=SIDE):
  prepare.main([f'--config={config_file}', f'--shorter_side={side}', f'--output={folder}'])
  return folder


def files_of(folder):
  return {path.name: path for path in (Path(folder) / 'photographs/1.0.0').iterdir()}


def open_reader(config_file, folder):
  config = config_lib.load(str(config_file))
  config.dataset.data_dir = str(folder)
  builder, splits = tfds_sets.open_builder(config.dataset)
  return builder, tfds_sets.TfdsReader(builder, splits, config)


def stored(tfds, builder, split):
  """Returns [(label, encoded image)] in the order of the files."""
  decoders = {'image': tfds.decode.SkipDecoding()}
  examples = tfds.as_numpy(builder.as_dataset(split=split, decoders=decoders))
  return [(int(example['label']), example['image']) for example in examples]


def size_of(encoded):
  return Image.open(io.BytesIO(encoded)).size


def test_training_images_are_resized_and_all_else_is_copied(tfds, config_file, original, copy):
  before, after = (open_reader(config_file, folder)[0] for folder in (original, copy))
  pairs = list(zip(stored(tfds, before, 'train'), stored(tfds, after, 'train'), strict=True))
  assert len(pairs) == NUM_TRAIN
  for number, ((label, image), (copied_label, copied)) in enumerate(pairs):
    is_kept = min(size_of(image)) <= SIDE or number >= NUM_TRAIN - NUM_VALIDATION
    assert label == copied_label
    assert (image == copied) == is_kept
    if not is_kept:
      scale = SIDE / min(size_of(image))
      assert size_of(copied) == tuple(round(scale * length) for length in size_of(image))
  for split, info in before.info.splits.items():
    assert after.info.splits[split].shard_lengths == info.shard_lengths
    assert len(info.shard_lengths) == NUM_FILES
  assert after.info.splits['train'].num_bytes < before.info.splits['train'].num_bytes
  for name, path in files_of(original).items():
    if '-test.' in name or name == 'features.json':
      assert files_of(copy)[name].read_bytes() == path.read_bytes()


def test_training_takes_the_same_images_and_evaluation_is_exact(config_file, original, copy):
  (_, one), (_, other) = (open_reader(config_file, folder) for folder in (original, copy))
  batches = [list(itertools.islice(reader.train_batches(0, 0), 5)) for reader in (one, other)]
  for batch, copied in zip(*batches, strict=True):
    np.testing.assert_array_equal(batch['label'], copied['label'])
    assert np.any(batch['image'] != copied['image'])
  resumed = next(other.train_batches(0, 3))
  np.testing.assert_array_equal(resumed['image'], batches[1][3]['image'])
  for split in ('validation', 'test'):
    evaluations = [reader.evaluation_batches(split) for reader in (one, other)]
    for batch, copied in zip(*evaluations, strict=True):
      for name, array in batch.items():
        np.testing.assert_array_equal(array, copied[name])


def test_a_run_on_a_copy_resumes_where_it_was_stopped(config_file, copy, tmp_path, monkeypatch):
  config = config_lib.load(str(config_file))
  config.tensorboard, config.dataset.data_dir = False, str(copy)
  config.model.update(num_exits=2, base=1, step=1, channels=2, growth_rate=2)
  config.model.update(scale_factors=(1,), bottleneck_factors=(1,))
  config.phases[0].steps = 5  # Of 2 per epoch.
  config.phases = config.phases[:1]
  whole, stopped = tmp_path / 'whole', tmp_path / 'stopped'
  loop.train_and_evaluate(config, whole)
  calls = itertools.count(1)
  with monkeypatch.context() as patch, pytest.raises(SystemExit):
    patch.setattr(signals.StopRequest, 'requested', lambda stop: next(calls) >= 3)
    loop.train_and_evaluate(config, stopped)
  assert {int(path.name) for path in (stopped / 'checkpoints/phase_1').iterdir()} == {2, 3}
  loop.train_and_evaluate(config, stopped)
  for split in ('validation', 'test'):
    name = f'evaluation/phase_1_{split}.npz'
    with np.load(whole / name) as expected, np.load(stopped / name) as found:
      for array in expected:
        np.testing.assert_array_equal(found[array], expected[array])


def test_an_interrupted_copy_is_completed(config_file, copy, capsys):
  first, *others = sorted(path for name, path in files_of(copy).items() if '-train.' in name)
  content, times = first.read_bytes(), [path.stat().st_mtime_ns for path in others]
  run(config_file, copy)
  summary = capsys.readouterr().out
  assert f'train: {NUM_TRAIN} images' in summary and f'test: {NUM_TEST} images' in summary
  first.with_name(first.name + '.part').write_bytes(content[:99])
  first.unlink()
  run(config_file, copy)
  assert first.read_bytes() == content
  assert [path.stat().st_mtime_ns for path in others] == times
  assert capsys.readouterr().out == summary


def change_label(path):
  import tensorflow as tf

  records = [record.numpy() for record in tf.data.TFRecordDataset(str(path))]
  example = tf.train.Example.FromString(records[1])
  example.features.feature['label'].int64_list.value[0] += 1
  records[1] = example.SerializeToString()
  with tf.io.TFRecordWriter(str(path)) as writer:
    for record in records:
      writer.write(record)


def drop_the_end(path):
  path.write_bytes(path.read_bytes()[:-7])


@pytest.mark.parametrize(
  ('corrupt', 'expected'),
  [(change_label, 'record 1 .counted from 0. of .* is not that of the original'),
   (drop_the_end, 'cannot be read .*: delete it and run the command again')],
)  # fmt: skip
@pytest.mark.parametrize('split', ['train', 'test'])
def test_a_corrupt_copy_is_named(config_file, copy, corrupt, expected, split):
  path = next(path for name, path in files_of(copy).items() if f'-{split}.' in name)
  corrupt(path)
  with pytest.raises(UsageError, match=expected) as caught:
    run(config_file, copy)
  assert path.name in str(caught.value)


def test_another_side_and_the_folder_of_the_original_are_refused(config_file, original, copy):
  for side in (SIDE - 8, SIDE + 8):
    with pytest.raises(UsageError, match=f'shorter side of {side}'):
      run(config_file, copy, side)
  with pytest.raises(UsageError, match='has the original'):
    run(config_file, epath.Path(original))
  with pytest.raises(UsageError, match='in memory'):
    run('configs/cifar100.py', copy)
