"""Batches against costs added up by hand."""

import numpy as np
import pytest

from imta_jax.adaptive.engine.plan import BatchPlan, cheapest_batches, expected_costs

SIZES = (1, 4, 16)


def is_one_program(plan, size, thresholds, total):
  return plan.program_end(0, size, thresholds, total) == thresholds.shape[1]


def test_batches_cost_least():
  # 5 images: 4 + 1 cost 12 + 9, a batch of 16 costs 24; 9 images: 33 against 24.
  least, first = cheapest_batches({size: 8 + size for size in SIZES}, most=16)
  assert [first[count] for count in (1, 2, 4, 5, 8, 9, 15, 16)] == [1, 4, 4, 4, 16, 16, 16, 16]
  assert [least[count] for count in (0, 1, 2, 5, 9)] == [0, 9, 12, 21, 24]
  # Never two where one will do.
  _, first = cheapest_batches({size: 256 + size for size in SIZES}, most=16)
  assert [first[count] for count in (1, 2, 4, 5, 15, 16)] == [1, 4, 4, 16, 16, 16]


@pytest.mark.parametrize(('half', 'first_batch'), [(9.8, 16), (9.0, 8)])
def test_a_batch_is_divided_if_that_is_clearly_cheaper(half, first_batch):
  _, first = cheapest_batches({8: half, 16: 20.0}, most=16)
  assert first[16] == first_batch


def test_no_batch_is_larger_than_pays():
  # 1.7 an image of a full batch of 4, 1.9 of one of 16, though the last stage gains by it.
  stages = [{1: 2, 4: 3, 16: 16}, {1: 2, 4: 3, 16: 12}, {1: 2, 4: 0.8, 16: 2.4}]
  plan = BatchPlan(stages, {})
  assert plan.full_batch == 4
  assert [plan.first_batch(0, count) for count in (1, 2, 4, 99)] == [1, 4, 4, 4]
  assert plan.first_batch(2, 1) == 4
  stages[0][16] = 15  # 1.84: nearly as cheap, and fewer batches.
  assert BatchPlan(stages, {}).full_batch == 16


@pytest.mark.parametrize(
  ('leaving', 'total', 'overhead', 'expected'),
  [
    # Stage by stage 16 + 8 + 4 places and two programs more: 20 places are saved.
    ((0.5, 0.25, 0.25), 16, 6, False),
    ((0.5, 0.25, 0.25), 16, 11, True),
    # With images of other batches, those that go on make batches of 16.
    ((0.5, 0.25, 0.25), 64, 26, False),
    ((0.5, 0.25, 0.25), np.inf, 27, True),
    # Where all leave at once, what follows is not run either way.
    ((1, 0, 0), 16, 11, True),
    ((1, 0, 0), np.inf, 11, True),
    ((0, 0, 1), 16, 1e-3, True),
  ],
)
def test_one_program_or_several(leaving, total, overhead, expected):
  thresholds = np.float32([0.9, 0.8, 0.7])
  stages = [{size: overhead + size for size in SIZES}] * 3
  fused = {size: overhead + 3 * size for size in SIZES}
  plan = BatchPlan(stages, fused, [(thresholds, leaving)])
  assert is_one_program(plan, 16, np.tile(thresholds, (16, 1)), total) == expected


def test_one_program_is_only_for_sizes_that_have_one():
  stages = [{size: 99 + size for size in SIZES}] * 2
  thresholds = np.full((4, 2), np.inf, np.float32)
  plan = BatchPlan(stages, {4: 1.0})
  assert is_one_program(plan, 4, thresholds, 4)
  assert not is_one_program(plan, 16, thresholds, 4)


def test_images_of_several_thresholds_share_a_batch():
  # Half of the images go to the end: one program runs 16 + 16 places, two programs 16 + 8.
  stages, fused = [{size: 5 + size for size in (1, 8, 16)}] * 2, {16: 5 + 32}
  thresholds = np.repeat(np.float32([[-np.inf, 0], [np.inf, 0]]), 8, axis=0)
  plan = BatchPlan(stages, fused)
  assert not is_one_program(plan, 16, thresholds, 16)  # 37 against 21 + 13.
  assert is_one_program(plan, 16, np.tile(thresholds[8:], (2, 1)), 16)  # 37 against 42.


def test_one_program_is_for_batches_in_which_programs_cost_much():
  stages, fused = expected_costs([10, 30], SIZES, 8)
  assert stages == [{1: 18, 4: 48, 16: 168}, {1: 28, 4: 88, 16: 328}]
  assert fused == {1: 38}
  assert list(expected_costs([10, 30], SIZES, 31)[1]) == [1, 4]
  assert list(expected_costs([10, 30], SIZES, 8, stops_early=False)[1]) == [1, 4, 16]


def test_one_program_that_does_not_stop_early_costs_all_stages():
  # A program of all stages costs 5 + 3; the first stage of its own 5 + 1, and no image goes on.
  stages, fused = [{1: 6.0}] * 3, {1: 8.0}
  known = [((0.9, 0.8, 0.7), (1, 0, 0))]
  thresholds = np.float32([known[0][0]])
  assert not is_one_program(BatchPlan(stages, fused, known, stops_early=False), 1, thresholds, 1)
  everyone_stays = np.full((1, 3), np.inf, np.float32)
  nearly_as_cheap = {1: 18.5}  # Than 6 + 6 + 6.
  assert is_one_program(BatchPlan(stages, nearly_as_cheap, known, False), 1, everyone_stays, 1)
  assert not is_one_program(BatchPlan(stages, nearly_as_cheap, known), 1, everyone_stays, 1)
  assert is_one_program(BatchPlan(stages, fused, known, False), 1, everyone_stays, 1)


def test_stages_between_which_few_images_leave_share_a_program():
  # A program costs 5, and 1 per stage.
  stages, fused = [{1: 6.0}] * 3, {1: 8.0}
  thresholds = np.float32([[0.9, 0.8, 0.7]])

  def program_ends(*leaving):
    plan = BatchPlan(stages, fused, [(thresholds[0], leaving)], stops_early=False)
    return [plan.program_end(first, 1, thresholds, 1) for first in range(3)]

  # 6 + 0.95 · 6 + 0.1 · 6 = 12.3 by stages, 7 + 0.1 · 6 = 7.6 by two programs, 8 by one.
  assert program_ends(0.05, 0.85, 0.1) == [2, 2, 3]
  # 12.3, 9, 8; from the second stage on 6 + 0.3 / 0.95 · 6 = 7.9 by stages, 7 by one program.
  assert program_ends(0.05, 0.65, 0.3) == [3, 3, 3]
  # 6 + 0.1 · 7 = 6.7, and 8.
  assert program_ends(0.9, 0.05, 0.05) == [1, 3, 3]
  # Only whole networks that stop early are compiled besides stages.
  plan = BatchPlan(stages, fused, [(thresholds[0], (0.05, 0.85, 0.1))])
  assert [plan.program_end(first, 1, thresholds, 1) for first in range(3)] == [3, 2, 3]


@pytest.mark.parametrize(
  ('thresholds', 'expected'),
  [
    ((0.9, 0.8, 0.7), (1, 0, 0)),  # Known.
    ((0.9, 0.8, 0.6), (1, 2 / 3, 1 / 3)),
    ((np.inf, 0.8, 0.6), (1, 1, 1 / 2)),
    ((0.5, -np.inf, 0.6), (1, 2 / 3, 0)),
    ((np.inf, np.inf, np.inf), (1, 1, 1)),
  ],
)
def test_other_thresholds_are_taken_to_spread_images_evenly(thresholds, expected):
  plan = BatchPlan([{1: 1.0}] * 3, {}, [((0.9, 0.8, 0.7), (1, 0, 0))])
  np.testing.assert_allclose(plan.reached_stages(np.float32(thresholds)), expected)
