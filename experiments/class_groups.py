"""Divides the classes of a data set into groups of similar ones, for the branches of a HydraNet.

    python experiments/class_groups.py runs/cifar100 --groups=20

Reads the logits of the last exit for the validation images, which a finished run of any network has
saved, and prints the argument for `imta_jax.main` that sets the groups.
"""

import argparse
from collections.abc import Sequence

from etils import epath

from imta_jax import command_line, evaluate
from imta_jax.command_line import positive
from imta_jax.errors import UsageError
from imta_jax.models.class_groups import class_groups
from imta_jax.training import workdir as layout


def main(arguments: Sequence[str] | None = None) -> None:
  """Runs the command line."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('workdir', help='workdir of a finished run, local or gs://')
  parser.add_argument(
    '--groups', type=positive(int), default=20, help='number of groups; default: %(default)s'
  )
  options = parser.parse_args(arguments)
  workdir = epath.Path(options.workdir)
  phase = layout.phase_name(len(layout.load_config(workdir).phases) - 1)
  path = layout.predictions_path(workdir, phase, 'validation')
  if not path.exists():
    raise UsageError(f'{workdir} has no predictions of {phase}: let the training command finish')
  predictions = evaluate.load_predictions(path)
  try:
    logits = predictions.logits[-1]
    groups = class_groups(logits, predictions.labels, logits.shape[-1], options.groups)
  except ValueError as error:
    raise UsageError(str(error)) from error
  print(f'--config.model.groups={",".join(map(str, groups))}')


if __name__ == '__main__':
  command_line.run(main)
