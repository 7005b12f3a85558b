"""A training that is killed again and again ends like one that is left alone."""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

ROOT = Path(__file__).parents[1]
# 2 exits, 96 training images: 6 steps per epoch.
COMMAND = (
  *(sys.executable, '-m', 'imta_jax.main', '--config=configs/mnist5k.py:exits=2'),
  '--config.dataset.validation_size=3904',
  '--config.batch_size=16',
  '--config.evaluation_batch_size=1000',
  '--config.log_every_steps=2',
  '--config.tensorboard=False',
  '--config.model.scale_factors=1,2',
  '--config.model.bottleneck_factors=1,2',
  '--config.phases[0].epochs=8',
  '--config.phases[1].epochs=4',
)
NUM_KILLS = 4


@pytest.fixture(scope='module')
def environment(tmp_path_factory):
  compiled = tmp_path_factory.mktemp('compiled')
  return {**os.environ, 'JAX_COMPILATION_CACHE_DIR': str(compiled), 'JAX_PLATFORMS': 'cpu'}


def start(workdir, environment):
  command = [*COMMAND, f'--workdir={workdir}']
  return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)


def is_saving(workdir):
  return any(workdir.glob('checkpoints/*/*-tmp*'))


def kill(process, workdir, seconds, *, while_saving):
  """Kills a run with SIGKILL after some seconds, or as soon as it writes a checkpoint.

  Returns whether the run was still going, and whether there was an unfinished checkpoint.
  """
  deadline = time.monotonic() + seconds
  while process.poll() is None and time.monotonic() < deadline:
    if while_saving and is_saving(workdir):
      break
    time.sleep(0.002)
  process.kill()
  return process.wait() != 0, is_saving(workdir)


def contents(workdir):
  """All that a run leaves and that does not depend on time, by name."""
  found = {}
  for path in sorted(workdir.glob('checkpoints/phase_?/*')):
    if path.name.isdigit():
      state = ocp.StandardCheckpointer().restore(path / 'state')
      for name, leaf in jax.tree_util.tree_leaves_with_path(state):
        found[f'{path.relative_to(workdir)}{jax.tree_util.keystr(name)}'] = np.asarray(leaf)
  for line in (workdir / 'metrics.jsonl').read_text().splitlines():
    record = json.loads(line)
    for name, value in record.items():
      if name.startswith(('train/', 'validation/')):
        found[f'{record["phase"]} step {record["step"]} {name}'] = np.asarray(value)
  for path in sorted(workdir.glob('evaluation/*.npz')):
    with np.load(path) as arrays:
      found |= {f'{path.name}/{name}': arrays[name] for name in arrays}
  for name in ('evaluation.json', 'exits.csv', 'budget.csv'):
    found[name] = np.frombuffer((workdir / 'evaluation' / name).read_bytes(), np.uint8)
  return found


@pytest.mark.slow
def test_killed_runs_end_with_the_same_states_metrics_and_evaluation(tmp_path, environment):
  assert start(tmp_path / 'alone', environment).wait() == 0
  begin = time.monotonic()  # Timed with the compilation cache filled.
  assert start(tmp_path / 'again', environment).wait() == 0
  duration = time.monotonic() - begin
  expected = contents(tmp_path / 'alone')

  moments, num_kills, num_saving, number = random.Random(0), 0, 0, 0
  while num_kills < NUM_KILLS:
    number += 1
    workdir, was_running = tmp_path / f'killed_{number}', True
    while was_running and num_kills < NUM_KILLS:
      process, seconds = start(workdir, environment), moments.uniform(0, duration)
      was_running, saving = kill(process, workdir, seconds, while_saving=num_kills % 2 == 0)
      num_kills += was_running
      num_saving += was_running and saving
    if was_running:
      assert start(workdir, environment).wait() == 0
    found = contents(workdir)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
      np.testing.assert_array_equal(found[name], value, err_msg=name)
  assert num_saving > 0
