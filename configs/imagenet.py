"""MSDNet on ImageNet, and the networks it is compared with: Table 3, Figure 5.

    python -m imta_jax.main --config=configs/imagenet.py           # Step 4: Table 3
    python -m imta_jax.main --config=configs/imagenet.py:step=6    # Figure 5: steps 4, 6, 7
    python -m imta_jax.main --config=configs/imagenet.py:network=densenet-121
    python -m imta_jax.main --config=configs/imagenet.py:network=googlenet,exits=3

Other networks are resnet-18, -34, -50, densenet-121, -169, -201 and googlenet. They have one exit
and phase I alone unless `exits` says otherwise; GoogLeNet can have 1 or 3.

Top-1 accuracy with step 4 in %, by exit:

    paper (Table 3)   57.28  66.22  70.24  71.71  72.43

Not trained yet. Cost: 90 + 90 epochs of 4,809 steps; 1.36 billion multiply-adds per
image at the last exit.
Data: `tfds build imagenet2012`, from the archives of image-net.org.
"""

from imta_jax import config as config_lib
from imta_jax.models import baselines


def get_config(argument=''):
  arguments = baselines.parse_argument(argument, step=4)
  config = config_lib.default()
  config.batch_size = 256
  config.evaluation_batch_size = 256
  # Each device normalizes its own images, as in the published code on several GPUs: the 32 images
  # on each of eight devices suffice, and exchanging statistics would add a fifth of the kernels.
  # Choose True for fewer images per device.
  config.global_batch_norm = False
  config.dataset.update(
    name='imagenet2012',
    test_split='validation',  # The test set in the paper; ImageNet's test split has no labels.
    validation_size=50_000,
    image_size=224,
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
    in_memory=False,
  )
  for phase in config.phases:
    # alpha and T are from the published ImageNet script; the paper does not give them.
    phase.update(epochs=90.0, milestones=(1 / 3, 2 / 3), alpha=0.9, temperature=1.0)
  if arguments.network != 'msdnet':
    baselines.choose(config, arguments.network, arguments.exits, 'imagenet')
    return config
  config.model.update(
    num_exits=5,
    base=arguments.step,
    step=arguments.step,
    step_mode='even',
    channels=32,
    growth_rate=16,
    scale_factors=(1, 2, 4, 4),
    bottleneck_factors=(1, 2, 4, 4),
    stem='imagenet',
  )
  return config
