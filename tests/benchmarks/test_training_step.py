"""The benchmark of training steps measures a small network."""

import argparse
import sys
from pathlib import Path

import pytest

from imta_jax import config as config_lib

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / 'experiments/benchmarks'))
import training_step  # noqa: E402


@pytest.mark.slow
def test_steps_with_other_graphs_are_timed_beside_ours(tmp_path):
  config = config_lib.load(f'{ROOT}/configs/mnist5k.py:exits=1')
  config.model.update(scale_factors=(1,), bottleneck_factors=(1,))
  options = argparse.Namespace(repeats=2, cuda_graphs=['whole'], lock=str(tmp_path / 'lock'))
  result = training_step.measure(config, 0, 16, [], options)
  assert set(result['seconds_per_step']) == {'ours', 'ours, whole'}
  assert all(len(seconds) == 2 for seconds in result['seconds_per_step'].values())
