"""Something fails on one rank: every rank hears of it, from whom, and where. All scenarios run in
one spawn of four ranks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from balancer_cases import NUM_RANKS, TWO_LAYERS, Arm, flat, loss_of
from balancer_scenarios import Reactions, Scenario
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from feplb import SwiGLU

BAD_RANK = 1
SHORT = {"deadline_s": 2.0}
LATE_S = 5.0  # a deadline of two seconds, and what a busy machine adds


class Failing(SwiGLU):
    """Experts that raise in one of the three functions."""

    def __init__(self, function: str) -> None:
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self._run("forward")
        return super().forward(*args, **kwargs)

    def backward_rows(self, *args: Any, **kwargs: Any) -> Any:
        self._run("backward_rows")
        return super().backward_rows(*args, **kwargs)

    def backward_weights(self, *args: Any, **kwargs: Any) -> Any:
        self._run("backward_weights")
        super().backward_weights(*args, **kwargs)

    def _run(self, function: str) -> None:
        if function == self.function:
            raise ZeroDivisionError("experts ran into a wall")


def forward(arm: Arm, *, layer: int = 0, **kwargs: Any) -> Tensor:
    return arm.run(arm.rows(layer)[0], arm.weights(layer), layer=layer, **kwargs)


def fail_in(arm: Arm, function: str) -> None:
    """Micro-batch 1 of layer 1 fails on one rank; the others get to check() if they can."""
    for layer in range(2):
        loss_of(forward(arm, layer=layer)).backward()
    compute = Failing(function) if arm.rank == BAD_RANK else SwiGLU()
    loss_of(forward(arm, layer=1, compute=compute)).backward()
    arm.check()


def fail_to_add(arm: Arm, prepared: bool) -> None:
    """As fail_in, but one rank's sinks cannot take what is added to them.

    Prepared: those of the rank's own rows still can; then a hook changes the sinks, before the late
    grads are added. The rank goes on as if nothing had been, so that peers meet it in every call.
    """
    for layer in range(2):
        loss_of(forward(arm, layer=layer)).backward()
    weights = arm.weights(1)
    sinks = [torch.zeros_like(leaf) for leaf in flat(weights)]
    of_ints = [torch.zeros_like(leaf, dtype=torch.int64) for leaf in flat(weights)]
    if prepared:
        weights = arm.door.prepare_weights(weights, layer=1)
    if arm.rank == BAD_RANK and prepared:
        weights[0].register_hook(lambda _: sinks.__setitem__(slice(None), of_ints))
    elif arm.rank == BAD_RANK:
        sinks = of_ints
    out = arm.run(arm.rows(1)[0], weights, layer=1, prepared=False, grad_sinks=sinks)
    errors: list[Exception] = []
    for work in (lambda: out, *(lambda: forward(arm, layer=1),) * 3):
        try:
            loss_of(work()).backward()
        except Exception as error:
            errors.append(error)
    if errors:
        raise errors[0]
    arm.check()


# ------------------------------------------------------------------------------------ waiting


def wait_for_an_absent_rank(arm: Arm, call: Callable[[Arm], object]) -> str:
    """One rank stays away until the others have given up."""
    loss_of(forward(arm)).backward()
    try:
        if arm.rank != BAD_RANK:
            call(arm)
    finally:
        dist.barrier()
    return forward_after_all(arm)


def forward_after_all(arm: Arm) -> str:
    """The rank that stayed away comes at last."""
    forward(arm)
    return "nothing raised"


def wait_for_a_closed_rank(arm: Arm) -> None:
    forward(arm)
    if arm.rank == BAD_RANK:
        arm.door.close()
    forward(arm)


def wait_for_a_backward(arm: Arm) -> str:
    loss = loss_of(forward(arm))
    return wait_for_an_absent_rank(arm, lambda _: loss.backward())


# -------------------------------------------------------------------------------- micro-batches


def spoil_a_count(arm: Arm) -> None:
    counts = arm.counts()
    if arm.rank == BAD_RANK:
        counts[0] = -1
    arm.door.run_experts(arm.rows()[0], counts, arm.weights(), SwiGLU(), layer=0)


def spoil_after(arm: Arm, before: Callable[[Arm], object]) -> None:
    before(arm)
    spoil_a_count(arm)


def run_two(arm: Arm) -> None:
    for _ in range(2):
        forward(arm)


def run_two_and_check(arm: Arm) -> None:
    run_two(arm)
    arm.check()


def run_eval_and_recompute(arm: Arm) -> None:
    """Three forwards: one for eval, one for training, one recomputed in its backward."""
    with torch.no_grad():
        forward(arm)
    rows, weights = arm.rows()[0], arm.weights()
    loss_of(checkpoint(arm.run, rows, weights, use_reentrant=False)).backward()


FUNCTIONS = ["forward", "backward_rows", "backward_weights"]
BEFORE = {
    "micro-batch 2": run_two,
    "micro-batch 0": run_two_and_check,
    "micro-batch 3": run_eval_and_recompute,
}
SCENARIOS = {
    "absent forward": Scenario(
        functools.partial(wait_for_an_absent_rank, call=forward), config=SHORT
    ),
    "absent check": Scenario(
        functools.partial(wait_for_an_absent_rank, call=Arm.check), config=SHORT
    ),
    "closed": Scenario(wait_for_a_closed_rank, config=SHORT),
}
SCENARIOS |= {
    f"{function} {policy}": Scenario(
        functools.partial(fail_in, function=function), TWO_LAYERS, {"policy": policy}
    )
    for function in FUNCTIONS
    for policy in ("greedy", "none")
}
SCENARIOS |= {
    f"sinks, {form}": Scenario(
        functools.partial(fail_to_add, prepared=form == "prepared"), TWO_LAYERS
    )
    for form in ("prepared", "raw")
}
SCENARIOS |= {
    name: Scenario(functools.partial(spoil_after, before=before)) for name, before in BEFORE.items()
}


@pytest.fixture(scope="module")
def reactions(lane: str) -> Reactions:
    return Reactions(SCENARIOS)


@pytest.mark.parametrize("policy", ["greedy", "none"])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_error_in_the_experts_of_one_rank_is_raised_on_every_rank(
    reactions: Reactions, function: str, policy: str
) -> None:
    # Under "none" nobody waits for anybody, so the others hear of it at check().
    kind = "forward" if function == "forward" else "backward"
    where = f"rank 1: the {kind} of layer 1, micro-batch 1 raised ZeroDivisionError: experts ran"
    patterns = [f"RuntimeError: .*{where}"] * NUM_RANKS
    patterns[BAD_RANK] = "ZeroDivisionError: experts ran into a wall"
    reactions.assert_closed(f"{function} {policy}", *patterns)
    assert max(reactions.seconds(f"{function} {policy}")) < LATE_S


@pytest.mark.parametrize("form", ["prepared", "raw"])
def test_grads_that_cannot_be_added_end_the_call_on_every_rank(
    reactions: Reactions, form: str
) -> None:
    why = "result type Float can't be cast to the desired output type Long"
    where = "rank 1: the backward of layer 1, micro-batch 1 raised RuntimeError: "
    patterns = [f"RuntimeError: .*{where}{why}"] * NUM_RANKS
    patterns[BAD_RANK] = f"RuntimeError: {why}"
    reactions.assert_closed(f"sinks, {form}", *patterns)
    assert max(reactions.seconds(f"sinks, {form}")) < LATE_S


def test_absent_rank_ends_the_call_at_the_deadline_and_is_named(reactions: Reactions) -> None:
    where = (
        r"while waiting for the counts of all ranks \(rank {}, layer 0, micro-batch 1, forward\): "
        r".*no answer from rank 1 \(last seen: backward of layer 0, micro-batch 0\) for 2 s"
    )
    patterns = [f"RuntimeError: .*{where.format(rank)}" for rank in range(NUM_RANKS)]
    patterns[BAD_RANK] = "RuntimeError: .*no answer from rank 1.*closed on every rank"
    reactions.assert_closed("absent forward", *patterns)


def test_deadline_is_kept(reactions: Reactions) -> None:
    waited = reactions.seconds("absent forward")
    assert all(2.0 <= seconds < LATE_S for seconds in waited)


def test_rank_absent_from_check_is_named(reactions: Reactions) -> None:
    where = r"\(rank \d, check\(\)\): .*no answer from rank 1 \(last seen: backward of layer 0"
    patterns = [f"RuntimeError: .*{where}"] * NUM_RANKS
    patterns[BAD_RANK] = "RuntimeError: .*no answer from rank 1.*closed on every rank"
    reactions.assert_closed("absent check", *patterns)


def test_rank_that_has_closed_is_named(reactions: Reactions) -> None:
    patterns = [r"RuntimeError: .*rank 1 \(last seen: .*has closed its Balancer\)"] * NUM_RANKS
    patterns[BAD_RANK] = "RuntimeError: .*rank 1.* the Balancer is closed"
    reactions.assert_closed("closed", *patterns)


def test_micro_batch_is_the_number_of_forwards_before_it(reactions: Reactions) -> None:
    reactions.assert_refused("micro-batch 2", BAD_RANK, r"\(rank 1, layer 0, micro-batch 2\)")


def test_micro_batches_count_anew_after_check(reactions: Reactions) -> None:
    reactions.assert_refused("micro-batch 0", BAD_RANK, r"\(rank 1, layer 0, micro-batch 0\)")


def test_eval_and_recompute_count_as_micro_batches(reactions: Reactions) -> None:
    reactions.assert_refused("micro-batch 3", BAD_RANK, r"\(rank 1, layer 0, micro-batch 3\)")
