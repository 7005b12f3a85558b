"""Images of a data set as files: which, where, and what is in them."""

import importlib.util
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from imta_jax import config as config_lib
from imta_jax.data import image_folder
from imta_jax.data.pipeline import open_dataset
from imta_jax.errors import UsageError

ROOT = Path(__file__).parents[2]
CONFIG = str(ROOT / 'configs/mnist5k.py')


@pytest.fixture(scope='module')
def program():
  spec = importlib.util.spec_from_file_location('program', ROOT / 'experiments/write_images.py')
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def test_files_hold_the_first_images_of_each_class(program, tmp_path, monkeypatch, capsys):
  monkeypatch.setenv('TFDS_DATA_DIR', str(tmp_path / 'tfds'))
  folder = tmp_path / 'digits'
  program.main([f'--config={CONFIG}', str(folder), '--per_class=3'])
  assert capsys.readouterr().out.endswith(f'30 images of 10 classes in {folder}\n')
  arrays = open_dataset(config_lib.load_file(CONFIG)).arrays
  for label in range(10):
    expected = np.flatnonzero(arrays.labels['test'] == label)[:3]
    assert sorted(os.listdir(folder / str(label))) == ['0.png', '1.png', '2.png']
    for number, index in enumerate(expected):
      with Image.open(folder / str(label) / f'{number}.png') as image:
        np.testing.assert_array_equal(np.asarray(image), arrays.images['test'][index][..., 0])
  # The folder is one to train on.
  found = image_folder.scan(str(folder))
  assert found.class_names == [str(label) for label in range(10)]
  with pytest.raises(UsageError, match='is not empty: choose another folder'):
    program.main([f'--config={CONFIG}', str(folder)])


def test_a_set_that_is_streamed_is_refused(program, tmp_path):
  with pytest.raises(UsageError, match='its data set is streamed'):
    program.main([f'--config={ROOT / "configs/imagenet.py"}', str(tmp_path / 'images')])
