"""The exact optimum: cases by hand, enumeration as the oracle, no time at all."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize

from feplb.scheduler import Move, Plan, PlanLimits, plan_violations
from feplb.scheduler import optimum as optimum_module
from feplb.scheduler.optimum import (
    Optimum,
    best_split,
    best_whole,
    fewest_copies_whole,
    split_floor,
)
from feplb.scheduler.workloads import calibrated

Counts = list[list[int]]

ROOMY = PlanLimits(
    num_dynamic=9, num_slots=9, num_grad_slots=9, max_recv_rows=999, max_return_rows=999
)
LONG = 20.0  # seconds; every program here takes a small part of one


# -------------------------------------------------------------------------------- the enumeration


def options(owner: int, rows: int, num_ranks: int, grain: int) -> Iterator[dict[int, int]]:
    """Every way to send rows of one expert: helper -> rows. grain 0: all rows, to one helper."""
    parts = {0, rows} | (set(range(0, rows + 1, grain)) if grain else set())
    helpers = [rank for rank in range(num_ranks) if rank != owner]
    for sizes in itertools.product(sorted(parts), repeat=len(helpers)):
        if sum(sizes) <= rows:
            yield {rank: size for rank, size in zip(helpers, sizes, strict=True) if size}


def frontier(counts: Counts, limits: PlanLimits, grain: int = 0) -> dict[int, int]:
    """The least largest load of all plans with exactly so many copies, for each such number."""
    num_ranks, least = len(counts), max(1, limits.min_tokens)
    most_copies = limits.max_copies or max(4, num_ranks)
    experts = [
        (owner, rows)
        for owner, of_rank in enumerate(counts)
        for expert, rows in enumerate(of_rank)
        if expert >= len(of_rank) - limits.num_dynamic and rows >= least
    ]
    best: dict[int, int] = {}

    def is_within(sent: list[tuple[int, int, int]]) -> bool:
        for rank in range(num_ranks):
            came = [rows for _, helper, rows in sent if helper == rank]
            went = [rows for owner, _, rows in sent if owner == rank]
            if len(came) > limits.num_slots or sum(came) > limits.max_recv_rows:
                return False
            if len(went) > limits.num_grad_slots or sum(went) > limits.max_return_rows:
                return False
        return len(sent) <= most_copies

    def visit(index: int, sent: list[tuple[int, int, int]]) -> None:
        if index == len(experts):
            loads = [sum(of_rank) for of_rank in counts]
            for owner, helper, rows in sent:
                loads[owner] -= rows
                loads[helper] += rows
            best[len(sent)] = min(best.get(len(sent), max(loads)), max(loads))
            return
        owner, rows = experts[index]
        for option in options(owner, rows, num_ranks, grain):
            if all(size >= least for size in option.values()):
                more = sent + [(owner, helper, size) for helper, size in option.items()]
                if is_within(more):
                    visit(index + 1, more)

    visit(0, [])
    return best


def fewest(best: dict[int, int], target: int) -> float:
    return min((copies for copies, load in best.items() if load <= target), default=math.inf)


def assert_valid(found: Optimum, counts: Counts, limits: PlanLimits) -> None:
    assert plan_violations(found.plan, counts, limits) == []
    assert found.num_copies <= (limits.max_copies or max(4, len(counts)))
    assert found.max_load == found.plan.loads_after(counts).max()


# ------------------------------------------------------------------------------------ against it


@st.composite
def cases(draw: st.DrawFn, most_cells: int, most_rows: int) -> tuple[Counts, PlanLimits]:
    """Up to 3 ranks with small counts, so that ties and limits that bite are common."""
    num_ranks = draw(st.integers(1, 3))
    num_experts = draw(st.integers(1, min(4, most_cells // num_ranks)))
    row = st.lists(st.integers(0, most_rows), min_size=num_experts, max_size=num_experts)
    counts = draw(st.lists(row, min_size=num_ranks, max_size=num_ranks))
    some = st.sampled_from([0, 1, 2, 9])
    rows = st.sampled_from([0, most_rows, 2 * most_rows, 999])
    limits = PlanLimits(
        num_dynamic=draw(st.integers(1, num_experts)),
        num_slots=draw(some),
        num_grad_slots=draw(some),
        max_recv_rows=draw(rows),
        max_return_rows=draw(rows),
        min_tokens=draw(st.sampled_from([0, 1, 3])),
        max_copies=draw(st.integers(0, 3)),
    )
    return counts, draw(st.sampled_from([limits, replace(limits, num_slots=9, num_grad_slots=9)]))


@settings(max_examples=100, deadline=None)
@given(cases(most_cells=8, most_rows=12), st.integers(0, 12))
def test_whole_experts_equal_the_enumeration(case: tuple[Counts, PlanLimits], above: int) -> None:
    best = frontier(*case)
    lowest = best_whole(*case, time_limit_s=LONG)
    assert_valid(lowest, *case)
    assert lowest.proven
    assert lowest.max_load == lowest.bound == min(best.values())
    assert best_whole(*case, time_limit_s=LONG, known=lowest.plan) == lowest
    target = lowest.max_load - 2 + above
    found = fewest_copies_whole(*case, target_load=target, time_limit_s=LONG)
    assert_valid(found, *case)
    assert found.proven
    assert found.bound == fewest(best, target)
    assert (found.max_load <= target) == math.isfinite(found.bound)
    assert found.num_copies == (found.bound if math.isfinite(found.bound) else 0)


@settings(max_examples=100, deadline=None)
@given(cases(most_cells=6, most_rows=5), st.integers(1, 3))
def test_split_equals_the_enumeration(case: tuple[Counts, PlanLimits], grain: int) -> None:
    best = frontier(*case, grain)
    floor = split_floor(np.sum(case[0], axis=1), grain)
    reached = max(floor, min(best.values()))
    found = best_split(*case, grain_rows=grain, time_limit_s=LONG)
    assert_valid(found, *case)
    assert found.proven
    assert found.max_load <= reached
    assert found.num_copies == found.bound == fewest(best, reached)
    for target in (reached - 1, reached + 2):
        found = best_split(*case, grain_rows=grain, target_load=target, time_limit_s=LONG)
        assert_valid(found, *case)
        assert found.proven
        assert found.bound == fewest(best, target)


@settings(max_examples=50, deadline=None)
@given(cases(most_cells=6, most_rows=5), st.sampled_from([0.0, 1e-9]))
def test_bounds_hold_without_any_time(case: tuple[Counts, PlanLimits], time: float) -> None:
    best = frontier(*case)
    lowest = best_whole(*case, time_limit_s=time)
    assert_valid(lowest, *case)
    assert lowest.bound <= min(best.values()) <= lowest.max_load
    assert not lowest.proven or lowest.max_load == min(best.values())
    target = min(best.values())
    found = fewest_copies_whole(*case, target_load=target, time_limit_s=time)
    assert_valid(found, *case)
    assert found.bound <= fewest(best, target)
    parts = best_split(*case, grain_rows=2, time_limit_s=time)
    assert_valid(parts, *case)
    best = frontier(*case, 2)
    floor = split_floor(np.sum(case[0], axis=1), 2)
    assert parts.bound <= fewest(best, max(floor, min(best.values())))


@pytest.mark.parametrize("hopeless_size", [0, 4000])
@pytest.mark.parametrize("seed", range(12))
def test_both_ways_to_the_least_load_end_at_the_optimum(
    seed: int, hopeless_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optimum_module, "HOPELESS_SIZE", hopeless_size)
    stream = np.random.default_rng(seed)
    counts = stream.integers(0, 60, (3, 4)).tolist()
    limits = replace(ROOMY, num_dynamic=4, max_copies=4)
    tight = [{"num_grad_slots": 1}, {"max_return_rows": 45}, {"num_slots": 1}, {"num_dynamic": 2}]
    limits = replace(limits, **tight[seed % 4])
    found = best_whole(counts, limits, time_limit_s=LONG)
    assert_valid(found, counts, limits)
    assert found.proven
    assert found.max_load == found.bound == min(frontier(counts, limits).values())


# Each limit alone, on loads 30 | 0 | 6 (12 | 12 | 12 without), then on 12 | 0.
BITES = [
    {"num_dynamic": 2},
    {"num_slots": 1},
    {"num_grad_slots": 1},
    {"max_recv_rows": 4},
    {"max_return_rows": 7},
    {"min_tokens": 7},
    {"max_copies": 1},
]
WIDE = replace(ROOMY, max_copies=4)


@pytest.mark.parametrize("limit", BITES, ids=lambda limit: next(iter(limit)))
def test_each_limit_bites_whole_experts(limit: dict[str, int]) -> None:
    counts = [[8, 7, 6, 5, 4], [0, 0, 0, 0, 0], [0, 0, 0, 0, 6]]
    limits = replace(WIDE, **limit)
    best = frontier(counts, limits)
    assert min(best.values()) > min(frontier(counts, WIDE).values())
    found = best_whole(counts, limits, time_limit_s=LONG)
    assert_valid(found, counts, limits)
    assert (found.max_load, found.proven) == (min(best.values()), True)


@pytest.mark.parametrize(
    "limit",
    [
        {"num_dynamic": 1},
        {"max_recv_rows": 4},
        {"max_return_rows": 4},
        {"min_tokens": 3},
        *BITES[1:3],
    ],
    ids=lambda limit: next(iter(limit)),
)
def test_each_limit_bites_split_experts(limit: dict[str, int]) -> None:
    # loads 12 | 0 in grains of 2: 4 + 2 rows move, or no more than 4, for a load of 8.
    counts = [[4, 4, 4], [0, 0, 0]]
    assert best_split(counts, WIDE, grain_rows=2, time_limit_s=LONG).max_load == 6
    limits = replace(WIDE, **limit)
    found = best_split(counts, limits, grain_rows=2, time_limit_s=LONG)
    assert_valid(found, counts, limits)
    assert (found.max_load, found.num_copies, found.bound, found.proven) == (8, 1, 1, True)


def test_split_needs_no_time_for_a_good_plan() -> None:
    # Pairs the fullest with the emptiest rank: the floor, with fewer copies than ranks.
    for ep_size in (2, 4, 8):
        counts = calibrated(ep_size, seed=1, step=0)
        limits = replace(
            ROOMY, num_dynamic=counts.shape[1], max_recv_rows=99_999, max_return_rows=99_999
        )
        found = best_split(counts, limits, grain_rows=16, time_limit_s=0)
        assert_valid(found, counts.tolist(), limits)
        assert found.max_load == split_floor(counts.sum(axis=1), 16)
        assert found.num_copies <= ep_size


@pytest.mark.parametrize(("said", "bound"), [(None, 9), (-math.inf, 9), (2.0005, 11), (2.4, 12)])
def test_what_the_solver_proved_is_rounded_up(
    said: float | None, bound: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # loads 18 | 0, nothing below the mean of 9; the solver counts from there.
    answer = optimize.OptimizeResult(status=1, x=None, mip_dual_bound=said)
    monkeypatch.setattr(optimize, "milp", lambda *_, **__: answer)
    found = best_whole([[7, 6, 5], [0, 0, 0]], ROOMY, time_limit_s=LONG)
    assert found == Optimum(max_load=18, bound=bound, plan=Plan(), proven=False)


def test_the_enumeration_by_hand() -> None:
    # loads 16 | 2. One copy, 10, 6 or 2 rows: 6 | 12, 10 | 8, 18 | 0. Two: 0 | 18, 8 | 10, 12 | 6.
    assert frontier([[10, 6], [2, 0]], replace(ROOMY, max_copies=2)) == {0: 16, 1: 10, 2: 10}


# ---------------------------------------------------------------------------------------- by hand


def test_the_best_single_copy() -> None:
    # loads 16 | 2: expert 1 (6 rows) leaves 10 | 8; expert 0 (10 rows), the busiest, 6 | 12.
    found = best_whole([[10, 6], [2, 0]], replace(ROOMY, max_copies=1), time_limit_s=LONG)
    move = Move(expert_idx=1, owner_rank=0, dst_rank=1, row_start=0, row_end=6)
    assert found == Optimum(max_load=10, bound=10, plan=Plan.from_moves([move]), proven=True)


def test_an_exchange_beats_every_single_copy() -> None:
    # loads 14 | 8, mean 11: expert 0 (7) against expert 0 (4) leaves 11 | 11.
    counts = [[7, 7], [4, 4]]
    assert best_whole(counts, ROOMY, time_limit_s=LONG).max_load == 11
    assert best_whole(counts, replace(ROOMY, max_copies=1), time_limit_s=LONG).max_load == 14


def test_split_shares_one_hot_expert() -> None:
    # loads 12 | 0 | 0 in grains of 4: one grain to each rank. In grains of 5: T = 5 gives rank 0
    # -2 grains, the others 1 each; 5 rows to each leave 2 | 5 | 5.
    counts = [[12], [0], [0]]
    found = best_split(counts, ROOMY, grain_rows=4, time_limit_s=LONG)
    assert found.plan.loads_after(counts).tolist() == [4, 4, 4]
    assert split_floor([12, 0, 0], 5) == 5
    found = best_split(counts, ROOMY, grain_rows=5, time_limit_s=LONG)
    assert found.plan.loads_after(counts).tolist() == [2, 5, 5]
    assert [(move.row_start, move.row_end) for move in found.plan.moves] == [(0, 5), (5, 10)]


def test_split_takes_a_whole_expert_that_is_no_multiple() -> None:
    # loads 20 | 0, grain 8, T = 12. 8 rows are too few to move, expert 0 is static: all 9 go.
    limits = replace(ROOMY, num_dynamic=1, min_tokens=9)
    found = best_split([[11, 9], [0, 0]], limits, grain_rows=8, time_limit_s=LONG)
    assert found.plan.moves[0].num_rows == 9


def test_limits_can_keep_split_above_its_floor() -> None:
    # The floor is 4, but a helper takes at most 3 rows: 12 - 3 - 3.
    limits = replace(ROOMY, max_recv_rows=3)
    found = best_split([[12], [0], [0]], limits, grain_rows=1, time_limit_s=LONG)
    assert (found.max_load, found.num_copies, found.proven) == (6, 2, True)


@pytest.mark.parametrize("loads", [[], [5], [0, 0], [7, 7], [130, 0, 5], [1000, 3, 999, 512]])
@pytest.mark.parametrize("grain", [1, 16, 128])
def test_split_floor_is_the_first_load_that_is_enough(loads: list[int], grain: int) -> None:
    enough = (
        load
        for load in itertools.count(-(-sum(loads) // max(len(loads), 1)))
        if sum((load - of_rank) // grain for of_rank in loads) >= 0
    )
    assert split_floor(loads, grain) == next(enough)


@pytest.mark.parametrize("shape", [(0, 0), (0, 4), (3, 0), (1, 4), (3, 4)])
def test_nothing_to_do_is_proven_at_once(shape: tuple[int, int]) -> None:
    # No ranks, no experts, one rank, or equal loads; without time, so without the solver.
    counts = np.full(shape, 5)
    load = 5 * shape[1] if shape[0] else 0
    whole = best_whole(counts, ROOMY, time_limit_s=0)
    assert whole == Optimum(max_load=load, bound=load, plan=Plan(), proven=True)
    none = Optimum(max_load=load, bound=0, plan=Plan(), proven=True)
    assert best_split(counts, ROOMY, grain_rows=2, time_limit_s=0) == none
    assert fewest_copies_whole(counts, ROOMY, target_load=load, time_limit_s=0) == none


def test_a_load_that_no_plan_reaches() -> None:
    # loads 9 | 0, one expert: it only changes places.
    found = fewest_copies_whole([[9], [0]], ROOMY, target_load=8, time_limit_s=LONG)
    assert found == Optimum(max_load=9, bound=math.inf, plan=Plan(), proven=True)


def test_counts_up_to_int32() -> None:
    most = 2**31 - 1
    limits = replace(ROOMY, max_recv_rows=2**40, max_return_rows=2**40)
    found = best_whole([[most, most], [0, 0]], limits, time_limit_s=LONG)
    assert (found.max_load, found.proven) == (most, True)


# ------------------------------------------------------------------------------ known, short time

BETTER = Plan.from_moves([Move(expert_idx=0, owner_rank=0, dst_rank=1, row_start=0, row_end=7)])


def test_a_known_plan_comes_back_where_nothing_is_better() -> None:
    # loads 15 | 2, mean 8.5: 7 rows leave 8 | 9, which counting alone proves.
    counts = [[7, 8], [2, 0]]
    for time in (0, LONG):
        found = best_whole(counts, ROOMY, time_limit_s=time, known=BETTER)
        assert found == Optimum(max_load=9, bound=9, plan=BETTER, proven=True)
    found = fewest_copies_whole(counts, ROOMY, target_load=9, time_limit_s=0, known=BETTER)
    assert found.plan is BETTER


def test_a_known_plan_is_beaten_where_it_can_be() -> None:
    # loads 22 | 2, mean 12: 6 rows leave 16 | 8, 9 rows 13 | 11.
    counts = [[7, 6, 9], [2, 0, 0]]
    known = Plan.from_moves([replace(BETTER.moves[0], expert_idx=1, row_end=6)])
    found = best_whole(counts, ROOMY, time_limit_s=LONG, known=known)
    assert found.max_load < known.loads_after(counts).max()
    found = best_whole(counts, ROOMY, time_limit_s=0, known=known)
    assert found.plan is known
    assert not found.proven


def test_a_known_split_stays_unproven_without_time() -> None:
    # loads 12 | 0 | 0: two copies of 4 rows are the fewest; counting alone proves one.
    parts = [Move(expert_idx=0, owner_rank=0, dst_rank=1, row_start=0, row_end=4)]
    parts.append(replace(parts[0], dst_rank=2, row_start=4, row_end=8))
    known = Plan.from_moves(parts)
    found = best_split([[12], [0], [0]], ROOMY, grain_rows=4, time_limit_s=0, known=known)
    assert found == Optimum(max_load=4, bound=1, plan=known, proven=False)
    found = best_split([[12], [0], [0]], ROOMY, grain_rows=4, time_limit_s=LONG, known=known)
    assert found == Optimum(max_load=4, bound=2, plan=known, proven=True)


@pytest.mark.parametrize("max_copies", [8, 16])
def test_no_time_at_full_size(max_copies: int) -> None:
    counts = calibrated(8, seed=0, step=0)
    limits = PlanLimits(
        num_dynamic=16,
        num_slots=8,
        num_grad_slots=8,
        max_recv_rows=99_999,
        max_return_rows=99_999,
        max_copies=max_copies,
    )
    for found in (
        best_whole(counts, limits, time_limit_s=1e-6),
        fewest_copies_whole(counts, limits, target_load=35_000, time_limit_s=1e-6),
        best_split(counts, limits, grain_rows=128, time_limit_s=1e-6),
    ):
        assert_valid(found, counts.tolist(), limits)
        assert not found.proven
        assert found.bound < found.max_load


# ----------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("known", "message"),
    [
        (replace(BETTER.moves[0], row_end=6), r"expected all rows, or a multiple of"),
        (replace(BETTER.moves[0], dst_rank=2), "dst_rank 2, expected 0 to 1"),
    ],
)
def test_a_known_plan_out_of_the_limits_is_named(known: Move, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        best_whole([[7, 8], [2, 0]], ROOMY, time_limit_s=0, known=Plan.from_moves([known]))


def test_a_known_plan_with_too_many_copies_is_named() -> None:
    moves = [*BETTER.moves, replace(BETTER.moves[0], expert_idx=1, row_end=8)]
    with pytest.raises(ValueError, match="2 copies, max_copies=1"):
        best_whole(
            [[7, 8], [20, 0]],
            replace(ROOMY, max_copies=1),
            time_limit_s=0,
            known=Plan.from_moves(moves),
        )


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="grain_rows=0, expected at least 1"):
        best_split([[1]], ROOMY, grain_rows=0, time_limit_s=0)
    with pytest.raises(ValueError, match="rank 0, local expert 1: -1"):
        best_whole([[1, -1]], ROOMY, time_limit_s=0)


def test_without_scipy_one_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(RuntimeError, match="Install it: pip install scipy"):
        best_whole([[7, 8], [2, 0]], ROOMY, time_limit_s=LONG)


def test_the_import_needs_no_scipy() -> None:
    code = (
        "import sys; sys.modules['scipy'] = None; import feplb.scheduler.optimum as o; "
        "from feplb.scheduler import PlanLimits as P; "
        "p = P(num_dynamic=1, num_slots=1, num_grad_slots=1, max_recv_rows=9, max_return_rows=9); "
        "assert o.best_whole([[1], [1]], p, time_limit_s=1).proven"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
