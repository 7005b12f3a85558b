"""MSDNet on MNIST-5k, 5,000 real digits: trains and evaluates in two minutes on a laptop.

    python -m imta_jax.main --config=configs/mnist5k.py

Top-1 accuracy on test images in %, by exit; the paper has no such network:

    ours, phase I    95.5  95.6  96.0  95.9
    ours, phase II   95.4  95.8  96.1  96.0

Cost: 3 + 3 epochs of 54 steps, two minutes on two CPU cores. Data: part of a package, so not
downloaded.
"""

from imta_jax import config as config_lib


def get_config(argument=''):
  arguments = config_lib.parse_argument(argument, exits=4)
  config = config_lib.default()
  config.dataset.update(
    name='mnist5k',
    validation_size=500,
    image_size=28,
    mean=(0.131,),
    std=(0.308,),
    padding=2,
    flip=False,
  )
  config.model.update(num_exits=arguments.exits, step_mode='even', channels=2, growth_rate=2)
  phase_one, phase_two = config.phases
  phase_one.update(epochs=3.0, schedule='cosine')
  phase_two.update(epochs=3.0, schedule='cosine')
  return config
