"""Figure 7: confidence ranks of validation images at exits 1 and 2, with and without ISC.

    python experiments/paper/figure_7.py --train

The closer the ranks, the better the exits agree on which images are easy. Spearman's rank
correlation summarizes it. The runs are two of Table 2, equally long: without ISC in phase II,
and with it.
"""

import numpy as np
import report
import runs
import scipy.stats
import table_2
from etils import epath

from imta_jax import command_line
from imta_jax.evaluate import new_figure

WITHOUT, WITH = f'{table_2.FOLDER}/none', f'{table_2.FOLDER}/ISC'
RUNS = [run for run in table_2.RUNS if run.name in (WITHOUT, WITH)]


def confidence_ranks(probabilities: np.ndarray) -> np.ndarray:
  """Ranks images by their confidence, the most confident first.

  Args:
    probabilities: [exit, image, class].

  Returns:
    [exit, image], from 1; equal confidences share the mean of their ranks.
  """
  return scipy.stats.rankdata(-probabilities.max(axis=-1), axis=-1)


def write(chosen: runs.Runs, output: epath.Path) -> str:
  """Writes the figure of the first seed, and the correlations of all."""
  figure = new_figure(8.4, 4.4)
  records = []
  panels = zip((WITHOUT, WITH), ('without ISC', 'with ISC'), ('blue', 'red'), strict=True)
  for axes, (run, label, color) in zip(figure.subplots(1, 2, sharey=True), panels, strict=True):
    for seed, predictions in enumerate(chosen.predictions(run, 1, 'validation')):
      first, second, *_ = confidence_ranks(predictions.probabilities())
      correlation = scipy.stats.spearmanr(first, second).statistic
      records.append(
        {'training': label, 'seed': seed, 'rank_correlation': round(float(correlation), 4)}
      )
      if seed == 0:
        axes.plot(first, second, '.', color=color, markersize=1.5)
        axes.set(title=f'{label}: rank correlation {correlation:.3f}', xlabel='rank at exit 1')
  figure.axes[0].set_ylabel('rank at exit 2')
  title = 'Figure 7: confidence ranks at exits 1 and 2'
  about = report.provenance(chosen, [WITHOUT, WITH])
  path = report.write_figure(output, 'figure_7', title, figure, records, about)
  lines = [f'{r["training"]}, seed {r["seed"]}: {r["rank_correlation"]:.3f}' for r in records]
  return '\n'.join(['Rank correlation', *lines, path])


def main() -> None:
  """Runs the command line."""
  runs.main(__doc__, 'figure_7', RUNS, write)


if __name__ == '__main__':
  command_line.run(main)
