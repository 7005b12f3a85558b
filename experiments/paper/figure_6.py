"""Figure 6: validation accuracy at each epoch of phase I, with and without GE, on CIFAR-100.

    python experiments/paper/figure_6.py --train

Networks with 4, 6 and 8 exits; accuracies are averaged over exits. One seed is drawn, the first.
"""

import curves
import numpy as np
import report
import runs
from etils import epath

from imta_jax import command_line
from imta_jax.evaluate import new_figure
from imta_jax.training import workdir as layout

EXITS = (4, 6, 8)
RUNS = [
  run
  for exits in EXITS
  for run in curves.pair(f'configs/cifar100.py:exits={exits}', f'cifar100_exits={exits}')
]


def validation_curve(chosen: runs.Runs, run: str) -> tuple[np.ndarray, np.ndarray]:
  """Returns steps and validation accuracies in %, averaged over exits, of phase I."""
  steps, accuracies = [], []
  for record in chosen.metrics(run, 0):
    of_exits = [value for name, value in record.items() if name.startswith('validation/accuracy')]
    if record['phase'] == layout.phase_name(0) and of_exits:
      steps.append(record['step'])
      accuracies.append(100 * np.mean(of_exits))
  return np.array(steps), np.array(accuracies)


def write(chosen: runs.Runs, output: epath.Path) -> str:
  """Writes the figure, and returns its path."""
  figure = new_figure(10, 3.6)
  records = []
  for exits, axes in zip(EXITS, figure.subplots(1, len(EXITS), sharey=True), strict=True):
    for label, run, color in (('baseline', 'none', 'red'), ('GE', 'GE+ISC+OFA', 'black')):
      steps, accuracies = validation_curve(chosen, f'cifar100_exits={exits}/{run}')
      axes.plot(steps, accuracies, color=color, label=label, linewidth=1)
      records += [
        {'exits': exits, 'training': label, 'step': step, 'validation_accuracy': round(value, 4)}
        for step, value in zip(steps, accuracies, strict=True)
      ]
    axes.set(title=f'{exits} exits', xlabel='training step')
    axes.grid(alpha=0.3)
    axes.legend()
  figure.axes[0].set_ylabel('validation accuracy (%)')
  title = 'Figure 6: validation accuracy in phase I, CIFAR-100'
  about = report.provenance(chosen, [run.name for run in RUNS])
  return report.write_figure(output, 'figure_6', title, figure, records, about)


def main() -> None:
  """Runs the command line."""
  runs.main(__doc__, 'figure_6', RUNS, write)


if __name__ == '__main__':
  command_line.run(main)
