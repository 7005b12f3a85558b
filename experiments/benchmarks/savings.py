"""What early exits save: tables and a figure of what inference.py has measured.

- The whole network, in a mode and at a batch size, is the faster of two ways to run every image
  through all stages: one XLA program that computes the logits of all exits, and the engine with all
  images leaving at the last exit.
- `time_ratio` is the time divided by that of the XLA program in the same repeat, median over the
  repeats.
- `time_saving` is 1 - time_ratio / time_ratio of the whole network; `madds_saving` is relative to
  the last exit's multiply-adds; `share` is time_saving / madds_saving.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import common
from etils import epath

from imta_jax.evaluate import new_figure, save_figure

ALL_EXITS, NEARLY_AS_ACCURATE = 'all exits', 'within 0.5 points'
RUNTIMES = ('ONNX Runtime', 'OpenVINO', 'PyTorch')

# Fields of a timing: milliseconds and images_per_second are averages, p50 and p99 milliseconds per
# call of `predict`, accuracy that on all images, madds the average of the images that were timed.
Timing = Mapping[str, Any]


def rounded(record: Timing) -> dict[str, Any]:
  """Returns a record with six digits of each float."""
  return {
    name: float(f'{value:.6g}') if isinstance(value, float) else value
    for name, value in record.items()
  }


def compute_savings(timings: Sequence[Timing]) -> list[dict[str, Any]]:
  """Returns the timings with is_whole_network, madds_saving, time_saving and share."""
  savings = []
  for timing in timings:
    group = [t for t in timings if _group(t) == _group(timing)]
    all_madds = max(t['madds'] for t in group)
    candidates = [
      t
      for t in group
      if t['madds'] == all_madds and not t['is_adaptive'] and t['method'] not in RUNTIMES
    ]
    whole = min(candidates, key=lambda t: t['time_ratio'])
    madds_saving = 1 - timing['madds'] / all_madds
    time_saving = 1 - timing['time_ratio'] / whole['time_ratio']
    share = time_saving / madds_saving if madds_saving > 0 else None
    derived = {'is_whole_network': timing is whole, 'madds_saving': madds_saving}
    savings.append(rounded({**timing, **derived, 'time_saving': time_saving, 'share': share}))
  return savings


def _group(timing):
  return timing['mode'], timing['batch_size']


def verdicts(savings: Sequence[Timing]) -> list[str]:
  """Returns lines: savings that became time, and what is slower than the whole network."""
  lines = [
    f'{_name(s)}: {s["share"]:.0%} of the saved multiply-adds is saved as time'
    for s in savings
    if s['method'] == NEARLY_AS_ACCURATE and s['share'] is not None
  ]
  slower = [
    f'{_name(s)} ({-s["time_saving"]:+.0%})'
    for s in savings
    if s['madds_saving'] > 0 and s['time_saving'] < 0
  ]
  return [*lines, f'slower than the whole network: {"; ".join(slower) or "none"}']


def _name(saving):
  return f'{saving["method"]}, {saving["mode"]} {saving["batch_size"]}'


def render(savings: Sequence[Timing]) -> str:
  """Returns a table to print; the whole network of each mode and batch size has a star."""
  hidden = {'is_adaptive', 'images', 'images_per_second', 'time_ratio', 'is_whole_network'}
  columns = [name for name in savings[0] if name not in hidden]
  rows = [
    ['' if s[name] is None else s[name] for name in columns] + ['*' * s['is_whole_network']]
    for s in savings
  ]
  cells = [[f'{cell:,.4g}' if isinstance(cell, float) else cell for cell in row] for row in rows]
  return common.table((*columns, '* whole network'), cells)


def write_figure(savings: Sequence[Timing], path: epath.Path, title: str) -> None:
  """Draws accuracy against multiply-adds, and against time for each batch size."""
  figure = new_figure(10, 4.4)
  from matplotlib.ticker import LogLocator, NullFormatter  # After `new_figure`; see there.

  by_madds, by_time = figure.subplots(1, 2, sharey=True)
  groups = {}
  for saving in savings:
    name = f'batch {saving["batch_size"]}' if saving['mode'] == 'predict' else 'stream'
    groups.setdefault(name, []).append(saving)
  _draw(by_madds, groups['stream'], lambda s: s['madds'] / 1e6, 'black', None)
  for index, (name, group) in enumerate(groups.items()):
    _draw(by_time, group, lambda s: s['milliseconds'], f'C{index}', name)
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
  whole = [s for s in savings if s['is_whole_network']]
  one_exit = [s for s in savings if not s['is_adaptive'] and s['madds'] < whole[0]['madds']]
  adaptive = sorted((s for s in savings if s['is_adaptive']), key=cost)
  for points, marker, size, name in (
    (whole, '*', 10, None),
    (one_exit, 'o', 5, None),
    (adaptive, '.-', 6, label),
  ):
    axes.plot(
      [cost(s) for s in points],
      [100 * s['accuracy'] for s in points],
      marker,
      color=color,
      markersize=size,
      fillstyle='full' if marker == '.-' else 'none',
      label=name,
    )
