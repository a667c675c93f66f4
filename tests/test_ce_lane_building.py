"""What fails while a Balancer is built over the ce lane: said on every rank, and nothing left.

Every call of the driver fails once, at its first and at its last use; and descriptors that do not
get through. The driver is the stand-in, tensors are the host's, ranks are processes.
"""

from __future__ import annotations

import gc
import os
import re
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch.distributed as dist
from balancer_cases import PLAIN, Arm, build, resources_in_use
from balancer_scenarios import attempt, call_and_check
from ranks import run_ranks
from stand_in import StandIn
from test_cuda_abi import functions

from feplb import lanes

pytestmark = pytest.mark.usefixtures("stand_in_machine")

BAD_RANK = 1
SICK = 700  # after an illegal address
WAYS = ("vmm", "ipc")
# What only gives something back: nobody can do anything about it.
GIVING_BACK = {
    "cuDevicePrimaryCtxRelease", "cuCtxPopCurrent", "cuStreamDestroy", "cuEventDestroy",
    "cuStreamSynchronize", "cuMemFree", "cuIpcCloseMemHandle", "cuMemHostUnregister",
    "cuMemRelease", "cuMemAddressFree", "cuMemUnmap",
}  # fmt: skip
SYMBOLS = sorted({symbol for _, symbol, _ in functions()} - {"cuGetErrorName", "cuGetErrorString"})
# What the driver does not say of a GPU is what the GPU does not have.
TOLERATED = {*GIVING_BACK, "cuDeviceGetAttribute"}
TAKING = [symbol for symbol in SYMBOLS if symbol not in GIVING_BACK]
# Not among those of a start: asked once per process or thread; the other ways to copy and to write
# flags; what a call needs, and another current context.
NOT_USED = {
    "cuInit", "cuDriverGetVersion", "cuCtxSetCurrent", "cuDeviceCanAccessPeer",
    "cuCtxEnablePeerAccess", "cuCtxPushCurrent", "cuCtxPopCurrent", "cuStreamIsCapturing",
    "cuStreamWriteValue32", "cuMemcpyPeerAsync", "cuMemcpyAsync", "cuStreamWaitEvent",
    "cuEventRecord",
}  # fmt: skip


@dataclass(frozen=True)
class Ending:
    """How building a Balancer ended on one rank; ``changed``: what it holds that it did not."""

    said: str
    changed: dict[str, tuple[Any, Any]]


@dataclass
class Found:
    """On one rank: (symbol, way) -> its endings; and whether the next Balancer works."""

    endings: dict[tuple[str, str], list[Ending]] = field(default_factory=dict)
    next_one: str = ""


def held(driver: StandIn) -> dict[str, Any]:
    """All that this process and its driver hold."""
    tasks = {"tasks": len(os.listdir("/proc/self/task"))}
    return {**resources_in_use(num_threads=0), **tasks, **driver.alive()}


def changes(before: dict[str, Any], driver: StandIn) -> dict[str, tuple[Any, Any]]:
    now = held(driver)
    if now != before:
        gc.collect()
        now = held(driver)
    kinds = {*before, *now}
    return {k: (before.get(k), now.get(k)) for k in kinds if before.get(k) != now.get(k)}


def uses_of(driver: StandIn, way: str) -> dict[str, int]:
    """How often each function is called while the bad rank builds a Balancer and closes it."""
    before = {symbol: driver.calls(symbol) for symbol in SYMBOLS}
    build(arena_handle=way).close()
    uses: Any = {symbol: driver.calls(symbol) - before[symbol] for symbol in SYMBOLS}
    of_ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(of_ranks, uses)
    of_bad_rank: dict[str, int] = of_ranks[BAD_RANK]
    return of_bad_rank


def build_and_fail(rank: int, driver: StandIn, symbol: str, way: str, after: int) -> Ending:
    before = held(driver)
    if rank == BAD_RANK:
        driver.fail_once(symbol, SICK, after)
    said = attempt(lambda: build(arena_handle=way).close())
    driver.fail(symbol, 0)
    return Ending(said, changes(before, driver))


def fail_everywhere(rank: int, num_ranks: int) -> Found:
    driver, found = StandIn(), Found()
    build().close()  # what a process opens once and keeps
    gc.collect()
    uses = {way: uses_of(driver, way) for way in WAYS}

    def fail(symbol: str, way: str) -> None:
        count = uses[way][symbol]
        if count == 0 or (way == "ipc" and count == uses["vmm"][symbol]):
            return
        # Without its context a Balancer that closes can give nothing back.
        uses_tried = {0} if symbol == "cuCtxGetCurrent" else {0, count - 1}
        endings = [build_and_fail(rank, driver, symbol, way, at) for at in sorted(uses_tried)]
        found.endings[symbol, way] = endings

    for symbol in TAKING:
        for way in WAYS:
            fail(symbol, way)
    with build() as balancer:
        found.next_one = call_and_check(Arm(rank, num_ranks, PLAIN, balancer))
    for symbol in sorted(GIVING_BACK - {"cuMemHostUnregister"}):
        for way in WAYS:
            fail(symbol, way)
    # What stays pinned is in the way of the next board.
    ending = build_and_fail(rank, driver, "cuMemHostUnregister", "vmm", 0)
    found.endings["cuMemHostUnregister", "vmm"] = [ending]
    return found


@pytest.fixture(scope="module")
def failed(stand_in_machine: None) -> list[Found]:
    return run_ranks(fail_everywhere, 2, timeout_s=240)


def test_every_call_was_tried(failed: list[Found]) -> None:
    tried = {symbol for symbol, _ in failed[BAD_RANK].endings}
    assert tried == set(SYMBOLS) - NOT_USED


@pytest.mark.parametrize("symbol", sorted({*TAKING} - NOT_USED - TOLERATED))
def test_a_failure_is_said_on_every_rank_and_leaves_nothing(
    failed: list[Found], symbol: str
) -> None:
    good, bad = (
        [ending for way in WAYS for ending in of_rank.endings.get((symbol, way), [])]
        for of_rank in failed
    )
    assert [ending.changed for ending in good + bad] == [{}] * len(good + bad)
    for of_good, of_bad in zip(good, bad, strict=True):
        assert re.match(
            rf"RuntimeError: [A-Za-z].* (failed|refused|cannot|while)\b.*\({SICK}\)", of_bad.said
        ), of_bad
        assert re.match(rf"RuntimeError: .*rank {BAD_RANK}.*\({SICK}\)", of_good.said), of_good


@pytest.mark.parametrize("symbol", sorted(TOLERATED - NOT_USED))
def test_what_does_not_matter_disturbs_nobody(failed: list[Found], symbol: str) -> None:
    said = [
        ending.said
        for of_rank in failed
        for way in WAYS
        for ending in of_rank.endings.get((symbol, way), [])
    ]
    assert said == ["None"] * len(said)
    assert said


def test_the_next_balancer_works(failed: list[Found]) -> None:
    assert [of_rank.next_one for of_rank in failed] == ["same bits"] * 2


# ----------------------------------------------------------------------------- passing descriptors


def in_another_network(rank: int, num_ranks: int) -> tuple[str, str, dict[str, tuple[Any, Any]]]:
    """Names of the abstract namespace mean another socket on each rank."""
    driver = StandIn()
    build().close()
    gc.collect()
    before = held(driver)
    address = lanes._Sockets._address

    def elsewhere(self: Any, of_rank: int) -> str:
        return f"{address(self, of_rank)}-seen-by-{rank}"

    lanes._Sockets._address = elsewhere  # type: ignore[method-assign]
    refused = attempt(lambda: build(deadline_s=1.0))
    ipc = attempt(lambda: build(deadline_s=1.0, arena_handle="ipc").close())
    lanes._Sockets._address = address  # type: ignore[method-assign]
    return refused, ipc, changes(before, driver)


def test_ranks_of_different_network_namespaces_are_told_what_to_do() -> None:
    for refused, ipc, changed in run_ranks(in_another_network, 2):
        assert "passing arenas between ranks failed: " in refused
        assert "network namespace" in refused
        assert "arena_handle='ipc'" in refused
        assert ipc == "None"
        assert changed == {}
