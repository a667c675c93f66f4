"""How ranks part from arenas that go by CUDA IPC: no exporter frees what a living peer maps.

Over the stand-in driver, which knows who has an allocation open, on both lanes that share them so.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import stand_in
import torch.distributed as dist
from balancer_cases import PLAIN, Arm, build, loss_of
from balancer_scenarios import attempt
from conftest import put
from ranks import run_ranks
from stand_in import StandIn

from feplb import Balancer

NUM_RANKS = 3
LATE_S = 0.05  # between the closes of two ranks


@pytest.fixture(scope="module", params=["ce", "cupy"], autouse=True)
def _machine(request: pytest.FixtureRequest) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        put(patch, stand_in.environment() | {"FEPLB_LANE": request.param})
        yield


@dataclass(frozen=True)
class Parting:
    """What a rank has seen: what it still holds, what it warned of, and its sins."""

    kept: dict[str, int]
    warnings: list[str]
    used_after_free: int
    said: str = ""


class Warnings(logging.Handler):
    """What feplb warns of."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def watched(work: Callable[[], object]) -> Parting:
    """What this rank holds after ``work`` and did not before."""
    heard, driver = Warnings(), StandIn()
    logging.getLogger("feplb").addHandler(heard)
    before = driver.alive()
    said = attempt(work)
    after = driver.alive()
    kept = {kind: count - before.get(kind, 0) for kind, count in after.items()}
    kept = {kind: count for kind, count in kept.items() if count}
    return Parting(kept, heard.texts, driver.used_after_free(), said)


def used(**config: Any) -> Balancer:
    """A Balancer that has moved rows both ways."""
    balancer = build(arena_handle="ipc", **config)
    arm = Arm(balancer.rank, balancer.num_ranks, PLAIN, balancer)
    loss_of(arm.run(arm.rows()[0], arm.weights())).backward()
    arm.check()
    return balancer


# -------------------------------------------------------------------------------------- programs


def one_after_the_other(rank: int, num_ranks: int) -> Parting:
    def work() -> None:
        balancer = used()
        time.sleep(rank * LATE_S)
        balancer.close()
        balancer.close()

    return watched(work)


def one_much_later(rank: int, num_ranks: int) -> Parting:
    """The last rank goes on while the others close."""

    def work() -> None:
        balancer = used(deadline_s=0.5)
        if rank < num_ranks - 1:
            balancer.close()
        dist.barrier()
        balancer.close()

    return watched(work)


def one_killed(rank: int, num_ranks: int) -> Parting:
    def work() -> None:
        balancer = used()
        dist.barrier()
        if rank == num_ranks - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        balancer.close()

    return watched(work)


def after_a_failure(rank: int, num_ranks: int) -> Parting:
    def work() -> None:
        balancer = used()
        if rank == 0:
            balancer.domain.core.fail("told to")
        try:
            balancer.check()
        finally:
            balancer.close()

    return watched(work)


def start_up_failed(rank: int, num_ranks: int) -> Parting:
    """One rank has the peers' arenas, but cannot pin the board."""

    def work() -> None:
        driver = StandIn()
        if rank == 0:
            driver.fail_once("cuMemHostRegister", 304)
        try:
            build(arena_handle="ipc")
        finally:
            dist.barrier()

    return watched(work)


# ----------------------------------------------------------------------------------------- tests


def test_ranks_that_close_one_after_the_other_free_everything() -> None:
    for parting in run_ranks(one_after_the_other, NUM_RANKS):
        assert parting == Parting({}, [], 0, "None")


def test_what_a_peer_still_maps_is_kept_and_said() -> None:
    *early, late = run_ranks(one_much_later, NUM_RANKS)
    assert late == Parting({}, [], 0, "None")
    for rank, parting in enumerate(early):
        assert parting.kept["allocation"] == 1
        assert parting.used_after_free == 0
        (text,) = parting.warnings
        assert f"close (rank {rank}): rank {NUM_RANKS - 1} still maps this rank's arena" in text
        assert "until the process ends" in text
        assert parting.said == "None"


def test_nobody_waits_for_a_killed_peer() -> None:
    *survivors, _ = run_ranks(one_killed, NUM_RANKS, may_die=[NUM_RANKS - 1])
    for parting in survivors:
        assert parting == Parting({}, [], 0, "None")


def test_everything_is_freed_after_a_failure() -> None:
    for parting in run_ranks(after_a_failure, NUM_RANKS):
        assert (parting.kept, parting.warnings, parting.used_after_free) == ({}, [], 0)
        assert "told to" in parting.said


def test_nothing_is_kept_when_a_rank_could_not_be_built() -> None:
    for parting in run_ranks(start_up_failed, NUM_RANKS):
        assert (parting.kept, parting.warnings) == ({}, [])
        assert "ulimit -l" in parting.said
