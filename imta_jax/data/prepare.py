"""Writes a data set as arrays, on which machines without TensorFlow can train.

    python -m imta_jax.data.prepare --config=configs/cifar100.py cifar100_arrays
    python -m imta_jax.main --config=configs/cifar100.py --config.dataset.arrays_dir=cifar100_arrays

For data sets that are kept in memory.
"""

import argparse
from collections.abc import Sequence

from etils import epath
from ml_collections import ConfigDict

from imta_jax import command_line, files
from imta_jax import config as config_lib
from imta_jax.data import arrays
from imta_jax.data.in_memory import InMemoryDataset
from imta_jax.data.pipeline import open_dataset
from imta_jax.errors import UsageError

# What to do if a folder could not be written to its end.
FIX_HINT = 'make room, delete what is there and run the command again'


def main(arguments: Sequence[str] | None = None) -> None:
  """Runs the command line.

  Raises:
    UsageError: If the config or the data set is wrong, or the folder is not empty or cannot be
      written.
  """
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--config', required=True, help='config file, as in training')
  parser.add_argument('folder', help='folder to write; must be empty or absent')
  options = parser.parse_args(arguments)
  folder = epath.Path(options.folder)
  config, dataset = open_for(options.config, folder)
  with files.accessing(folder, FIX_HINT):
    path = arrays.write(config.dataset, dataset.arrays, folder)
  print(f'{path}  {files.size_and_time(path)[0] / 1e6:.1f} MB')


def open_for(config_file: str, folder: epath.Path) -> tuple[ConfigDict, InMemoryDataset]:
  """Opens a data set that is to be written to a folder.

  Args:
    config_file: The config file, as in training.
    folder: Where its images are to be written.

  Returns:
    The config and its data set.

  Raises:
    UsageError: If the config or the data set is wrong, or the folder is not empty.
  """
  config = config_lib.load(config_file)
  if not config.dataset.in_memory:
    raise UsageError(f'--config={config_file}: its data set is streamed, not kept in memory')
  if folder.exists() and any(folder.iterdir()):
    raise UsageError(f'{folder} is not empty: choose another folder')
  dataset = open_dataset(config)
  assert isinstance(dataset, InMemoryDataset)
  return config, dataset


if __name__ == '__main__':
  command_line.run(main)
