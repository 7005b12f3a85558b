"""Divides the classes of a data set into groups of similar ones, for the branches of a HydraNet.

    python experiments/class_groups.py runs/cifar100 --groups=20

Reads the logits of the last exit for the validation images, which a finished run of any network has
saved, and prints the argument for `imta_jax.main` that sets the groups.
"""

import argparse
from collections.abc import Sequence

import numpy as np
from etils import epath
from scipy.cluster.vq import kmeans2

from imta_jax import command_line, evaluate
from imta_jax.command_line import positive
from imta_jax.errors import UsageError
from imta_jax.training import workdir as layout


def main(arguments: Sequence[str] | None = None) -> None:
  """Runs the command line."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('workdir', help='workdir of a finished run, local or gs://')
  parser.add_argument(
    '--groups', type=positive(int), default=20, help='number of groups; default: %(default)s'
  )
  options = parser.parse_args(arguments)
  workdir = epath.Path(options.workdir)
  phase = layout.phase_name(len(layout.load_config(workdir).phases) - 1)
  predictions = evaluate.load_predictions(layout.predictions_path(workdir, phase, 'validation'))
  logits = predictions.logits[-1]
  groups = class_groups(logits, predictions.labels, logits.shape[-1], options.groups)
  print(f'--config.model.groups={",".join(map(str, groups))}')


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
    UsageError: If a class has no image, or there are fewer classes than groups.
  """
  num_images = np.bincount(labels, minlength=num_classes)
  if not num_images.all():
    raise UsageError(f'class {num_images.argmin()} has no image: give features of every class')
  if not 1 <= num_groups <= num_classes:
    raise UsageError(f'num_groups {num_groups} is out of range: it must be from 1 to {num_classes}')
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


if __name__ == '__main__':
  command_line.run(main)
