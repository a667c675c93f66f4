"""A Balancer over the cupy lane that cannot be built, on the stand-ins for driver, CuPy and
cuda-python: what is said, with what to do, on every rank; and nothing stays behind.
"""

from __future__ import annotations

import ctypes
import gc
import os
import re
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
from balancer_cases import PLAIN, Arm, build, resources_in_use
from balancer_scenarios import attempt, call_and_check
from nvml_stand_in import UUIDS, Nvml
from ranks import run_ranks
from stand_in import StandIn

from feplb import BalancerConfig, cupy_lane
from feplb.cupy_device import CupyDevice
from feplb.cupy_gpu import Arena, Packages
from feplb.links import check_nvlink
from feplb.observe.nvlink import read_topology

BAD_RANK = 1
SICK = 700  # what a driver says for ever after an illegal address


@pytest.fixture(scope="module", autouse=True)
def _machine(cupy_machine: None) -> None:
    """For all of this file."""


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
    "copies": ("cuMemcpyBatchAsync", SICK, 0, r"submitting a batch of 4 copies failed: .*\(700\)"),
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


def test_a_uuid_is_written_as_everybody_writes_it() -> None:
    assert cupy_lane.uuid_text(bytes(range(16))) == "GPU-00010203-0405-0607-0809-0a0b0c0d0e0f"


def on_gpus_apart(rank: int, num_ranks: int) -> tuple[str, str]:
    """Each rank on a GPU of its own, where NVML can be asked; and then both on one."""
    init, asked = cupy_lane.CupyLane.__init__, []

    def with_nvml(self: Any, config: BalancerConfig) -> None:
        init(self, config)
        self._is_stand_in = False

    def switches_but_gpu_1(uuids: list[str], ranks: Any) -> None:
        asked.append(uuids)
        topology = read_topology(uuids, nvml=Nvml(links={1: []}))
        check_nvlink(uuids, ranks, topology=topology)

    cupy_lane.CupyLane.__init__ = with_nvml  # type: ignore[method-assign]
    cupy_lane.check_nvlink = switches_but_gpu_1
    cupy_lane.uuid_text = lambda _: UUIDS[0]
    together = attempt(lambda: build().close())
    cupy_lane.uuid_text = lambda uuid: UUIDS[uuid[-1] % 2]
    cupy_lane.Gpu.uuids = lambda self: [bytes(15) + bytes([rank])]  # type: ignore[method-assign]
    apart = attempt(build)
    assert asked == [[UUIDS[0]] * 2, UUIDS[:2]]
    return together, apart


def test_gpus_that_only_pcie_joins_are_refused() -> None:
    for together, apart in run_ranks(on_gpus_apart, 2):
        assert together == "None"
        assert re.match("RuntimeError: .*not known to be joined by NVLink", apart)
        assert all(word in apart for word in ("PCIe only", "FEPLB_DOMAIN", "lane='host'"))


def lose_what_is_sent(rank: int, num_ranks: int) -> str:
    """Copies of one rank are accepted, and nothing travels."""
    if rank == BAD_RANK:
        CupyDevice.copy_batch = lambda *_: None  # type: ignore[method-assign]
    return attempt(lambda: build(deadline_s=5.0))


def test_a_lane_that_carries_nothing_is_refused_by_its_pattern() -> None:
    for said in run_ranks(lose_what_is_sent, 2):
        assert re.match(
            r"RuntimeError: .*byte \d+ of rank 1's pattern is \d+, expected \d+: this lane",
            said,
        ), said


def with_an_old_driver(rank: int, num_ranks: int) -> str:
    os.environ["STAND_IN_VERSION"] = "11040"  # before this process opens it
    return attempt(build)


def test_a_driver_too_old_is_told_with_what_it_supports() -> None:
    for said in run_ranks(with_an_old_driver, 2):
        assert re.match(
            r"RuntimeError: .*too old: it supports CUDA 11\.4, feplb needs 11\.7 .*Update the", said
        ), said


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
    with pytest.raises(
        RuntimeError, match=r"no GPU.*a CUDA build.*CUDA_VISIBLE_DEVICES.*lane='host'"
    ):
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
    assert cupy_lane.choose_copy_call("auto", packages) == chosen
    assert cupy_lane.choose_copy_call("plain", packages) == "plain"
    if chosen == "batch":
        assert cupy_lane.choose_copy_call("batch", packages) == "batch"
    else:
        with pytest.raises(RuntimeError, match=r'copy_call="batch" needs .*use "plain"'):
            cupy_lane.choose_copy_call("batch", packages)
