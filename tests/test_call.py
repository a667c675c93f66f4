"""One call in numbers: what a finished one says about itself, and what kept B should cover."""

from __future__ import annotations

import numpy as np
import pytest

from feplb import call
from feplb.call import CallRecord
from feplb.scheduler import PlanLimits, cost_model, make_plan
from feplb.scheduler.workloads import calibrated


def test_a_call_record_knows_loads_and_rows_moved() -> None:
    counts = np.array([[10, 6], [2, 0], [3, 0]], dtype=np.int32)
    moves = np.array([[0, 0, 1, 0, 4], [0, 0, 2, 4, 7]], dtype=np.int32)  # expert 0 of rank 0
    record = CallRecord(counts, moves, plan_us=1.0)
    assert record.loads_before.tolist() == [16, 2, 3]
    assert record.loads_after.tolist() == [9, 6, 6]
    assert record.num_rows_moved == 7
    assert record.whole_expert_floor == 10 / 7


def test_a_call_without_moves_leaves_loads_alone() -> None:
    record = CallRecord(np.array([[1, 2]], dtype=np.int32), np.zeros((0, 5), np.int32), plan_us=0)
    assert record.loads_after.tolist() == record.loads_before.tolist() == [3]
    assert record.num_rows_moved == 0


@pytest.mark.parametrize("policy", ["refine", "split"])
def test_kept_b_covers_what_the_cost_model_says(policy: str) -> None:
    counts = calibrated(8, seed=1, step=0)
    limits = PlanLimits(
        num_dynamic=16, num_slots=8, num_grad_slots=8, max_recv_rows=2**40, max_return_rows=2**40
    )
    plan = make_plan(policy, counts, limits)
    moves = [(m.expert_idx, m.owner_rank, m.dst_rank, m.row_start, m.row_end) for m in plan.moves]
    seen = [call.rows_on_the_way_back(rank, np.array(moves)) for rank in range(8)]
    assert seen == cost_model.rows_on_the_way_back(8, plan.moves)
    assert max(seen) > (0, 0)


def test_rows_on_the_way_back_by_hand() -> None:
    moves = np.array([[0, 0, 1, 0, 6], [0, 0, 2, 6, 8]])
    # Rank 1 sends six in a row, which come to rank 0 as two others do.
    expected = [(6, 8), (6, 8), (2, 8), (0, 0)]
    assert [call.rows_on_the_way_back(rank, moves) for rank in range(4)] == expected


def test_a_helpers_other_owners_do_not_count_for_more_than_this_one_waits_for() -> None:
    moves = np.array([[0, 0, 2, 0, 3], [0, 1, 2, 0, 7]])
    expected = [(3, 3), (7, 7), (10, 7)]
    assert [call.rows_on_the_way_back(rank, moves) for rank in range(3)] == expected
