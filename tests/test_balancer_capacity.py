"""What does not fit is not moved, and what moves has the right bits: capacity, empty micro-batches,
domains of one rank. Four ranks unless stated; expected values come from experts without a Balancer.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch
from balancer_cases import (
    NUM_RANKS,
    PLAIN,
    PROBS,
    Arm,
    Bits,
    Case,
    Outcomes,
    differences,
    grads,
    layer_spec,
    loss_of,
    run_arm,
)
from ranks import run_ranks

from feplb import Balancer, BalancerConfig, SwiGLU
from feplb.two_phase import run_experts_locally

NUM_STEPS = 3
SMALL_ROWS = 48  # room for one of the overloaded rank's experts of 24 to 55 rows


def train(arm: Arm, **limits: int) -> Bits:
    """A few steps; every plan must keep to ``limits``."""
    weights = arm.weights()
    bits: Bits = {}
    for step in range(NUM_STEPS):
        rows, row_data = arm.rows(step=step)
        out = arm.run(rows, weights, step=step, row_data=row_data)
        loss_of(out).backward()
        arm.check()
        bits |= {f"out of step {step}": out.detach(), **grads(**{f"rows of step {step}": rows})}
        if arm.balancer is not None:
            assert_within(arm, **limits)
    return bits | grads(weights=weights)


def assert_within(
    arm: Arm, max_rows: int = 1 << 30, slots: int = 1 << 30, grad_slots: int = 1 << 30,
    first_dynamic: int = 0, min_tokens: int = 1,
) -> None:  # fmt: skip
    record = arm.door.last_call(0)
    assert record is not None
    expert, owner, helper, start, end = record.moves.T
    num_rows = end - start
    for rank in range(arm.num_ranks):
        assert num_rows[helper == rank].sum() <= max_rows
        assert num_rows[owner == rank].sum() <= max_rows
        assert np.count_nonzero(helper == rank) <= slots
        assert np.count_nonzero(owner == rank) <= grad_slots
    assert (expert >= first_dynamic).all()
    assert (num_rows >= min_tokens).all()


def run_nothing(arm: Arm) -> Bits:
    """A micro-batch without tokens on any rank, between two that have some."""
    weights = arm.weights()
    spec = arm.specs[0]
    bits: Bits = {}
    for step, is_empty in enumerate((False, True, False)):
        rows, (probs,) = arm.rows(step=step)
        if not is_empty:
            out = arm.run(rows, weights, step=step, row_data=[probs])
        else:
            rows = torch.empty(0, spec.hidden, requires_grad=True)
            probs = torch.empty(0, requires_grad=True)
            counts = [0] * spec.num_local_experts
            if arm.balancer is None:
                out = run_experts_locally(rows, counts, weights, SwiGLU(), [probs])
            else:
                prepared = arm.balancer.prepare_weights(weights, layer=0)
                out = arm.balancer.run_experts(
                    rows, counts, prepared, SwiGLU(), layer=0, row_data=[probs]
                )
        loss_of(out).backward()
        bits |= {f"out {step}": out.detach(), **grads(**{f"rows {step}": rows})}
        bits |= grads(**{f"probs {step}": probs})
    arm.check()
    return bits | grads(weights=weights)


def limited(specs: Any = PLAIN, config: dict[str, Any] | None = None, **limits: Any) -> Case:
    return Case(
        functools.partial(train, **limits), specs, expected_policy="local", config=config or {}
    )


CASES = {
    "roomy": limited(),
    "rows": limited((layer_spec(max_rows=SMALL_ROWS),), max_rows=SMALL_ROWS),
    "no rows": limited((layer_spec(max_rows=0),), max_rows=0),
    "slots": limited(config={"num_slots": 1, "num_grad_slots": 8}, slots=1),
    "no slots": limited(config={"num_slots": 0}, slots=0),
    "grad slots": limited(config={"num_grad_slots": 1}, grad_slots=1),
    "no grad slots": limited(config={"num_grad_slots": 0}, grad_slots=0),
    "one dynamic": limited(config={"num_dynamic": 1}, first_dynamic=4),
    "none dynamic": limited(config={"num_dynamic": 0}, first_dynamic=5),
    "tokens": limited(config={"min_tokens": 40}, min_tokens=40),
    "empty": Case(run_nothing, (layer_spec(row_data=PROBS),), expected_policy="local"),
}


@pytest.fixture(scope="module")
def outcomes() -> Outcomes:
    return Outcomes(CASES)


def num_moves(outcomes: Outcomes, name: str) -> int:
    return outcomes.by_rank[0][name].num_moves


@pytest.mark.parametrize("name", ["rows", "slots", "grad slots", "one dynamic", "tokens"])
def test_small_capacity_moves_fewer_experts_with_the_same_bits(
    outcomes: Outcomes, name: str
) -> None:
    outcomes.assert_same_bits(name)
    assert num_moves(outcomes, name) < num_moves(outcomes, "roomy")


@pytest.mark.parametrize("name", ["no rows", "no slots", "no grad slots", "none dynamic"])
def test_without_capacity_nothing_moves(outcomes: Outcomes, name: str) -> None:
    outcomes.assert_same_bits(name, moved=False)


def test_micro_batch_without_any_token_runs(outcomes: Outcomes) -> None:
    outcomes.assert_same_bits("empty")


# --------------------------------------------------------------------------- domains of one rank


def train_alone(rank: int, num_ranks: int) -> list[str]:
    expected, _ = run_arm(rank, num_ranks, PLAIN, "local", train)
    seen, num_moves = run_arm(rank, num_ranks, PLAIN, "greedy", train)
    assert num_moves == 0
    return differences(seen, expected)


def test_one_rank_with_a_process_group_has_the_bits_of_its_experts() -> None:
    assert run_ranks(train_alone, 1) == [[]]


def test_one_rank_without_a_process_group_has_the_bits_of_its_experts() -> None:
    expected = train(Arm(0, 1, PLAIN, None))
    with Balancer(BalancerConfig(), layers=PLAIN) as balancer:
        assert differences(train(Arm(0, 1, PLAIN, balancer)), expected) == []


def test_one_rank_reserves_no_arena() -> None:
    with Balancer(BalancerConfig(), layers=PLAIN) as balancer:
        assert balancer.memory.arena_bytes == 0


def train_off(rank: int, num_ranks: int) -> list[str]:
    """FEPLB_OFF=1 turns greedy into none."""
    expected, _ = run_arm(rank, num_ranks, PLAIN, "local", train)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEPLB_OFF", "1")
        seen, num_moves = run_arm(rank, num_ranks, PLAIN, "greedy", train)
    assert num_moves == 0
    return differences(seen, expected)


def test_feplb_off_moves_nothing_and_changes_no_bit() -> None:
    assert run_ranks(train_off, NUM_RANKS) == [[]] * NUM_RANKS
