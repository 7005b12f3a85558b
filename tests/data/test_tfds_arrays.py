"""Sets that are read whole through TFDS; test_tfds_reader.py has those that are corrupt."""

import numpy as np

from imta_jax.data import tfds_arrays


def test_images_are_read_as_stored(mnist5k_builder, mnist5k_splits):
  splits = {'train': ('train[:7]', 7), 'validation': ('train[7:9]', 2), 'test': ('test', 1000)}
  arrays = tfds_arrays.read(mnist5k_builder, splits)
  images, labels = mnist5k_splits['train']
  np.testing.assert_array_equal(arrays.images['train'], images[:7])
  np.testing.assert_array_equal(arrays.labels['train'], labels[:7])
  np.testing.assert_array_equal(arrays.labels['validation'], labels[7:9])
  np.testing.assert_array_equal(arrays.images['test'], mnist5k_splits['test'][0])
  assert arrays.labels['test'].dtype == np.int32
  assert arrays.class_names == [str(digit) for digit in range(10)]
