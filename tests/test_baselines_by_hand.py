"""The rivals, case by case, as one computes them by hand."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np

from feplb.scheduler import Plan
from feplb.scheduler.baselines import (
    Baseline,
    BaselineInput,
    LayerCost,
    Outcome,
    WeightCopy,
    eplb_oracle,
    eplb_previous,
    fastermoe,
    force_balanced,
    llep,
    lplb,
    lpt,
    mindspeed_mm,
    moonep,
    none,
    ultraep,
)
from feplb.scheduler.baselines.history import pack, replicate
from feplb.scheduler.baselines.linear_program import topology

ANY = BaselineInput()
EXAMPLE = [[10, 6], [2, 0]]  # loads 16 | 2, mean 9


def parts(outcome: Outcome) -> list[tuple[int, int, int, int]]:
    """Moves as (owner_rank, expert_idx, dst_rank, rows)."""
    return [(m.owner_rank, m.expert_idx, m.dst_rank, m.num_rows) for m in outcome.plan.moves]


def loads(policy: Baseline, counts: Sequence[Sequence[int]], given: BaselineInput = ANY) -> object:
    return policy(counts, given).loads_after(counts).tolist()


def test_none_moves_nothing() -> None:
    assert none(EXAMPLE, ANY) == Outcome(policy="none", plan=Plan(), reroutes=False)


def test_force_balanced_is_equal_and_free() -> None:
    # 19 rows: the fuller rank keeps the odd one.
    outcome = force_balanced([[10, 7], [2, 0]], ANY)
    assert outcome.loads_after([[10, 7], [2, 0]]).tolist() == [10, 9]
    assert outcome.copies == ()
    assert outcome.is_ideal


def test_lpt_places_the_busiest_dynamic_experts_on_the_emptiest_rank() -> None:
    # One dynamic expert each, 6 and 0 rows stay: 10 to rank 1 (6 | 10), 2 to rank 0 (8 | 10).
    outcome = lpt(EXAMPLE, ANY, num_dynamic=1)
    assert parts(outcome) == [(0, 0, 1, 10), (1, 0, 0, 2)]
    assert not outcome.reroutes


def test_lpt_tries_every_number_of_dynamic_experts_and_prefers_few_copies() -> None:
    # Two each: 10 stays (a tie goes to the owner), 6 to rank 1, 2 stays: 10 | 8, and one copy only.
    assert parts(lpt(EXAMPLE, ANY)) == [(0, 1, 1, 6)]


def test_lpt_leaves_an_expert_at_home_on_a_tie() -> None:
    # 0 | 0: 9 stays on rank 1. Then 2, 1 and 1 to rank 0.
    assert parts(lpt([[1, 1], [9, 2]], ANY, num_dynamic=2)) == [(1, 1, 0, 2)]


def test_lpt_respects_slots_and_drops_what_does_not_help() -> None:
    # All 6 experts dynamic, one slot: 8 stays, 4 to rank 1, which is then full.
    counts = [[8, 4, 4], [0, 0, 0]]
    assert parts(lpt(counts, BaselineInput(num_slots=1), num_dynamic=3)) == [(0, 1, 1, 4)]
    assert parts(lpt(counts, BaselineInput(num_slots=0))) == []
    assert parts(lpt([[5], [5]], ANY)) == []


BY_SOURCE = [[5, 3, 1, 0], [5, 3, 1, 0]]  # sums to EXAMPLE


def shadow(by_source: Sequence[Sequence[int]], **cost: float) -> BaselineInput:
    return BaselineInput(by_source=by_source, cost=LayerCost(**cost))


def test_fastermoe_shadows_while_compute_saved_is_worth_the_copy() -> None:
    # Loads 16 | 2, then 11 | 7, 8 | 10, 9 | 9. Times 3 * max + 4 * shadows: 48, 37, 38, 39.
    outcome = fastermoe(EXAMPLE, shadow(BY_SOURCE, row_us=1, row_wire_us=0, expert_us=2))
    assert parts(outcome) == [(0, 0, 1, 5)]
    assert outcome.copies == (WeightCopy(0, 0, 1),)
    # With 2 * shadows: 48, 35, 34, 33, and 35 for the expert without rows.
    outcome = fastermoe(EXAMPLE, shadow(BY_SOURCE, row_us=1, row_wire_us=0, expert_us=1))
    assert outcome.loads_after(EXAMPLE).tolist() == [9, 9]
    assert outcome.num_copies == 3


def test_fastermoe_shadows_while_rows_kept_off_the_wire_are_worth_the_copy() -> None:
    # Rows from others 8 | 1, 3 | 1, 0 | 1, 0 | 0. Times 4 * max + 12 * shadows: 32, 24, 28, 36.
    outcome = fastermoe(EXAMPLE, shadow(BY_SOURCE, row_us=0, row_wire_us=1, expert_us=6))
    assert outcome.copies == (WeightCopy(0, 0, 1),)


def test_fastermoe_copies_to_ranks_without_tokens_too() -> None:
    # 12 | 0 | 0 becomes 4 | 8 | 0: 3 * 8 + 2 is less than 3 * 12.
    given_ = shadow([[4, 0, 0], [8, 0, 0], [0, 0, 0]], row_us=1, row_wire_us=0, expert_us=1)
    outcome = fastermoe([[12], [0], [0]], given_)
    assert outcome.loads_after([[12], [0], [0]]).tolist() == [4, 8, 0]
    assert outcome.copies == (WeightCopy(0, 0, 1), WeightCopy(0, 0, 2))


def test_fastermoe_without_sources_spreads_an_expert_evenly() -> None:
    given_ = BaselineInput(cost=LayerCost(row_us=1, row_wire_us=0, expert_us=1))
    assert loads(fastermoe, [[12], [0], [0]], given_) == [4, 4, 4]


def test_eplb_replicates_packs_and_splits_evenly() -> None:
    # 12 rows get both extra replicas: 4 each. Packed 4 4 2 | 4 4 2; the pack with two of rank 0's
    # experts is rank 0's: it holds expert 0 twice, rank 1 once.
    counts = [[12, 2], [4, 2]]
    outcome = eplb_oracle(counts, BaselineInput(num_slots=1))
    assert parts(outcome) == [(0, 0, 1, 4)]
    assert outcome.copies == (WeightCopy(0, 0, 1),)
    assert outcome.copies_ahead


def test_eplb_previous_meets_other_counts_with_the_old_placement() -> None:
    # As above; 14 rows go round three replicas, 5 5 4, the first two of them on rank 0.
    given_ = BaselineInput(num_slots=1, previous=[[12, 2], [4, 2]])
    assert loads(eplb_previous, [[14, 0], [0, 9]], given_) == [10, 13]
    assert eplb_previous([[14, 0], [0, 9]], ANY).copies == ()


def test_eplb_replicates_the_expert_with_most_rows_per_replica() -> None:
    # 9 8 1 -> 4.5 8 1 -> 4.5 4 1 -> 3 4 1.
    experts, num_replicas = replicate(np.array([9, 8, 1]), 3)
    assert experts.tolist() == [0, 1, 2, 0, 1, 0]
    assert num_replicas.tolist() == [3, 2, 1]


def test_eplb_packs_as_many_on_each_rank() -> None:
    # 9 | 1 1, which is full; the last goes to the heavier one.
    assert pack(np.array([9.0, 1.0, 1.0, 1.0]), 2).tolist() == [0, 1, 1, 0]


def test_eplb_numbers_its_packs_so_that_experts_stay_home() -> None:
    # Packed by load: 9 1 | 8 2, whichever rank owns them.
    for counts in ([[9, 1], [8, 2]], [[2, 8], [9, 1]]):
        assert eplb_oracle(counts, BaselineInput(num_slots=0)).copies == ()


def test_lplb_shares_rows_between_an_expert_and_its_replica() -> None:
    # Placed at home (9 1 | 8 2); each rank's hottest, experts 0 and 2, lie on the other rank too.
    given_ = BaselineInput(num_slots=1, previous=[[9, 1], [8, 2]])
    outcome = lplb(EXAMPLE, given_)
    assert parts(outcome) == [(0, 0, 1, 7)]
    assert outcome.copies == (WeightCopy(0, 0, 1), WeightCopy(1, 0, 0))
    # The hottest now is not replicated: expert 1's 10 rows stay, all 6 of expert 0 go.
    assert parts(lplb([[6, 10], [2, 0]], given_)) == [(0, 0, 1, 6)]


def test_lplb_reorders_by_history_unless_told_not_to() -> None:
    # By history 8 | 7 + 2, 0 filling up: one expert of rank 0 goes, or stays without reorder.
    given_ = BaselineInput(num_slots=0, previous=[[8, 7], [2, 0]])
    assert lplb([[8, 7], [2, 0]], given_).loads_after([[8, 7], [2, 0]]).max() == 9
    assert parts(lplb([[8, 7], [2, 0]], given_, reorder=False)) == []


def test_lplb_topologies_are_the_published_ones() -> None:
    assert topology(8).tolist() == [[3, 0, 1, 2, 7, 4, 5, 6], [6, 7, 4, 5, 0, 1, 2, 3]]
    assert topology(16)[0].tolist() == [3, 0, 1, 2, 7, 4, 5, 6, 11, 8, 9, 10, 15, 12, 13, 14]
    assert topology(16)[1].tolist() == [12, 13, 14, 15, *range(12)]
    # A torus of 2 x 3: the rank below, and the one to the right.
    assert topology(6).tolist() == [[3, 4, 5, 0, 1, 2], [1, 2, 0, 4, 5, 3]]
    for num_ranks in range(2, 73):
        for link in topology(num_ranks):
            assert sorted(link.tolist()) == list(range(num_ranks))
            assert (link != np.arange(num_ranks)).all()


def test_llep_spills_what_exceeds_the_cap() -> None:
    # Cap 9: beside 6 rows not yet looked at, 3 of 10 stay, 7 go. Then 6 have room.
    assert parts(llep(EXAMPLE, ANY, alpha=1.0)) == [(0, 0, 1, 7)]
    # Cap 99 of mean 90: beside 60, 39 of 100 stay.
    assert parts(llep([[100, 60], [20, 0]], ANY, alpha=1.1)) == [(0, 0, 1, 61)]


def test_llep_gives_all_away_where_the_owner_has_no_room() -> None:
    # Cap 6. Beside 8 rows: all 4 go. Beside 4: 2 stay, 2 go. The last 4 stay: 6 | 6.
    assert parts(llep([[4, 4, 4], [0, 0, 0]], ANY, alpha=1.0)) == [(0, 0, 1, 4), (0, 1, 1, 2)]


def test_llep_forces_what_is_too_little_for_a_helper_on_the_emptiest() -> None:
    # Cap 5, 7 rows to give, room 5 and 2: in two parts, or as one where parts of 5 are too few.
    counts = [[12], [0], [3]]
    assert loads(partial(llep, alpha=1.0, min_chunk=1), counts) == [5, 5, 5]
    assert loads(partial(llep, alpha=1.0, min_chunk=6), counts) == [5, 7, 3]


def test_llep_forces_on_the_emptiest_of_now_or_of_before() -> None:
    # Cap 10. The owner keeps 10 of 22: 8 go to rank 1, which is full then; 4 are too many for the
    # room of 2 on ranks 2 and 3 each, and are forced on rank 2. It later keeps 6 of its own 8.
    forced = partial(llep, alpha=1.0, min_chunk=5)
    assert loads(forced, [[22], [2], [8], [8]]) == [10, 10, 10, 10]
    # The owner, full with 10 others, keeps none of 12: 8 go to rank 1, the emptiest, and as the
    # order is not renewed, so do 4 more. Its own 2 rows then go to rank 2.
    assert loads(forced, [[12, 10], [2, 0], [8, 0], [8, 0]]) == [10, 12, 10, 8]


def test_llep_gives_a_small_part_where_it_is_the_last() -> None:
    # Cap 10, beside 10 others: of 12 rows 8 go to rank 1, and the last 4 have room on rank 2.
    forced = partial(llep, alpha=1.0, min_chunk=5)
    assert loads(forced, [[12, 10], [2, 0], [6, 0], [10, 0]]) == [10, 10, 10, 10]


def test_llep_leaves_fewer_rows_than_ranks_alone() -> None:
    assert parts(llep([[2], [0], [0]], ANY, alpha=1.0)) == []


def test_llep_does_nothing_below_its_gate() -> None:
    # max / mean 16 / 9 = 1.78.
    assert parts(llep(EXAMPLE, ANY, alpha=1.0, gate=1.8)) == []
    assert len(parts(llep(EXAMPLE, ANY, alpha=1.0, gate=1.7))) == 1


def test_ultraep_exports_what_exceeds_the_threshold() -> None:
    # Threshold 9 + 1 % -> 10.
    assert parts(ultraep(EXAMPLE, ANY)) == [(0, 0, 1, 6)]
    assert parts(ultraep(EXAMPLE, ANY, eps=0)) == [(0, 0, 1, 7)]
    # Wanted 1.3 * 9 = 11.7 -> 12.
    assert parts(ultraep(EXAMPLE, ANY, eps=0, balance_threshold=1.3)) == [(0, 0, 1, 4)]


def test_ultraep_keeps_a_row_at_home() -> None:
    assert parts(ultraep([[1, 1], [0, 0]], ANY)) == []


def test_ultraep_takes_no_part_that_the_helpers_left_would_exceed() -> None:
    # 12 rows needed, room 6 | 6. Expert 0 has 9 to give: 6 to rank 1, but its last 3 are less than
    # the 6 that rank 2 must take. Expert 1 gives them.
    assert parts(ultraep([[10, 9], [1, 0], [1, 0]], ANY, eps=0)) == [(0, 0, 1, 6), (0, 1, 2, 6)]


def test_ultraep_raises_the_threshold_until_one_replica_does() -> None:
    # One slot. 6 rows needed, an expert gives 5: threshold 7, where 5 do.
    given_ = BaselineInput(num_slots=1)
    assert parts(ultraep([[6, 6], [0, 0]], given_, eps=0)) == [(0, 0, 1, 5)]
    assert parts(ultraep([[6, 6], [0, 0]], BaselineInput(num_slots=0))) == []


def test_ultraep_bisects_where_its_quick_tries_fail() -> None:
    # One slot, mean 9. 9, 8 and 7 rows needed, an expert gives 5: the least threshold is 13.
    # A replica of 1024 rows at least is none here.
    given_ = BaselineInput(num_slots=1)
    counts = [[6, 6, 6], [0, 0, 0]]
    assert loads(partial(ultraep, eps=0, min_rows=1), counts, given_) == [13, 5]
    assert loads(partial(ultraep, eps=0), counts, given_) == [18, 0]


def test_moonep_fills_ranks_exactly() -> None:
    assert parts(moonep(EXAMPLE, ANY)) == [(0, 0, 1, 7)]
    # 6 of 12 rows: one expert, and half of the next.
    assert parts(moonep([[4, 4, 4], [0, 0, 0]], ANY)) == [(0, 0, 1, 4), (0, 1, 1, 2)]


def test_moonep_overfills_a_receiver_from_one_owner() -> None:
    # Over the mean of 6: 4 | 2 | -6. Rank 0 fills rank 2 alone, and is then filled by rank 1.
    outcome = moonep([[10], [8], [0]], ANY)
    assert parts(outcome) == [(0, 0, 2, 6), (1, 0, 0, 2)]


def test_mindspeed_mm_fills_the_emptiest_rank_to_the_mean() -> None:
    assert parts(mindspeed_mm(EXAMPLE, ANY)) == [(0, 0, 1, 7)]
    assert parts(mindspeed_mm([[4, 4, 4], [0, 0, 0]], ANY)) == [(0, 0, 1, 4), (0, 1, 1, 2)]


def test_mindspeed_mm_stops_without_slots_or_within_its_threshold() -> None:
    # 12 | 0 -> 8 | 4 with one copy.
    counts = [[4, 4, 4], [0, 0, 0]]
    assert loads(mindspeed_mm, counts, BaselineInput(num_slots=1)) == [8, 4]
    assert loads(partial(mindspeed_mm, threshold_rows=4), counts) == [8, 4]


def test_mindspeed_mm_ends_where_it_would_repeat_a_copy() -> None:
    # Mean 2: 8 | 0 | 0 -> 6 | 2 | 0 -> 4 | 2 | 2. Rank 1 would be next, and has the expert.
    assert loads(mindspeed_mm, [[8], [0], [0]]) == [4, 2, 2]


def test_mindspeed_mm_takes_from_the_rank_with_most_rows_of_its_own() -> None:
    # One slot, mean 13: 13 | 13 | 0 | 27 -> 13 | 13 | 10 | 17 -> 15 | 13 | 10 | 15. Rank 0 has 13
    # of its own, rank 3 has 15 and gives again: half-way, 14.
    counts = [[7, 2, 4], [11, 2, 0], [0, 0, 0], [10, 8, 9]]
    assert loads(mindspeed_mm, counts, BaselineInput(num_slots=1)) == [15, 14, 10, 14]


def test_mindspeed_mm_goes_half_way_where_the_helper_is_above_the_mean() -> None:
    # One slot, mean 11: 20 | 12 | 1 -> 15 | 12 | 6; rank 2 is full, rank 1 goes to 27 // 2 = 13.
    counts = [[5, 5, 5, 5], [12, 0, 0, 0], [1, 0, 0, 0]]
    assert loads(mindspeed_mm, counts, BaselineInput(num_slots=1)) == [14, 13, 6]
