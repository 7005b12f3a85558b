"""Computes accuracy against average cost (budgeted batch classification), as in Figures 2 to 5.

    python -m imta_jax.sweep runs/mnist5k
    python -m imta_jax.sweep runs/cifar100-exits=4 runs/cifar100-exits=8 --output=figure

Reads the logits of finished runs from their workdirs. For other runs it computes them from the
checkpoints, which needs the data set.
"""

import argparse
import functools
from collections.abc import Iterator, Sequence

from etils import epath

from imta_jax import command_line, evaluate
from imta_jax.adaptive.cost import ExitCost
from imta_jax.adaptive.policy import BUDGET_PARAMETERS
from imta_jax.errors import UsageError
from imta_jax.training import workdir as layout


def main(arguments: Sequence[str] | None = None) -> None:
  """Runs the command line."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('workdirs', nargs='+', help='workdirs of runs, local or gs://')
  parser.add_argument(
    '--phases',
    default='last',
    choices=('last', 'all'),
    help='training phases of each run to show; default: %(default)s',
  )
  parser.add_argument(
    '--parameters',
    type=command_line.positive(float),
    nargs='+',
    default=BUDGET_PARAMETERS,
    help='budget parameters p; default: the 40 values of the paper, 0.05 to 2.00',
  )
  parser.add_argument(
    '--recompute', action='store_true', help='compute logits even if the run has saved them'
  )
  parser.add_argument(
    '--output',
    type=command_line.output_folder,
    help='folder for tables and figure; default: evaluation/sweep in the first workdir',
  )
  options = parser.parse_args(arguments)
  workdirs = [epath.Path(workdir) for workdir in options.workdirs]
  output = options.output or layout.evaluation_folder(workdirs[0]) / 'sweep'

  evaluations, labels = [], []
  for workdir in workdirs:
    phases = layout.load_config(workdir).phases
    for index, costs, predictions in networks(workdir, options.phases, options.recompute):
      name = layout.phase_name(index)
      name = name if len(workdirs) == 1 else f'{workdir.name} {name}'
      labels.append(layout.phase_label(name, phases[index]))
      try:
        evaluations.append(evaluate.assess(name, costs, predictions, parameters=options.parameters))
      except ValueError as error:
        raise UsageError(f'{workdir}: {error}: evaluate again with --recompute') from error
  evaluate.write_tables(evaluations, output)
  evaluate.write_figure(evaluations, output / 'budget.png', 'budgeted batch classification', labels)
  for evaluation in evaluations:
    print(evaluation.name)
    print('     p   val %   multiply-adds  test %   multiply-adds')
    for point in evaluation.points:
      print(
        f'{point.parameter:6.2f}  {100 * point.validation_accuracy:6.2f} '
        f'{point.validation_madds:15,.0f}'
        f'  {100 * point.test_accuracy:6.2f} {point.test_madds:15,.0f}'
      )
  print(f'{len(evaluations)} network(s) swept; tables and figure in {output}')


def networks(
  workdir: epath.Path, phases: str, recompute: bool
) -> Iterator[tuple[int, list[ExitCost], dict[str, evaluate.Predictions]]]:
  """Yields the phase (counted from 0), costs and predictions of each network of a run.

  Args:
    workdir: The workdir of the run.
    phases: 'last' or 'all'.
    recompute: Whether to run the networks even if the run has saved their predictions.
  """
  config = layout.load_config(workdir)
  indices = range(len(config.phases))[slice(-1 if phases == 'last' else 0, None)]
  names = {index: layout.phase_name(index) for index in indices}
  folder = layout.evaluation_folder(workdir)
  if (folder / 'evaluation.json').exists() and not recompute:
    for index, name in names.items():
      predictions = {
        split: evaluate.load_predictions(layout.predictions_path(workdir, name, split))
        for split in evaluate.SPLITS
      }
      yield index, evaluate.load_costs(folder, name), predictions
    return
  # These are slow to import and not needed for finished runs.
  from imta_jax.data.pipeline import open_dataset
  from imta_jax.training.restore import restore_network

  dataset = open_dataset(config)
  for index in indices:
    network = restore_network(workdir, index)
    yield index, network.costs, evaluate.predict_splits(network.predict, network.weights, dataset)


run = functools.partial(command_line.run, main)

if __name__ == '__main__':
  run()
