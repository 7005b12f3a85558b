"""Scaling: against the formulas written out, and the committed study against its plan."""

import csv
import json
import sys
from pathlib import Path

import pytest

from imta_jax.errors import UsageError

sys.path.insert(0, str(Path(__file__).parents[2] / 'experiments'))
import scaling

RESULTS = Path(__file__).parents[2] / 'experiments/results'
RECORD = {
  'config': str(RESULTS.parents[1] / 'configs/imagenet.py'),
  'target': 'v5e:2x4',
  'devices': 8,
  'dtype': 'bfloat16',
  'phase': 1,
  'batch_size': 256,
  'operations': 197e9,  # 1 ms on v5e.
  'hbm_bytes': 0.819e10,  # 10 ms.
  'collective_bytes': 200e6,
}


def test_times_are_those_of_the_formulas():
  step = scaling.step_on(RECORD, 'v5e:64')
  assert step.batch_size == 2048
  assert step.operations == pytest.approx(1e-3) and step.memory == pytest.approx(10e-3)
  # 1.97 ms for sending the gradients, and 2 × 8 hops in a torus of 8 × 8 chips.
  assert step.gradients == pytest.approx(2 * 63 / 64 * 1e-3 + 16e-6)
  seconds = 10e-3 + step.gradients
  assert step.efficiency == pytest.approx(10e-3 / seconds)
  num_steps = 90 * ((1_281_167 - 50_000) // 2048)
  assert step.hours == pytest.approx(num_steps * seconds / 3600)
  # 16 hosts with 128 images each; 112 CPUs of the needed ones.
  assert step.cpus_per_host == pytest.approx(128 / seconds / 110)
  slowed = max(1, step.cpus_per_host / 112)
  assert step.hours_with_input == pytest.approx(step.hours * slowed)
  assert step.chip_hours == pytest.approx(64 * step.hours_with_input)


def test_a_chip_alone_sends_nothing_and_smaller_gradients_take_less():
  assert scaling.step_on(RECORD, 'v5p:1').gradients == 0
  one, half = (scaling.step_on(RECORD, 'v5p:4', size).gradients for size in (4, 2))
  assert one - half == pytest.approx(0.5 * 2 * 3 / 4 * 200e6 / 600e9)


@pytest.mark.parametrize('name', ['v5e', 'v5e:0', 'v5e:many', 'h100:8', 'v5e:2x4'])
def test_a_slice_that_does_not_exist_is_refused(name):
  with pytest.raises(UsageError, match='must be one of v4, v5e, v5p, v6e with a number of chips'):
    scaling.step_on(RECORD, name)


@pytest.mark.parametrize('change', [{'target': 'h100:8'}, {'devices': 1}])
def test_a_plan_without_an_all_reduce_is_refused(change):
  with pytest.raises(UsageError, match='must be for a TPU slice of two or more'):
    scaling.step_on({**RECORD, **change}, 'v5e:8')


def test_a_slice_is_extrapolated_from_the_plan_for_its_kind_or_else_from_the_first():
  plans = [[RECORD], [{**RECORD, 'target': 'v5p:2x2x1', 'hbm_bytes': 2.765e10}]]
  v6e, v5p, v5e = scaling.extrapolate(plans, ['v6e:8', 'v5p:8', 'v5e:8'])
  assert v5e.memory == pytest.approx(0.819e10 / 0.819e12)
  assert v5p.memory == pytest.approx(2.765e10 / 2.765e12)
  assert v6e.memory == pytest.approx(0.819e10 / 1.640e12)


def test_the_committed_study_follows_from_its_plans():
  plans = [
    [
      {**record, 'config': RECORD['config']}
      for record in json.loads((RESULTS / f'plans/imagenet_{slice}.json').read_text())
    ]
    for slice in ('v5e-2x4', 'v5p-2x2x1')
  ]
  with (RESULTS / 'scaling/scaling.csv').open() as file:
    rows = list(csv.DictReader(file))
  steps = scaling.extrapolate(plans, [row['slice'] for row in rows[:7]])
  assert len(rows) == len(steps) == 14
  for row, step in zip(rows, steps, strict=True):
    assert (row['phase'], row['slice']) == (str(step.phase), step.slice)
    assert float(row['chip_hours']) == pytest.approx(step.chip_hours)
    assert float(row['hours']) == pytest.approx(step.hours)


def test_plans_for_more_chips_have_the_same_steps_per_chip():
  fields = ('phase', 'operations', 'bytes', 'hbm_bytes', 'launches', 'collectives')
  fields += ('collective_bytes', 'peak_bytes')
  plans = [
    json.loads((RESULTS / f'plans/imagenet_v5e-{topology}.json').read_text())
    for topology in ('2x4', '8x8', '16x16')
  ]
  small, *larger = [[[record[f] for f in fields] for record in plan] for plan in plans]
  assert larger == [small, small]
  assert [[r['batch_size'] // r['devices'] for r in plan] for plan in plans] == [[32, 32]] * 3
