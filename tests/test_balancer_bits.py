"""Whole-expert greedy moves give the bits of ``none``: outputs and every gradient.

All cases run in one spawn of four ranks; each test looks at one of them.
"""

from __future__ import annotations

import functools
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
    grads,
    layer_spec,
    loss_of,
    uneven_counts,
)
from torch import Tensor

from feplb import as_compute

NUM_STEPS = 5
QUIET_NAN = 0x7FC12345  # with a payload, which a copy keeps


def record_step(bits: Bits, name: str, leaves: dict[str, Tensor | None]) -> None:
    """Keep the gradients of ``leaves`` and clear them."""
    for leaf_name, leaf in leaves.items():
        assert leaf is not None
        assert leaf.grad is not None, f"{name} {leaf_name} has no grad"
        bits[f"{name} grad of {leaf_name}"] = leaf.grad
        leaf.grad = None


def train(arm: Arm, prepared: bool, begun: bool, stacked: bool, num_steps: int = NUM_STEPS) -> Bits:
    """Every step runs all layers forward, then backward, then check()."""
    bits: Bits = {}
    weights = [arm.weights(layer, stacked=stacked) for layer in range(len(arm.specs))]
    for step in range(num_steps):
        loss = torch.zeros(())
        leaves: dict[str, Tensor | None] = {}
        for layer in range(len(arm.specs)):
            rows, row_data = arm.rows(layer, step)
            out = arm.run(
                rows, weights[layer],
                layer=layer, step=step, row_data=row_data, prepared=prepared, begun=begun,
            )  # fmt: skip
            bits[f"step {step} layer {layer} out"] = out.detach()
            loss = loss + loss_of(out)
            leaves |= {f"layer {layer} input {i}": t for i, t in enumerate([rows, *row_data])}
            leaves |= {f"layer {layer} weight {i}": w for i, w in enumerate(flat(weights[layer]))}
        loss.backward()
        record_step(bits, f"step {step}", leaves)
        arm.check()
    return bits


def accumulate(arm: Arm) -> Bits:
    """Weight grads of three micro-batches add up."""
    weights = arm.weights()
    for step in range(3):
        loss_of(arm.run(arm.rows(step=step)[0], weights, step=step)).backward()
    arm.check()
    return grads(weights=weights)


def keep_in_flight(arm: Arm, newest_first: bool) -> Bits:
    """All forwards of three micro-batches, then all backwards, in one order or the other."""
    weights = arm.weights()
    rows = [arm.rows(step=step)[0] for step in range(3)]
    losses = [loss_of(arm.run(x, weights, step=step)) for step, x in enumerate(rows)]
    for loss in reversed(losses) if newest_first else losses:
        loss.backward()
    arm.check()
    return grads(weights=weights, rows=rows)


def prepare_at_the_start(arm: Arm) -> Bits:
    """All layers' weights are prepared before the first layer runs: late grads wait longest.

    In this step ranks 0 and 1 help each other, so neither may wait for the other's late grads.
    """
    step = 1
    weights = [arm.weights(layer) for layer in range(2)]
    prepared: Any = weights
    if arm.balancer is not None:
        prepared = [arm.balancer.prepare_weights(weights[i], layer=i) for i in range(2)]
    rows, _ = arm.rows(step=step)
    hidden = rows
    for layer in range(2):
        more = arm.run(hidden, prepared[layer], layer=layer, step=step, prepared=False)
        hidden = hidden + more
    loss_of(hidden).backward()
    arm.check()
    leaves = {f"weight {i}": w for i, w in enumerate(flat(weights[0]) + flat(weights[1]))}
    bits: Bits = {"out": hidden.detach()}
    record_step(bits, "all", {"rows": rows, **leaves})
    return bits


def move_nan(arm: Arm) -> Bits:
    """Experts that copy their rows, some of which are NaN with a payload."""
    copy = as_compute(lambda rows, row_data, weights: rows.clone())
    rows, _ = arm.rows()
    rows = rows.detach()
    rows.view(torch.int32)[::3] = QUIET_NAN
    out = arm.run(rows.requires_grad_(), arm.weights(), compute=copy)
    out.backward(rows.detach())
    arm.check()
    assert rows.grad is not None
    return {"out": out.detach(), "grad of rows": rows.grad}


def return_nan_rows(arm: Arm) -> Bits:
    """What a program that copies NaN must return, with no experts at all."""
    rows = arm.rows()[0].detach()
    rows.view(torch.int32)[::3] = QUIET_NAN
    return {"out": rows, "grad of rows": rows}


def compute_nan(arm: Arm) -> Bits:
    """NaN in one row of every expert of rank 0."""
    weights = arm.weights()
    rows = arm.rows()[0].detach()
    if arm.rank == 0:
        rows[:: max(1, len(rows) // 4)] = float("nan")
    rows.requires_grad_()
    out = arm.run(rows, weights)
    bits: Bits = {"out": out.detach()}
    loss_of(out).backward()
    arm.check()
    record_step(bits, "", {"rows": rows, **{f"weight {i}": w for i, w in enumerate(weights)}})
    return bits


def steps(prepared: bool, begun: bool, stacked: bool) -> Any:
    return functools.partial(train, prepared=prepared, begun=begun, stacked=stacked)


CASES = {
    "prepared, begun, stacked": Case(steps(True, True, True), MIXED),
    "prepared, lists": Case(steps(True, False, False), MIXED),
    "begun, lists": Case(steps(False, True, False), MIXED),
    "neither, stacked": Case(steps(False, False, True), MIXED),
    "local": Case(steps(True, True, True), MIXED, expected_policy="local"),
    "none against local": Case(
        steps(True, True, True), MIXED, seen_policy="none", expected_policy="local"
    ),
    "same seed": Case(steps(True, True, True), MIXED, expected_policy="greedy"),
    "accumulate": Case(accumulate),
    "oldest first": Case(functools.partial(keep_in_flight, newest_first=False)),
    "newest first": Case(functools.partial(keep_in_flight, newest_first=True)),
    "prepared at the start": Case(prepare_at_the_start, (layer_spec(3),) * 2),
    "copied NaN": Case(move_nan, PLAIN, expected=return_nan_rows, expected_policy="local"),
    "computed NaN": Case(compute_nan),
}


@pytest.fixture(scope="module")
def bits(lane: str) -> Outcomes:
    return Outcomes(CASES)


def test_counts_hold_ranks_and_experts_without_tokens() -> None:
    steps = range(NUM_STEPS)
    by_rank = [[uneven_counts(r, NUM_RANKS, 5, s) for s in steps] for r in range(NUM_RANKS)]
    assert all([0] * 5 in of_rank for of_rank in by_rank)
    assert any(0 in counts and any(counts) for counts in by_rank[0])


def test_steps_have_the_bits_of_none_with_prepare_weights_and_begin(bits: Outcomes) -> None:
    bits.assert_same_bits("prepared, begun, stacked")


def test_steps_have_the_bits_of_none_with_lists_of_prepared_weights(bits: Outcomes) -> None:
    bits.assert_same_bits("prepared, lists")


def test_steps_have_the_bits_of_none_without_prepare_weights(bits: Outcomes) -> None:
    bits.assert_same_bits("begun, lists")


def test_steps_have_the_bits_of_none_without_prepare_weights_and_begin(bits: Outcomes) -> None:
    bits.assert_same_bits("neither, stacked")


def test_greedy_has_the_bits_of_experts_without_any_balancer(bits: Outcomes) -> None:
    bits.assert_same_bits("local")


def test_none_has_the_bits_of_experts_without_any_balancer(bits: Outcomes) -> None:
    bits.assert_same_bits("none against local", moved=False)


def test_same_seed_gives_the_same_bits_again(bits: Outcomes) -> None:
    bits.assert_same_bits("same seed")


def test_gradient_accumulation_has_the_bits_of_none(bits: Outcomes) -> None:
    bits.assert_same_bits("accumulate")


def test_micro_batches_in_flight_have_the_bits_of_none_when_the_oldest_returns_first(
    bits: Outcomes,
) -> None:
    bits.assert_same_bits("oldest first")


def test_micro_batches_in_flight_have_the_bits_of_none_when_the_newest_returns_first(
    bits: Outcomes,
) -> None:
    bits.assert_same_bits("newest first")


def test_weights_prepared_at_the_start_of_the_step_get_their_grads(bits: Outcomes) -> None:
    bits.assert_same_bits("prepared at the start")


def test_nan_travels_with_its_payload(bits: Outcomes) -> None:
    bits.assert_same_bits("copied NaN")


def test_nan_stays_in_the_rows_and_experts_it_belongs_to(bits: Outcomes) -> None:
    bits.assert_same_bits("computed NaN")
