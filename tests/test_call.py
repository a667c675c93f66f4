"""One call in numbers: what a finished one says about itself, and what kept B should cover."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from feplb import LayerSpec, call
from feplb.call import Agreement, CallRecord
from feplb.costs import LaneRates
from feplb.domain_calls import DomainCalls
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


@pytest.mark.parametrize(
    ("rates", "rows"),
    # Rank 1 sends 6 rows of 32 bytes while rank 0 takes in 8; a row's GEMMs take 10 ns.
    [((3.2, 3.2), 9), ((3.2, 1.6), 17), ((1.6, 3.2), 13), ((3.2, 32.0), 7)],
)
def test_kept_b_covers_the_slower_direction(rates: tuple[float, float], rows: int) -> None:
    spec = LayerSpec(2, 8, torch.float32, ((16, 8), (8, 8)))  # 384 operations a row
    moves = np.array([[0, 0, 1, 0, 6], [0, 0, 2, 6, 8]], dtype=np.int32)
    one = cast(Any, object())
    agreement = Agreement(1, moves, 0, (one,), (), np.zeros(0, np.int32), 0.0)
    domain = SimpleNamespace(_rank=0, _gemm_gflops=38.4, lane_rates=LaneRates(*rates))
    assert DomainCalls.rows_in_kept_b(cast(Any, domain), spec, agreement) == rows
