"""Groups of similar classes, for networks with a branch per group (HydraNet).

groups = class_groups(logits, labels, num_classes=100, num_groups=20)
"""

import numpy as np
from scipy.cluster.vq import kmeans2


def class_groups(
  features: np.ndarray, labels: np.ndarray, num_classes: int, num_groups: int
) -> tuple[int, ...]:
  """Divides classes into groups of the same size by the features of a trained network.

  As in HydraNet (Mullapudi et al., CVPR 2018): the features of each class are averaged over its
  images and clustered by k-means; then each cluster centre in turn takes the nearest classes that
  are left. The publication takes the features of the last dense layer and images of the training
  set.

  Args:
    features: [image, width], for example logits.
    labels: [image], classes counted from 0; each class must have an image.
    num_classes: Number of classes.
    num_groups: Number of groups.

  Returns:
    [class], the group of each class, counted from 0. Sizes differ by at most one class.

  Raises:
    ValueError: If a class has no image, or there are fewer classes than groups.
  """
  num_images = np.bincount(labels, minlength=num_classes)
  if not num_images.all():
    raise ValueError(f'class {num_images.argmin()} has no image: give features of every class')
  if not 1 <= num_groups <= num_classes:
    raise ValueError(f'num_groups {num_groups} is out of range: it must be from 1 to {num_classes}')
  means = np.zeros((num_classes, features.shape[1]))
  np.add.at(means, labels, features)
  means /= num_images[:, np.newaxis]
  centres, _ = kmeans2(means, num_groups, minit='++', rng=0)
  groups = np.full(num_classes, -1)
  for group, centre in enumerate(centres):
    left = np.flatnonzero(groups < 0)
    size = -(-left.size // (num_groups - group))
    nearest = np.argsort(np.linalg.norm(means[left] - centre, axis=1), kind='stable')
    groups[left[nearest[:size]]] = group
  return tuple(groups.tolist())
