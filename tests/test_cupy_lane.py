"""The cupy lane without a GPU: the whole Balancer over CuPy's and cuda-python's calls, which go to
the stand-in driver. Ranks are processes, tensors the host's.

Bits with every way of copying and of writing flags; threads; a driver that fails in a call; a
killed peer while Python holds its lock; a forked child. test_cupy_startup.py has what fails before.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cupy_stand_in
import pytest
import test_balancer_autograd
import test_balancer_bits
import test_balancer_failures
import test_balancer_fork
import test_balancer_weight_grads
import torch.distributed as dist
from balancer_cases import (
    NUM_RANKS,
    TWO_LAYERS,
    Arm,
    Bits,
    Case,
    Outcomes,
    build,
    grads,
    loss_of,
    threads_of_feplb,
)
from balancer_scenarios import Reactions, Scenario
from ranks import run_ranks
from stand_in import StandIn
from test_host_kills import HELPER, NOTICE_S, OWNER, Fall, check_survivors, rank_program

from feplb.domain_calls import DomainCalls

BAD_RANK = 1
SICK = 700  # what a driver says for ever after an illegal address


@pytest.fixture(scope="module", autouse=True)
def _machine(cupy_machine: None) -> None:
    """For all of this file."""


# -------------------------------------------------------------------------------------------- bits

COPIES = {
    "batch": "cuMemcpyBatchAsync", "plain": "cuMemcpyAsync", "peer": "cuMemcpyPeerAsync"
}  # fmt: skip
FLAGS = {"memops": "cuStreamBatchMemOp", "write": "cuStreamWriteValue32", "copy": "cuMemcpyAsync"}
WAYS = list(itertools.product(COPIES, FLAGS))


def train(arm: Arm, used: tuple[str, ...] = ()) -> Bits:
    """Two micro-batches through two layers; ``used``: what the driver is asked for meanwhile."""
    driver = StandIn()
    before = {symbol: driver.calls(symbol) for symbol in {*COPIES.values(), *FLAGS.values()}}
    bits: Bits = {}
    for step in range(2):
        weights = [arm.weights(layer) for layer in range(2)]
        rows, _ = arm.rows(step=step)
        hidden = rows
        for layer in range(2):
            hidden = hidden + arm.run(hidden, weights[layer], layer=layer, step=step)
        loss_of(hidden).backward()
        bits[f"step {step} out"] = hidden.detach()
        leaves = grads(rows=rows, first=weights[0], second=weights[1])
        bits |= {f"step {step} {name}": leaf for name, leaf in leaves.items()}
    arm.check()
    if used:
        called = {symbol for symbol, count in before.items() if driver.calls(symbol) > count}
        assert called == set(used) or (arm.rank != 0 and called < set(used)), (called, used)
    return bits


def way(copies: str, flags: str) -> Case:
    used = {COPIES[copies], FLAGS[flags]} | ({FLAGS["write"]} if flags == "copy" else set())
    program = functools.partial(train, used=tuple(used))
    config = {"copy_call": copies, "flag_call": flags}
    return Case(program, TWO_LAYERS, expected=train, expected_policy="local", config=config)


# What the files of the host lane show, in part.
BORROWED = {
    "mixed layers, in lists": test_balancer_bits.CASES["prepared, lists"],
    "newest first": test_balancer_bits.CASES["newest first"],
    "checkpoint": test_balancer_autograd.CASES["non-reentrant"],
    "backward in a thread": test_balancer_autograd.CASES["backward in a thread"],
    "grad sinks": test_balancer_weight_grads.CASES["fp32 sinks"],
}
CASES = BORROWED | {f"{copies}, {flags}": way(copies, flags) for copies, flags in WAYS}


@pytest.fixture(scope="module")
def outcomes() -> Outcomes:
    return Outcomes(CASES)


@pytest.mark.parametrize("name", CASES)
def test_bits_are_those_of_none(outcomes: Outcomes, name: str) -> None:
    outcomes.assert_same_bits(name)


# ----------------------------------------------------------------------------------------- threads


class Submission(ctypes.Structure):
    """As tests/driver/ledger.h writes it down."""

    _fields_ = (
        ("end_ns", ctypes.c_int64),
        ("thread", ctypes.c_int64),
        ("symbol", ctypes.c_char * 32),
    )


class WatchedCore:
    """The core, which notes how many batches the driver has when rows were posted."""

    def __init__(self, core: Any) -> None:
        self._core = core
        self.batches: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._core, name)

    def post_rows(self, *args: Any) -> None:
        before = StandIn().calls("cuMemcpyBatchAsync")
        self._core.post_rows(*args)
        self.batches.append(StandIn().calls("cuMemcpyBatchAsync") - before)


def look_at_threads(rank: int, num_ranks: int) -> dict[str, Any]:
    """Threads of feplb; those that submitted to the driver, and how often; batches per post."""
    log = (Submission * 4096)()
    driver = StandIn().functions
    with build(TWO_LAYERS) as balancer:
        balancer.domain.core = core = WatchedCore(balancer.domain.core)
        train(Arm(rank, num_ranks, TWO_LAYERS, balancer))
        names = threads_of_feplb(None)
        driver.stand_in_take_log.restype = ctypes.c_int64
        count = driver.stand_in_take_log(log, ctypes.c_int64(len(log)))
    threads = {submission.thread for submission in log[:count]}
    return {"names": names, "threads": len(threads), "calls": count, "batches": core.batches}


@pytest.fixture(scope="module")
def threads() -> list[dict[str, Any]]:
    return run_ranks(look_at_threads, 2)


def test_only_the_watchdog_has_a_thread_and_the_caller_submits(
    threads: list[dict[str, Any]],
) -> None:
    for rank, found in enumerate(threads):
        assert found["names"] == [f"feplb-{rank}-watch"]
        assert (found["threads"], found["calls"] > 100) == (1, True)


def test_rows_and_weights_are_with_the_driver_when_they_have_been_posted(
    threads: list[dict[str, Any]],
) -> None:
    assert threads[0]["batches"][0] == 1  # both in one; nothing has to be released yet


# ---------------------------------------------------------------------------- failures in a call


def sick(arm: Arm, symbol: str) -> None:
    """On one rank every further call of ``symbol`` fails."""
    train(arm)
    driver = StandIn()
    try:
        if arm.rank == BAD_RANK:
            driver.fail(symbol, SICK)
        train(arm)
    finally:
        dist.barrier()  # nobody is well again while a peer is still in the call
        driver.fail(symbol, 0)


SICKNESS = {
    "cuMemcpyBatchAsync": r"submitting a batch of \d+ copies failed: .*\(700\)",
    "cuStreamBatchMemOp": r"enqueueing flags failed: .*\(700\)",
    "cuStreamWaitEvent": "waiting for an event failed: CUDA_ERROR_ILLEGAL_ADDRESS",
    "cuEventRecord": "recording an event failed: CUDA_ERROR_ILLEGAL_ADDRESS",
    "cuStreamWaitValue32": r"enqueueing the wait for a flag failed: .*\(700\)",
}
SCENARIOS = {
    symbol: Scenario(functools.partial(sick, symbol=symbol), TWO_LAYERS) for symbol in SICKNESS
}
SCENARIOS |= {
    name: test_balancer_failures.SCENARIOS[name]
    for name in ("absent forward", "backward_rows greedy", "micro-batch 3")
}


@pytest.fixture(scope="module")
def reactions() -> Reactions:
    return Reactions(SCENARIOS)


@pytest.mark.parametrize("symbol", SICKNESS)
def test_a_driver_that_fails_in_a_call_is_told_on_every_rank(
    reactions: Reactions, symbol: str
) -> None:
    reactions.assert_closed(symbol, f"RuntimeError: .*{SICKNESS[symbol]}")


def test_an_absent_rank_is_named_at_the_deadline(reactions: Reactions) -> None:
    reactions.assert_closed("absent forward", "RuntimeError: .*no answer from rank 1")


def test_an_error_of_one_rank_is_raised_on_every_rank(reactions: Reactions) -> None:
    patterns = ["RuntimeError: .*rank 1: the backward of layer 1.*raised ZeroDiv"] * NUM_RANKS
    patterns[BAD_RANK] = "ZeroDivisionError: "
    reactions.assert_closed("backward_rows greedy", *patterns)


def test_a_refused_call_leaves_the_balancer_usable(reactions: Reactions) -> None:
    reactions.assert_refused("micro-batch 3", BAD_RANK, r"\(rank 1, layer 0, micro-batch 3\)")


def wait_with_the_lock(rank: int, num_ranks: int, fall: Fall, stamp: str) -> dict[str, Any]:
    """A wait that runs at once keeps Python's lock, until the flag is there or lifted."""
    cupy_stand_in.install(holds_gil=True)
    return rank_program(rank, num_ranks, fall, stamp, {})


def wait_in_a_stream(rank: int, num_ranks: int, fall: Fall, stamp: str) -> dict[str, Any]:
    """Waits lie in a compute stream of the driver; what the host computes meanwhile is noise."""
    runtime, stream = cupy_stand_in.packages().runtime, 0

    def bind(calls: DomainCalls) -> None:
        nonlocal stream
        stream = stream or runtime.streamCreateWithFlags(runtime.streamNonBlocking)
        calls.core.bind_compute(stream)

    DomainCalls._bind_stream = bind  # type: ignore[method-assign]
    return rank_program(rank, num_ranks, fall, stamp, {})


@pytest.mark.parametrize("program", [wait_with_the_lock, wait_in_a_stream])
def test_the_watchdog_lifts_waits_for_a_killed_rank(
    tmp_path: Path, program: Callable[..., dict[str, Any]]
) -> None:
    fall = Fall(OWNER, "forward", "wait_plan", "after")  # its helpers wait for its rows
    stamp = tmp_path / "fell_at"
    results = run_ranks(program, NUM_RANKS, fall, str(stamp), may_die=[OWNER])
    survivors = [result for result in results if result is not None]
    check_survivors(fall, survivors)
    if program is wait_with_the_lock:
        assert "while waiting for rows and weights" in survivors[HELPER - 1]["error"]
    fell = float(stamp.read_text())
    assert max(survivor["raised"] for survivor in survivors) - fell < NOTICE_S


# -------------------------------------------------------------------------------------------- fork


def test_a_forked_child_is_refused_and_changes_nothing() -> None:
    for of_rank in run_ranks(test_balancer_fork.fork_in_rank, 2):
        refused = of_rank.texts.keys() - {"close", "forget"}
        assert len(refused) == 6
        for call in refused:
            assert "process forked after its Balancer was built" in of_rank.texts[call], call
        assert (of_rank.texts["close"], of_rank.texts["forget"]) == ("closed", "memory intact")
        assert of_rank.after == of_rank.before
        assert of_rank.differences == []
