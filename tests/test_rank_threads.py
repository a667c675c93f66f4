"""Ranks as threads of one process: the bits and the errors of ranks that are processes.

Over the stand-in driver, and on a GPU (rank_threads.py says what a process of several ranks needs
there). Everything of one number of ranks happens in one process.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from balancer_cases import (
    MIXED,
    PLAIN,
    Arm,
    Case,
    Outcome,
    Outcomes,
    build,
    device,
    experts,
    loss_of,
    resources_in_use,
    run_case,
    warm_up,
)
from balancer_scenarios import attempt, call_and_check
from conftest import GPU, enter
from gpu_programs import split_rows
from rank_threads import ENVIRONMENT, ThreadPeers, run_rank_threads
from ranks import on_gpu, run_ranks
from test_balancer_bits import keep_in_flight, train

steps = functools.partial(train, prepared=True, begun=True, stacked=True, num_steps=3)
SPLIT = functools.partial(split_rows, with_weights=False)
SPLIT_ALL = functools.partial(split_rows, with_weights=True)
CASES = {
    "greedy": Case(steps, MIXED),
    "refine": Case(steps, PLAIN, seen_policy="refine"),
    "weight grads in the layer": Case(
        functools.partial(train, prepared=False, begun=False, stacked=False, num_steps=2)
    ),
    "in flight": Case(functools.partial(keep_in_flight, newest_first=False)),
    "peer copies": Case(
        steps, PLAIN, config={"copy_call": "peer", "flag_call": "write", "arena_handle": "vmm"}
    ),
    "split rows": Case(SPLIT, seen_policy="split"),
    "split again": Case(SPLIT_ALL, seen_policy="split", expected_policy="split"),
}


class Faulty(Exception):  # noqa: N818 - what a test raises
    """An error of one rank's experts."""


@dataclass(frozen=True)
class Found:
    """What the ranks of one process found: by rank, by name."""

    outcomes: list[dict[str, Outcome]]
    refusals: list[str]  # of handles that one process cannot open
    after_refusal: list[str]
    errors: list[str]  # where rank 1's experts raise
    left_over: dict[str, tuple[Any, Any]]


def cases_of_a_rank(peers: ThreadPeers, cases: Mapping[str, Case]) -> dict[str, Outcome]:
    outcomes = {}
    for name, case in cases.items():
        outcomes[name] = run_case(peers.rank, peers.num_ranks, case, group=peers)
        peers.gather(None)
    return outcomes


def open_handles(peers: ThreadPeers) -> tuple[str, str]:
    """What a Balancer with handles of CUDA IPC says, and how the next one does."""
    refusal = attempt(lambda: build(group=peers, arena_handle="ipc").close())
    with build(group=peers) as balancer:
        after = call_and_check(Arm(peers.rank, peers.num_ranks, PLAIN, balancer))
        peers.gather(None)
    return refusal, after


def raise_in_experts(peers: ThreadPeers) -> str:
    """Rank 1's experts raise in backward; what each rank's backward says."""

    class Breaking(type(experts())):  # type: ignore[misc]
        def backward_rows(self, *_: Any, **__: Any) -> Any:
            raise Faulty("out of luck")

    compute = Breaking() if peers.rank == 1 else experts()
    with build(group=peers, deadline_s=10) as balancer:
        arm = Arm(peers.rank, peers.num_ranks, PLAIN, balancer)
        loss = loss_of(arm.run(arm.rows()[0], arm.weights(), compute=compute))

        def backward_and_check() -> None:
            loss.backward()
            arm.check()

        said = attempt(backward_and_check)
        peers.gather(None)
    return said


def find(rank: int, num_ranks: int, num_threads: int) -> Found:
    """The one process. Kernels are compiled and loaded before any device wait is queued."""
    del rank, num_ranks
    if on_gpu():
        torch.zeros(1, device=device())
        for spec in {spec for case in CASES.values() for spec in case.specs}:
            warm_up(spec)
    handles = run_rank_threads(open_handles, num_threads)
    outcomes = run_rank_threads(cases_of_a_rank, num_threads, CASES)
    errors = run_rank_threads(raise_in_experts, num_threads)
    before = resources_in_use(num_threads=0)  # all that a driver opens once is open
    run_rank_threads(open_handles, num_threads)
    run_rank_threads(cases_of_a_rank, num_threads, {"peer copies": CASES["peer copies"]})
    run_rank_threads(raise_in_experts, num_threads)
    after = resources_in_use(num_threads=0)
    return Found(
        outcomes=outcomes,
        refusals=[refusal for refusal, _ in handles],
        after_refusal=[text for _, text in handles],
        errors=errors,
        left_over={name: (before[name], after[name]) for name in before},
    )


@pytest.fixture(scope="module", params=["ce", GPU])
def lane_name(request: pytest.FixtureRequest) -> Iterator[str]:
    """The variables of one process with several ranks."""
    with pytest.MonkeyPatch.context() as patch:
        enter(patch, request.param)
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        yield request.param


@pytest.fixture(scope="module", params=[2, 4])
def found(request: pytest.FixtureRequest, lane_name: str) -> Found:
    return run_ranks(find, 1, request.param, timeout_s=120)[0]


@pytest.mark.parametrize("name", CASES)
def test_bits(found: Found, name: str) -> None:
    Outcomes(CASES, by_rank=found.outcomes).assert_same_bits(name)


def test_handles_that_one_process_cannot_open_are_refused(found: Found) -> None:
    for text in found.refusals:
        assert text.startswith("ValueError: ranks 0 and 1 are threads of one process ")
        assert "arena_handle='vmm'" in text
    assert found.after_refusal == ["same bits"] * len(found.refusals)


def test_an_error_of_one_rank_is_named_on_all(found: Found) -> None:
    assert found.errors[1] == "Faulty: out of luck"
    for text in found.errors[:1] + found.errors[2:]:
        assert text.startswith("RuntimeError: "), text
        assert "rank 1" in text, text
        assert "out of luck" in text, text


def test_nothing_is_left(found: Found) -> None:
    assert {name: after for name, (_, after) in found.left_over.items()} == {
        name: before for name, (before, _) in found.left_over.items()
    }
