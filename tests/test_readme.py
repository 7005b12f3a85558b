"""The README and the pages of results: code runs as printed, figures follow from the results."""

import collections
import csv
import importlib.metadata
import itertools
import json
import re
import subprocess
import time
import urllib.request
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import imta_jax
from imta_jax import config as config_lib

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / 'README.md').read_text(encoding='utf-8')
PYTHON = re.findall(r'```python\n(.*?)```', TEXT, re.DOTALL)
RESULTS = ROOT / 'experiments/results'
RESULTS_PAGE, INFERENCE_PAGE = (
  (ROOT / 'docs' / name).read_text(encoding='utf-8') for name in ('results.md', 'inference.md')
)
SECTIONS = ('imta_jax', 'Your own images', 'Run it')


def newcomers_commands():
  """The commands of SECTIONS, without comments."""
  sections = [
    section
    for section in re.split(r'^#+ ', TEXT, flags=re.MULTILINE)
    if section.partition('\n')[0] in SECTIONS
  ]
  lines = [line[4:] for s in sections for line in s.splitlines() if line.startswith('    ')]
  return [line.partition('  #')[0].strip() for line in lines]


def test_the_readme_is_short():
  assert len(TEXT.split()) <= 900


@pytest.mark.slow
def test_the_first_example_classifies_digits(capsys, monkeypatch):
  monkeypatch.chdir(ROOT)
  (code,) = (block for block in PYTHON if 'imta_jax.load' in block)
  exec(code, {})
  assert float(capsys.readouterr().out.split()[0]) > 0.95


def test_example_trains_a_model_of_ones_own():
  (code,) = (block for block in PYTHON if 'one_for_all_loss' in block)

  class Network(nn.Module):
    @nn.compact
    def __call__(self, x, labels):
      stages, heads = ([nn.Dense(8) for _ in range(3)] for _ in range(2))
      names = {
        'jnp': jnp,
        'stages': stages,
        'heads': heads,
        'num_classes': 4,
        'train': True,
        'x': x,
        'labels': labels,
      }
      exec(code, names)
      return names['loss']

  images, labels = jnp.ones((5, 6)), jnp.arange(5) % 4
  variables = jax.jit(Network().init)(jax.random.key(0), images, labels)

  def loss_of(params):
    return Network().apply({**variables, 'params': params}, images, labels, mutable=True)[0]

  gradient = jax.jit(jax.grad(loss_of))(variables['params'])
  assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
  assert any(jnp.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient['Dense_0']))


def test_every_config_and_program_in_a_command_exists(monkeypatch):
  monkeypatch.chdir(ROOT)
  lines = [line[4:] for line in TEXT.splitlines() if line.startswith('    ')]
  configs = {config for line in lines for config in re.findall(r'--config=(\S+)', line)}
  assert len(configs) >= 7
  for config in configs - {f'configs/image_folder.py:{name}' for name in ('digits', 'flowers')}:
    config_lib.load(config)
  programs = {word for line in lines for word in re.findall(r'python (\S+\.py)', line)}
  modules = {word for line in lines for word in re.findall(r'python -m (imta_jax\S*)', line)}
  commands = {word for line in lines for word in re.findall(r'\bimta-\w+', line)}
  assert len(programs) >= 3 and modules == {'imta_jax.main'}
  for path in programs:
    assert (ROOT / path).exists(), path
  entry_points = importlib.metadata.entry_points(group='console_scripts')
  assert commands == {'imta-export', 'imta-predict', 'imta-serve', 'imta-train'}
  assert commands <= set(entry_points.names)


def test_the_commands_that_are_run_word_for_word_are_those_of_a_newcomer():
  commands = newcomers_commands()
  install = ".venv/bin/pip install -q -c constraints.txt -e '.[train]'"
  assert commands[0] == f'python3 -m venv .venv && {install}'
  for word in ('write_images', 'predict', 'configs/mnist5k.py', 'image_folder', 'serve', 'export'):
    assert any(word in command for command in commands), word
  assert not any('#' in command or 'pytest' in command for command in commands)


@pytest.mark.slow
def test_a_newcomers_commands_work_word_for_word_in_a_fresh_clone(tmp_path):
  clone = tmp_path / 'imta_jax'
  subprocess.run(['git', 'clone', '-q', ROOT, clone], check=True)
  write_flowers(clone / 'flowers')
  activate = ''
  for command in newcomers_commands():
    if 'imta-serve' in command:
      install = "pip install -q -c constraints.txt -e '.[serve]'"  # As the comment beside it says.
      subprocess.run(['bash', '-c', activate + install], cwd=clone, check=True)
      assert '"label"' in first_answer(['bash', '-c', f'{activate}exec {command}'], clone)
    else:
      subprocess.run(['bash', '-c', activate + command], cwd=clone, check=True)
    activate = '. .venv/bin/activate; '


def write_flowers(folder):
  """Writes a few photographs, of what colours tell apart."""
  random = np.random.default_rng(0)
  for name, colour in {'bluebell': (90, 90, 220), 'sunflower': (240, 200, 30)}.items():
    (folder / name).mkdir(parents=True)
    for number in range(5):
      pixels = np.array(colour) + random.normal(0, 20, (120, 150, 1))
      Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / name / f'{number}.jpg')


def first_answer(command, clone):
  """Starts a server and returns its answer to an image."""
  port = re.search(r'--port=(\d+)', command[-1])[1]
  image = next((clone / 'digits/7').glob('*.png')).read_bytes()
  request = urllib.request.Request(
    f'http://localhost:{port}/predict', image, {'Content-Type': 'image/png'}
  )
  process = subprocess.Popen(command, cwd=clone)
  try:
    deadline = time.monotonic() + 300
    while process.poll() is None and time.monotonic() < deadline:
      try:
        with urllib.request.urlopen(request, timeout=30) as answer:
          return answer.read().decode()
      except OSError:
        time.sleep(1)
    raise AssertionError('the server does not answer')
  finally:
    process.terminate()
    process.wait()


def read_csv(name, table):
  with (RESULTS / name / table).open() as file:
    return list(csv.DictReader(file))


def early_exits(name, phase):
  """Accuracy and relative cost of the cheapest thresholds within 0.5 points on validation."""
  last = [row for row in read_csv(name, 'exits.csv') if row['network'] == phase][-1]
  least = float(last['validation_top1']) - 0.005
  points = [row for row in read_csv(name, 'budget.csv') if row['network'] == phase]
  chosen = min(
    (point for point in points if float(point['validation_accuracy']) >= least),
    key=lambda point: float(point['validation_madds']),
  )
  return float(chosen['test_accuracy']), float(chosen['test_madds']) / float(last['madds'])


@pytest.mark.parametrize(
  ('name', 'phase', 'label'),
  [
    ('mnist5k', 'phase_1', '| MNIST-5k, 3 + 3 epochs | phase I'),
    ('mnist5k', 'phase_2', '| | phase II'),
    ('cifar100', 'phase_1', '| CIFAR-100, 7.5 + 4.5 epochs | phase I'),
    ('cifar100', 'phase_2', '| | phase II'),
  ],
)
def test_accuracies_follow_from_the_committed_results(name, phase, label):
  exits = [row['test_top1'] for row in read_csv(name, 'exits.csv') if row['network'] == phase]
  accuracy, cost = early_exits(name, phase)
  cells = [f'{100 * float(x):.1f}' for x in exits] + [''] * (5 - len(exits))
  cells += [f'{100 * accuracy:.1f}', f'{100 * cost:.0f} %']
  assert re.sub(' +', ' ', f'{label} | {" | ".join(cells)} |') in RESULTS_PAGE


def flowers(seed):
  """Accuracies of the exits, then accuracy and relative cost with early exits, in %."""
  exits, points = (
    [row for row in read_csv(f'flowers/seed_{seed}', table) if row['network'] == 'phase_3']
    for table in ('exits.csv', 'budget.csv')
  )
  last = float(exits[-1]['madds'])
  point = max(
    (point for point in points if float(point['validation_madds']) <= 0.6 * last),
    key=lambda point: (float(point['validation_accuracy']), -float(point['validation_madds'])),
  )
  cost = float(point['test_madds']) / last
  return [100 * float(row['test_top1']) for row in exits] + [
    100 * float(point['test_accuracy']),
    100 * cost,
  ]


def test_the_flowers_follow_from_the_committed_results():
  page = (RESULTS / 'flowers/README.md').read_text(encoding='utf-8')
  rows = [flowers(seed) for seed in range(3)]
  mean = np.mean(rows, axis=0)
  for name, row in zip((0, 1, 2, 'mean'), [*rows, mean], strict=True):
    exits = ' | '.join(f'{figure:.1f}' for figure in row[:5])
    assert f'| {name} | {exits} | {row[5]:.1f} at {row[6]:.0f} % |' in page
  recipes = collections.defaultdict(list)
  for row in read_csv('flowers', 'ablation.csv'):
    recipes[row['recipe']].append([100 * float(row[name]) for name in list(row)[2:]])
  for recipe, of_seeds in recipes.items():
    *exits, early, share = np.mean(of_seeds, axis=0)
    cells = ' | '.join(f'{figure:.1f}' for figure in exits)
    assert f'| {recipe} | {cells} | {early:.1f} at {share:.0f} % |' in page
  assert f'classifies {mean[4]:.1f} % of 240' in TEXT
  assert f'{mean[5]:.1f} % with early exits at {mean[6]:.0f} % of the multiply-adds' in TEXT
  accuracies = '  '.join(f'{figure:.1f}' for figure in mean[:5])
  assert f'ours    {accuracies}\n' in (ROOT / 'configs/image_folder.py').read_text()
  card = (RESULTS / 'flowers/export/README.md').read_text(encoding='utf-8')
  assert f'{rows[0][5]:.1f} % at {rows[0][6]:.0f} %' in card
  classifier = imta_jax.load(RESULTS / 'flowers/export')
  assert classifier.class_names[0] == 'bluebell'
  costs = ', '.join(f'{madds / 1e6:.0f}' for madds in classifier.madds[:4])
  assert f'{costs} and\n  {classifier.madds[4] / 1e6:.0f} million multiply-adds' in card


def test_table_2_follows_from_the_committed_results():
  lines = iter(RESULTS_PAGE.partition('| CIFAR-100, 5 exits |')[2].splitlines()[2:])
  records = read_csv('table_2', 'table.csv')
  for row in ('none', 'GE', 'ISC', 'OFA', 'GE + ISC + OFA'):
    of_row = [record for record in records if record['row'] == row]
    name = 'MSDNet' if row == 'none' else row
    paper = ' | '.join(f'{float(record["paper"]):.2f}' for record in of_row)
    ours = ' | '.join(
      f'{float(record["mean"]):.1f} ± {float(record["standard_deviation"]):.1f}'
      for record in of_row
    )
    assert next(lines) == f'| {name}, paper | {paper} |'
    assert next(lines) == f'| ours, short | {ours} |'


@pytest.mark.parametrize(
  ('name', 'label'), [('mnist5k', 'MNIST-5k'), ('cifar100', 'CIFAR-100'), ('flowers', 'flowers')]
)
def test_times_follow_from_the_committed_results(name, label):
  rows = read_csv(name, 'latency/latency.csv')
  groups = list(dict.fromkeys((row['mode'], row['batch_size']) for row in rows))
  columns = [('predict', size) for size in ('1', '16', '64', '256')] + [('stream', '64')]

  def cells(method, field, form):
    found = {
      (row['mode'], row['batch_size']): form(float(row[field]))
      for row in rows
      if row['method'] == method
    }
    assert list(found) in (groups, [])
    return ' | '.join(found.get(column, '') for column in columns)

  nearly = [row for row in rows if row['method'] == 'engine, within 0.5 points']
  saved = sorted({round(100 * float(row['madds_saving'])) for row in nearly})
  share = f'{saved[0]} to {saved[-1]} %' if saved[1:] else f'{saved[0]} %'
  times = cells('engine, within 0.5 points', 'time_saving', lambda x: f'{100 * x:.0f} %')
  assert f'| {label} | {share} | {times} |' in INFERENCE_PAGE
  quarter = cells('engine, budget 25%', 'of_fastest', lambda x: f'{100 * x:.0f} %')
  none = cells('engine, no early exit', 'of_fastest', lambda x: f'{x:.2f}')
  assert name == 'flowers' or f'| {label} | {quarter} |' in INFERENCE_PAGE
  assert f'| {label} | {none} |' in INFERENCE_PAGE
  fastest = [
    min((row for row in rows if (row['mode'], row['batch_size']) == group), key=_of_whole)
    for group in groups
  ]
  assert {float(row['of_fastest']) for row in fastest} == {1}
  if name != 'mnist5k':
    pays = [100 * float(row['time_saving']) for row in nearly]
    assert f'{min(pays):.0f} to {max(pays):.0f} %' in TEXT


def _of_whole(row):
  return np.inf if row['method'].startswith('engine') else float(row['of_fastest'])


def test_the_caption_of_the_figure_follows_from_the_committed_results():
  last = [row for row in read_csv('cifar100', 'exits.csv') if row['network'] == 'phase_2'][-1]
  point = next(
    row
    for row in read_csv('cifar100', 'thresholds/sweeps.csv')
    if float(row['optimal_validation']) >= 100 * float(last['validation_top1'])
  )
  share = float(point['optimal_test_madds']) / float(last['madds'])
  caption = re.search(r'^\*(CIFAR-100.*?)\*$', TEXT, re.MULTILINE | re.DOTALL)[1].split()
  expected = (float(point['optimal_test']), 100 * share, 100 * float(last['test_top1']))
  figures = [word for word, unit in itertools.pairwise(caption) if unit.startswith('%')]
  assert figures == ['2.5', f'{expected[0]:.1f}', f'{expected[1]:.0f}', f'{expected[2]:.1f}']


def test_the_table_of_plans_follows_from_the_committed_plans():
  table = (RESULTS / 'plans/README.md').read_text(encoding='utf-8')
  records = [
    record
    for path in sorted((RESULTS / 'plans').glob('*.json'))
    for record in json.loads(path.read_text())
  ]
  assert len(records) >= 10
  for record in records:
    cells = (
      'I' if record['phase'] == 1 else 'II',
      record['batch_size'],
      record['target'],
      'yes' if record['fits'] else 'no',
      f'{record["peak_bytes"] / 1e9:.2f} of {record["memory_bytes"] / 1e9:.0f} GB',
      f'{record["bytes"] / 1e9:.2f} GB',
      f'{record["launches"]:,}',
      record['collectives'],
    )
    assert f'| {" | ".join(map(str, cells))} |' in table
