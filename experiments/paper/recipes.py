"""Deep Feature Surgery's recipe told apart from its method: 7 exits on CIFAR-100, after phase I.

    python experiments/paper/recipes.py --train --seeds=1 --scale=0.1

Its publication (Gong et al., ECCV 2024) trains with larger batches, more weight decay and later
cuts of the learning rate than the networks that it compares with. Here, GE, feature partitioning
and both are trained with each recipe; see configs/cifar100.py. Table 1 shares the run of GE.
"""

import ablation
import published
import report
import runs
from etils import epath

from imta_jax import command_line

_PARTITIONED = {'phases[0].shared_channels': 0.5}
_METHODS = {
  'GE': {},
  'partitioning': ablation.PLAIN_FIRST | _PARTITIONED,
  'GE+partitioning': _PARTITIONED,
}
# Fields, besides the recipe: that of Deep Feature Surgery has no phase II.
_RECIPES = {'paper': ablation.PLAIN_SECOND, 'dfs': {}}
_PAIRS = (
  *((('partitioning', recipe), ('GE', recipe)) for recipe in _RECIPES),
  *((('GE+partitioning', recipe), ('GE', recipe)) for recipe in _RECIPES),
  *(((method, 'dfs'), (method, 'paper')) for method in _METHODS),
)


def _run(method, recipe):
  name = 'exits=7' if recipe == 'paper' else f'exits=7,recipe={recipe}'
  fields = _METHODS[method] | _RECIPES[recipe]
  return runs.Run(f'cifar100_{name}/{method}', f'configs/cifar100.py:{name}', fields)


_RUNS = {(method, recipe): _run(method, recipe) for recipe in _RECIPES for method in _METHODS}
RUNS = list(_RUNS.values())


def write(chosen: runs.Runs, output: epath.Path) -> str:
  """Writes the table, and returns it as Markdown."""
  rows = {
    key: report.row(
      f'{key[0]}, recipe {key[1]}',
      chosen.accuracies(run.name, 0),
      published.DEEP_FEATURE_SURGERY if key == ('partitioning', 'dfs') else None,
    )
    for key, run in _RUNS.items()
  }
  return report.write_table(
    output,
    'Recipes: CIFAR-100, 7 exits',
    list(rows.values()),
    [report.difference(rows[one], rows[other]) for one, other in _PAIRS],
    report.provenance(chosen, [run.name for run in RUNS]),
  )


def main() -> None:
  """Runs the command line."""
  runs.main(__doc__, 'recipes', RUNS, write)


if __name__ == '__main__':
  command_line.run(main)
