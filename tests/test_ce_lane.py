"""The ce lane without a GPU: the whole Balancer over a driver that fails where it is told to.

Bits with every way of copying, writing flags and sharing arenas; what is chosen where the config
says "auto"; a machine that lacks something; a driver that fails in the middle of a call; a killed
and a silent peer. Tensors are the host's, ranks are processes. test_ce_lane_building.py has the
failures while a Balancer is built, tests/cpp/test_cuda_device.cpp the streams that are behind.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import itertools
import logging
import os
import re
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import stand_in
import torch.distributed as dist
from balancer_cases import (
    NUM_RANKS,
    PLAIN,
    TWO_LAYERS,
    Arm,
    Heard,
    build,
    differences,
    grads,
    loss_of,
    resources_in_use,
)
from balancer_scenarios import Reactions, Scenario, attempt, call_and_check
from ranks import run_ranks
from stand_in import StandIn
from test_host_kills import HELPER, OWNER, STOP_DEADLINE_S, Fall, check_survivors, survivors_of

BAD_RANK = 1
SICK = 700  # what a driver says for ever after an illegal address


pytestmark = pytest.mark.usefixtures("stand_in_machine")

# ---------------------------------------------------------------------------- every way, same bits

WAYS = list(
    itertools.product(("batch", "peer", "plain"), ("memops", "write", "copy"), ("vmm", "ipc"))
)
# The functions that only this way calls.
OF_COPIES = {
    "batch": "cuMemcpyBatchAsync", "peer": "cuMemcpyPeerAsync", "plain": "cuMemcpyAsync",
}  # fmt: skip
OF_FLAGS = {"memops": "cuStreamBatchMemOp", "write": "cuStreamWriteValue32"}
OF_ARENAS = {"vmm": "cuMemImportFromShareableHandle", "ipc": "cuIpcOpenMemHandle"}


def train(arm: Arm) -> dict[str, Any]:
    """Two micro-batches through two layers."""
    bits = {}
    for step in range(2):
        weights = [arm.weights(layer) for layer in range(2)]
        rows, _ = arm.rows(step=step)
        hidden = rows
        for layer in range(2):
            hidden = hidden + arm.run(hidden, weights[layer], layer=layer, step=step)
        loss_of(hidden).backward()
        arm.check()
        bits |= {f"step {step} out": hidden.detach()}
        leaves = grads(rows=rows, first=weights[0], second=weights[1])
        bits |= {f"step {step} {name}": leaf for name, leaf in leaves.items()}
    return bits


def train_every_way(rank: int, num_ranks: int) -> dict[tuple[str, ...], tuple[list[str], int]]:
    """What differs from experts without a Balancer, and the moves; and which calls were made."""
    expected = train(Arm(rank, num_ranks, TWO_LAYERS, None))
    driver = StandIn()
    found = {}
    for way in WAYS:
        copies, flags, arenas = way
        config = {"copy_call": copies, "flag_call": flags, "arena_handle": arenas}
        symbols = {*OF_COPIES.values(), *OF_FLAGS.values(), *OF_ARENAS.values()}
        before = {symbol: driver.calls(symbol) for symbol in symbols}
        with build(TWO_LAYERS, **config) as balancer:
            arm = Arm(rank, num_ranks, TWO_LAYERS, balancer)
            wrong = differences(train(arm), expected)
        used = {symbol for symbol in symbols if driver.calls(symbol) > before[symbol]}
        wanted = {OF_COPIES[copies], OF_ARENAS[arenas], OF_FLAGS.get(flags, "cuMemcpyAsync")}
        if flags == "copy":
            wanted.add("cuStreamWriteValue32")  # of the word that is copied
        wrong += [f"called {used}, expected {wanted}"] * (used != wanted)
        found[way] = (wrong, arm.num_moves)
    return found


@pytest.fixture(scope="module")
def trained(stand_in_machine: None) -> list[dict[tuple[str, ...], tuple[list[str], int]]]:
    return run_ranks(train_every_way, NUM_RANKS, timeout_s=120)


@pytest.mark.parametrize("way", WAYS, ids="-".join)
def test_every_way_has_the_bits_of_experts_without_a_balancer(
    trained: list[dict[tuple[str, ...], tuple[list[str], int]]], way: tuple[str, ...]
) -> None:
    for of_rank in trained:
        assert of_rank[way][0] == []
        assert of_rank[way][1] > 0


# ------------------------------------------------------------------------------- what is chosen


def on_a_machine_of_its_own(folder: str, rank: int, variables: dict[str, str]) -> None:
    """From here on this process has a driver that nobody has asked anything, in that state."""
    own = Path(folder) / f"libcuda-{rank}-{len(os.listdir(folder))}.so"
    shutil.copy(os.environ["FEPLB_LIBCUDA"], own)
    for name in [name for name in os.environ if name.startswith("STAND_IN_")]:
        del os.environ[name]
    os.environ.update({"FEPLB_LIBCUDA": str(own), **variables})


Machine = tuple[dict[str, str], dict[str, Any]]  # variables of the stand-in, and the config

CHOICES: dict[str, tuple[Machine, str]] = {
    "newest": (({}, {}), "ce (batch copies, flags by memops, vmm arena)"),
    "driver of 12.4": (
        ({"STAND_IN_VERSION": "12040"}, {}),
        "ce (plain copies, flags by memops, vmm arena)",
    ),
    "oldest driver": (
        ({"STAND_IN_VERSION": "11070"}, {}),
        "ce (plain copies, flags by memops, vmm arena)",
    ),
    "no descriptors": (
        ({"STAND_IN_HAS_VMM": "0"}, {}),
        "ce (batch copies, flags by memops, ipc arena)",
    ),
    "masked": (
        ({"STAND_IN_UUIDS_FROM": "{rank}"}, {}),
        "ce (batch copies, flags by memops, vmm arena)",
    ),
}


def choose(rank: int, num_ranks: int, folder: str) -> dict[str, tuple[str, str]]:
    """What was logged, and whether it carries data."""
    heard = Heard()
    logger = logging.getLogger("feplb")
    logger.addHandler(heard)
    logger.setLevel(logging.INFO)
    found = {}
    for name, ((variables, config), _) in CHOICES.items():
        filled = {key: value.format(rank=rank) for key, value in variables.items()}
        on_a_machine_of_its_own(folder, rank, filled)
        with build(**config) as balancer:
            works = call_and_check(Arm(rank, num_ranks, PLAIN, balancer))
        found[name] = (heard.texts[-1], works)
    return found


@pytest.fixture(scope="module")
def chosen(
    stand_in_machine: None, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, tuple[str, str]]]:
    return run_ranks(choose, 2, str(tmp_path_factory.mktemp("drivers")))


@pytest.mark.parametrize("name", CHOICES)
def test_auto_takes_what_the_driver_has_and_says_so(
    chosen: list[dict[str, tuple[str, str]]], name: str
) -> None:
    for rank, of_rank in enumerate(chosen):
        logged, works = of_rank[name]
        assert f"rank {rank}: domain of ranks" in logged
        assert f"lane {CHOICES[name][1]}, canary ok" in logged
        assert works == "same bits"


# ------------------------------------------------------------------------- what the machine lacks

MEMORY = r"GPU 0 has not the \d+ bytes that feplb's arena takes: .* Lower max_rows, num_slots"
PEER = r"cannot reach a peer's memory: .*\(217\).*needs NVLink.*FEPLB_DOMAIN"
LACKS: dict[str, tuple[Machine, str]] = {
    "driver too old": (
        ({"STAND_IN_VERSION": "11040"}, {}),
        r"supports CUDA 11\.4, feplb needs 11\.7 .*missing: .*cuStreamWaitValue32.*Update the",
    ),
    "no GPU": (
        ({"STAND_IN_GPUS": "0"}, {}),
        r"sees no GPU: CUDA_ERROR_NO_DEVICE \(100\).*CUDA_VISIBLE_DEVICES.*lane=\"host\"",
    ),
    "no driver": (
        ({"FEPLB_LIBCUDA": "/nowhere/libcuda.so.1"}, {}),
        r"driver could not be opened \(/nowhere/libcuda.so.1: .*use lane=\"host\"",
    ),
    "something else in its place": (
        ({"FEPLB_LIBCUDA": "libm.so.6"}, {}),
        r"libm.so.6 has no cuGetProcAddress.*Update the NVIDIA driver",
    ),
    "batches of an old driver": (
        ({"STAND_IN_VERSION": "12040"}, {"copy_call": "batch"}),
        r"copy_call=\"batch\" needs a driver of CUDA 12\.8 .*supports 12\.4.*use \"plain\"",
    ),
    "memory": (({"STAND_IN_FAIL": "cuMemCreate:2"}, {}), MEMORY),
    "memory, ipc": (({"STAND_IN_FAIL": "cuMemAlloc:2"}, {"arena_handle": "ipc"}), MEMORY),
    "ipc refused": (
        ({"STAND_IN_FAIL": "cuIpcOpenMemHandle:800"}, {"arena_handle": "ipc"}),
        r"IPC of a peer's arena was refused: .*\(800\).*--ipc=host.*arena_handle=\"vmm\"",
    ),
    "descriptors refused": (
        ({"STAND_IN_FAIL": "cuMemExportToShareableHandle:801"}, {}),
        r"as a file descriptor was refused: .*\(801\).*\(no MIG\).*arena_handle=\"ipc\"",
    ),
    "descriptors refused by the other": (
        ({"STAND_IN_FAIL": "cuMemImportFromShareableHandle:800"}, {}),
        r"opening a peer's arena as a file descriptor was refused: .*\(800\).*one container",
    ),
    "no peer access": (({"STAND_IN_FAIL": "cuMemSetAccess:217:1"}, {}), PEER),
    "no peer access, ipc": (
        ({"STAND_IN_FAIL": "cuIpcOpenMemHandle:217"}, {"arena_handle": "ipc"}),
        PEER,
    ),
    "memlock": (
        ({"STAND_IN_FAIL": "cuMemHostRegister:304"}, {}),
        r"pinning \d+ bytes of the count board failed: .*ulimit -l",
    ),
    "masked GPUs": (
        ({"STAND_IN_UUIDS_FROM": "{rank}"}, {"copy_call": "peer"}),
        r"copy_call=\"peer\" must know the GPUs of all ranks.*CUDA_VISIBLE_DEVICES.*\"plain\"",
    ),
}


def lack(rank: int, num_ranks: int, folder: str) -> dict[str, str]:
    """How building a Balancer ends where the machine lacks something."""
    found = {}
    for name, ((variables, config), _) in LACKS.items():
        filled = {key: value.format(rank=rank) for key, value in variables.items()}
        on_a_machine_of_its_own(folder, rank, filled)
        found[name] = attempt(lambda config=config: build(**config))
        os.environ["FEPLB_LIBCUDA"] = str(stand_in.library())
        gc.collect()
    return found


@pytest.fixture(scope="module")
def lacking(
    stand_in_machine: None, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, str]]:
    return run_ranks(lack, 2, str(tmp_path_factory.mktemp("drivers")))


@pytest.mark.parametrize("name", LACKS)
def test_what_a_machine_lacks_is_said_with_what_to_do(
    lacking: list[dict[str, str]], name: str
) -> None:
    for of_rank in lacking:
        assert re.search(f"^RuntimeError: .*{LACKS[name][1]}", of_rank[name], re.DOTALL), of_rank


# --------------------------------------------------------------------- failures in the middle


def forward_and_backward(arm: Arm) -> None:
    for step in range(2):
        for layer in range(2):
            loss_of(arm.run(arm.rows(layer, step)[0], arm.weights(layer), layer=layer, step=step)
                    ).backward()  # fmt: skip
    arm.check()


def sick_after(arm: Arm, symbol: str, after: int) -> None:
    """On one rank every call of ``symbol`` fails, after so many that did not."""
    forward_and_backward(arm)
    driver = StandIn()
    try:
        if arm.rank == BAD_RANK:
            driver.fail(symbol, SICK, after)
        forward_and_backward(arm)
    finally:
        dist.barrier()  # nobody is well again while a peer is still in the call
        driver.fail(symbol, 0)


def in_another_context(arm: Arm) -> str:
    """The caller has another context current, before and after everything that feplb does."""
    driver = StandIn().functions
    other, seen = ctypes.c_void_p(), ctypes.c_void_p()
    driver.cuDevicePrimaryCtxRetain(ctypes.byref(other), 1)
    contexts = []

    def work(then: Callable[[], object]) -> None:
        driver.cuCtxSetCurrent(other)
        then()
        driver.cuCtxGetCurrent(ctypes.byref(seen))
        contexts.append(seen.value == other.value)

    def all_of_it() -> None:
        work(lambda: forward_and_backward(arm))
        work(lambda: build(arena_handle="ipc").close())

    thread = threading.Thread(target=all_of_it)
    thread.start()
    thread.join()
    driver.cuDevicePrimaryCtxRelease(1)
    return f"{contexts} with another current"


def leave_nothing(arm: Arm) -> str:
    """One more Balancer, used and closed, leaves what was there before it."""
    driver = StandIn()
    before = held_with_one_open(driver)
    with build(TWO_LAYERS) as second:
        forward_and_backward(Arm(arm.rank, arm.num_ranks, TWO_LAYERS, second))
    after = held_with_one_open(driver)
    return str([kind for kind in {*before, *after} if before.get(kind) != after.get(kind)])


def held_with_one_open(driver: StandIn) -> dict[str, Any]:
    gc.collect()
    return {**resources_in_use(), **driver.alive()}


MIDDLE = {
    f"{symbol} {after}": Scenario(
        functools.partial(sick_after, symbol=symbol, after=after), TWO_LAYERS
    )
    for symbol in ("cuMemcpyBatchAsync", "cuStreamBatchMemOp", "cuStreamWaitValue32",
                   "cuStreamWaitEvent", "cuEventRecord")
    for after in (0, 1, 4)
}  # fmt: skip
SCENARIOS = {
    **MIDDLE,
    "context": Scenario(in_another_context, TWO_LAYERS),
    "leave nothing": Scenario(leave_nothing, TWO_LAYERS),
}


@pytest.fixture(scope="module")
def reactions(stand_in_machine: None) -> Reactions:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STAND_IN_GPUS", "2")
        return Reactions(SCENARIOS)


@pytest.mark.parametrize("name", MIDDLE)
def test_a_driver_that_fails_in_the_middle_is_told_to_all(reactions: Reactions, name: str) -> None:
    where = r"RuntimeError: feplb failed while .* \(rank {}"
    here = rf"rank {BAD_RANK}: .* in the (for|back)ward of layer \d, micro-batch \d: .*\({SICK}\)"
    patterns = [where.format(rank) + rf".*\): {here}" for rank in range(NUM_RANKS)]
    called = r", layer \d, micro-batch \d, (for|back)ward\): "
    patterns[BAD_RANK] = where.format(BAD_RANK) + called + rf".*\({SICK}\)"
    reactions.assert_closed(name, *patterns)
    assert max(reactions.seconds(name)) < 8  # the deadline is 10


def test_another_context_stays_current(reactions: Reactions) -> None:
    assert reactions.first("context") == ["[True, True] with another current"] * NUM_RANKS
    assert reactions.after("context") == ["same bits"] * NUM_RANKS


def test_close_gives_everything_back(reactions: Reactions) -> None:
    assert reactions.first("leave nothing") == ["[]"] * NUM_RANKS


# -------------------------------------------------------------------------- killed and silent peers

# Peers are parked in what they wait for: rows, results, weight grads.
KILLS = [
    Fall(OWNER, "forward", "post_rows", "before"),
    Fall(HELPER, "forward", "await_rows", "after"),
    Fall(HELPER, "backward", "post_returns", "before"),
    Fall(HELPER, "backward", "post_grads", "before"),
]
STOPS = [
    Fall(OWNER, "forward", "post_rows", "before", signal.SIGSTOP),
    Fall(HELPER, "backward", "post_returns", "before", signal.SIGSTOP),
]


@pytest.mark.parametrize("fall", KILLS, ids=str)
def test_a_killed_rank_is_named_within_two_seconds(fall: Fall, tmp_path: Path) -> None:
    fell, survivors = survivors_of(fall, tmp_path)
    check_survivors(fall, survivors)
    assert max(survivor["raised"] for survivor in survivors) - fell < 2.0


@pytest.mark.parametrize("fall", STOPS, ids=str)
def test_a_stopped_rank_is_named_at_the_deadline(fall: Fall, tmp_path: Path) -> None:
    fell, survivors = survivors_of(fall, tmp_path)
    check_survivors(fall, survivors)
    assert max(survivor["raised"] for survivor in survivors) - fell < STOP_DEADLINE_S + 2.0
