"""Writes small files of `torch.save` in both formats, which tests read without PyTorch.

pip install torch && python tests/interop/record_torch_files.py
"""

import argparse
from pathlib import Path

import numpy as np

DATA = Path(__file__).parents[1] / 'data'


def main() -> None:
  """Writes DATA/torch_zip.pth and DATA/torch_legacy.pth."""
  import torch

  base = torch.arange(24, dtype=torch.float32)
  weight = torch.nn.Parameter(torch.ones(3))
  optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9, nesterov=True)
  weight.sum().backward()
  optimizer.step()
  content = {
    'epoch': 299,
    'best_prec1': torch.tensor(75.96),
    'best_accuracy': np.float64(31),
    'args': argparse.Namespace(data=Path('data'), rate=np.float32(0.1)),
    'state_dict': {
      'whole': base.view(2, 3, 4),
      'transposed': base.view(4, 6).t(),
      'part': base[5:17:3],
      'parameter': torch.nn.Parameter(base[:2].clone()),
      'scalar': torch.tensor(2.5),
      'empty': torch.zeros(0, 3),
      'half': base[:4].half() / 3,
      'bfloat16': base[:4].bfloat16() / 3,
      'double': base[:4].double() / 3,
      'long': torch.tensor([-1, 2**40]),
      'bool': torch.tensor([True, False]),
      'complex': torch.complex(base[:2], base[2:4]),
      'sparse': torch.eye(2).to_sparse(),
      'meta': base.to('meta'),
      'epoch': 3,
    },
    'optimizer': optimizer.state_dict(),
  }
  for name, is_zip in (('zip', True), ('legacy', False)):
    torch.save(content, DATA / f'torch_{name}.pth', _use_new_zipfile_serialization=is_zip)


if __name__ == '__main__':
  main()
