"""The cupy lane without a GPU: the whole Balancer over CuPy's and cuda-python's calls, which go to
the stand-in driver. Ranks are processes, tensors the host's.

Bits with every way of copying and of writing flags; threads; a driver that fails while a Balancer
is built and in a call; a killed peer while Python holds its lock; what is missing, in sentences.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import itertools
import re
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cupy_stand_in
import pytest
import stand_in
import test_balancer_autograd
import test_balancer_bits
import test_balancer_failures
import test_balancer_fork
import test_balancer_weight_grads
import torch.distributed as dist
from balancer_cases import (
    NUM_RANKS,
    PLAIN,
    TWO_LAYERS,
    Arm,
    Bits,
    Case,
    Outcomes,
    build,
    grads,
    loss_of,
    resources_in_use,
    threads_of_feplb,
)
from balancer_scenarios import Reactions, Scenario, attempt, call_and_check
from ranks import run_ranks
from stand_in import StandIn
from test_host_kills import HELPER, NOTICE_S, OWNER, Fall, check_survivors, rank_program

from feplb import BalancerConfig, cupy_lane
from feplb.cupy_gpu import Arena, Packages
from feplb.domain_calls import DomainCalls

BAD_RANK = 1
SICK = 700  # what a driver says for ever after an illegal address


@pytest.fixture(scope="module", autouse=True)
def _machine() -> Iterator[None]:
    """Every rank of this file has the stand-ins for a driver, CuPy and cuda-python."""
    with pytest.MonkeyPatch.context() as patch:
        for variable, value in (stand_in.environment() | {"FEPLB_LANE": "cupy"}).items():
            patch.setenv(variable, value)
        yield


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
    assert threads[0]["batches"][0] == 2  # nothing has to be released yet


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


def captured(arm: Arm) -> None:
    """One rank's stream is captured; asked as with CUDA tensors."""
    core = arm.door.domain.core
    arm.door.domain._bind_stream = lambda: core.bind_compute(0)  # type: ignore[method-assign]
    driver = StandIn()
    driver.say_capturing(1 if arm.rank == BAD_RANK else 0)
    try:
        train(arm)
    finally:
        driver.say_capturing(0)


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
SCENARIOS |= {"captured": Scenario(captured, TWO_LAYERS)}
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


def test_a_captured_stream_is_refused(reactions: Reactions) -> None:
    texts = reactions.first("captured")
    assert "is captured into a CUDA graph" in texts[BAD_RANK]
    assert all(text.startswith("RuntimeError: ") for text in texts)


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
    return rank_program(rank, num_ranks, fall, stamp)


def wait_in_a_stream(rank: int, num_ranks: int, fall: Fall, stamp: str) -> dict[str, Any]:
    """Waits lie in a compute stream of the driver; what the host computes meanwhile is noise."""
    runtime, stream = cupy_stand_in.packages().runtime, 0

    def bind(calls: DomainCalls) -> None:
        nonlocal stream
        stream = stream or runtime.streamCreateWithFlags(runtime.streamNonBlocking)
        calls.core.bind_compute(stream)

    DomainCalls._bind_stream = bind  # type: ignore[method-assign]
    return rank_program(rank, num_ranks, fall, stamp)


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


# --------------------------------------------------------------------- failures while it is built

# Which call of the driver fails on one rank, with which code, after how many that did not.
REFUSALS = {
    "memory": ("cuMemAlloc", 2, 0, r"GPU 0 has not the \d+ bytes .*Lower max_rows, num_slots"),
    "export": ("cuIpcGetMemHandle", SICK, 0, "exporting the arena by CUDA IPC failed: CUDA_"),
    "ipc": ("cuIpcOpenMemHandle", 800, 0, r"IPC of a peer's arena was refused: .*--ipc=host"),
    "peer access": ("cuIpcOpenMemHandle", 217, 0, "cannot reach a peer's memory: .*NVLink"),
    "memlock": ("cuMemHostRegister", 304, 0, r"pinning \d+ bytes of .* failed: .*ulimit -l"),
    "second pin": ("cuMemHostRegister", 304, 1, "pinning 4096 bytes of .* failed: .*ulimit -l"),
    "pinned address": ("cuMemHostGetDevicePointer", SICK, 1, r"sees the count board .*\(700\)"),
    "flag words": ("cuMemAlloc", 2, 1, "allocating the flag words failed: CUDA_"),
    "events": ("cuEventCreate", SICK, 300, "creating an event failed: CUDA_"),
    "streams": ("cuStreamCreate", SICK, 2, "creating a stream failed: CUDA_"),
    "context": ("cuDevicePrimaryCtxRetain", SICK, 0, r"taking a GPU's context failed: .*\(700\)"),
    "copies": ("cuMemcpyBatchAsync", SICK, 0, r"submitting a batch of 1 copies failed: .*\(700\)"),
    "put": ("cuMemcpyHtoD", SICK, 0, "copying to the GPU failed: CUDA_"),
}


def held(driver: StandIn) -> dict[str, Any]:
    """All that this process and its driver hold."""
    gc.collect()
    return {**resources_in_use(num_threads=0), **driver.alive()}


def refuse(rank: int, num_ranks: int) -> dict[str, tuple[str, bool]]:
    """Per refusal: what is said, and whether anything is left; at last whether a Balancer works."""
    driver = StandIn()
    build().close()  # what a first one loads stays
    clean = held(driver)
    found = {}
    for name, (symbol, code, after, _) in REFUSALS.items():
        if rank == BAD_RANK:
            driver.fail(symbol, code, after)
        said = attempt(lambda: build(deadline_s=2.0).close())
        driver.fail(symbol, 0)
        found[name] = (said, held(driver) == clean)
    found["vmm"] = (attempt(lambda: build(arena_handle="vmm")), held(driver) == clean)
    with build() as balancer:
        works = call_and_check(Arm(rank, num_ranks, PLAIN, balancer))
    del balancer
    found[""] = (works, held(driver) == clean)
    return found


@pytest.fixture(scope="module")
def refused() -> list[dict[str, tuple[str, bool]]]:
    return run_ranks(refuse, 2)


@pytest.mark.parametrize("name", REFUSALS)
def test_a_refusal_is_said_on_every_rank_and_leaves_nothing(
    refused: list[dict[str, tuple[str, bool]]], name: str
) -> None:
    own, heard = refused[BAD_RANK][name], refused[0][name]
    assert re.match(rf"RuntimeError: .*{REFUSALS[name][3]}", own[0], re.DOTALL), own
    assert f"rank {BAD_RANK}" in heard[0]
    assert (own[1], heard[1]) == (True, True)


def test_descriptors_are_refused_with_what_to_use(
    refused: list[dict[str, tuple[str, bool]]],
) -> None:
    for of_rank in refused:
        assert of_rank["vmm"][0].startswith("ValueError: lane='cupy' shares arenas by CUDA IPC")
        assert of_rank["vmm"][1]


def test_the_next_balancer_works_and_leaves_nothing(
    refused: list[dict[str, tuple[str, bool]]],
) -> None:
    assert [of_rank[""] for of_rank in refused] == [("same bits", True)] * 2


# ------------------------------------------------------------------------------- whose GPU is whose


def name_peers(rank: int, num_ranks: int) -> tuple[list[tuple[int, int, int]], str]:
    """Two ranks whose GPUs this process numbers the other way round; then one it cannot see."""
    lane = cupy_lane.CupyLane(BalancerConfig(copy_call="peer"))
    first, second = Arena(lane._gpu), Arena(lane._gpu)
    lane._arenas = [first, second]
    first.address, second.address = 1 << 40, 2 << 40
    lane._name_peers([b"one", b"two"], [b"two", b"one"], 100)
    found = [(peer.address, peer.num_bytes, peer.ordinal) for peer in lane._lane.peers]
    masked = attempt(lambda: lane._name_peers([b"one", b"two"], [b"one"], 100))
    first.address = second.address = 0  # nobody's memory
    return found, masked


def test_copies_that_name_both_gpus_must_see_both() -> None:
    ((found, masked),) = run_ranks(name_peers, 1)
    assert found == [(1 << 40, 100, 1), (2 << 40, 100, 0)]
    assert re.match(r'RuntimeError: copy_call="peer" must know .*CUDA_VISIBLE_DEVICES', masked)


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


# ----------------------------------------------------------------------------------------- context


def keep_another_context(rank: int, num_ranks: int) -> list[str]:
    """A thread with another GPU's context current has it back after all that feplb does."""
    driver = StandIn().functions
    other, seen = ctypes.c_void_p(), ctypes.c_void_p()
    driver.cuDevicePrimaryCtxRetain(ctypes.byref(other), 1)
    found = []

    def work() -> None:
        driver.cuCtxSetCurrent(other)
        with build() as balancer:
            found.append(call_and_check(Arm(rank, num_ranks, PLAIN, balancer)))
        driver.cuCtxGetCurrent(ctypes.byref(seen))
        found.append(f"{seen.value == other.value}")

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    return found


def test_another_context_comes_back() -> None:
    assert run_ranks(keep_another_context, 2) == [["same bits", "True"]] * 2


# --------------------------------------------------------------------------------- what is missing


@pytest.mark.parametrize(
    ("cuda", "lines"),
    [
        ("12.8", ["pip install cupy-cuda12x 'cuda-python==12.*'"]),
        ("13.0", ["pip install cupy-cuda13x 'cuda-python==13.*'"]),
        (
            None,
            ["cupy-cuda12x 'cuda-python==12.*' or pip install cupy-cuda13x 'cuda-python==13.*'"],
        ),
    ],
)
def test_a_missing_package_is_told_with_the_line_that_installs_it(
    monkeypatch: pytest.MonkeyPatch, cuda: str | None, lines: list[str]
) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    monkeypatch.setattr("torch.version.cuda", cuda)
    with pytest.raises(RuntimeError, match="needs CuPy and cuda-python") as caught:
        cupy_lane.import_packages()
    assert all(line in str(caught.value) for line in lines)
    assert ("cuda12x" in str(caught.value)) == (cuda != "13.0")


def test_packages_without_a_gpu_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cupy_lane, "import_packages", lambda: Packages(None, None))
    with pytest.raises(RuntimeError, match=r"sees no GPU.*Install a CUDA build.*lane='host'"):
        cupy_lane.CupyLane(BalancerConfig(lane="cupy"))


class Versions:
    """A driver and bindings of some CUDA versions, and nothing else."""

    def __init__(self, driver: int, bindings: int, *, has_call: bool = True) -> None:
        self.CUDA_VERSION = bindings
        self.driverGetVersion: Callable[[], int] = lambda: driver
        if has_call:
            self.cuMemcpyBatchAsync = None


@pytest.mark.parametrize(
    ("versions", "chosen"),
    [
        (Versions(12080, 12080), "batch"),
        (Versions(13000, 12090), "batch"),
        (Versions(13000, 13000), "batch"),
        (Versions(13000, 13020), "batch"),
        (Versions(12090, 13000), "plain"),  # the bindings call the form of CUDA 13
        (Versions(12040, 12080), "plain"),
        (Versions(13000, 12060, has_call=False), "plain"),
    ],
)
def test_batches_are_chosen_where_driver_and_bindings_have_them(
    versions: Versions, chosen: str
) -> None:
    packages = Packages(versions, versions)
    assert cupy_lane._copy_call("auto", packages) == chosen
    assert cupy_lane._copy_call("plain", packages) == "plain"
    if chosen == "batch":
        assert cupy_lane._copy_call("batch", packages) == "batch"
    else:
        with pytest.raises(RuntimeError, match=r'copy_call="batch" needs .*use "plain"'):
            cupy_lane._copy_call("batch", packages)
