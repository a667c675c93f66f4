"""The planner: cases computed by hand, an oracle in Python, and properties of every policy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from feplb import _core
from feplb.scheduler import (
    POLICIES,
    Move,
    Plan,
    PlanLimits,
    load_imbalance,
    make_plan,
    plan_violations,
    token_straggler,
    whole_expert_floor,
)
from feplb.scheduler.cost_model import UnitCosts
from feplb.scheduler.plan import hash_moves
from feplb.scheduler.policies import core_limits

COSTS = UnitCosts(row_forward=10, row_push=1, row_return=1, weight_push=20)
ROOMY = PlanLimits(
    num_dynamic=2, num_slots=9, num_grad_slots=9, max_recv_rows=999, max_return_rows=999
)


def greedy(counts: Sequence[Sequence[int]], **limits: int) -> Plan:
    """The greedy plan, all experts dynamic and room for everything unless said otherwise."""
    limits = {"num_dynamic": len(counts[0]) if counts else 0, **limits}
    return make_plan("greedy", np.array(counts, dtype=np.int64), replace(ROOMY, **limits))


def short(plan: Plan) -> list[tuple[int, int, int, int]]:
    """Moves of whole experts as (owner_rank, expert_idx, dst_rank, rows)."""
    assert all(move.row_start == 0 for move in plan.moves)
    return [(m.owner_rank, m.expert_idx, m.dst_rank, m.row_end) for m in plan.moves]


# ------------------------------------------------------------------------------ computed by hand


def test_the_worked_example_of_plan_h() -> None:
    # loads 16 | 2. Expert 0 (10 rows): 2 + 10 < 16, moves: 6 | 12. Then rank 1 is the fullest and
    # its expert 0 (2 rows) helps: 6 + 2 < 12, moves: 8 | 10. Its expert 1 is empty: end.
    counts = [[10, 6], [2, 0]]
    one_move = greedy(counts, min_tokens=3)
    move = Move(expert_idx=0, owner_rank=0, dst_rank=1, row_start=0, row_end=10)
    assert one_move.moves == (move,)
    assert short(greedy(counts)) == [(0, 0, 1, 10), (1, 0, 0, 2)]


def test_only_the_last_experts_of_a_rank_are_dynamic() -> None:
    # loads 19 | 1, expert 0 static. Expert 1 (7): 1 + 7 < 19 -> 12 | 8. Expert 2 (2): 8 + 2 < 12 ->
    # 10 | 10. Equal loads: nothing helps.
    plan = greedy([[10, 7, 2], [1, 0, 0]], num_dynamic=2)
    assert short(plan) == [(0, 1, 1, 7), (0, 2, 1, 2)]
    assert greedy([[10, 7, 2], [1, 0, 0]], num_dynamic=0).moves == ()


def test_an_expert_that_would_not_help_is_skipped_for_the_next_busiest() -> None:
    # loads 12 | 4. Expert 0 (8): 4 + 8 = 12, no help. Expert 1 (3): 4 + 3 < 12 -> 9 | 7. Then
    # expert 2 (1): 7 + 1 < 9 -> 8 | 8.
    assert short(greedy([[8, 3, 1], [4, 0, 0]])) == [(0, 1, 1, 3), (0, 2, 1, 1)]


def test_a_helper_may_later_send_experts_of_its_own() -> None:
    # loads 20 | 9 | 7. Rank 0's expert 0 (10) to rank 2 -> 10 | 9 | 17. Rank 2 is the fullest now;
    # what it received stays, its own expert 0 (7) moves: 9 + 7 < 17 -> 10 | 16 | 10. Rank 1's
    # expert 0 (5) to rank 0, the lower of two equals: 10 + 5 < 16 -> 15 | 11 | 10. Rank 0's
    # expert 1 (10) does not help: 10 + 10 > 15. End.
    plan = greedy([[10, 10], [5, 4], [7, 0]])
    assert short(plan) == [(0, 0, 2, 10), (1, 0, 0, 5), (2, 0, 1, 7)]


def test_ties_go_to_the_lowest_index() -> None:
    # loads 8 | 8 | 0 | 0: rank 0 before rank 1, expert 0 before 1, rank 2 before 3.
    # (0, 0, 4) to 2 -> 4 | 8 | 4 | 0; (1, 0, 4) to 3 -> 4 | 4 | 4 | 4.
    counts = [[4, 4], [4, 4], [0, 0], [0, 0]]
    assert short(greedy(counts)) == [(0, 0, 2, 4), (1, 0, 3, 4)]


def test_min_tokens_keeps_small_experts_at_home() -> None:
    # loads 16 | 0: 6 and 5 rows move while they help; 5 is under 6.
    counts = [[6, 5, 5], [0, 0, 0]]
    assert short(greedy(counts, min_tokens=6)) == [(0, 0, 1, 6)]
    assert greedy(counts, min_tokens=7).moves == ()
    assert short(greedy(counts, min_tokens=0)) == short(greedy(counts, min_tokens=1))


# Each limit alone, on loads 30 | 0 | 6 with experts of 8, 7, 6, 5, 4 rows. Without limits: 8 to
# rank 1 (22 | 8 | 6), 7 to rank 2 (15 | 8 | 13), 6 to rank 1 (9 | 14 | 13); rank 1 owns nothing.
BINDING = [[8, 7, 6, 5, 4], [0, 0, 0, 0, 0], [6, 0, 0, 0, 0]]


def test_without_binding_limits() -> None:
    assert short(greedy(BINDING)) == [(0, 0, 1, 8), (0, 1, 2, 7), (0, 2, 1, 6)]


def test_num_slots_binds() -> None:
    # One slot per rank: 8 to rank 1, 7 to rank 2, both full; rank 0 is still the fullest with 15.
    assert short(greedy(BINDING, num_slots=1)) == [(0, 0, 1, 8), (0, 1, 2, 7)]
    assert greedy(BINDING, num_slots=0).moves == ()


def test_max_recv_rows_binds() -> None:
    # 7 rows per helper: 8 fits nowhere, 7 to rank 1 (23 | 7 | 6); then 6 fits in rank 2 only
    # (17 | 7 | 12), which leaves 1 row there and 0 on rank 1.
    assert short(greedy(BINDING, max_recv_rows=7)) == [(0, 1, 1, 7), (0, 2, 2, 6)]


def test_a_fuller_rank_with_room_helps_when_the_emptiest_has_none() -> None:
    # loads 20 | 0 | 4, 10 rows per helper. 9 to rank 1 (11 | 9 | 4), 5 to rank 2 (6 | 9 | 9). Rank
    # 1 is the fullest and owns nothing. 8 rows per helper: 9 has no room, 5 to rank 1 (15 | 5 | 4),
    # 4 to rank 2 (11 | 5 | 8), 2 to rank 1 (9 | 7 | 8).
    counts = [[9, 5, 4, 2], [0, 0, 0, 0], [4, 0, 0, 0]]
    assert short(greedy(counts, max_recv_rows=10)) == [(0, 0, 1, 9), (0, 1, 2, 5)]
    assert short(greedy(counts, max_recv_rows=8)) == [(0, 1, 1, 5), (0, 2, 2, 4), (0, 3, 1, 2)]


def test_num_grad_slots_binds() -> None:
    # Rank 0 may send two experts.
    assert short(greedy(BINDING, num_grad_slots=2)) == [(0, 0, 1, 8), (0, 1, 2, 7)]
    assert greedy(BINDING, num_grad_slots=0).moves == ()


def test_max_return_rows_binds() -> None:
    # Rank 0 may get 14 rows back: 8 to rank 1 leaves 6; 7 is too many, 6 to rank 2 (16 | 8 | 12).
    assert short(greedy(BINDING, max_return_rows=14)) == [(0, 0, 1, 8), (0, 2, 2, 6)]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("shape", [(0, 0), (0, 4), (3, 0), (1, 4), (3, 4)])
def test_nothing_to_do_is_an_empty_plan(policy: str, shape: tuple[int, int]) -> None:
    # No ranks, no experts, one rank, or all counts zero.
    counts = np.full(shape, 5 if shape[0] == 1 else 0)
    limits = replace(ROOMY, num_dynamic=shape[1])
    plan = make_plan(policy, counts, limits, costs=COSTS)
    assert plan == Plan(moves=(), hash=0)
    assert plan_violations(plan, counts, limits) == []


def test_none_moves_nothing() -> None:
    assert make_plan("none", [[9, 9], [0, 0]], ROOMY) == Plan()


def test_counts_up_to_int32_do_not_overflow() -> None:
    # loads 3 M | 0 with M = 2^31 - 1: one expert moves (2 M | M), a second would not help.
    most = 2**31 - 1
    plan = greedy([[most] * 3, [0] * 3], max_recv_rows=2**40, max_return_rows=2**40)
    assert short(plan) == [(0, 0, 1, most)]
    assert plan.loads_after([[most] * 3, [0] * 3]).tolist() == [2 * most, most]


def test_what_a_plan_does_to_the_loads() -> None:
    # loads 16 | 2 -> 6 | 12, mean 9; the hottest expert has 10 rows.
    counts = [[10, 6], [2, 0]]
    plan = greedy(counts, min_tokens=3)
    assert plan.loads_before(counts).tolist() == [16, 2]
    assert plan.loads_after(counts).tolist() == [6, 12]
    assert plan.imbalance_before(counts) == pytest.approx(16 / 9)
    assert plan.imbalance_after(counts) == pytest.approx(12 / 9)
    assert whole_expert_floor(counts) == pytest.approx(10 / 9)
    assert token_straggler([16, 2]) == 7.0
    assert plan.num_rows_moved == 10


def test_loads_of_nothing() -> None:
    assert load_imbalance([0, 0]) == 1.0
    assert token_straggler([]) == 0.0
    assert whole_expert_floor([[0, 0], [0, 0]]) == 1.0


# ----------------------------------------------------------------------------- oracle, properties


def reference_greedy(counts: npt.NDArray[np.int64], limits: PlanLimits) -> Plan:
    """The paper's greedy as its sentence reads: expert by expert, rank by rank."""
    num_ranks, num_local_experts = counts.shape
    loads = counts.sum(axis=1).tolist()
    moves: list[Move] = []

    def has_room(rank: int, rows: int) -> bool:
        received = [move.num_rows for move in moves if move.dst_rank == rank]
        return len(received) < limits.num_slots and sum(received) + rows <= limits.max_recv_rows

    def next_move() -> Move | None:
        owner = loads.index(max(loads))
        sent = {move.expert_idx: move.num_rows for move in moves if move.owner_rank == owner}
        dynamic = range(num_local_experts - limits.num_dynamic, num_local_experts)
        for expert in sorted(set(dynamic) - set(sent), key=lambda e: (-counts[owner, e], e)):
            rows = int(counts[owner, expert])
            if rows < max(1, limits.min_tokens) or len(sent) == limits.num_grad_slots:
                continue
            if sum(sent.values()) + rows > limits.max_return_rows:
                continue
            helpers = [rank for rank in range(num_ranks) if has_room(rank, rows)]
            dst = min(helpers, key=lambda rank: (loads[rank], rank), default=owner)
            if loads[dst] + rows < loads[owner]:
                return Move(
                    expert_idx=expert, owner_rank=owner, dst_rank=dst, row_start=0, row_end=rows
                )
        return None

    while counts.size and (move := next_move()):
        moves.append(move)
        loads[move.owner_rank] -= move.num_rows
        loads[move.dst_rank] += move.num_rows
    return Plan.from_moves(moves)


@st.composite
def planning_cases(draw: st.DrawFn) -> tuple[npt.NDArray[np.int64], PlanLimits]:
    """Few small values, so that ties, empty experts and binding limits are common."""
    num_ranks = draw(st.integers(0, 6))
    num_local_experts = draw(st.integers(0, 6))
    most = draw(st.sampled_from([2, 9, 100]))
    rows = st.lists(
        st.integers(0, most) | st.sampled_from([0, most, 5 * most]),
        min_size=num_ranks * num_local_experts,
        max_size=num_ranks * num_local_experts,
    )
    limits = PlanLimits(
        num_dynamic=draw(st.integers(0, num_local_experts)),
        num_slots=draw(st.sampled_from([0, 1, 2, 99])),
        num_grad_slots=draw(st.sampled_from([0, 1, 2, 99])),
        min_tokens=draw(st.sampled_from([0, 1, 2, most])),
        max_recv_rows=draw(st.sampled_from([0, most, 2 * most, 9999])),
        max_return_rows=draw(st.sampled_from([0, most, 2 * most, 9999])),
    )
    counts = np.array(draw(rows), dtype=np.int64).reshape(num_ranks, num_local_experts)
    return counts, limits


@settings(max_examples=500, deadline=None)
@given(planning_cases())
def test_greedy_equals_the_reference(case: tuple[npt.NDArray[np.int64], PlanLimits]) -> None:
    assert make_plan("greedy", *case) == reference_greedy(*case)


@settings(max_examples=200, deadline=None)
@given(planning_cases(), st.sampled_from(POLICIES))
def test_every_plan_is_valid_and_repeats(
    case: tuple[npt.NDArray[np.int64], PlanLimits], policy: str
) -> None:
    plan = make_plan(policy, *case, costs=COSTS)
    assert plan_violations(plan, *case) == []
    assert make_plan(policy, *case, costs=COSTS) == plan


@pytest.mark.parametrize("num_dynamic", [4, 16])
def test_greedy_equals_the_reference_at_full_size(num_dynamic: int) -> None:
    limits = PlanLimits(
        num_dynamic=num_dynamic,
        num_slots=4,
        num_grad_slots=5,
        min_tokens=100,
        max_recv_rows=9000,
        max_return_rows=9000,
    )
    stream = np.random.default_rng(0)
    for _ in range(50):
        counts = stream.lognormal(7, 1, (8, 16)).astype(np.int64)
        assert make_plan("greedy", counts, limits) == reference_greedy(counts, limits)


def test_the_hash_is_the_same_in_every_run() -> None:
    # FNV-1a by hand: ((((offset ^ 0) * prime ^ 0) * prime ^ 1) * prime ^ 0) * prime ^ 10) * prime.
    value = 14695981039346656037
    for integer in (0, 0, 1, 0, 10):
        value = (value ^ integer) * 1099511628211 % 2**64
    assert greedy([[10, 6], [2, 0]], min_tokens=3).hash == value
    assert hash_moves(()) == 0


# ------------------------------------------------------------------------------------- violations

GOOD = Move(expert_idx=1, owner_rank=0, dst_rank=1, row_start=0, row_end=6)
COUNTS = [[4, 6], [1, 1], [0, 0]]
TIGHT = PlanLimits(
    num_dynamic=1, num_slots=1, num_grad_slots=1, max_recv_rows=6, max_return_rows=6, min_tokens=2
)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"dst_rank": 3}, "dst_rank 3, expected 0 to 2"),
        ({"owner_rank": -1}, "owner_rank -1, expected 0 to 2"),
        ({"expert_idx": 2}, "expert_idx 2, expected 0 to 1"),
        ({"dst_rank": 0}, "the helper is the owner"),
        ({"expert_idx": 0, "row_end": 4}, "a static expert moves, expected expert_idx >= 1"),
        ({"row_end": 7}, "expected 0 <= row_start < row_end <= 6"),
        ({"row_end": 1}, "1 rows move, expected at least min_tokens=2"),
    ],
)
def test_a_wrong_move_is_named(changes: dict[str, int], sentence: str) -> None:
    plan = Plan.from_moves([replace(GOOD, **changes)])
    assert any(sentence in text for text in plan_violations(plan, COUNTS, TIGHT))


def test_a_good_plan_has_no_violations() -> None:
    assert plan_violations(Plan.from_moves([GOOD]), COUNTS, TIGHT) == []


def test_capacities_are_named_with_rank_and_values() -> None:
    # Rank 0 sends 6 + 5 rows of two experts to rank 1.
    moves = [replace(GOOD, row_end=6), replace(GOOD, expert_idx=0, row_end=5)]
    limits = replace(TIGHT, num_dynamic=2)
    found = plan_violations(Plan.from_moves(moves), [[5, 6], [0, 0]], limits)
    assert found == [
        "rank 1 receives 2 experts, num_slots=1",
        "rank 1 receives 11 rows, max_recv_rows=6",
        "rank 0 gets back 11 rows, max_return_rows=6",
        "rank 0 gets grads of 2 moves, num_grad_slots=1",
    ]


def test_two_ranges_of_one_expert_need_one_slot_but_may_not_overlap() -> None:
    limits = replace(TIGHT, num_grad_slots=2)
    halves = [replace(GOOD, row_end=3), replace(GOOD, row_start=3)]
    assert plan_violations(Plan.from_moves(halves), COUNTS, limits) == []
    overlapping = [replace(GOOD, row_end=4), replace(GOOD, row_start=3, dst_rank=2)]
    found = plan_violations(
        Plan.from_moves(overlapping), COUNTS, replace(limits, max_return_rows=9)
    )
    assert found == [
        "rows 3 to 6 of expert 1 of rank 0 to rank 2: rows below 4 already move to rank 1"
    ]


def test_a_fuller_fullest_rank_is_named() -> None:
    plan = Plan.from_moves([GOOD])
    found = plan_violations(plan, [[4, 6], [8, 1], [0, 0]], TIGHT)
    assert found == ["the fullest rank computes 15 rows, 10 without the plan"]


def test_order_and_hash_are_checked() -> None:
    moves = (replace(GOOD, row_start=3), replace(GOOD, row_end=3))
    found = plan_violations(Plan(moves=moves, hash=1), COUNTS, replace(TIGHT, num_grad_slots=2))
    assert found == [
        "the moves are not ordered by (owner_rank, expert_idx, row_start)",
        f"the hash is 1, expected {hash_moves(moves)} for these moves",
    ]


# ----------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ([1, 2], r"counts has shape \(2,\), expected \[num_ranks, num_local_experts\]"),
        ([[1.5, 2.0]], "counts has dtype float64, expected integers"),
        ([[1, 2], [3, -4]], "rank 1, local expert 1: -4, expected 0 to 2147483647"),
        ([[1, 2**31]], "rank 0, local expert 1: 2147483648, expected 0 to 2147483647"),
    ],
)
def test_wrong_counts_are_named(counts: list[object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_plan("greedy", np.array(counts), ROOMY)


def test_an_unknown_policy_is_named() -> None:
    with pytest.raises(
        ValueError, match=r'policy="best", expected "none", "greedy", "refine", "split" or "auto"'
    ):
        make_plan("best", [[1, 2]], ROOMY)


def test_more_dynamic_experts_than_a_rank_has() -> None:
    with pytest.raises(ValueError, match=r"num_dynamic=3, expected 0 to 2 \(the experts of one"):
        make_plan("none", [[1, 2]], replace(ROOMY, num_dynamic=3))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("num_slots", -1, r"PlanLimits\.num_slots: -1, expected an integer from 0 to 2147483647"),
        ("min_tokens", 2**31, r"min_tokens: 2147483648, expected an integer from 0 to 2147483647"),
        ("max_recv_rows", 1.5, r"max_recv_rows: 1\.5, expected an integer"),
    ],
)
def test_wrong_limits_are_named(name: str, value: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(ROOMY, **{name: value})


def test_the_core_checks_for_itself() -> None:
    # What the mover hands over never passes make_plan's Python checks.
    wrong = np.array([[1, 2], [3, -4]], dtype=np.int32)
    with pytest.raises(ValueError, match="rank 1, local expert 1: -4, expected at least 0"):
        _core.make_plan("greedy", wrong, core_limits(ROOMY))
    with pytest.raises(ValueError, match="counts has 1 dimensions, expected 2"):
        _core.make_plan("greedy", wrong[0], core_limits(ROOMY))
