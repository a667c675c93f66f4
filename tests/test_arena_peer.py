"""Doctor's second process, over the stand-in driver: it opens what the first one shares."""

from __future__ import annotations

import os
from typing import Any

import pytest
from conftest import put
from ranks import run_ranks
from stand_in import StandIn, environment

from feplb import _core
from feplb.observe import arena_peer
from feplb.observe.core_trials import read_core


@pytest.fixture(autouse=True)
def _stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    put(monkeypatch, environment(gpus=1))


def read(rank: int, num_ranks: int, failing: str) -> tuple[dict[str, tuple[bool, str]], Any]:
    """What the trials say; calls that ``failing`` names fail in the second process alone."""
    StandIn().calls()  # this process's driver has read its variables
    if failing:
        os.environ["STAND_IN_FAIL"] = failing
    before = len(os.listdir("/proc/self/fd"))
    found = read_core(None, os.environ["FEPLB_LIBCUDA"])
    held = len(os.listdir("/proc/self/fd")) - before
    assert found.cuda is not None
    (gpu,) = found.cuda.devices
    return {trial.name: (trial.ok, trial.seen) for trial in gpu.trials}, held


def test_a_second_process_opens_both() -> None:
    ((trials, held),) = run_ranks(read, 1, "")
    assert all(ok for ok, _ in trials.values())
    for name in ("vmm", "cuda_ipc"):
        assert trials[name][1].endswith("; a second process opened one")
    assert held <= 1  # the driver's own


@pytest.mark.parametrize(
    ("failing", "name", "said"),
    [
        ("cuMemImportFromShareableHandle:800", "vmm", "as a file descriptor was refused"),
        ("cuIpcOpenMemHandle:800", "cuda_ipc", "CUDA IPC of a peer's arena was refused"),
    ],
)
def test_what_only_a_second_process_is_refused(failing: str, name: str, said: str) -> None:
    ((trials, _),) = run_ranks(read, 1, failing)
    assert {each for each, (ok, _) in trials.items() if not ok} == {name}
    assert trials[name][1].startswith("opened by a second process: ")
    assert said in trials[name][1]


def test_a_second_process_that_dies_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arena_peer.sys, "executable", "/bin/false")
    library = environment()["FEPLB_LIBCUDA"]
    found = arena_peer.try_peer(_core, library, 0, ["vmm", "ipc"])
    assert found == dict.fromkeys(
        ("vmm", "ipc"), "a second process could not try it (it ended with status 1)"
    )
    broken = arena_peer.try_peer(_core, "/nowhere/libcuda.so.1", 0, ["ipc"])
    assert "could not be opened" in broken["ipc"]
