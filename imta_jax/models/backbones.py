"""Networks whose pretrained weights are public, with exits at places whose costs grow evenly.

    model = imta_jax.create_model('resnet', **BACKBONES['resnet-50'].fields, num_classes=12)

`imta_jax.interop.pretrained` loads the weights.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
# Pixels from -1 to 1; EfficientNet-Lite was trained on (pixel - 127) / 128.
_SYMMETRIC = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
_LITE = ((127 / 255,) * 3, (128 / 255,) * 3)


@dataclasses.dataclass(frozen=True)
class Backbone:
  """A network and what its weights were trained on.

  Attributes:
    architecture: Its name in `models.ARCHITECTURES`.
    fields: Arguments of the architecture.
    image_size: Side of the images in pixels.
    mean, std: Per channel, for pixels between 0 and 1.
  """

  architecture: str
  fields: dict[str, Any]
  image_size: int
  mean: Sequence[float]
  std: Sequence[float]


def _lite(variant, image_size, *exits_after):
  fields = {'variant': variant, 'exits_after': exits_after}
  return Backbone('efficientnet_lite', fields, image_size, *_LITE)


def _resnet(depth, *exits_after):
  fields = {'depth': depth, 'stem': 'imagenet', 'exits_after': exits_after}
  return Backbone('resnet', fields, 224, *_IMAGENET)


def _vit(size, normalization):
  return Backbone('vit', {'size': size, 'exits_after': (3, 6, 9)}, 224, *normalization)


# 'vit' are the weights of big_vision and timm, 'deit' those of DeiT.
BACKBONES = {
  'efficientnet-lite0': _lite(0, 224, 5, 8, 10, 13),
  'efficientnet-lite1': _lite(1, 240, 6, 10, 14, 17),
  'efficientnet-lite2': _lite(2, 260, 6, 10, 14, 17),
  'efficientnet-lite3': _lite(3, 280, 7, 12, 15, 19),
  'efficientnet-lite4': _lite(4, 300, 10, 16, 20, 25),
  'resnet-18': _resnet(18, 2, 4, 6),
  'resnet-34': _resnet(34, 4, 8, 12),
  'resnet-50': _resnet(50, 4, 8, 12),
  'resnet-101': _resnet(101, 8, 16, 24),
  'vit-s16': _vit('s', _SYMMETRIC),
  'vit-b16': _vit('b', _SYMMETRIC),
  'deit-s16': _vit('s', _IMAGENET),
  'deit-b16': _vit('b', _IMAGENET),
}
