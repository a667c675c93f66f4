"""Named workloads: what each name promises, exact totals, and that they come from names alone."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from feplb.scheduler import load_imbalance, rank_loads
from feplb.scheduler.named_workloads import WORKLOADS, make_by_source, make_counts
from feplb.scheduler.shares import apportion, capped, spread
from feplb.scheduler.traces import Trace
from feplb.scheduler.workloads import calibrated

PLAIN = [name for name, workload in WORKLOADS.items() if not workload.needs_trace]
TRACED = [name for name, workload in WORKLOADS.items() if workload.needs_trace]

# Three steps (or domains) of 8 experts at top-2, in two layers; the largest share is 1 / 2.
TRACE = Trace(
    name="three.json",
    top_k=2,
    recorded=np.array(
        [
            [[50, 10, 10, 10, 5, 5, 5, 5], [1, 1, 1, 1, 1, 1, 1, 1]],
            [[5, 5, 5, 5, 10, 10, 10, 50], [1, 1, 1, 1, 1, 1, 1, 1]],
            [[0, 0, 0, 0, 0, 10, 10, 0], [2, 1, 1, 1, 1, 1, 1, 1]],
        ]
    ),
)


def max_vio(counts: np.ndarray) -> float:
    return float(counts.max() / counts.mean() - 1)


def imbalance(name: str, ep_size: int, step: int = 0, **sizes: int) -> float:
    return load_imbalance(rank_loads(make_counts(name, ep_size, seed=0, step=step, **sizes)))


# ------------------------------------------------------------------------------ of every workload


@given(
    name=st.sampled_from(PLAIN),
    ep_size=st.sampled_from([1, 2, 4, 8]),
    num_local_experts=st.integers(1, 8),
    num_tokens=st.integers(1, 60),
    top_k=st.integers(1, 8),
    seed=st.integers(0, 2**40),
    step=st.integers(0, 1000),
)
@settings(max_examples=200, deadline=None)
def test_totals_are_exact_and_a_token_selects_an_expert_once(
    name: str,
    ep_size: int,
    num_local_experts: int,
    num_tokens: int,
    top_k: int,
    seed: int,
    step: int,
) -> None:
    sizes = {
        "seed": seed,
        "step": step,
        "num_experts": ep_size * num_local_experts,
        "num_tokens": num_tokens,
        "top_k": top_k,
    }
    impossible = ""
    try:
        by_source = make_by_source(name, ep_size, **sizes)
    except ValueError as error:
        impossible = str(error)
    if impossible:  # too few experts for top_k at all, or for what the name promises
        assert top_k > ep_size * num_local_experts or re.search("at most[ ;,]", impossible)
        return
    assert by_source.shape == (ep_size, ep_size * num_local_experts)
    assert by_source.dtype == np.int64
    assert by_source.min() >= 0
    tokens = by_source.sum(axis=1) / top_k  # of each rank; no expert gets more of them
    assert (by_source.max(axis=1) <= tokens).all()
    assert by_source.sum() == ep_size * num_tokens * top_k
    if name != "W4_source_ragged":
        assert (tokens == num_tokens).all()
    counts = make_counts(name, ep_size, **sizes)
    assert counts.shape == (ep_size, num_local_experts)
    assert (counts.ravel() == by_source.sum(axis=0)).all()


@pytest.mark.parametrize("name", PLAIN)
def test_counts_come_from_the_arguments_alone(name: str) -> None:
    def counts(seed: int = 1, step: int = 7, layer: int = 2) -> bytes:
        drawn = make_counts(name, 4, seed=seed, step=step, layer=layer, num_tokens=256)
        return drawn.tobytes()

    assert counts() == counts()
    others = {counts(), counts(seed=2), counts(step=8), counts(layer=3)}
    assert len(others) == (1 if name == "W0_balanced" else 4)


def test_the_names() -> None:
    assert list(WORKLOADS) == [
        "calibrated",
        "W0_balanced",
        "W1_hot_expert_set",
        "W2_hot_rank",
        "W3_spread_hot_experts",
        "W4_source_ragged",
        "W5_zero_expert_rank",
        "W6_rotating_hotspot",
        "W7_burst",
        "maxvio_0.2",
        "maxvio_1",
        "maxvio_4",
        "zipf_1.5",
        "zipf_2",
        "zipf_3",
        "domain_mix",
        "replay",
    ]


# 4 ranks of 4 experts, 8 tokens each, top-2, in step 3 (the burst of W7, the second hotspot of W6).
# fmt: off
FROZEN = {
    "calibrated": [5, 3, 1, 1, 4, 7, 0, 3, 0, 5, 4, 12, 8, 7, 3, 1],
    "W0_balanced": [4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4],
    "W1_hot_expert_set": [8, 20, 12, 16, 0, 0, 0, 0, 0, 4, 0, 0, 4, 0, 0, 0],
    "W2_hot_rank": [12, 8, 16, 12, 0, 0, 0, 0, 0, 0, 4, 4, 0, 4, 0, 4],
    "W3_spread_hot_experts": [8, 0, 4, 0, 12, 0, 8, 8, 0, 0, 4, 0, 4, 4, 12, 0],
    "W4_source_ragged": [6, 0, 0, 5, 6, 3, 1, 9, 4, 4, 1, 13, 5, 2, 0, 5],
    "W5_zero_expert_rank": [0, 0, 0, 0, 0, 0, 0, 0, 8, 4, 8, 4, 8, 12, 12, 8],
    "W6_rotating_hotspot": [0, 4, 0, 0, 16, 0, 20, 16, 0, 0, 4, 0, 0, 4, 0, 0],
    "W7_burst": [8, 8, 8, 8, 4, 4, 4, 4, 4, 0, 0, 0, 4, 0, 4, 4],
    "maxvio_0.2": [5, 4, 4, 4, 5, 4, 4, 4, 4, 4, 4, 3, 4, 3, 4, 4],
    "maxvio_1": [4, 3, 4, 3, 4, 4, 6, 8, 3, 3, 3, 3, 3, 5, 5, 3],
    "maxvio_4": [3, 5, 2, 6, 4, 2, 2, 20, 1, 1, 1, 5, 2, 2, 4, 4],
    "zipf_1.5": [3, 3, 3, 3, 8, 5, 5, 6, 3, 3, 3, 3, 4, 4, 4, 4],
    "zipf_2": [4, 3, 3, 4, 3, 2, 2, 3, 13, 8, 5, 6, 2, 2, 2, 2],
    "zipf_3": [10, 27, 4, 6, 1, 1, 1, 1, 1, 1, 1, 1, 3, 2, 2, 2],
}
# fmt: on


@pytest.mark.parametrize("name", PLAIN)
def test_streams_are_frozen(name: str) -> None:
    seen = make_counts(name, 4, seed=3, step=3, num_experts=16, num_tokens=8, top_k=2)
    assert seen.ravel().tolist() == FROZEN[name]


def test_calibrated_is_the_calibrated_model() -> None:
    seen = make_counts("calibrated", 8, seed=1, step=2, layer=3)
    assert (seen == calibrated(8, seed=1, step=2, layer=3)).all()


# --------------------------------------------------------------------------------- Megatron's


def test_w0_is_round_robin() -> None:
    assert (make_counts("W0_balanced", 8, seed=0, step=0) == 2048).all()
    # 3 tokens x top-2 over 4 experts: 0 1, 2 3, 0 1 on each of the two ranks.
    small = make_counts("W0_balanced", 2, seed=0, step=0, num_experts=4, num_tokens=3, top_k=2)
    assert small.tolist() == [[4, 4], [2, 2]]


@pytest.mark.parametrize("name", ["W1_hot_expert_set", "W2_hot_rank"])
def test_hot_experts_are_selected_by_three_tokens_in_four(name: str) -> None:
    # 8 experts at top-4: 4 are hot, and 6 of 8 tokens select all of them, on both ranks.
    row = make_by_source(name, 2, seed=0, step=0, num_experts=8, num_tokens=8, top_k=4)[0]
    assert row[:4].min() >= 6
    assert row[4:].max() <= 2
    # 32 hot of 128: 3/4 + 1/4 x 1/4 of the selections, all on the first 2 of 8 ranks.
    assert imbalance(name, 8) == pytest.approx(0.8125 * 8 / 2, rel=0.02)
    assert imbalance(name, 2) == pytest.approx((0.8125 + 0.1875 / 3) * 2, rel=0.02)
    counts = make_counts(name, 8, seed=0, step=0)
    assert max_vio(counts) == pytest.approx(0.8125 * 4 - 1, rel=0.1)


def test_w1_and_w2_are_drawn_anew() -> None:
    first, second = (make_counts(n, 8, seed=0, step=0) for n in PLAIN[2:4])
    assert (first != second).any()


def test_w3_spreads_its_heat_over_all_ranks() -> None:
    counts = make_counts("W3_spread_hot_experts", 8, seed=0, step=0)
    # 64 hot of 128: 3/4 + 1/4 x 1/2 of the selections.
    assert counts[:, ::2].sum() / counts.sum() == pytest.approx(0.875, abs=0.005)
    assert load_imbalance(rank_loads(counts)) < 1.05


def test_w4_has_ragged_sources_and_even_destinations() -> None:
    by_source = make_by_source("W4_source_ragged", 4, seed=0, step=0, num_tokens=1000, top_k=2)
    assert by_source.sum(axis=1).tolist() == [800, 1600, 2400, 3200]
    assert imbalance("W4_source_ragged", 8) < 1.05


def test_w5_leaves_ranks_without_any_selection() -> None:
    counts = make_counts("W5_zero_expert_rank", 8, seed=0, step=0)
    assert counts[:4].sum() == 0
    assert counts[4:].min() > 0
    assert imbalance("W5_zero_expert_rank", 8) == pytest.approx(2, rel=0.03)


def test_w6_moves_on_every_three_steps() -> None:
    hottest = [
        int(rank_loads(make_counts("W6_rotating_hotspot", 4, seed=0, step=step)).argmax())
        for step in range(15)
    ]
    assert hottest == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 0, 0, 0]


def test_w7_bursts_in_every_fourth_step() -> None:
    seen = [imbalance("W7_burst", 8, step) for step in range(8)]
    # 1/2 + 1/2 x 1/4 of the selections on the first 2 of 8 ranks.
    assert [seen[3], seen[7]] == pytest.approx([2.5, 2.5], rel=0.02)
    assert max(seen[:3] + seen[4:7]) < 1.05


# --------------------------------------------------------------------------- wanted imbalance


@pytest.mark.parametrize("wanted", [0.2, 1, 4])
@pytest.mark.parametrize("ep_size", [1, 2, 8])
def test_maxvio_is_reached(wanted: float, ep_size: int) -> None:
    for step in range(5):
        counts = make_counts(f"maxvio_{wanted}", ep_size, seed=0, step=step)
        # The mean is 256 x ep_size selections, and the hottest expert is rounded to one.
        assert max_vio(counts) == pytest.approx(wanted, abs=0.004)


@pytest.mark.parametrize("wanted", [1.5, 2, 3])
def test_zipf_reaches_the_wanted_max_over_mean_of_ranks(wanted: float) -> None:
    hottest = set()
    for step in range(10):
        loads = rank_loads(make_counts(f"zipf_{wanted}", 8, seed=0, step=step))
        assert load_imbalance(loads) == pytest.approx(wanted, abs=0.001)
        hottest.add(int(loads.argmax()))
    assert len(hottest) > 3


def test_zipf_has_zipf_loads() -> None:
    counts = np.sort(make_counts("zipf_1.5", 8, seed=0, step=0).ravel())[::-1].astype(float)
    slope = np.diff(np.log(counts)) / np.diff(np.log(np.arange(1, 129)))
    assert slope[:20] == pytest.approx(slope[0], rel=0.05)


@pytest.mark.parametrize(
    ("name", "ep_size", "sizes", "message"),
    [
        ("maxvio_4", 2, {"num_experts": 8, "top_k": 2}, "8 experts at top_k=2 reach MaxVio 3 at"),
        ("zipf_3", 2, {}, "2 ranks reach max / mean 2.000 at most"),
        ("W5_zero_expert_rank", 2, {"num_experts": 8, "top_k": 6}, "top_k=6, expected at most"),
        ("W9", 2, {}, "workload 'W9', expected one of calibrated, W0_balanced"),
        ("W0_balanced", 3, {}, "ep_size=3, expected a divisor of num_experts=128"),
        ("W0_balanced", 0, {}, "ep_size=0, expected a divisor"),
        ("W0_balanced", 2, {"num_experts": 0}, "expected a divisor of num_experts=0"),
        ("W0_balanced", 2, {"num_experts": 4, "top_k": 5}, "top_k=5, expected 1 to num_experts=4"),
        ("W0_balanced", 2, {"top_k": 0}, "top_k=0, expected 1 to"),
        ("W0_balanced", 2, {"num_tokens": 0}, "num_tokens=0, expected 1 or more"),
        ("calibrated", 2, {"step": -1}, "step=-1, expected 0 or more"),
        ("calibrated", 2, {"seed": -1}, "seed=-1, expected 0 or more"),
        ("replay", 2, {}, "replay: trace=None, expected a trace"),
    ],
)
def test_what_cannot_be_is_named(
    name: str, ep_size: int, sizes: dict[str, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_counts(name, ep_size, **{"seed": 0, "step": 0, **sizes})


# ----------------------------------------------------------------------------------- of traces


@given(
    name=st.sampled_from(TRACED),
    ep_size=st.sampled_from([1, 2, 4, 8]),
    num_tokens=st.integers(1, 200),
    step=st.integers(0, 20),
    layer=st.integers(0, 1),
)
@settings(max_examples=100, deadline=None)
def test_traced_workloads_keep_the_totals(
    name: str, ep_size: int, num_tokens: int, step: int, layer: int
) -> None:
    by_source = make_by_source(
        name, ep_size, seed=0, step=step, layer=layer, num_tokens=num_tokens, trace=TRACE
    )
    assert by_source.shape == (ep_size, 8)
    assert (by_source.sum(axis=1) == 2 * num_tokens).all()
    assert 0 <= by_source.min() <= by_source.max() <= num_tokens


def test_replay_is_the_trace_scaled_and_starts_again() -> None:
    counts = make_counts("replay", 2, seed=0, step=0, num_tokens=100, trace=TRACE)
    assert counts.tolist() == [[200, 40, 40, 40], [20, 20, 20, 20]]
    for step in range(6):
        again = make_counts("replay", 2, seed=9, step=step, num_tokens=77, trace=TRACE)
        assert (again == TRACE.counts(2, step=step % 3, num_tokens=77)).all()


def test_a_domain_mix_is_made_of_domains() -> None:
    # Four sequences of a rank: shares of expert 0 are sums of four of 0.5, 0.05, 0, over four.
    rows = [
        make_by_source("domain_mix", 8, seed=0, step=step, num_tokens=10_000, trace=TRACE)
        for step in range(5)
    ]
    shares = np.concatenate(rows)[:, 0] / 20_000
    mixes = {(a * 0.5 + b * 0.05) / 4 for a in range(5) for b in range(5) if a + b <= 4}
    assert all(min(abs(share - mix) for mix in mixes) < 0.012 for share in shares)
    assert len({round(share, 1) for share in shares}) > 3


@pytest.mark.parametrize(
    ("name", "sizes", "message"),
    [
        ("W0_balanced", {}, "trace=three.json, expected no trace"),
        ("replay", {"num_experts": 128}, r"= \(128, 2\), expected \(8, 2\) of three.json"),
        ("replay", {"top_k": 4}, r"= \(8, 4\), expected \(8, 2\) of three.json; leave them out"),
        ("replay", {"layer": 2}, "layer=2, expected step 0 to 2 and layer 0 to 1"),
        ("domain_mix", {"layer": 2}, "layer=2, expected step 0 to 2 and layer 0 to 1"),
    ],
)
def test_a_trace_that_does_not_fit_is_named(name: str, sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_counts(name, 2, seed=0, step=0, trace=TRACE, **sizes)


# ------------------------------------------------------------------------------------- shares


def test_apportion_by_hand() -> None:
    assert apportion(np.array([1, 1, 1]), 4).tolist() == [2, 1, 1]
    assert apportion(np.array([5, 0, 3]), 8).tolist() == [5, 0, 3]


def test_capped_by_hand() -> None:
    assert capped(np.array([9, 1, 3]), 5).tolist() == [5, 4, 4]  # 4 over, room 4 and 2
    assert capped(np.array([5, 1, 3]), 5).tolist() == [5, 1, 3]


@given(st.lists(st.integers(0, 50), min_size=1, max_size=10), st.integers(1, 8))
def test_spread_gives_every_rank_the_same(totals: list[int], num_ranks: int) -> None:
    totals[0] += -sum(totals) % num_ranks
    parts = spread(np.array(totals), num_ranks)
    assert parts.sum(axis=0).tolist() == totals
    assert (parts.sum(axis=1) == sum(totals) // num_ranks).all()
    assert (np.ptp(parts, axis=0) <= 1).all()
