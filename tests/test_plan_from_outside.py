"""A plan from the caller: carried out, compared between ranks, refused where it is wrong."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from balancer_cases import (
    NUM_RANKS,
    PLAIN,
    Arm,
    Bits,
    build,
    differences,
    experts,
    grads,
    loss_of,
    run_arm,
)
from balancer_scenarios import attempt
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import run_ranks

from feplb import _core
from feplb.scheduler import Move, Plan, PlanLimits, make_plan, plan_violations
from feplb.scheduler.policies import core_limits

# uneven_counts of step 0: rank 0 has [24, 35, 37, 48, 50], rank 2 nothing.
PART = Move(expert_idx=4, owner_rank=0, dst_rank=2, row_start=10, row_end=50)
EXPERT = Move(expert_idx=3, owner_rank=0, dst_rank=3, row_start=0, row_end=48)
WHOLE, SPLIT = Plan.from_moves([EXPERT]), Plan.from_moves([EXPERT, PART])
BAD = {
    "too many rows": (replace(PART, row_end=51), "row_end <= 50, the rows of the expert"),
    "no such rank": (replace(PART, dst_rank=4), "expected ranks 0 to 3"),
    "to itself": (replace(PART, dst_rank=0), "the helper is the owner"),
}


def run_with(arm: Arm, plan: Plan) -> Bits:
    """One forward and backward under this plan."""
    weights, (rows, _) = arm.weights(), arm.rows()
    prepared = arm.door.prepare_weights(weights, layer=0)
    ticket = arm.door.begin(arm.counts(), layer=0, plan=plan)
    out = arm.door.run_experts(rows, arm.counts(), prepared, experts(), layer=0, ticket=ticket)
    loss_of(out).backward()
    arm.check()
    return {"out": out.detach(), **grads(rows=rows, weights=weights)}


def outside(rank: int, num_ranks: int) -> dict[str, Any]:
    found: dict[str, Any] = {}

    def plain(arm: Arm) -> Bits:
        weights, (rows, _) = arm.weights(), arm.rows()
        out = arm.run(rows, weights)
        loss_of(out).backward()
        arm.check()
        return {"out": out.detach(), **grads(rows=rows, weights=weights)}

    expected, _ = run_arm(rank, num_ranks, PLAIN, "none", plain)
    with build(policy="none") as balancer:  # whose own plan would move nothing
        arm = Arm(rank, num_ranks, PLAIN, balancer)
        found["whole"] = differences(run_with(arm, WHOLE), expected)
        record = balancer.last_call(0)
        assert record is not None
        found["moves"] = record.moves.tolist()
        split = run_with(arm, SPLIT)
        found["split"] = max(
            float((split[name] - want).abs().max())
            for name, want in expected.items()
            if want.numel()
        )
        found["empty"] = differences(run_with(arm, Plan()), expected)
        for name, (move, _) in BAD.items():
            bad = Plan.from_moves([move])
            found[name] = attempt(lambda bad=bad: run_with(arm, bad))
        found["after"] = differences(run_with(arm, WHOLE), expected)
        found["unequal"] = attempt(lambda: run_with(arm, WHOLE if rank else SPLIT))
    return found


@pytest.fixture(scope="module")
def found(lane: str) -> list[dict[str, Any]]:
    return run_ranks(outside, NUM_RANKS, timeout_s=60)


def test_a_plan_from_outside_is_carried_out(found: list[dict[str, Any]]) -> None:
    for of_rank in found:
        assert of_rank["moves"] == [[3, 0, 3, 0, 48]]
        assert of_rank["whole"] == of_rank["empty"] == []
        assert of_rank["split"] < 1e-3  # fp32, other shapes of GEMM


@pytest.mark.parametrize("name", BAD)
def test_a_plan_that_breaks_an_invariant_is_refused_by_every_rank(
    found: list[dict[str, Any]], name: str
) -> None:
    for of_rank in found:
        assert of_rank[name].startswith("ValueError: layer 0")
        assert BAD[name][1] in of_rank[name]
        assert of_rank["after"] == []


def test_ranks_with_different_plans_all_raise(found: list[dict[str, Any]]) -> None:
    for of_rank in found:
        assert "ranks have different plans for the forward of layer 0" in of_rank["unequal"]


# --------------------------------------------------------------------- the core's own judgement


@st.composite
def doubtful(draw: st.DrawFn) -> tuple[npt.NDArray[np.int32], PlanLimits, Plan]:
    """Counts, limits that may bite, and a plan that may be wrong in any way but its order."""
    num_ranks, width = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    size = num_ranks * width
    rows = draw(st.lists(st.integers(0, 9), min_size=size, max_size=size))
    counts = np.array(rows, dtype=np.int32).reshape(num_ranks, width)
    few = st.integers(0, 12)
    limits = PlanLimits(
        num_dynamic=draw(st.integers(0, width)), num_slots=draw(st.integers(0, 3)),
        num_grad_slots=draw(st.integers(0, 3)), max_recv_rows=draw(few), max_return_rows=draw(few),
        min_tokens=draw(st.integers(0, 3)),
    )  # fmt: skip
    place = st.integers(-1, 3)
    moves = draw(
        st.lists(
            st.builds(
                Move, expert_idx=place, owner_rank=place, dst_rank=place,
                row_start=st.integers(-1, 5), row_end=st.integers(0, 10),
            ),
            max_size=3,
        )
    )  # fmt: skip
    good = make_plan("refine", counts, limits)
    return counts, limits, good if draw(st.booleans()) else Plan.from_moves(moves)


@settings(max_examples=500, deadline=None)
@given(doubtful())
def test_the_core_finds_a_fault_where_the_reference_does(
    case: tuple[npt.NDArray[np.int32], PlanLimits, Plan],
) -> None:
    counts, limits, plan = case
    fault = _core.plan_fault(counts, core_limits(limits), plan.as_array())
    assert bool(fault) == bool(plan_violations(plan, counts, limits)), fault
