"""The rivals: what all of them promise, an oracle for the LP, and values known from elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import product

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from feplb.scheduler import Move, Plan, PlanLimits, plan_violations, rank_loads, token_straggler
from feplb.scheduler.baselines import (
    BASELINES,
    Baseline,
    BaselineInput,
    LayerCost,
    Outcome,
    WeightCopy,
    fastermoe,
    llep,
    lpt,
    mindspeed_mm,
    moonep,
    outcome_violations,
    ultraep,
)
from feplb.scheduler.baselines.linear_program import best_parts
from feplb.scheduler.workloads import calibrated, calibrated_by_source

Rows = npt.NDArray[np.int64]

ANY = BaselineInput()
EXAMPLE = [[10, 6], [2, 0]]  # loads 16 | 2, mean 9


# ------------------------------------------------------------------------------ the common answer


def test_the_owner_keeps_an_experts_first_rows_and_helpers_follow_by_rank() -> None:
    # 12 rows to 4 | 4 | 4: the pairs are 0 -> 1 and 0 -> 2.
    outcome = moonep([[12], [0], [0]], ANY)
    common = {"expert_idx": 0, "owner_rank": 0}
    assert outcome.plan.moves == (
        Move(**common, dst_rank=1, row_start=4, row_end=8),
        Move(**common, dst_rank=2, row_start=8, row_end=12),
    )
    assert outcome.copies == (WeightCopy(0, 0, 1), WeightCopy(0, 0, 2))
    assert (outcome.num_copies, outcome.num_rows_moved, outcome.max_slots) == (2, 8, 1)
    assert outcome.loads_after([[12], [0], [0]]).tolist() == [4, 4, 4]
    assert outcome.imbalance_after([[12], [0], [0]]) == 1.0


def test_outcome_violations_are_named() -> None:
    good = moonep(EXAMPLE, ANY)
    copy = good.copies[0]
    assert outcome_violations(good, EXAMPLE) == []
    for copies, sentence in (
        ((), "rows 3 to 10 of expert 0 of rank 0 to rank 1: no copy of the expert's weights"),
        ((copy, copy), "one comes twice"),
        ((copy, WeightCopy(1, 0, 1)), "the owner has the weights"),
        ((copy, WeightCopy(0, 2, 1)), "local experts are 0 to 1"),
        ((copy, WeightCopy(0, 1, 2)), "ranks are 0 to 1"),
    ):
        wrong = Outcome(policy="wrong", plan=good.plan, copies=copies, reroutes=True)
        assert sentence in "; ".join(outcome_violations(wrong, EXAMPLE))


# ----------------------------------------------------------------------------- oracle, properties


@st.composite
def shared_rows(draw: st.DrawFn) -> tuple[Rows, Rows, Rows, Rows, int]:
    """Experts, their ranks, and up to four replicas elsewhere, of few rows."""
    num_ranks = draw(st.integers(2, 4))
    num_experts = draw(st.integers(1, 6))

    def array(low: int, high: int, size: int) -> Rows:
        values = draw(st.lists(st.integers(low, high), min_size=size, max_size=size))
        return np.array(values, dtype=np.int64)

    ranks = array(0, num_ranks - 1, num_experts)
    copied = np.arange(draw(st.integers(0, min(4, num_experts))))
    helpers = (ranks[copied] + array(1, num_ranks - 1, len(copied))) % num_ranks
    return array(0, 5, num_experts), ranks, copied, helpers, num_ranks


@settings(max_examples=150, deadline=None)
@given(shared_rows())
def test_lplbs_program_equals_brute_force(case: tuple[Rows, Rows, Rows, Rows, int]) -> None:
    rows, ranks, copied, helpers, num_ranks = case

    def key(moved: Sequence[int]) -> tuple[float, int]:
        after = np.bincount(ranks, weights=rows, minlength=num_ranks)
        np.subtract.at(after, ranks[copied], moved)
        np.add.at(after, helpers, moved)
        return float(after.max()), sum(moved)

    best = min(key(moved) for moved in product(*(range(rows[e] + 1) for e in copied)))
    assert key(best_parts(*case).tolist()) == best


@st.composite
def cases(draw: st.DrawFn) -> tuple[Rows, BaselineInput]:
    """Few small values, so that ties, empty experts and binding slots are common."""
    num_ranks, num_local_experts = draw(st.integers(1, 6)), draw(st.integers(1, 4))
    most = draw(st.sampled_from([0, 2, 9, 5000]))
    rows = st.lists(
        st.integers(0, most) | st.sampled_from([0, most, 5 * most]),
        min_size=num_ranks * num_local_experts,
        max_size=num_ranks * num_local_experts,
    )
    counts = np.array(draw(rows), dtype=np.int64).reshape(num_ranks, num_local_experts)
    previous = np.array(draw(rows), dtype=np.int64).reshape(counts.shape)
    split = np.random.RandomState(draw(st.integers(0, 99)))
    shares = np.ones(num_ranks) / num_ranks
    by_source = np.stack([split.multinomial(num, shares) for num in counts.ravel()], axis=1)
    return counts, BaselineInput(
        previous=draw(st.sampled_from([None, previous])),
        by_source=draw(st.sampled_from([None, by_source])),
        num_slots=draw(st.sampled_from([None, 0, 1, 2, 99])),
        cost=draw(st.sampled_from([LayerCost(), LayerCost(expert_us=0.1)])),
    )


# Whose rules promise it: the others pack by history, force the last rows, or pay for bandwidth.
NEVER_WORSE = {"none", "force_balanced", "lpt", "ultraep", "moonep", "mindspeed_mm"}
LIMITS_SLOTS = {"lpt", "ultraep", "mindspeed_mm"}


@pytest.mark.parametrize("name", BASELINES)
@settings(max_examples=60, deadline=None)
@given(cases())
def test_every_row_is_computed_once_where_the_weights_are(
    name: str, case: tuple[Rows, BaselineInput]
) -> None:
    counts, given_ = case
    outcome = BASELINES[name](*case)
    roomy = PlanLimits(
        num_dynamic=counts.shape[1],
        num_slots=counts.size,
        num_grad_slots=counts.size * len(counts),
        max_recv_rows=int(counts.sum()),
        max_return_rows=int(counts.sum()),
    )
    found = plan_violations(outcome.plan, counts, roomy)
    if name not in NEVER_WORSE:
        found = [text for text in found if not text.startswith("the fullest rank computes")]
    assert found + outcome_violations(outcome, counts) == []
    if name in LIMITS_SLOTS and given_.num_slots is not None:
        assert outcome.max_slots <= given_.num_slots


@pytest.mark.parametrize("name", BASELINES)
@settings(max_examples=30, deadline=None)
@given(cases())
def test_an_outcome_repeats_and_bears_its_name(name: str, case: tuple[Rows, BaselineInput]) -> None:
    counts, given_ = case
    outcome = BASELINES[name](counts, given_)
    assert BASELINES[name](counts.tolist(), given_) == outcome
    assert outcome.policy == name


@pytest.mark.parametrize("name", ["force_balanced", "moonep"])
@settings(max_examples=60, deadline=None)
@given(cases())
def test_exact_policies_leave_a_difference_of_one_row(
    name: str, case: tuple[Rows, BaselineInput]
) -> None:
    after = BASELINES[name](*case).loads_after(case[0])
    assert after.max() - after.min() <= 1


@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.parametrize("counts", [[[0, 0], [0, 0]], [[5, 0, 3]], [[0]], [[7]]])
def test_nothing_to_do_is_an_empty_outcome(name: str, counts: list[list[int]]) -> None:
    outcome = BASELINES[name](counts, BaselineInput(previous=counts))
    assert (outcome.plan, outcome.copies) == (Plan(), ())


@pytest.mark.parametrize("name", BASELINES)
def test_64_ranks_of_8_experts_are_no_worse_off(name: str) -> None:
    counts = calibrated(64, seed=0, step=1, num_experts=512)
    given_ = BaselineInput(previous=calibrated(64, seed=0, step=0, num_experts=512))
    outcome = BASELINES[name](counts, given_)
    assert outcome_violations(outcome, counts) == []
    assert outcome.imbalance_after(counts) <= Plan().imbalance_after(counts)


# ----------------------------------------------------------------------------------- known values

COUNTS = [calibrated(8, seed=0, step=step, layer=step) for step in range(200)]

# Copies and max / mean at EP 8, measured before on 400 micro-batches of nearly this routing with
# other re-makes of the same rules. Standard errors: 0.08 copies, 0.0006 at most.
KNOWN = [
    ("llep 1.00", partial(llep, alpha=1.0), 7.8, 1.0),
    ("llep 1.01", partial(llep, alpha=1.01), 5.5, 1.01),
    ("llep 1.02", partial(llep, alpha=1.02), 4.6, 1.02),
    ("llep 1.05", partial(llep, alpha=1.05), 3.1, 1.05),
    ("llep 1.10", partial(llep, alpha=1.1), 1.8, 1.10),
    ("ultraep 1.00", partial(ultraep, balance_threshold=1.0), 5.1, 1.012),
    ("ultraep 1.01", partial(ultraep, balance_threshold=1.01), 4.4, 1.020),
    ("ultraep 1.02", partial(ultraep, balance_threshold=1.02), 3.9, 1.030),
    ("ultraep 1.05", partial(ultraep, balance_threshold=1.05), 2.8, 1.060),
    ("ultraep 1.10", partial(ultraep, balance_threshold=1.1), 1.6, 1.110),
    ("mindspeed_mm", mindspeed_mm, 7.7, 1.0001),
]


@pytest.mark.parametrize(
    ("policy", "copies", "imbalance"), [k[1:] for k in KNOWN], ids=[k[0] for k in KNOWN]
)
def test_copies_and_imbalance_are_those_known(
    policy: Baseline, copies: float, imbalance: float
) -> None:
    outcomes = [policy(counts, ANY) for counts in COUNTS]
    assert np.mean([o.num_copies for o in outcomes]) == pytest.approx(copies, abs=0.25)
    after = [o.imbalance_after(c) for o, c in zip(outcomes, COUNTS, strict=True)]
    assert np.mean(after) == pytest.approx(imbalance, abs=0.002)


@pytest.mark.parametrize(("ep_size", "removed"), [(2, 0.55), (4, 0.47), (8, 0.39)])
def test_fastermoe_removes_what_the_paper_measured(ep_size: int, removed: float) -> None:
    # arXiv 2604.19654. Its timings are not known, ours are the layer's by data sheet: not exact.
    before, after = 0.0, 0.0
    for step in range(100):
        by_source = calibrated_by_source(ep_size, seed=0, step=step, layer=step)
        counts = by_source.sum(axis=0).reshape(ep_size, -1)
        outcome = fastermoe(counts, BaselineInput(by_source=by_source))
        before += token_straggler(rank_loads(counts))
        after += token_straggler(outcome.loads_after(counts))
    assert 1 - after / before == pytest.approx(removed, abs=0.1)


# ----------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ([1, 2], r"counts has shape \(2,\), expected \[num_ranks, num_local_experts\]"),
        (np.zeros((0, 3), dtype=np.int64), r"counts has shape \(0, 3\)"),
        ([[1.5, 2.0]], "counts has dtype float64, expected integers"),
        ([[1, -2]], "counts has -2 rows somewhere, expected at least 0"),
    ],
)
def test_wrong_counts_are_named(name: str, counts: npt.ArrayLike, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BASELINES[name](counts, ANY)


@pytest.mark.parametrize("name", ["eplb_previous", "lplb"])
def test_a_history_of_another_shape_is_named(name: str) -> None:
    with pytest.raises(ValueError, match=r"previous has shape \(1, 2\), expected \(2, 2\)"):
        BASELINES[name](EXAMPLE, BaselineInput(previous=[[1, 2]]))


def test_sources_that_do_not_fit_the_counts_are_named() -> None:
    with pytest.raises(ValueError, match=r"by_source has shape \(1, 4\), expected \(2, 4\)"):
        fastermoe(EXAMPLE, BaselineInput(by_source=[[10, 6, 2, 0]]))
    with pytest.raises(ValueError, match="by_source has 5 rows of expert 1, expected 6 as in"):
        fastermoe(EXAMPLE, BaselineInput(by_source=[[5, 3, 1, 0], [5, 2, 1, 0]]))


def test_wrong_parameters_are_named() -> None:
    with pytest.raises(ValueError, match=r"num_slots: -1, expected at least 0"):
        BaselineInput(num_slots=-1)
    with pytest.raises(ValueError, match="lpt: num_dynamic=3, expected 0 to 2"):
        lpt(EXAMPLE, ANY, num_dynamic=3)
