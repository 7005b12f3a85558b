"""Accuracy against average cost in budgeted batch classification: what Figures 2 to 5 share."""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial

import ablation
import numpy as np
import report
from etils import epath
from runs import Run, Runs, main

from imta_jax import evaluate
from imta_jax.evaluate import new_figure
from imta_jax.training import workdir as layout


@dataclasses.dataclass(frozen=True)
class Curve:
  """A network of a figure.

  Attributes:
    label: Its name in the legend.
    run: The run.
    phase: The phase, counted from 0, after which it is read.
    color: Colour of its line.
    style: Its line style.
  """

  label: str
  run: str
  phase: int
  color: str = ''
  style: str = '-'


def pair(config: str, folder: str) -> list[Run]:
  """Returns the two runs of a network: as MSDNet was trained, and with all techniques."""
  plain = ablation.PLAIN_FIRST | ablation.PLAIN_SECOND
  return [Run(f'{folder}/none', config, plain), Run(f'{folder}/GE+ISC+OFA', config)]


@dataclasses.dataclass(frozen=True)
class Comparison:
  """MSDNets of several sizes, and networks that compute all layers for all images.

  Attributes:
    config: Config file of the data set, without folder and ending.
    argument: Name of the config's argument for the size of the MSDNet.
    sizes: Values of that argument.
    networks: Values of the config's argument `network`, by label.
  """

  config: str
  argument: str
  sizes: Sequence[int]
  networks: Mapping[str, Sequence[str]]

  def runs(self) -> list[Run]:
    """Returns what is to be trained."""
    pairs = [
      run
      for size in self.sizes
      for run in pair(
        f'configs/{self.config}.py:{self.argument}={size}', f'{self.config}_{self.argument}={size}'
      )
    ]
    return pairs + [
      Run(f'{self.config}/{name}', f'configs/{self.config}.py:network={name}')
      for names in self.networks.values()
      for name in names
    ]

  def curves(self) -> list[Curve]:
    """Returns the curves of the MSDNets, in the paper's colours."""
    curves = []
    for size, style in zip(self.sizes, ('-', '--', ':'), strict=False):
      folder, label = f'{self.config}_{self.argument}={size}', f'{self.argument} {size}'
      curves += [
        Curve(f'MSDNet, {label}', f'{folder}/none', 0, 'red', style),
        Curve(f'with GE, ISC and OFA, {label}', f'{folder}/GE+ISC+OFA', 1, 'black', style),
      ]
    return curves

  def single_exits(self) -> list[Curve]:
    """Returns the points of the other networks."""
    return [
      Curve(label, f'{self.config}/{name}', 0)
      for label, names in self.networks.items()
      for name in names
    ]

  def main(self, description: str, name: str, title: str) -> None:
    """Runs the command line of a figure; see `runs.main`."""
    write_figure = partial(
      write, name=name, title=title, curves=self.curves(), single_exits=self.single_exits()
    )
    main(description, name, self.runs(), write_figure)


def sweep(runs: Runs, run: str, phase: int) -> tuple[np.ndarray, np.ndarray]:
  """Returns multiply-adds and accuracy in % on test images, both [seed, budget]."""
  points = [
    evaluate.load_points(
      layout.evaluation_folder(runs.workdir(run, seed)), layout.phase_name(phase)
    )
    for seed in range(runs.num_seeds)
  ]
  madds, accuracy = (
    np.array([[getattr(point, field) for point in of_seed] for of_seed in points])
    for field in ('test_madds', 'test_accuracy')
  )
  return madds, 100 * accuracy


def write(
  runs: Runs,
  output: epath.Path,
  name: str,
  title: str,
  curves: Sequence[Curve],
  single_exits: Sequence[Curve] = (),
) -> str:
  """Writes a figure, and the points in it as CSV.

  Args:
    runs: The finished runs.
    output: Where to write.
    name: Name of the figure, for its files.
    title: Its heading.
    curves: Networks that let images leave early; each line is the mean over seeds.
    single_exits: Networks with one exit: a point each, and a line for those of one label.

  Returns:
    The path of the figure.
  """
  figure = new_figure(6.4, 4.8)
  axes = figure.add_subplot()
  records = []
  for curve in curves:
    madds, accuracy = sweep(runs, curve.run, curve.phase)
    x, y = madds.mean(axis=0) / 1e6, accuracy.mean(axis=0)
    axes.plot(x, y, curve.style, color=curve.color, label=curve.label, linewidth=1.5)
    if runs.num_seeds > 1:
      spread = accuracy.std(axis=0, ddof=1)
      axes.fill_between(x, y - spread, y + spread, color=curve.color, alpha=0.15, linewidth=0)
    records += _records(curve, x, accuracy)
  labels = dict.fromkeys(curve.label for curve in single_exits)
  for number, label in enumerate(labels):
    points = []
    for curve in (curve for curve in single_exits if curve.label == label):
      folder = layout.evaluation_folder(runs.workdir(curve.run, 0))
      cost = evaluate.load_costs(folder, layout.phase_name(curve.phase))[-1]
      accuracy = runs.accuracies(curve.run, curve.phase)[:, -1:]
      points.append((cost.madds / 1e6, accuracy.mean()))
      records += _records(curve, [cost.madds / 1e6], accuracy)
    axes.plot(*zip(*sorted(points), strict=True), f'C{number}o-', label=label, markersize=4)
  axes.set(
    xlabel='average multiply-adds per image (million)', ylabel='test accuracy (%)', title=title
  )
  axes.grid(alpha=0.3)
  axes.legend(fontsize='small')
  about = report.provenance(runs, dict.fromkeys(c.run for c in (*curves, *single_exits)))
  return report.write_figure(output, name, title, figure, records, about)


def _records(curve, madds, accuracy):
  """One record per point: accuracy is [seed, point]."""
  for x, of_seeds in zip(madds, accuracy.T, strict=True):
    yield {
      'network': curve.label,
      'million_multiply_adds': round(float(x), 4),
      'mean': round(of_seeds.mean(), 4),
      'standard_deviation': round(of_seeds.std(ddof=1), 4) if len(of_seeds) > 1 else '',
    }
