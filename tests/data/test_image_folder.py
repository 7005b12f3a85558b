"""Folders of images: what is found, how it is split, what is read."""

import os

import numpy as np
import pytest
from PIL import Image

from imta_jax.data import image_folder
from imta_jax.errors import UsageError


def write_images(root, counts, mode='RGB', size=(12, 10)):
  """Writes noise as {class: number} images."""
  random = np.random.default_rng(0)
  for name, count in counts.items():
    (root / name).mkdir(parents=True)
    for number in range(count):
      pixels = random.integers(0, 256, (*size, 3), np.uint8)
      Image.fromarray(pixels).convert(mode).save(root / name / f'{number}.png')


def test_a_folder_without_splits_is_split_in_equal_shares_and_always_the_same(tmp_path):
  write_images(tmp_path, {'rose': 20, 'daisy': 40, 'empty': 0, '.hidden': 20})
  folder = image_folder.scan(str(tmp_path))
  assert folder.class_names == ['daisy', 'rose']
  assert folder.is_split_here
  # A fifth for testing, then a tenth of the rest for validation.
  counts = {split: np.bincount(labels).tolist() for split, labels in folder.labels.items()}
  assert counts == {'train': [29, 14], 'validation': [3, 2], 'test': [8, 4]}
  paths = [path for split in folder.paths.values() for path in split]
  assert len(set(paths)) == 60
  for split, of_split in folder.paths.items():
    names = [folder.class_names[label] for label in folder.labels[split]]
    assert [os.path.basename(os.path.dirname(path)) for path in of_split] == names
  assert image_folder.scan(str(tmp_path)).paths == folder.paths


@pytest.mark.parametrize(
  ('given', 'expected'),
  [
    (('test',), {'train': 18, 'validation': 2, 'test': 6}),
    (('val',), {'train': 18, 'validation': 2, 'test': 6}),
    (('val', 'test'), {'train': 20, 'validation': 6, 'test': 6}),
    ((), {'train': 14, 'validation': 2, 'test': 4}),
  ],
)
def test_given_splits_are_kept(tmp_path, given, expected):
  write_images(tmp_path / 'train', {'a': 10, 'b': 10})
  for name in given:
    write_images(tmp_path / name, {'a': 3, 'b': 3})
  folder = image_folder.scan(str(tmp_path))
  assert {split: len(paths) for split, paths in folder.paths.items()} == expected
  assert folder.is_split_here == (not given)
  for path in folder.paths['test']:
    assert f'/{given[-1] if given else "train"}/' in path


@pytest.mark.parametrize(
  ('counts', 'message'),
  [
    ({'a': 5}, r'has 1 folder\(s\) with images'),
    ({'a': 5, 'b': 2}, r"class 'b' of .* has 2 training image\(s\), too few"),
  ],
)
def test_a_folder_that_cannot_be_used_is_refused(tmp_path, counts, message):
  write_images(tmp_path, counts)
  with pytest.raises(UsageError, match=message):
    image_folder.scan(str(tmp_path))


def test_a_folder_that_does_not_exist_is_refused():
  with pytest.raises(UsageError, match="image folder 'nowhere' does not exist"):
    image_folder.scan('nowhere')


def test_a_class_without_training_images_is_named(tmp_path):
  write_images(tmp_path / 'train', {'a': 4, 'b': 4})
  write_images(tmp_path / 'test', {'a': 4, 'c': 4})
  with pytest.raises(UsageError, match="has a class 'c' that the training images do not have"):
    image_folder.scan(str(tmp_path))


@pytest.mark.parametrize(
  ('mode', 'size', 'expected'),
  [
    ('RGB', (12, 10), image_folder.Survey(3, 10, False)),
    ('L', (12, 12), image_folder.Survey(1, 12, True)),
    ('1', (12, 12), image_folder.Survey(1, 12, True)),
    ('P', (12, 12), image_folder.Survey(3, 12, True)),
    ('RGBA', (8, 12), image_folder.Survey(3, 8, False)),
  ],
)
def test_a_survey_tells_colours_and_sizes(tmp_path, mode, size, expected):
  write_images(tmp_path, {'a': 4, 'b': 4}, mode, size)
  assert image_folder.survey(image_folder.scan(str(tmp_path))) == expected


def test_squares_of_several_sizes_are_not_uniform(tmp_path):
  write_images(tmp_path, {'a': 4}, size=(12, 12))
  write_images(tmp_path, {'b': 4}, size=(16, 16))
  assert image_folder.survey(image_folder.scan(str(tmp_path))) == image_folder.Survey(3, 14, False)


def test_images_are_read_with_their_labels(tmp_path):
  for name, level in (('dark', 10), ('light', 240)):
    (tmp_path / name).mkdir()
    for number in range(5):
      Image.new('L', (20 + number, 16), level).save(tmp_path / name / f'{number}.bmp')
  folder = image_folder.scan(str(tmp_path))
  arrays = image_folder.read(folder, (8, 8, 3), 'center')
  assert arrays.class_names == ['dark', 'light']
  for split, labels in arrays.labels.items():
    assert arrays.images[split].shape == (len(labels), 8, 8, 3)
    np.testing.assert_array_equal(arrays.images[split][:, 0, 0, 0], np.array([10, 240])[labels])


@pytest.fixture
def corrupt(tmp_path):
  """A folder with 7 of 18 images cut in the middle, so that their headers are intact."""
  write_images(tmp_path, {'a': 9, 'b': 9}, size=(60, 60))
  for number in range(7):
    cut(tmp_path / f'a/{number}.png')
  return tmp_path


def cut(path):
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_files_that_cannot_be_read_are_named(corrupt):
  folder = image_folder.scan(str(corrupt))
  image_folder.check_headers(folder)
  expected = r'image\(s\) cannot be read: .*/a/\d.png: .*restore or remove such files'
  with pytest.raises(UsageError, match=expected):
    image_folder.read(folder, (8, 8, 3), 'none')
  (corrupt / 'b/0.png').write_text('no image')
  with pytest.raises(UsageError, match=r'1 image\(s\) cannot be read: .*/b/0.png: not an image'):
    image_folder.check_headers(folder)


def test_a_survey_leaves_out_files_without_a_header(tmp_path):
  write_images(tmp_path, {'a': 4, 'b': 4}, 'RGB', (12, 10))
  (tmp_path / 'b/0.png').write_text('no image')
  folder = image_folder.scan(str(tmp_path))
  assert image_folder.survey(folder) == image_folder.Survey(3, 10, False)
  for path in tmp_path.glob('*/*'):
    path.write_text('no image')
  with pytest.raises(UsageError, match=r'8 image\(s\) cannot be read'):
    image_folder.survey(folder)
