"""Ranks that disagree, tickets that go astray, a second thread, calls after the end: each is told
by name on every rank, and nobody waits for the deadline. All scenarios run in one spawn of four
ranks.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from balancer_cases import NUM_RANKS, PROBS, TWO_LAYERS, Arm, layer_spec, loss_of
from balancer_scenarios import Reactions, Scenario, attempt
from torch import Tensor

from feplb import SwiGLU

ODD_RANK = 1
SOON_S = 5.0  # half the deadline
WITH_PROBS = (layer_spec(row_data=PROBS),)
STAYS_USABLE = ["same bits"] * NUM_RANKS


def forward(arm: Arm, *, layer: int = 0, **kwargs: Any) -> Tensor:
    rows, row_data = arm.rows(layer)
    return arm.run(rows, arm.weights(layer), layer=layer, row_data=row_data, **kwargs)


def run_expected_by(arm: Arm, ticket: Any, **changes: Any) -> Tensor:
    """run_experts of layer 0 with a ticket."""
    rows, _ = arm.rows()
    args: dict[str, Any] = {"rows": rows, "counts": arm.counts(), "weights": arm.weights()}
    args |= {"layer": 0, **changes}
    return arm.door.run_experts(**args, compute=SwiGLU(), ticket=ticket)


# ------------------------------------------------------------------------------- disagreement


def disagree_about_the_layer(arm: Arm) -> None:
    forward(arm, layer=int(arm.rank == ODD_RANK))


def disagree_about_check(arm: Arm) -> None:
    if arm.rank == ODD_RANK:
        arm.check()
    forward(arm)


def disagree_about_backward(arm: Arm) -> None:
    loss = loss_of(forward(arm))
    if arm.rank == ODD_RANK:
        loss.backward()
    forward(arm)


def disagree_about_the_micro_batch(arm: Arm) -> None:
    """Two micro-batches with the same counts, hence the same plan; one rank swaps them."""
    losses = [loss_of(forward(arm)) for _ in range(2)]
    if arm.rank == ODD_RANK:
        losses.reverse()
    for loss in losses:
        loss.backward()


def disagree_about_grad_mode(arm: Arm, begun: bool) -> None:
    with torch.set_grad_enabled(arm.rank != ODD_RANK):
        forward(arm, begun=begun)


def disagree_about_frozen_experts(arm: Arm) -> None:
    rows, _ = arm.rows()
    arm.run(rows, arm.weights(grad=arm.rank != ODD_RANK))


def disagree_about_side_data(arm: Arm) -> None:
    rows, (probs,) = arm.rows()
    arm.run(rows, arm.weights(), row_data=[probs.requires_grad_(arm.rank != ODD_RANK)])


def refuse_another_layer(arm: Arm) -> None:
    """The odd rank means layer 1, and is wrong about its counts too: refused before any order."""
    if arm.rank != ODD_RANK:
        forward(arm, layer=0)
    else:
        arm.door.run_experts(arm.rows()[0], [-1] * 5, arm.weights(), SwiGLU(), layer=1)


# ------------------------------------------------------------------------------------ tickets


def begin_twice(arm: Arm) -> str:
    ticket = arm.door.begin(arm.counts(), layer=0)
    text = attempt(lambda: arm.door.begin(arm.counts(), layer=0))
    run_expected_by(arm, ticket)
    return text


def use_a_ticket_twice(arm: Arm) -> None:
    ticket = arm.door.begin(arm.counts(), layer=0)
    run_expected_by(arm, ticket)
    run_expected_by(arm, ticket)


def use_a_ticket_twice_on_one_rank(arm: Arm) -> None:
    ticket = arm.door.begin(arm.counts(), layer=0)
    run_expected_by(arm, ticket)
    run_expected_by(arm, ticket if arm.rank == ODD_RANK else None)


def forget_the_ticket(arm: Arm) -> None:
    ticket = arm.door.begin(arm.counts(), layer=0)
    run_expected_by(arm, None if arm.rank == ODD_RANK else ticket)
    arm.check()


def hand_the_ticket_to_another_layer(arm: Arm) -> None:
    ticket = arm.door.begin(arm.counts(), layer=0)
    run_expected_by(arm, ticket, layer=int(arm.rank == ODD_RANK))
    arm.check()


def change_after_begin(arm: Arm, change: Callable[[Arm], dict[str, Any]]) -> None:
    ticket = arm.door.begin(arm.counts(), layer=0)
    run_expected_by(arm, ticket, **(change(arm) if arm.rank == ODD_RANK else {}))
    arm.check()


def other_counts(arm: Arm) -> dict[str, Any]:
    return {"counts": [1, 0, 0, 0, 0], "rows": torch.zeros(1, 32)}


def other_dtype(arm: Arm) -> dict[str, Any]:
    return {"rows": arm.rows()[0].double()}


def change_grad_mode_after_begin(arm: Arm) -> None:
    ticket = arm.door.begin(arm.counts(), layer=0)
    with torch.set_grad_enabled(arm.rank != ODD_RANK):
        run_expected_by(arm, ticket)
    arm.check()


# ------------------------------------------------------------------------ threads and the end


class Waiting(SwiGLU):
    """Experts that wait in the middle of a call until they may go on."""

    def __init__(self) -> None:
        self.inside, self.go_on = threading.Event(), threading.Event()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.inside.set()
        assert self.go_on.wait(SOON_S)
        return super().forward(*args, **kwargs)


def call_from_two_threads(arm: Arm, call: str) -> str:
    compute = Waiting()
    thread = threading.Thread(target=functools.partial(forward, arm, compute=compute))
    thread.start()
    assert compute.inside.wait(SOON_S)
    calls: dict[str, Callable[[], object]] = {
        "run_experts": functools.partial(forward, arm),
        "begin": functools.partial(arm.door.begin, arm.counts(), layer=0),
        "check": arm.check,
    }
    text = attempt(calls[call])
    compute.go_on.set()
    thread.join()
    return text


def call_after_close(arm: Arm, call: str) -> None:
    loss = loss_of(forward(arm))
    arm.door.close()
    arm.door.close()
    calls: dict[str, Callable[[], object]] = {
        "run_experts": functools.partial(forward, arm, prepared=False),
        "begin": functools.partial(arm.door.begin, arm.counts(), layer=0),
        "backward": loss.backward,
        "check": arm.check,
    }
    calls[call]()


THREAD_CALLS = ["run_experts", "begin", "check"]
CLOSED_CALLS = ["run_experts", "begin", "backward", "check"]
SCENARIOS = {
    "layer": Scenario(disagree_about_the_layer, TWO_LAYERS),
    "check": Scenario(disagree_about_check),
    "backward": Scenario(disagree_about_backward),
    "micro-batch": Scenario(disagree_about_the_micro_batch),
    "grad mode": Scenario(functools.partial(disagree_about_grad_mode, begun=False)),
    "begun grad mode": Scenario(functools.partial(disagree_about_grad_mode, begun=True)),
    "frozen": Scenario(disagree_about_frozen_experts),
    "side data": Scenario(disagree_about_side_data, WITH_PROBS),
    "refused elsewhere": Scenario(refuse_another_layer, TWO_LAYERS),
    "begin twice": Scenario(begin_twice),
    "stale ticket": Scenario(use_a_ticket_twice),
    "stale ticket, one rank": Scenario(use_a_ticket_twice_on_one_rank),
    "no ticket": Scenario(forget_the_ticket),
    "other layer's ticket": Scenario(hand_the_ticket_to_another_layer, TWO_LAYERS),
    "counts after begin": Scenario(functools.partial(change_after_begin, change=other_counts)),
    "dtype after begin": Scenario(functools.partial(change_after_begin, change=other_dtype)),
    "grad mode after begin": Scenario(change_grad_mode_after_begin),
}
SCENARIOS |= {
    f"thread {call}": Scenario(functools.partial(call_from_two_threads, call=call))
    for call in THREAD_CALLS
}
SCENARIOS |= {
    f"closed {call}": Scenario(functools.partial(call_after_close, call=call))
    for call in CLOSED_CALLS
}


@pytest.fixture(scope="module")
def reactions() -> Reactions:
    return Reactions(SCENARIOS)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "layer",
            "rank 0 began the forward of layer 0, micro-batch 0, rank 1 the forward of l.* 1",
        ),
        ("check", "rank 0 began the forward of layer 0, micro-batch 0, rank 1 the check()"),
        ("backward", "rank 0 began the forward of layer 0, .* 1, rank 1 the backward of layer 0"),
        ("micro-batch", "rank 0 began the backward of .*-batch 0, rank 1 the .*micro-batch 1"),
    ],
)
def test_ranks_in_different_order_are_both_named(
    reactions: Reactions, name: str, message: str
) -> None:
    reactions.assert_closed(name, f"RuntimeError: .*{message}")
    assert max(reactions.seconds(name)) < SOON_S


@pytest.mark.parametrize("name", ["grad mode", "begun grad mode"])
def test_ranks_in_different_grad_mode_are_both_named(reactions: Reactions, name: str) -> None:
    message = "rank 0 has grad mode on.*; rank 1 has grad mode off"
    reactions.assert_closed(name, f"RuntimeError: .*{message}")


def test_experts_frozen_on_some_ranks_are_named_on_both_sides(reactions: Reactions) -> None:
    seen = "rank 0 has grad mode on, rows need grad, weight 0 needs grad, weight 1 needs grad; "
    seen += r"rank 1 has grad mode on, rows need grad\."
    reactions.assert_closed("frozen", f"RuntimeError: .*{seen}")


def test_side_data_with_grads_on_some_ranks_is_named(reactions: Reactions) -> None:
    message = "rank 0 has .*row_data 0 needs grad.*; rank 1 has (?!.*row_data 0)"
    reactions.assert_closed("side data", f"RuntimeError: .*{message}")


def test_refusal_of_another_layer_leaves_ranks_in_the_same_order(reactions: Reactions) -> None:
    reactions.assert_refused("refused elsewhere", ODD_RANK, r"counts\[0\] is -1")


def test_second_begin_is_refused_and_the_first_runs(reactions: Reactions) -> None:
    for rank, text in enumerate(reactions.first("begin twice")):
        start = f"RuntimeError: begin of layer 0 (rank {rank}): the call begun for layer 0 has not"
        assert text.startswith(start)
    assert reactions.after("begin twice") == STAYS_USABLE


def test_ticket_serves_once(reactions: Reactions) -> None:
    for text in reactions.first("stale ticket"):
        assert "was given a ticket of layer 0, but the call begun is of no call" in text
    assert reactions.after("stale ticket") == STAYS_USABLE


def test_stale_ticket_on_one_rank_is_told_to_all(reactions: Reactions) -> None:
    name = "stale ticket, one rank"
    for text in reactions.first(name):
        assert "was given a ticket of layer 0, but the call begun is of no call" in text
    assert max(reactions.seconds(name)) < SOON_S


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no ticket", "given no ticket, but the call begun is of layer 0"),
        ("other layer's ticket", "given a ticket of layer 0, but the call begun is of layer 0"),
        ("counts after begin", "counts differ from those that begin.. published"),
        ("dtype after begin", "rows have dtype torch.float64, expected torch.float32"),
        ("grad mode after begin", "grad mode changed between begin.. and run_experts"),
    ],
)
def test_mistake_after_begin_ends_the_call_on_every_rank(
    reactions: Reactions, name: str, message: str
) -> None:
    reactions.assert_closed(name, f"(Runtime|Value)Error: .*{message}")
    assert max(reactions.seconds(name)) < SOON_S


@pytest.mark.parametrize("call", THREAD_CALLS)
def test_second_thread_is_refused_while_a_call_runs(reactions: Reactions, call: str) -> None:
    for rank, text in enumerate(reactions.first(f"thread {call}")):
        assert text == (
            f"RuntimeError: {call} (rank {rank}): another thread is inside a call of this "
            "Balancer. Nothing was sent. Make one call at a time, in the same order on every rank."
        )
    assert reactions.after(f"thread {call}") == STAYS_USABLE


@pytest.mark.parametrize("call", CLOSED_CALLS)
def test_call_after_close_says_closed(reactions: Reactions, call: str) -> None:
    reactions.assert_closed(f"closed {call}", rf"RuntimeError: {call} \(rank \d\): .* is closed")
