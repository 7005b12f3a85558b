"""Folders of images: what is found, how it is split, what is read."""

import os
import unicodedata

import numpy as np
import pytest
from ml_collections import ConfigDict
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


def touch(root, names):
  """Makes empty files, which are all that `scan` needs."""
  for name in names:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


def numbered(classes, count):
  return [f'{name}/{number:03}.png' for name in classes for number in range(count)]


def split_of(root):
  """Returns {relative path: split}."""
  paths = image_folder.scan(str(root)).paths
  return {
    image_folder.relative_name(path, str(root)): split for split in paths for path in paths[split]
  }


def test_a_folder_without_splits_is_split_by_hash(tmp_path):
  touch(tmp_path / 'one', numbered(('rose', 'daisy'), 500))
  folder = image_folder.scan(str(tmp_path / 'one'))
  assert folder.class_names == ['daisy', 'rose']
  assert folder.is_split_here
  paths = [path for split in folder.paths.values() for path in split]
  assert len(set(paths)) == len(paths) == 1_000
  # A fifth for testing, then a tenth of the rest for validation, each class for itself.
  for split, share in {'train': 0.72, 'validation': 0.08, 'test': 0.2}.items():
    assert np.bincount(folder.labels[split]) / 500 == pytest.approx([share] * 2, abs=0.05)
    names = [folder.class_names[label] for label in folder.labels[split]]
    assert [os.path.basename(os.path.dirname(path)) for path in folder.paths[split]] == names
  touch(tmp_path / 'copy', numbered(('rose', 'daisy'), 500))
  assert split_of(tmp_path / 'copy') == split_of(tmp_path / 'one')


@pytest.mark.parametrize('given', [(), ('test',)])
def test_adding_and_removing_images_moves_no_other(tmp_path, given):
  root = tmp_path / 'train' if given else tmp_path
  touch(root, numbered(('cat', 'dog'), 100))
  for name in given:
    touch(tmp_path / name, numbered(('cat', 'dog'), 3))
  before = split_of(tmp_path)
  touch(root, [f'{name}/more/{number}.jpg' for name in ('cat', 'dog') for number in range(50)])
  for number in range(0, 100, 7):
    (root / f'cat/{number:03}.png').unlink()
  after = split_of(tmp_path)
  common = before.keys() & after.keys()
  assert len(common) == len(before) - 15 and len(after) == len(common) + 100
  assert {name: before[name] for name in common} == {name: after[name] for name in common}
  assert {after[name] for name in after.keys() - common} == {'train', 'validation'} | (
    set() if given else {'test'}
  )


def test_the_smallest_classes_have_images_in_every_split(tmp_path):
  names = [
    f'{count}_{copy}/{n}.png' for count in (3, 4, 9) for copy in range(30) for n in range(count)
  ]
  touch(tmp_path, names)
  folder = image_folder.scan(str(tmp_path))
  for labels in folder.labels.values():
    assert set(labels.tolist()) == set(range(90))
  assert split_of(tmp_path).keys() == set(names)


def test_names_in_other_unicode_forms_are_the_same(tmp_path):
  names = numbered(('Käfer', 'Zebra', 'Zz'), 30)  # Decomposed, Käfer becomes Ka◌̈fer.
  for form in ('NFC', 'NFD'):
    touch(tmp_path / form, [unicodedata.normalize(form, name) for name in names])
  assert split_of(tmp_path / 'NFD') == split_of(tmp_path / 'NFC')
  expected = [unicodedata.normalize('NFC', name) for name in ('Käfer', 'Zebra', 'Zz')]
  assert image_folder.scan(str(tmp_path / 'NFD')).class_names == expected


@pytest.mark.parametrize(
  ('train', 'validation', 'test'),
  [('Training', None, 'Testing'), ('TRAIN', 'Valid', 'test'), ('training_set', None, 'test_set')],
)
def test_folders_of_splits_may_have_other_names(tmp_path, train, validation, test):
  counts = {train: 20, validation: 5, test: 6}
  for name in filter(None, counts):
    touch(tmp_path / name, numbered(('glioma', 'none'), counts[name]))
  touch(tmp_path, ['extra/1.png', 'labels.csv'])
  folder = image_folder.scan(str(tmp_path))
  assert folder.class_names == ['glioma', 'none'] and not folder.is_split_here
  assert {os.path.relpath(path, tmp_path).split('/')[0] for path in folder.paths['test']} == {test}
  assert len(folder.paths['test']) == 12
  assert (len(folder.paths['validation']) == 10) == bool(validation)
  assert folder.ignored == {'extra/': 1, '.csv': 1}


@pytest.mark.parametrize(
  ('folders', 'message'),
  [
    (('test', 'cat', 'dog'), 'has test/ but no train/'),
    (('train', 'Training'), '.*/Training and train/ are both for train: keep one'),
  ],
)
def test_splits_that_are_not_clear_are_refused(tmp_path, folders, message):
  for name in folders:
    touch(tmp_path / name, numbered(('a', 'b'), 5))
  with pytest.raises(UsageError, match=message):
    image_folder.scan(str(tmp_path))


@pytest.mark.parametrize(
  ('files', 'message'),
  [
    (
      ('1.HEIC', '2.heic', '3.avif', '.DS_Store'),
      r'rose has no images .* \(.heic, .avif\): convert',
    ),
    (('Thumbs.db', '.hidden.png', '.ipynb_checkpoints/1.png'), r'rose has no images .* \(empty\)'),
  ],
)
def test_a_class_without_images_is_named(tmp_path, files, message):
  touch(tmp_path, numbered(('cat', 'dog'), 5) + [f'rose/{file}' for file in files])
  with pytest.raises(UsageError, match=message):
    image_folder.scan(str(tmp_path))


def test_what_is_no_image_is_ignored_and_counted(tmp_path):
  images = [*numbered(('cat', 'dog'), 5), 'cat/a.jfif', 'dog/deep/b.JPE']
  others = ['cat/a.heic', 'dog/deep/b.HEIC', 'cat/LICENSE', 'readme.txt', 'loose.png']
  hidden = ['cat/.ipynb_checkpoints/000.png', '@eaDir/cat/000.png', '__MACOSX/cat/._000.png']
  touch(tmp_path, images + others + hidden + ['.git/a.png', 'cat/Thumbs.db', '.DS_Store'])
  assert split_of(tmp_path).keys() == set(images)
  folder = image_folder.scan(str(tmp_path))
  assert folder.ignored == {'.heic': 2, 'no extension': 1, '.txt': 1, '.png': 1}
  assert '; ignored: 1 × .png, 1 × .txt, 1 × no extension, 2 × .heic' in folder.summary()


def test_a_summary_names_classes_and_numbers(tmp_path):
  touch(tmp_path / 'train', numbered([f'class_{number:02}' for number in range(30)], 3))
  touch(tmp_path / 'test', numbered(['class_01', 'class_02'], 1))
  folder = image_folder.scan(str(tmp_path))
  assert folder.summary() == (
    '30 classes (class_00, class_01, class_02, class_03, class_04, class_05, class_06, class_07, '
    'class_08, …); 60 train, 30 validation, 2 test images'
  )


@pytest.mark.parametrize('given', [('test',), ('val',), ('val', 'test'), ()])
def test_given_splits_are_kept(tmp_path, given):
  touch(tmp_path / 'train', numbered('ab', 10))
  for name in given:
    touch(tmp_path / name, numbered('ab', 3))
  folder = image_folder.scan(str(tmp_path))
  assert folder.is_split_here == (not given)
  of_split = {
    split: {os.path.relpath(path, tmp_path).split('/')[0] for path in paths}
    for split, paths in folder.paths.items()
  }
  assert of_split == {
    'train': {'train'},
    'validation': {'val' if len(given) == 2 else 'train'},
    'test': {given[-1] if given else 'train'},
  }
  assert sum(map(len, folder.paths.values())) == 20 + 6 * len(given)


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


@pytest.mark.parametrize('root', ['nowhere', None])
def test_a_folder_that_does_not_exist_is_refused(root):
  with pytest.raises(
    UsageError, match=f'image folder {root!r} does not exist: config.dataset.data'
  ):
    image_folder.scan(root)


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


def test_files_that_cannot_be_read_are_named(tmp_path):
  write_images(tmp_path, {'a': 9, 'b': 9}, size=(60, 60))
  for number in range(7):
    path = tmp_path / f'a/{number}.png'
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
  folder = image_folder.scan(str(tmp_path))
  expected = r'image\(s\) cannot be read: .*/a/\d.png: .*restore or remove such files'
  with pytest.raises(UsageError, match=expected):
    image_folder.read(folder, (8, 8, 3), 'none')


def test_a_survey_leaves_out_files_without_a_header(tmp_path):
  write_images(tmp_path, {'a': 4, 'b': 4}, 'RGB', (12, 10))
  (tmp_path / 'b/0.png').write_text('no image')
  folder = image_folder.scan(str(tmp_path))
  assert image_folder.survey(folder) == image_folder.Survey(3, 10, False)
  for path in tmp_path.glob('*/*'):
    path.write_text('no image')
  with pytest.raises(UsageError, match=r'8 image\(s\) cannot be read'):
    image_folder.survey(folder)


def test_a_folder_has_its_own_name_in_titles():
  assert image_folder.title(ConfigDict({'name': image_folder.NAME, 'data_dir': '/a/flowers/'})) == (
    'flowers'
  )
  assert image_folder.title(ConfigDict({'name': 'cifar100', 'data_dir': None})) == 'cifar100'
