"""What a Balancer takes it gives back: threads, files, mappings, shared memory. And while it waits
it holds neither the GIL nor its peers.
"""

from __future__ import annotations

import functools
import gc
import threading
import time
from dataclasses import dataclass
from typing import Any

import pytest
import torch.distributed as dist
from balancer_cases import NUM_RANKS, PLAIN, Arm, build, loss_of, resources_in_use
from balancer_scenarios import attempt, call_and_check
from ranks import run_ranks

from feplb import SwiGLU

LATE_S = 0.5  # how much later one rank comes


@dataclass(frozen=True)
class Held:
    """What a rank holds at the points of one Balancer's life."""

    before: dict[str, Any]
    open: dict[str, Any]
    closed: dict[str, Any]
    closed_twice: dict[str, Any]
    second: str  # "same bits" where a second Balancer works
    at_end: dict[str, Any]


def live(rank: int, num_ranks: int) -> Held:
    build().close()  # what a process opens once and keeps (random numbers, say)
    gc.collect()
    before = resources_in_use(num_threads=0)
    balancer = build()
    arm = Arm(rank, num_ranks, PLAIN, balancer)
    loss_of(arm.run(arm.rows()[0], arm.weights())).backward()
    arm.check()
    held = resources_in_use()
    dist.barrier()
    balancer.close()
    closed = resources_in_use(num_threads=0)
    balancer.close()
    closed_twice = resources_in_use(num_threads=0)
    with build() as second:
        text = call_and_check(Arm(rank, num_ranks, PLAIN, second))
    return Held(before, held, closed, closed_twice, text, resources_in_use(num_threads=0))


@pytest.fixture(scope="module")
def held() -> list[Held]:
    return run_ranks(live, NUM_RANKS)


def test_open_balancer_has_three_threads_with_its_name(held: list[Held]) -> None:
    for rank, of_rank in enumerate(held):
        names = [f"feplb-{rank}-{name}" for name in ("copy", "mover", "watch")]
        assert of_rank.open["threads"] == names


def test_running_balancer_has_no_name_in_shared_memory(held: list[Held]) -> None:
    assert [of_rank.open["in /dev/shm"] for of_rank in held] == [[]] * NUM_RANKS


@pytest.mark.parametrize("kind", ["open files", "threads", "mappings", "in /dev/shm"])
def test_close_gives_everything_back(held: list[Held], kind: str) -> None:
    for of_rank in held:
        assert of_rank.closed[kind] == of_rank.before[kind]


def test_second_close_does_nothing(held: list[Held]) -> None:
    assert [of_rank.closed_twice for of_rank in held] == [of_rank.closed for of_rank in held]


def test_second_balancer_works_in_the_same_process(held: list[Held]) -> None:
    assert [of_rank.second for of_rank in held] == ["same bits"] * NUM_RANKS


def test_second_balancer_leaves_nothing_behind(held: list[Held]) -> None:
    assert [of_rank.at_end for of_rank in held] == [of_rank.before for of_rank in held]


# ------------------------------------------------------------------------------ without the peers


def close_alone(rank: int, num_ranks: int) -> tuple[float, float]:
    """Rank 0 closes while its peers are open, which close only after it has."""
    balancer = build()
    arm = Arm(rank, num_ranks, PLAIN, balancer)
    arm.run(arm.rows()[0], arm.weights())
    arm.check()
    if rank != 0:
        dist.barrier()
    start = time.monotonic()
    balancer.close()
    end = time.monotonic()
    if rank == 0:
        dist.barrier()
    return start, end


def test_close_needs_no_peer() -> None:
    times = run_ranks(close_alone, NUM_RANKS)
    rank_0_closed = times[0][1]
    assert all(start >= rank_0_closed for start, _ in times[1:])


def drop(rank: int, num_ranks: int) -> dict[str, Any]:
    """A Balancer that nobody closes, only forgets."""
    build().close()
    gc.collect()
    before = resources_in_use(num_threads=0)
    arm = Arm(rank, num_ranks, PLAIN, build())
    arm.run(arm.rows()[0], arm.weights())
    arm.check()
    dist.barrier()
    del arm
    gc.collect()
    after = resources_in_use(num_threads=0)
    return {kind: (before[kind], after[kind]) for kind in before if before[kind] != after[kind]}


def test_forgotten_balancer_gives_everything_back() -> None:
    assert run_ranks(drop, 2) == [{}, {}]


# --------------------------------------------------------------------------------------- threads


def count_while_waiting(rank: int, num_ranks: int) -> int:
    """Increments a Python thread makes while its rank waits for the last one to come."""
    balancer = build()
    arm = Arm(rank, num_ranks, PLAIN, balancer)
    rows, weights = arm.rows()[0], arm.weights()
    arm.run(rows, weights)  # first calls load code, which holds the GIL
    is_over = threading.Event()
    count = 0

    def increment() -> None:
        nonlocal count
        while not is_over.is_set():
            count += 1
            time.sleep(0.001)

    dist.barrier()
    if rank == num_ranks - 1:
        time.sleep(LATE_S)
        arm.run(rows, weights)
    else:
        thread = threading.Thread(target=increment)
        thread.start()
        arm.run(rows, weights)
        is_over.set()
        thread.join()
    balancer.close()
    return count


def test_python_threads_run_while_a_rank_waits_for_its_peers() -> None:
    # Sleeping a millisecond at a time, LATE_S allows 500; a held GIL allows one or two.
    counts = run_ranks(count_while_waiting, NUM_RANKS)
    assert min(counts[:-1]) > 50


class Waiting(SwiGLU):
    """Experts that wait in the middle of a call until they may go on."""

    def __init__(self) -> None:
        self.inside, self.go_on = threading.Event(), threading.Event()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.inside.set()
        assert self.go_on.wait(5)
        return super().forward(*args, **kwargs)


def close_during_a_call(rank: int, num_ranks: int) -> tuple[str, str]:
    """What close() says while another thread is inside a call, and how that call ends."""
    balancer = build(deadline_s=3)
    arm = Arm(rank, num_ranks, PLAIN, balancer)
    compute, ends = Waiting(), []
    rows, weights = arm.rows()[0], arm.weights()
    run = functools.partial(arm.run, rows, weights, compute=compute)
    thread = threading.Thread(target=lambda: ends.append(attempt(run)))
    thread.start()
    assert compute.inside.wait(5)
    dist.barrier()  # a rank that closes ends the call of one that is not inside yet
    said = attempt(balancer.close)
    compute.go_on.set()
    thread.join()
    balancer.close()
    return said, ends[0]


def test_close_during_a_call_of_another_thread_is_refused_or_ends_it() -> None:
    for said, end in run_ranks(close_during_a_call, 2):
        assert "another thread" in said or "closed" in end
