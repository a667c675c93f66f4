"""The cost model by hand, its C++ twin, and what auto makes of it."""

from __future__ import annotations

import dataclasses
from functools import cache

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from feplb import _core
from feplb.scheduler import Move, Plan, PlanLimits, make_plan, plan_violations
from feplb.scheduler.cost_model import UnitCosts, ceiling, predict, recovered
from feplb.scheduler.machines import GLM5, MACHINES, ExpertShape, Machine, unit_costs
from feplb.scheduler.named_workloads import make_counts
from feplb.scheduler.workloads import calibrated

Counts = npt.NDArray[np.int64]
SIMPLE = UnitCosts(
    row_forward=10, row_dgrad=10, row_wgrad=10, row_push=1, row_push_backward=2, weight_push=5,
    row_return=1, row_return_backward=1, grad_push=8,
)  # fmt: skip
ONE_MOVE = Move(expert_idx=0, owner_rank=0, dst_rank=1, row_start=4, row_end=6)


def limits_for(counts: npt.ArrayLike, **changes: int) -> PlanLimits:
    values = {
        "num_dynamic": np.asarray(counts).shape[1], "num_slots": 8, "num_grad_slots": 8,
        "max_recv_rows": 2**40, "max_return_rows": 2**40,
    }  # fmt: skip
    return PlanLimits(**{**values, **changes})


# ------------------------------------------------------------------------------------- by hand


def test_forward_of_the_worked_example() -> None:
    time = predict([[6], [2]], [ONE_MOVE], SIMPLE).forward
    assert time.by_rank == (40, 40)
    assert time.engine == (2 + 5, 2)
    assert predict([[6], [2]], [], SIMPLE).forward.by_rank == (60, 20)


def test_backward_of_the_worked_example() -> None:
    # Pushed: 2 rows x 2, weights 5, there at 9. Helper: 40 of its own less B = 2, dgrad until 58,
    # wgrad until 78, B until 80; grad rows home at 60, weight grads sent from 78 until 86.
    time = predict([[6], [2]], [ONE_MOVE], SIMPLE).backward
    assert time.by_rank == (86, 80)  # the owner is done at 80, and waits for the weight grads
    later = dataclasses.replace(SIMPLE, late_window=4)
    assert predict([[6], [2]], [ONE_MOVE], later).backward.by_rank == (82, 80)
    adding = dataclasses.replace(SIMPLE, late_window=4, grad_add=10)
    assert predict([[6], [2]], [ONE_MOVE], adding).backward.by_rank == (92, 80)


def test_the_late_window_hides_the_arrival_of_weight_grads_but_not_the_adds() -> None:
    # There at 86; what runs from 80 until 100 hides that, and the add comes behind it.
    wide = dataclasses.replace(SIMPLE, late_window=20, grad_add=10)
    assert predict([[6], [2]], [ONE_MOVE], wide).backward.by_rank == (90, 80)


def test_an_owner_adds_weight_grads_when_it_has_all_of_them() -> None:
    costs = dataclasses.replace(SIMPLE, late_window=2, grad_add=10)
    moves = [
        Move(expert_idx=0, owner_rank=0, dst_rank=1, row_start=4, row_end=6),
        Move(expert_idx=1, owner_rank=0, dst_rank=2, row_start=4, row_end=6),
    ]
    # Rank 0 keeps 8 rows, until 160. Rank 1 has its two at 13, wgrad until 53, its grads are there
    # at 61. Rank 2 computes 6 rows of its own until 116, less B for the 4 rows that rank 0 takes
    # in, dgrad until 136, wgrad until 156; its grads are there at 164, 2 behind the late window.
    seen = predict([[6, 6], [0, 0], [6, 0]], moves, costs).backward
    assert seen.by_rank == (164 - 2 + 2 * 10, 53, 160)


def test_received_rows_wait_for_what_the_engine_sends_before_them() -> None:
    slow = dataclasses.replace(SIMPLE, weight_push=50)
    moves = [
        Move(expert_idx=0, owner_rank=0, dst_rank=1, row_start=4, row_end=6),
        Move(expert_idx=1, owner_rank=0, dst_rank=2, row_start=4, row_end=6),
    ]
    # Rows until 4, weights for rank 1 until 54, for rank 2 until 104; then 20 of work.
    time = predict([[6, 6], [0, 0], [0, 0]], moves, slow).forward
    assert time.by_rank == (80 + 46, 74, 124)


def test_tiles_and_the_reading_of_weights_are_the_least_of_a_gemm() -> None:
    tiles = UnitCosts(tile_rows=4, row_forward=10, weight_read=70)
    assert predict([[5, 1, 0], [8, 0, 0]], [], tiles).forward.by_rank == (80 + 70, 80)


def test_a_gemm_costs_something_beside_its_rows() -> None:
    costs = UnitCosts(row_forward=10, row_dgrad=20, row_wgrad=30, gemm=7)
    time = predict([[5, 1, 0], [0, 0, 2]], [], costs)
    assert time.forward.by_rank == (60 + 2 * 7, 20 + 7)
    assert time.backward.by_rank == (300 + 4 * 7, 100 + 2 * 7)


def test_copies_and_gemms_of_a_shared_core_delay_each_other() -> None:
    shared = dataclasses.replace(SIMPLE, shares_core=1)
    # Rank 0 pushes 2 + 5 and computes 40: kept A of 38 ends at 45, kept B at 47. Everything is with
    # rank 1 at 14; it computes 18, then 20, then B of 2, and pushing the outputs takes 2 of that.
    forward = predict([[6], [2]], [ONE_MOVE], shared).forward
    assert [(p.kept_a, p.arrived, p.received, p.kept_b) for p in forward.phases] == [
        (45, 45, 45, 47), (18, 18, 38, 42),
    ]  # fmt: skip
    assert forward.by_rank == (47, 42)
    # Backward: rank 0 loses 4 + 5 of 80. Rank 1 has its 38 + 40 + 2, and loses 2 + 8 to its pushes;
    # the weight grads leave from 78 on, at half the rate, and are with rank 0 at 94.
    backward = predict([[6], [2]], [ONE_MOVE], shared).backward
    assert [p.kept_b for p in backward.phases] == [89, 90]
    assert backward.by_rank == (94, 90)


def test_an_idle_core_loses_nothing() -> None:
    shared = dataclasses.replace(SIMPLE, shares_core=1)
    all_of_it = dataclasses.replace(ONE_MOVE, row_start=0, row_end=6)
    # Rank 0 keeps nothing and only pushes, 6 + 5 at half the rate; rank 1 has nothing else either.
    forward = predict([[6], [0]], [all_of_it], shared).forward
    assert [(p.kept_a, p.arrived, p.kept_b) for p in forward.phases] == [(0, 0, 0), (0, 22, 82)]
    assert forward.by_rank == (94, 82)


def test_phases_of_the_worked_example() -> None:
    owner, helper = predict([[6], [2]], [ONE_MOVE], SIMPLE).forward.phases
    assert dataclasses.astuple(owner) == (38, 38, 38, 38, 40, 40, 40, 40)
    assert dataclasses.astuple(helper) == (18, 18, 38, 38, 40, 40, 40, 40)
    helper = predict([[6], [2]], [ONE_MOVE], SIMPLE).backward.phases[1]
    assert (helper.received, helper.wgrad, helper.kept_b) == (58, 78, 80)


def test_returned_rows_are_placed_and_wait_for_the_link() -> None:
    costs = UnitCosts(row_forward=10, row_return=30, row_place=3)
    # Rank 1 computes 2 received rows until 20 and sends them home until 80.
    assert predict([[4], [0]], [dataclasses.replace(ONE_MOVE, row_start=2, row_end=4)],
                   costs).forward.by_rank == (80 + 6, 20)  # fmt: skip


def test_a_destination_takes_in_at_its_own_rate() -> None:
    slow = dataclasses.replace(SIMPLE, inbound_permille=4000)
    # Sent by 7, taken in by 4 x 7; rank 1's own work, 20, less B for 2 rows out, which rank 0 takes
    # in 4 x 2, ends at 12: it waits until 28, computes until 48, B of 8 until 56.
    owner, helper = predict([[6], [2]], [ONE_MOVE], slow).forward.phases
    assert (helper.kept_a, helper.arrived, helper.received, helper.kept_b) == (12, 28, 48, 56)
    assert (owner.kept_a, owner.kept_b, owner.home) == (32, 40, 48 + 8)


def test_two_sources_of_a_fast_destination_do_not_wait_for_each_other() -> None:
    """Two owners send 7 each, which one link of a source's rate takes 14 to take in."""
    moves = [
        Move(expert_idx=0, owner_rank=0, dst_rank=2, row_start=4, row_end=6),
        Move(expert_idx=0, owner_rank=1, dst_rank=2, row_start=4, row_end=6),
    ]
    arrived = {
        permille: predict(
            [[6], [6], [0]], moves, dataclasses.replace(SIMPLE, inbound_permille=permille)
        ).forward.phases[2].arrived
        for permille in (1000, 800, 500, 250)
    }  # fmt: skip
    assert arrived == {1000: 14, 800: 11, 500: 7, 250: 7}


def test_the_owner_of_a_slow_helper_covers_what_that_one_sends() -> None:
    costs = UnitCosts(row_forward=10, row_return=4, inbound_permille=500)
    # Rank 1 sends 2 rows in 8, which rank 0 could take in 4: it keeps 8 of its 40 for them.
    owner, helper = predict([[6], [2]], [ONE_MOVE], costs).forward.phases
    assert (owner.kept_a, owner.kept_b) == (32, 40)
    assert (helper.kept_a, helper.kept_b) == (12, 40)


def test_ceiling_and_what_a_plan_recovers() -> None:
    free = UnitCosts(row_forward=10)
    assert ceiling([[6], [2]], free) == 40
    assert recovered([[6], [2]], Plan.from_moves([ONE_MOVE]), free) == 1.0
    assert recovered([[6], [2]], Plan(), free) == 0.0
    assert recovered([[4], [4]], Plan(), free) == 1.0


@pytest.mark.parametrize(
    "wrong", [{"tile_rows": 0}, {"row_push": -1}, {"copy": 1.5}, {"shares_core": 2}]
)
def test_wrong_costs_are_named(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=f"UnitCosts.{next(iter(wrong))}"):
        UnitCosts(**wrong)


# -------------------------------------------------------------------------------------- the twin


@st.composite
def planned(draw: st.DrawFn) -> tuple[Counts, Plan, UnitCosts]:
    """Counts, any plan of ours on them, and any costs."""
    num_ranks, width = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    size = num_ranks * width
    rows = draw(st.lists(st.integers(0, 300), min_size=size, max_size=size))
    counts = np.array(rows, dtype=np.int64).reshape(num_ranks, width)
    names = [field.name for field in dataclasses.fields(UnitCosts)]
    costs = {name: draw(st.integers(0, 10**6)) for name in names}
    costs["tile_rows"] = draw(st.integers(1, 130))
    costs["shares_core"] = draw(st.integers(0, 1))
    costs["inbound_permille"] = draw(st.sampled_from([0, 300, 1000, 4321]))
    policy = draw(st.sampled_from(["none", "greedy", "refine", "split"]))
    limits = limits_for(counts, grain_rows=draw(st.integers(1, 64)))
    return counts, make_plan(policy, counts, limits), UnitCosts(**costs)


@settings(max_examples=400, deadline=None)
@given(planned())
def test_the_core_predicts_the_same_to_the_picosecond(case: tuple[Counts, Plan, UnitCosts]) -> None:
    counts, plan, costs = case
    moves = [
        (m.expert_idx, m.owner_rank, m.dst_rank, m.row_start, m.row_end) for m in plan.moves
    ]  # fmt: skip
    as_array = np.array(moves, dtype=np.int32).reshape(-1, 5)
    seen = _core.predict(counts.astype(np.int32), as_array, dataclasses.asdict(costs))
    assert seen == predict(counts, plan, costs).total


# ------------------------------------------------------------------------------------------ auto


H100 = unit_costs(MACHINES["h100"], GLM5, rows_per_rank=32768)


def auto(counts: Counts, costs: UnitCosts, **changes: int) -> Plan:
    return make_plan("auto", counts, limits_for(counts, **changes), costs=costs)


@settings(max_examples=100, deadline=None)
@given(planned())
def test_auto_is_never_slower_than_none(case: tuple[Counts, Plan, UnitCosts]) -> None:
    counts, _, costs = case
    plan = auto(counts, costs)
    assert plan_violations(plan, counts, limits_for(counts)) == []
    before = predict(counts, (), costs).total
    assert predict(counts, plan, costs).total <= before
    if plan.moves:
        assert predict(counts, plan, costs).total < before


def test_auto_moves_nothing_where_the_load_is_even() -> None:
    counts = make_counts("W0_balanced", 8, seed=0, step=0)
    assert auto(counts, H100).moves == ()


def test_auto_moves_nothing_where_copies_cost_more_than_they_bring() -> None:
    slow = dataclasses.replace(MACHINES["h100"], lane_gbps=1)
    counts = calibrated(8, seed=9, step=0)
    assert auto(counts, unit_costs(slow, GLM5, rows_per_rank=32768)).moves == ()


def test_auto_needs_costs() -> None:
    with pytest.raises(ValueError, match="auto needs costs"):
        make_plan("auto", [[1], [0]], limits_for([[1], [0]]))


def test_auto_moves_whole_experts_only_where_grain_rows_is_0() -> None:
    counts = np.full((4, 4), 2000)
    counts[0, 0] = 60000  # more than a rank's share
    split = auto(counts, H100)
    whole = auto(counts, H100, grain_rows=0)
    rows = {(m.owner_rank, m.expert_idx): m.num_rows for m in whole.moves}
    assert rows == {place: counts[place] for place in rows}
    assert any(m.num_rows < counts[m.owner_rank, m.expert_idx] for m in split.moves)


@cache
def shares(ep_size: int) -> list[float]:
    """What auto recovers of the ceiling on 300 micro-batches, each of another layer."""
    drawn = (calibrated(ep_size, seed=9, step=step, layer=step) for step in range(300))
    return [recovered(counts, auto(counts, H100), H100) for counts in drawn]


def test_auto_recovers_the_ceiling_of_calibrated_loads() -> None:
    assert np.mean(shares(8)) >= 0.86
    assert np.percentile(shares(8), 5) >= 0.78


# -------------------------------------------------------------------------------------- machines


def test_unit_costs_by_hand() -> None:
    machine = Machine(
        gemm_tflops=1, hbm_gbps=8, lane_gbps=2, dispatch_gbps=4, start_us=3, copy_us=1
    )
    costs = unit_costs(machine, ExpertShape(hidden=10, ffn_hidden=5), rows_per_rank=200)
    # 300 operations, 20 bytes per row; 150 parameters: 300 bytes of weights, 600 of grads.
    assert costs == UnitCosts(
        tile_rows=1, row_forward=300, row_dgrad=300, row_wgrad=300, weight_read=37500,
        row_push=10000, row_push_backward=20000, weight_push=150000, row_return=10000,
        row_return_backward=10000, grad_push=300000, row_place=5000, grad_add=225000,
        late_window=1_000_000, start=3_000_000, copy=1_000_000,
    )  # fmt: skip


@pytest.mark.parametrize("name", MACHINES)
def test_every_preset_names_its_source(name: str) -> None:
    assert "NVLink" in MACHINES[name].source


def test_wrong_rates_are_named() -> None:
    with pytest.raises(ValueError, match=r"Machine\.lane_gbps=0"):
        dataclasses.replace(MACHINES["h100"], lane_gbps=0)
