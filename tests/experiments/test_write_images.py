"""Images of a data set as files: which, where, and what is in them."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import write_images
from etils import epath
from PIL import Image

from imta_jax import config as config_lib
from imta_jax.data import arrays, image_folder
from imta_jax.errors import UsageError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def content(tmp_path):
  """A data set of 30 images per split, in the folder arrays/ with config.py."""
  random, sizes = np.random.default_rng(0), dict.fromkeys(arrays.SPLITS, 30)
  content = arrays.Arrays(
    ['a', 'b', 'c'],
    {split: random.integers(0, 256, (n, 8, 8, 1), np.uint8) for split, n in sizes.items()},
    {split: np.arange(n, dtype=np.int32) % 3 for split, n in sizes.items()},
  )
  config = config_lib.load(str(ROOT / 'configs/mnist5k.py'))
  config.batch_size = config.evaluation_batch_size = 24
  config.dataset.update(
    arrays_dir=str(tmp_path / 'arrays'), image_size=8, validation_size=30, padding=1
  )
  arrays.write(config.dataset, content, epath.Path(tmp_path / 'arrays'))
  (tmp_path / 'config.json').write_text(json.dumps(config_lib.to_dict(config)))
  (tmp_path / 'config.py').write_text(
    'from pathlib import Path\n'
    'from imta_jax.config import from_json\n'
    "def get_config(argument): return from_json(Path(__file__).with_suffix('.json').read_text())\n"
  )
  return content


def test_files_hold_the_first_images_of_each_class(content, tmp_path, capsys):
  arguments = [f'--config={tmp_path}/config.py', str(tmp_path / 'images')]
  write_images.main([*arguments, '--per_class=4'])
  folder = tmp_path / 'images'
  assert capsys.readouterr().out.endswith(f'12 images of 3 classes in {folder}\n')
  for label, name in enumerate('abc'):
    expected = np.flatnonzero(content.labels['test'] == label)[:4]
    assert sorted(os.listdir(folder / name)) == ['0.png', '1.png', '2.png', '3.png']
    for number, index in enumerate(expected):
      with Image.open(folder / name / f'{number}.png') as image:
        np.testing.assert_array_equal(np.asarray(image), content.images['test'][index][..., 0])
  # The folder is one to train on.
  assert image_folder.scan(str(folder)).class_names == ['a', 'b', 'c']
  with pytest.raises(UsageError, match='is not empty: choose another folder'):
    write_images.main(arguments)


def test_a_set_that_is_streamed_is_refused(tmp_path):
  with pytest.raises(UsageError, match='its data set is streamed'):
    write_images.main([f'--config={ROOT / "configs/imagenet.py"}', str(tmp_path / 'images')])
