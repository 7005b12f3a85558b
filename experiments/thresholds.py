"""Compares thresholds for a trained network: where they come from, exit rules, and guarantees.

    python experiments/thresholds.py runs/mnist5k

Everything is chosen on validation images and then measured on test images. Writes a table and a
figure of the paper's geometric shares and of searched thresholds at the same 40 budgets, a figure
of the searched ones beside single exits, a table of exit rules, and one of thresholds with a
statistical guarantee on the loss of accuracy.
"""

import argparse
from collections.abc import Mapping, Sequence

import numpy as np
from benchmarks import common
from etils import epath

from imta_jax import command_line, evaluate, files
from imta_jax.adaptive import policy
from imta_jax.adaptive.cost import ExitCost
from imta_jax.adaptive.guarantee import CalibrationSet, guaranteed_thresholds
from imta_jax.adaptive.rules import RULES
from imta_jax.adaptive.search import fit_temperatures
from imta_jax.evaluate import new_figure, save_figure
from imta_jax.training import workdir as layout

_SHARES_OF_COST = (0.25, 0.5, 0.75)
_MAX_LOSSES, _CONFIDENCES = (0.005, 0.01, 0.02), (0.9, 0.95)
_QUANTILE = 1.96  # Of the normal distribution, for intervals of 95 %.
_KINDS = ('geometric', 'optimal')
_PAGE = """# Thresholds for {name}

Made by `{command}`. Chosen on {validation:,} validation images, measured on {test:,} test images;
accuracies in %, gains and losses in points, with 95 % intervals from differences image by image.

## By geometric shares and by search

![Accuracy against budget](sweeps.png)

At the same budgets, searched thresholds are {mean:.2f} points better on validation images on
average ({low:.2f} at least, {high:.2f} at most), and {test_gain:+.2f} points on test images: the
rest is overfitting. On test images the gain is above zero with 95 % confidence at {better} of
{budgets} budgets, and below zero at {worse}. Every fifth budget; all are in
[sweeps.csv](sweeps.csv):

{sweeps}

## Exit rules

Accuracy on test images with geometric shares, within these shares of the last exit's multiply-adds:

{rules}

## Statistical guarantees

Thresholds whose accuracy lies at most so much below the last exit's, with that confidence
([guarantees](../../../../docs/thresholds.md)):

{guarantees}
"""


def main(arguments: Sequence[str] | None = None) -> None:
  """Runs the command line.

  Raises:
    UsageError: If the workdir has no evaluated network.
  """
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('workdir', help='workdir of an evaluated run')
  parser.add_argument(
    '--output',
    type=command_line.output_folder,
    help='folder; default: evaluation/thresholds of the workdir',
  )
  options = parser.parse_args(arguments)
  workdir = epath.Path(options.workdir)
  config = layout.load_config(workdir)
  folder, name = layout.evaluation_folder(workdir), layout.phase_name(len(config.phases) - 1)
  madds = np.array([cost.madds for cost in evaluate.load_costs(folder, name)])
  splits = {
    split: evaluate.load_predictions(layout.predictions_path(workdir, name, split))
    for split in evaluate.SPLITS
  }
  output = options.output or folder / 'thresholds'
  records = compare_sweeps(splits, madds)
  files.write_csv(output / 'sweeps.csv', records)
  rules = compare_rules(splits, madds)
  files.write_csv(output / 'rules.csv', rules)
  guarantees = compare_guarantees(splits, madds)
  files.write_csv(output / 'guarantees.csv', guarantees)
  draw(records, config.dataset.name, output / 'sweeps.png')
  evaluate.write_figure(
    [of_searched(records, splits, madds)],
    output / 'early_exits.png',
    config.dataset.name,
    ['early exits, searched thresholds'],
  )
  text = page(records, rules, guarantees, config.dataset.name, splits, options)
  files.write_whole(output / 'README.md', text.encode())
  print(text)


def compare_sweeps(
  splits: Mapping[str, evaluate.Predictions], madds: np.ndarray
) -> list[dict[str, float]]:
  """Geometric and optimal thresholds at the budgets that the geometric ones take on validation.

  Args:
    splits: {split: predictions}.
    madds: [exit].

  Returns:
    A record per budget: accuracies in %, and what the optimal thresholds gain on test images in
    percentage points, with half the width of its 95 % interval (from differences image by image).
  """
  arrays = _arrays(splits)
  geometric = policy.budget_sweep(*arrays, madds)
  optimal = policy.optimal_sweep(*arrays, madds, [p.validation_madds for p in geometric])
  test = policy.scores_and_correctness('test', *arrays[2:], len(madds))
  records = []
  for one, other in zip(geometric, optimal, strict=True):
    differences = 1.0 * _answers(test, other.thresholds) - _answers(test, one.thresholds)
    records.append(
      {
        'budget': round(one.validation_madds),
        'geometric_validation': 100 * one.validation_accuracy,
        'optimal_validation': 100 * other.validation_accuracy,
        'geometric_test': 100 * one.test_accuracy,
        'optimal_test': 100 * other.test_accuracy,
        'geometric_test_madds': round(one.test_madds),
        'optimal_test_madds': round(other.test_madds),
        'gain_on_test': 100 * differences.mean(),
        'margin': 100 * _QUANTILE * differences.std() / np.sqrt(len(differences)),
      }
    )
  return [{key: round(value, 4) for key, value in record.items()} for record in records]


def compare_rules(
  splits: Mapping[str, evaluate.Predictions], madds: np.ndarray
) -> list[dict[str, object]]:
  """Accuracies in % on test images of each exit rule with geometric shares, at three budgets.

  Each is the most accurate operating point on validation images within the budget.
  """
  arrays = _arrays(splits)
  records = []
  for rule in RULES:
    temperatures = fit_temperatures(*arrays[:2]) if rule == 'calibrated' else None
    points = policy.budget_sweep(*arrays, madds, rule=rule, temperatures=temperatures)
    record = {'rule': rule}
    for share in _SHARES_OF_COST:
      within = [p for p in points if p.validation_madds <= share * madds[-1]]
      best = max(within, key=lambda p: (p.validation_accuracy, -p.validation_madds), default=None)
      record[f'{share:.0%}'] = round(100 * best.test_accuracy, 2) if best else ''
    records.append(record)
  return records


def compare_guarantees(
  splits: Mapping[str, evaluate.Predictions], madds: np.ndarray
) -> list[dict[str, object]]:
  """Thresholds with several guarantees: what they save, and what they lose on test images."""
  validation, test = (
    policy.scores_and_correctness(
      split, splits[split].probabilities(), splits[split].labels, len(madds)
    )
    for split in evaluate.SPLITS
  )
  records = []
  for max_loss in _MAX_LOSSES:
    for confidence in _CONFIDENCES:
      thresholds = guaranteed_thresholds(validation, max_loss, confidence)
      exits = policy.choose_exits(test.scores, thresholds)
      losses = 1.0 * test.correct[-1] - _answers(test, thresholds)
      records.append(
        {
          'max_loss': round(100 * max_loss, 4),
          'confidence': f'{confidence:.0%}',
          'threshold': round(float(thresholds[0]), 4),
          'multiply_adds': f'{madds[exits].mean() / madds[-1]:.0%}',
          'loss_on_test': round(100 * losses.mean(), 2),
          'margin': round(100 * _QUANTILE * losses.std() / np.sqrt(len(losses)), 2),
        }
      )
  return records


def _arrays(splits):
  return [x for s in evaluate.SPLITS for x in (splits[s].probabilities(), splits[s].labels)]


def _answers(images: CalibrationSet, thresholds: Sequence[float]) -> np.ndarray:
  """Whether each image is classified correctly, [image]."""
  exits = policy.choose_exits(images.scores, thresholds)
  return images.correct[exits, np.arange(len(exits))]


def draw(records: Sequence[Mapping[str, float]], title: str, path: epath.Path) -> None:
  """Draws accuracy against budget, and below it the gain on test images with its interval."""
  figure = new_figure(6.4, 6.0)
  above, below = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
  budgets = [record['budget'] / 1e6 for record in records]
  for kind, color in zip(_KINDS, ('tab:red', 'tab:blue'), strict=True):
    for split, style in (('validation', '--'), ('test', '-')):
      values = [record[f'{kind}_{split}'] for record in records]
      above.plot(budgets, values, style, color=color, label=f'{kind}, {split} images')
  gains, margins = (
    np.array([record[field] for record in records]) for field in ('gain_on_test', 'margin')
  )
  below.axhline(0, color='gray', linewidth=0.8)
  below.plot(budgets, gains, color='tab:blue')
  below.fill_between(budgets, gains - margins, gains + margins, color='tab:blue', alpha=0.2)
  above.set(ylabel='accuracy (%)', title=f'{title}: thresholds by geometric shares and by search')
  above.legend(fontsize='small')
  below.set(
    xlabel='budget: average multiply-adds per validation image (million)',
    ylabel='gain on test (points)',
  )
  for axes in (above, below):
    axes.grid(alpha=0.3)
  save_figure(figure, path)


def of_searched(
  records: Sequence[Mapping[str, float]],
  splits: Mapping[str, evaluate.Predictions],
  madds: np.ndarray,
) -> evaluate.Evaluation:
  """The evaluation of the searched thresholds, for the figure that runs have of geometric ones."""
  points = [
    policy.OperatingPoint(
      parameter=record['budget'],
      thresholds=(),
      validation_accuracy=record['optimal_validation'] / 100,
      validation_madds=record['budget'],
      validation_exit_fractions=(),
      test_accuracy=record['optimal_test'] / 100,
      test_madds=record['optimal_test_madds'],
      test_exit_fractions=(),
    )
    for record in records
  ]
  accuracies = {(split, 1): predictions.accuracy() for split, predictions in splits.items()}
  costs = [ExitCost(int(cost), params=0) for cost in madds]
  return evaluate.Evaluation('searched', costs, accuracies, points)


def page(
  records: Sequence[Mapping[str, float]],
  rules: Sequence[Mapping[str, object]],
  guarantees: Sequence[Mapping[str, object]],
  name: str,
  splits: Mapping[str, evaluate.Predictions],
  options: argparse.Namespace,
) -> str:
  """Returns the report in Markdown."""
  counts = {split: len(splits[split].labels) for split in evaluate.SPLITS}
  gains = [record['optimal_validation'] - record['geometric_validation'] for record in records]
  test_gain = np.mean([record['gain_on_test'] for record in records])
  significant = [record for record in records if abs(record['gain_on_test']) > record['margin']]
  better = sum(record['gain_on_test'] > 0 for record in significant)
  return _PAGE.format(
    name=name,
    command=f'python experiments/thresholds.py {options.workdir} --output={options.output}',
    validation=counts['validation'],
    test=counts['test'],
    mean=np.mean(gains),
    low=min(gains),
    high=max(gains),
    test_gain=test_gain,
    better=better,
    worse=len(significant) - better,
    budgets=len(records),
    sweeps=common.table(
      ('budget, million', 'validation, geometric', 'optimal', 'test, geometric', 'optimal', 'gain'),
      [
        (
          f'{record["budget"] / 1e6:.2f}',
          *(f'{record[f"{kind}_{split}"]:.2f}' for split in evaluate.SPLITS for kind in _KINDS),
          f'{record["gain_on_test"]:+.2f} ± {record["margin"]:.2f}',
        )
        for record in records[4::5]
      ],
    ),
    rules=common.table(tuple(rules[0]), [tuple(record.values()) for record in rules]),
    guarantees=common.table(
      ('max loss, points', 'confidence', 'threshold', 'multiply-adds', 'loss on test images'),
      [
        (*list(record.values())[:4], f'{record["loss_on_test"]:+.2f} ± {record["margin"]:.2f}')
        for record in guarantees
      ],
    ),
  )


if __name__ == '__main__':
  command_line.run(main)
