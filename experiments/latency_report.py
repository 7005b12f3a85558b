"""Tables, verdicts and figure of what latency.py has measured.

    python experiments/latency_report.py experiments/results/mnist5k/latency

Reads latency.json in a folder and writes latency.csv and latency.png beside it, by these rules:

- The whole network, in a mode and at a batch size, is the faster of two ways to run every image
  through all stages: one program that computes the logits of all exits, and the engine with all
  images leaving at the last exit.
- Times are compared by time_ratio: the time divided by the time of the program that computes all
  exits in the same repeat, median over the repeats.
- The time saved is 1 - time_ratio / time_ratio of the whole network; the multiply-adds saved are
  counted against the last exit's; the share is the time saved divided by the multiply-adds saved.
"""

import argparse
import csv
import dataclasses
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks import common
from etils import epath

from imta_jax import command_line
from imta_jax.errors import UsageError
from imta_jax.figures import new_figure, save_figure
from imta_jax.files import write_whole

NEARLY_AS_ACCURATE = 'within 0.5 points'

# The share of the saved multiply-adds that shall be saved as time.
GOAL = 0.8


@dataclasses.dataclass(frozen=True)
class Timing:
  """What was measured of one way to classify images.

  Attributes:
    method: What tables call it.
    is_adaptive: Whether images leave at different exits.
    mode: 'predict' or 'stream'.
    batch_size: Images per call.
    images: Number of different images that were timed.
    accuracy: Fraction of all test images in use that was classified correctly.
    madds: Multiply-adds per image, averaged over the images that were timed.
    milliseconds: Per image, averaged; median over the repeats.
    images_per_second: Likewise.
    p50: Median of the milliseconds per call of `predict`; None for 'stream'.
    p99: Their 99th percentile.
    time_ratio: Time divided by that of the program that computes all exits, in the same repeat;
      median over the repeats.
  """

  method: str
  is_adaptive: bool
  mode: str
  batch_size: int
  images: int
  accuracy: float
  madds: float
  milliseconds: float
  images_per_second: float
  p50: float | None
  p99: float | None
  time_ratio: float


@dataclasses.dataclass(frozen=True)
class Saving:
  """What a method saves compared with the whole network.

  Attributes:
    timing: The method's timing.
    is_whole_network: Whether it is the faster of the methods that run all stages for all images.
    madds_saving: Fraction of the multiply-adds that is saved.
    time_saving: Fraction of the time that is saved.
    share: time_saving / madds_saving; None if no multiply-adds are saved.
  """

  timing: Timing
  is_whole_network: bool
  madds_saving: float
  time_saving: float
  share: float | None


def main(arguments: Sequence[str] | None = None) -> None:
  """Runs the command line.

  Raises:
    UsageError: If the folder holds no measurement.
  """
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('folder', help='folder with the latency.json that latency.py wrote')
  folder = epath.Path(parser.parse_args(arguments).folder)
  path = folder / 'latency.json'
  if not path.exists():
    raise UsageError(f'{path} does not exist: run experiments/latency.py first')
  content = json.loads(path.read_text())
  report([Timing(**row) for row in content['timings']], content, folder)


def report(timings: Sequence[Timing], description: Mapping[str, Any], folder: epath.Path) -> None:
  """Writes latency.csv and latency.png, and prints the table and verdicts.

  Args:
    timings: All that were measured.
    description: What latency.json says of the measurement.
    folder: Where to write.
  """
  savings = compute_savings(timings)
  write_whole(folder / 'latency.csv', to_csv(savings).encode())
  write_figure(savings, folder / 'latency.png', description['title'])
  print(f'{description["machine"]}; load average before: {description["load_average"]:.1f}')
  print(f'\n{render(savings)}\n')
  print('\n'.join(verdicts(savings)))
  print(f'tables and figure in {folder}')


def write_timings(
  timings: Sequence[Timing], description: Mapping[str, Any], folder: epath.Path
) -> None:
  """Writes latency.json."""
  rows = [_rounded(dataclasses.asdict(timing)) for timing in timings]
  content = json.dumps({**description, 'timings': rows}, indent=2) + '\n'
  folder.mkdir(parents=True, exist_ok=True)
  write_whole(folder / 'latency.json', content.encode())


def compute_savings(timings: Sequence[Timing]) -> list[Saving]:
  """What each method saves, by the rules of the module, in the order of the timings."""
  groups = {}
  for timing in timings:
    groups.setdefault((timing.mode, timing.batch_size), []).append(timing)
  savings = []
  for timing in timings:
    group = groups[timing.mode, timing.batch_size]
    all_madds = max(other.madds for other in group)
    whole_network = min(
      (other for other in group if not other.is_adaptive and other.madds == all_madds),
      key=lambda other: other.time_ratio,
    )
    madds_saving = 1 - timing.madds / all_madds
    time_saving = 1 - timing.time_ratio / whole_network.time_ratio
    share = time_saving / madds_saving if madds_saving > 0 else None
    savings.append(Saving(timing, timing is whole_network, madds_saving, time_saving, share))
  return savings


def verdicts(savings: Sequence[Saving]) -> list[str]:
  """Lines: the share of the saving that is real, and what is slower than the whole network."""
  lines = []
  chosen = [saving for saving in savings if saving.timing.method == NEARLY_AS_ACCURATE]
  for saving in chosen:
    share = 'none' if saving.share is None else f'{100 * saving.share:.0f} %'
    is_met = saving.share is not None and saving.share >= GOAL
    lines.append(
      f'{_name(saving)}: {share} of the saved multiply-adds is saved as time; '
      f'goal {100 * GOAL:.0f} %: {"met" if is_met else "missed"}'
    )
  if not chosen:
    lines.append('no thresholds are within 0.5 points of the last exit on validation images')
  slower = [
    f'{_name(saving)} ({-100 * saving.time_saving:+.0f} %)'
    for saving in savings
    if saving.madds_saving > 0 and saving.time_saving < 0
  ]
  lines.append(f'slower than the whole network: {"; ".join(slower) or "none"}')
  return lines


def _name(saving):
  return f'{saving.timing.method}, {saving.timing.mode} {saving.timing.batch_size}'


_HEADINGS = (
  *('mode', 'batch', 'method', 'accuracy %', 'multiply-adds', 'ms/image', 'images/s'),
  *('p50 ms', 'p99 ms', 'saved madds %', 'saved time %', 'share %'),
)


def render(savings: Sequence[Saving]) -> str:
  """A table to print; the whole network of each mode and batch size has a star."""
  rows = []
  for saving in savings:
    timing = saving.timing
    rows.append(
      (
        timing.mode,
        timing.batch_size,
        timing.method + (' *' if saving.is_whole_network else ''),
        f'{100 * timing.accuracy:.1f}',
        f'{timing.madds:,.0f}',
        f'{timing.milliseconds:.3f}',
        f'{timing.images_per_second:,.0f}',
        *('' if value is None else f'{value:.2f}' for value in (timing.p50, timing.p99)),
        f'{100 * saving.madds_saving:.0f}',
        f'{100 * saving.time_saving:.0f}',
        '' if saving.share is None else f'{100 * saving.share:.0f}',
      )
    )
  return common.table(_HEADINGS, rows) + '\n* the whole network, with which times are compared'


def to_csv(savings: Sequence[Saving]) -> str:
  """A row per method, mode and batch size: what was measured, then what follows from it."""
  records = []
  for saving in savings:
    fields = {field.name: getattr(saving, field.name) for field in dataclasses.fields(saving)}
    records.append(_rounded({**dataclasses.asdict(fields.pop('timing')), **fields}))
  table = io.StringIO()
  writer = csv.DictWriter(table, records[0], lineterminator='\n')
  writer.writeheader()
  writer.writerows(records)
  return table.getvalue()


def _rounded(record):
  return {
    name: float(f'{value:.6g}') if isinstance(value, float) else value
    for name, value in record.items()
  }


def write_figure(savings: Sequence[Saving], path: epath.Path, title: str) -> None:
  """Draws accuracy against multiply-adds, and against time for each batch size."""
  figure = new_figure(10, 4.4)
  from matplotlib.ticker import LogLocator, NullFormatter  # After `new_figure`; see there.

  by_madds, by_time = figure.subplots(1, 2, sharey=True)
  groups = {}
  for saving in savings:
    timing = saving.timing
    name = f'batch {timing.batch_size}' if timing.mode == 'predict' else 'stream'
    groups.setdefault(name, []).append(saving)
  _draw(by_madds, groups['stream'], lambda timing: timing.madds / 1e6, 'black', None)
  for index, (name, group) in enumerate(groups.items()):
    _draw(by_time, group, lambda timing: timing.milliseconds, f'C{index}', name)
  for marker, size, name in (
    ('*', 10, 'whole network, the faster way'),
    ('o', 5, 'one exit for all images'),
    ('.-', 6, 'adaptive'),
  ):
    by_madds.plot([], [], marker, color='black', markersize=size, fillstyle='none', label=name)
  by_madds.set(xlabel='average multiply-adds per image (million)', ylabel='test accuracy (%)')
  by_time.set(xlabel='average time per image (ms)', xscale='log')
  by_time.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
  by_time.xaxis.set_major_formatter('{x:g}')
  by_time.xaxis.set_minor_formatter(NullFormatter())
  for axes in (by_madds, by_time):
    axes.grid(alpha=0.3)
    axes.legend()
  figure.suptitle(title)
  save_figure(figure, path)


def _draw(axes, savings, cost, color, label):
  whole = [saving.timing for saving in savings if saving.is_whole_network]
  one_exit = [
    saving.timing
    for saving in savings
    if not saving.timing.is_adaptive and saving.timing.madds < whole[0].madds
  ]
  adaptive = sorted((s.timing for s in savings if s.timing.is_adaptive), key=cost)
  for timings, marker, size, name in (
    (whole, '*', 10, None),
    (one_exit, 'o', 5, None),
    (adaptive, '.-', 6, label),
  ):
    axes.plot(
      [cost(timing) for timing in timings],
      [100 * timing.accuracy for timing in timings],
      marker,
      color=color,
      markersize=size,
      fillstyle='full' if marker == '.-' else 'none',
      label=name,
    )


if __name__ == '__main__':
  command_line.run(main)
