"""The policies beside greedy, in real processes: refine and auto by their bits, split by its sums.

Shared by owner and helpers, an expert's GEMMs have other shapes than alone, so split is compared
with ``none`` in fp64, and with itself bit by bit.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from balancer_cases import (
    MIXED,
    NUM_RANKS,
    PLAIN,
    Arm,
    Bits,
    Case,
    Outcomes,
    flat,
    layer_spec,
    loss_of,
    run_arm,
)
from ranks import run_ranks

FP64 = (layer_spec(dtype=torch.float64, max_rows=512),)
# So slow a GEMM that the cost model sees every copy paid for.
SLOW = {"gemm_gflops": 0.001}


def train(arm: Arm, num_steps: int = 4) -> Bits:
    """Forward, backward and check() of all layers; outputs and every gradient."""
    bits: Bits = {}
    weights = [arm.weights(layer, stacked=layer % 2 == 0) for layer in range(len(arm.specs))]
    for step in range(num_steps):
        loss = torch.zeros(())
        leaves: dict[str, Any] = {}
        for layer in range(len(arm.specs)):
            rows, row_data = arm.rows(layer, step)
            out = arm.run(
                rows, weights[layer], layer=layer, step=step, row_data=row_data,
                prepared=step % 2 == 0, begun=step % 3 == 0,
            )  # fmt: skip
            bits[f"step {step} layer {layer} out"] = out.detach()
            loss = loss + loss_of(out)
            leaves |= {f"layer {layer} input {i}": t for i, t in enumerate([rows, *row_data])}
            leaves |= {f"layer {layer} weight {i}": w for i, w in enumerate(flat(weights[layer]))}
        loss.backward()
        for name, leaf in leaves.items():
            bits[f"step {step} grad of {name}"], leaf.grad = leaf.grad, None
        arm.check()
    return bits


CASES = {
    "refine": Case(train, MIXED, seen_policy="refine"),
    "refine with a target": Case(
        train, MIXED, seen_policy="refine", config={"target_imbalance": 1.3}
    ),
    "refine of one copy": Case(train, PLAIN, seen_policy="refine", config={"copy_budget": 1}),
    "auto": Case(train, MIXED, seen_policy="auto", config={"split_experts": False, **SLOW}),
    "auto that sees no gain": Case(
        train, PLAIN, seen_policy="auto", config={"gemm_gflops": 1e9, "lane_gbps": 1e-3}
    ),
    "split again": Case(train, MIXED, seen_policy="split", expected_policy="split"),
}


@pytest.fixture(scope="module")
def bits() -> Outcomes:
    return Outcomes(CASES)


@pytest.mark.parametrize("name", [name for name in CASES if name != "auto that sees no gain"])
def test_bits(bits: Outcomes, name: str) -> None:
    bits.assert_same_bits(name)


def test_auto_that_sees_no_gain_moves_nothing(bits: Outcomes) -> None:
    bits.assert_same_bits("auto that sees no gain", moved=False)


# ----------------------------------------------------------------------------------------- split


def hot_counts(arm: Arm, step: int) -> list[int]:
    """One expert of rank `step` has more rows than a rank's share."""
    counts = [3] * arm.specs[0].num_local_experts
    if arm.rank == step % arm.num_ranks:
        counts[step] = 200
    return counts


def train_hot(arm: Arm, shares: set[tuple[int, int, int, bool]]) -> Bits:
    """As `train`; notes (owner, expert, its helpers, did the owner keep rows) of all moves."""
    arm.counts = lambda layer=0, step=0: hot_counts(arm, step)  # type: ignore[method-assign]
    bits: Bits = {}
    for step in range(4):
        weights = arm.weights()
        rows, _ = arm.rows(step=step)
        out = arm.run(rows, weights, step=step)
        record = arm.door.last_call(0)
        assert record is not None
        moves = record.moves.tolist()
        for expert, owner, _, start, _ in moves:
            helpers = sum(move[:2] == [expert, owner] for move in moves)
            shares.add((owner, expert, helpers, start > 0))
        loss_of(out).backward()
        arm.check()
        bits[f"step {step} out"] = out.detach()
        leaves = {"rows": rows, **{f"weight {i}": w for i, w in enumerate(flat(weights))}}
        for name, leaf in leaves.items():
            assert leaf.grad is not None
            bits[f"step {step} grad of {name}"] = leaf.grad
    return bits


def split_against_none(
    rank: int, num_ranks: int, policy: str
) -> tuple[float, set[tuple[int, int, int, bool]]]:
    """Largest difference of any tensor, of its largest element; and which experts were shared."""
    shares: set[tuple[int, int, int, bool]] = set()
    expected, _ = run_arm(rank, num_ranks, FP64, "none", lambda arm: train_hot(arm, set()))
    seen, _ = run_arm(
        rank, num_ranks, FP64, policy, lambda arm: train_hot(arm, shares), grain_rows=4, **SLOW
    )
    assert seen.keys() == expected.keys()
    worst = 0.0
    for name, want in expected.items():
        scale = float(want.abs().max()) or 1.0
        worst = max(worst, float((seen[name] - want).abs().max()) / scale)
    return worst, shares


@pytest.mark.parametrize("policy", ["split", "auto"])
def test_a_shared_expert_adds_up_to_the_whole_one(policy: str) -> None:
    found = run_ranks(split_against_none, NUM_RANKS, policy, timeout_s=60)
    for worst, shares in found:
        # Sums of 200 rows in another order: 200 roundings of 2^-53, with room for the loss's slope.
        assert worst < 1e-12
        assert shares == found[0][1]
        assert any(helpers > 1 and kept for _, _, helpers, kept in shares)
