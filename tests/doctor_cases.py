"""Machines for the tests of doctor: a node of eight GPUs, a CPU machine, a core with trials."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from nvml_stand_in import UUIDS, Nvml

from feplb import _core, config
from feplb.observe.core_trials import TorchFacts, read_core
from feplb.observe.facts import Facts
from feplb.observe.findings import Finding, Report
from feplb.observe.machine import Machine
from feplb.observe.nvlink import read_topology
from feplb.observe.processes import ProcessTrials

ROOT = Path(__file__).resolve().parent.parent
GIB = 1 << 30
TRIALS = ("vmm", "cuda_ipc", "pinned_board", "stream_values", "batch_copy")

GPU_NODE = Machine(
    system="Linux 6.8", python="3.12.1", shm_bytes=512 * GIB, shm_free=512 * GIB,
    memory_available=900 * GIB, memory_limit=None, cpus=96, cpu_limit=None, memlock_limit=None,
    files_limit=65536, own_pids=False, seccomp=False, ptrace_scope=0, may_ptrace=True,
    kernel_driver="570.86.10", gpu_nodes=8, nvcc="",
)  # fmt: skip
NODE = replace(GPU_NODE, gpu_nodes=0, kernel_driver="")
ALLOWED = ProcessTrials(own_pidfd="", peer_pidfd="", peer_getfd="", passed_fd="")
ENVIRONMENT = config.Environment(
    log_level=None, lane=None, off=False, domain=None, host_address=None, master_address=None,
    job_id="job", restart_count="0", cuda_connections=None, cuda_copy_connections=None,
    cuda_library=None, cuda_visible_devices=None, alloc_conf=None,
)  # fmt: skip


class CudaCore(SimpleNamespace):
    """The real core, with the two functions of the copy-engine lane as the test says."""

    def __init__(
        self, gpus: Sequence[int] = range(8), *, driver: int = 12080,
        no_access: Sequence[tuple[int, int]] = (), failing: Mapping[str, str] | None = None,
        engines: int = 3, fabric: bool = False, broken: str = "",
    ) -> None:  # fmt: skip
        super().__init__(**{
            name: getattr(_core, name)
            for name in ("SharedMemory", "PlanLimits", "make_plan", "board_bytes")
        })  # fmt: skip
        self.gpus, self.driver, self.engines, self.fabric = gpus, driver, engines, fabric
        self.no_access, self.failing, self.broken = no_access, failing or {}, broken

    def cuda_facts(self, library: str) -> dict[str, Any]:
        if self.broken:
            raise RuntimeError(self.broken)
        some = range(len(self.gpus))
        device = {"name": "NVIDIA H100", "compute_capability": (9, 0), "vmm": True}
        device |= {"async_engines": self.engines, "posix_fd": True, "fabric": self.fabric}
        return {
            "driver": self.driver,
            "devices": [{**device, "uuid": UUIDS[gpu]} for gpu in self.gpus],
            "peer_access": [[(a, b) not in self.no_access for b in some] for a in some],
        }

    def cuda_trials(self, device: int, library: str) -> list[dict[str, Any]]:
        return [
            {"name": name, "ok": name not in self.failing, "seen": self.failing.get(name, "done")}
            for name in TRIALS
        ]


def node(
    *, nvml: Nvml | None = None, core: Any = None, environment: Mapping[str, Any] | None = None,
    **changes: Any,
) -> Facts:  # fmt: skip
    """Eight H100 on NVSwitch where all is well, but for what a test changes."""
    trials = read_core(core or CudaCore())
    devices = trials.cuda.devices if trials.cuda else ()
    whole = Facts(
        machine=GPU_NODE,
        processes=ALLOWED,
        core=trials,
        torch=TorchFacts(version="2.13.0", cuda="12.8", uuids=tuple(d.uuid[4:] for d in devices)),
        topology=read_topology(nvml=nvml or Nvml(num_gpus=8)),
        packages={"torch": "2.13.0"},
        environment=replace(ENVIRONMENT, **(environment or {})),
    )
    return replace(whole, **changes)


def cpu_machine(**changes: Any) -> Facts:
    whole = Facts(
        machine=NODE,
        processes=ALLOWED,
        core=read_core(CudaCore(broken="libcuda.so.1: cannot open")),
        torch=TorchFacts(version="2.13.0+cpu"),
        topology=read_topology(nvml=Nvml(refuse={"nvmlInit": 12})),
        packages={"torch": "2.13.0+cpu"},
        environment=ENVIRONMENT,
    )
    return replace(whole, **changes)


def found(report: Report, name: str) -> Finding:
    (finding,) = [each for each in report.findings if each.name == name]
    return finding


def check(report: Report, name: str, verdict: str, *words: str) -> None:
    """That finding has that verdict, the words in that order, and advice; the report follows it."""
    finding = found(report, name)
    assert finding.verdict == verdict
    said = f"{finding.seen}. {finding.means} {finding.what_to_do}"
    assert re.search(".*".join(map(re.escape, words)), said), said
    if verdict == "no-go":
        assert finding.what_to_do != "Nothing."
        assert report.verdict == "no-go"
        assert f"no-go for the {report.lane} lane: " in report.lines()[-1]
