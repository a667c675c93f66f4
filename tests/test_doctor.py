"""feplb doctor: the command, what it reads here, and machines where all is well."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from doctor_cases import (
    GIB,
    ROOT,
    TRIALS,
    CudaCore,
    check,
    cpu_machine,
    found,
    node,
)
from nvml_stand_in import Nvml

import feplb
from feplb import config
from feplb.cli import main
from feplb.observe import facts as facts_module
from feplb.observe import findings, machine, processes
from feplb.observe.doctor import judge
from feplb.observe.facts import Question

# ------------------------------------------------------------------------------- where all is well


def test_a_node_where_all_is_well_is_go() -> None:
    report = judge(node(), Question())
    assert (report.lane, report.because) == ("ce", "a GPU is here")
    assert {finding.verdict for finding in report.findings} == {"go"}
    assert found(report, "GPUs").seen == (
        "8 x NVIDIA H100 80GB HBM3, 80.0 GiB, compute capability 9.0"
    )
    check(report, "NVLink", "go", "all 28 pairs of 8 GPUs are joined, by switch")
    check(report, "peer access", "go", "between all 8")
    check(report, "shared arena", "go", "by VMM handles; CUDA IPC works too")
    check(report, "driver", "go", "570.86.10, CUDA 12.8", "batches")
    assert report.lines()[-1] == "go for the ce lane, 0 notes"


def test_a_cpu_machine_is_go_for_the_host_lane_only() -> None:
    report = judge(cpu_machine(), Question())
    assert (report.lane, report.verdict) == ("host", "go")
    check(report, "host lane", "go", "1 MiB of shared memory", "a known call planned")
    check(report, "GPUs", "note", "none: NVML does not start", "The host lane works without")
    check(judge(cpu_machine(), Question(lane="ce")), "GPUs", "no-go", "--gpus all")


def test_every_finding_says_what_was_seen_and_what_to_do() -> None:
    every = [*judge(node(), Question()).findings, *judge(cpu_machine(), Question()).findings]
    for finding in every:
        assert finding.seen
        assert finding.what_to_do.endswith(".")
        assert finding.verdict == "go" or finding.means.endswith(".")


def test_the_page_names_every_finding() -> None:
    page = (ROOT / "docs/doctor.md").read_text()
    rooms = (ROOT / "feplb/observe").glob("*_findings.py")
    written = "".join(path.read_text() for path in [*rooms, ROOT / "feplb/observe/packages.py"])
    for name in re.findall(r"^\| ([^|`]+) \|", page, re.MULTILINE)[1:]:
        assert all(f'"{part}"' in written for part in name.split(", ")), name
    shown = {
        each.name for facts in (node(), cpu_machine()) for each in judge(facts, Question()).findings
    }
    assert all(name in page for name in shown)
    assert page.count("\n") <= 60


def test_a_report_as_text() -> None:
    two = (
        findings.go("cores", "96 for this process"),
        findings.no_go("MIG", "on: GPU 2", "No peer is reached.", "Choose whole GPUs."),
    )
    assert findings.Report(lane="ce", because="as asked", findings=two).lines() == [
        "feplb doctor: judged for the ce lane (as asked)",
        "",
        "go     cores  96 for this process",
        "no-go  MIG    on: GPU 2. No peer is reached.",
        "              -> Choose whole GPUs.",
        "",
        "no-go for the ce lane: MIG",
    ]


def test_a_screen_of_100_columns_holds_it() -> None:
    bad = node(core=CudaCore(failing=dict.fromkeys(TRIALS, "refused " * 30)))
    for facts in (node(), cpu_machine(), bad):
        assert max(map(len, judge(facts, Question()).lines())) <= 100


# ---------------------------------------------------------------------------- what the system says


def laid_out(folder: Path, files: Mapping[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def test_limits_of_a_container(tmp_path: Path) -> None:
    proc = laid_out(tmp_path / "proc", {
        "self/cgroup": "0::/job/step\n",
        "self/status": "CapEff:\t00000000a80425fb\nSeccomp:\t2\n",
        "self/ns/pid": "",
        "meminfo": "MemTotal: 4 kB\nMemAvailable:    1024 kB\n",
        "sys/kernel/yama/ptrace_scope": "1\n",
        "driver/nvidia/version": "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  "
        "570.86.10  Release Build\nGCC version: 12.3.0\n",
    })  # fmt: skip
    cgroup = laid_out(tmp_path / "cgroup", {
        "memory.max": "max", "job/memory.max": "4096\n", "job/step/memory.max": "8192\n",
        "job/cpu.max": "150000 100000\n", "job/step/cpu.max": "max 100000\n",
    })  # fmt: skip
    dev = laid_out(tmp_path / "dev", {"nvidia0": "", "nvidia1": "", "nvidiactl": ""})
    seen = machine.read_machine(proc=proc, cgroup=cgroup, dev=dev)
    assert (seen.memory_limit, seen.cpu_limit) == (4096, 1.5)
    assert (seen.seccomp, seen.may_ptrace, seen.ptrace_scope) == (True, False, 1)
    assert (seen.own_pids, seen.memory_available) == (True, 1 << 20)
    assert (seen.kernel_driver, seen.gpu_nodes) == ("570.86.10", 2)
    assert (seen.shm_bytes, seen.shm_free) == (None, None)


def test_limits_of_the_older_control_groups(tmp_path: Path) -> None:
    proc = laid_out(tmp_path / "proc", {
        "self/cgroup": "5:memory:/a\n4:cpu,cpuacct:/a\n0::/\n",
        "self/status": "CapEff:\t0000000000080000\n",
    })  # fmt: skip
    cgroup = laid_out(tmp_path / "cgroup", {
        "memory/memory.limit_in_bytes": "9223372036854771712\n",
        "memory/a/memory.limit_in_bytes": "1073741824\n",
        "cpu/a/cpu.cfs_quota_us": "50000\n", "cpu/a/cpu.cfs_period_us": "100000\n",
    })  # fmt: skip
    seen = machine.read_machine(proc=proc, cgroup=cgroup, dev=tmp_path)
    assert (seen.memory_limit, seen.cpu_limit) == (GIB, 0.5)
    assert (seen.may_ptrace, seen.seccomp, seen.own_pids) == (True, None, None)


def test_a_bare_system_has_no_limits(tmp_path: Path) -> None:
    seen = machine.read_machine(proc=tmp_path, cgroup=tmp_path, dev=tmp_path)
    assert (seen.memory_limit, seen.cpu_limit, seen.kernel_driver) == (None, None, "")


def test_limits_of_the_process() -> None:
    code = (
        "import resource as r; from feplb.observe.machine import read_machine; "
        "r.setrlimit(r.RLIMIT_NOFILE, (100, 200)); "
        "r.setrlimit(r.RLIMIT_MEMLOCK, (65536, r.getrlimit(r.RLIMIT_MEMLOCK)[1])); "
        "seen = read_machine(); print(seen.files_limit, seen.memlock_limit); "
        "r.getrlimit = lambda name: (r.RLIM_INFINITY,) * 2; print(read_machine().files_limit)"
    )
    seen = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60, check=True)
    assert seen.stdout == b"100 65536\nNone\n"


@pytest.mark.parametrize(
    ("says", "version"),
    [("Cuda compilation tools, release 12.8, V12.8.61", "12.8"), ("?", "of unknown version")],
)
def test_nvcc_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, says: str, version: str
) -> None:
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(f"#!/bin/sh\necho '{says}'\n")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine.read_machine().nvcc == ""  # it may not be run yet
    nvcc.chmod(0o700)
    assert machine.read_machine().nvcc == version


def test_processes_are_tried_for_real() -> None:
    before = sorted(os.listdir("/proc/self/fd"))
    trials = processes.try_processes()
    assert (trials.own_pidfd, trials.peer_pidfd, trials.passed_fd) == ("", "", "")
    assert sorted(os.listdir("/proc/self/fd")) == before


def test_a_denied_pidfd_getfd_is_what_the_system_says() -> None:
    # Whoever is not root may not take descriptors of process 1.
    code = (
        "import os, runpy, sys; room = runpy.run_path(sys.argv[1]); "
        "os.getuid() or os.setuid(65534); print(room['_said'](lambda: room['_get_fd'](1)))"
    )
    command = [sys.executable, "-I", "-c", code, processes.__file__]
    seen = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert seen.stdout == "Operation not permitted\n"


def test_children_that_cannot_be_started_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    assert processes.try_processes().peer_pidfd.startswith("could not be tried")


# ------------------------------------------------------------------------------------- the command


def run_doctor(
    *arguments: str, code: str = "", **environment: str
) -> subprocess.CompletedProcess[str]:
    command = (
        [sys.executable, "-c", code, "doctor"]
        if code
        else [sys.executable, "-m", "feplb", "doctor"]
    )
    kept = {name: value for name, value in os.environ.items() if not name.startswith("FEPLB_")}
    return subprocess.run(
        [*command, *arguments], capture_output=True, text=True, timeout=120, check=False,
        cwd=ROOT, env={**kept, **environment},
    )  # fmt: skip


def is_running(segment: Path) -> bool:
    """Does the doctor still run that made it? (Other tests may ask one.)"""
    return Path("/proc", segment.name.split("-")[2]).exists()


def test_on_this_machine() -> None:
    seen = run_doctor("--lane", "host")
    assert (seen.returncode, seen.stderr) == (0, "")
    lines = seen.stdout.splitlines()
    assert max(map(len, lines)) <= 100
    assert lines[0] == "feplb doctor: judged for the host lane (as asked)"
    assert "removed; a known call planned" in " ".join(seen.stdout.split())
    assert re.fullmatch(r"go for the host lane, \d+ notes?", lines[-1])
    assert not [path for path in Path("/dev/shm").glob("feplb-doctor-*") if not is_running(path)]


def test_as_json_with_the_copy_engine_lane_asked_for() -> None:
    seen = run_doctor("--lane", "ce", "--json")
    report = json.loads(seen.stdout)
    assert report["lane"] == "ce"
    assert seen.returncode == {"go": 0, "no-go": 1}[report["verdict"]]
    fields = {"name", "verdict", "seen", "means", "what_to_do"}
    assert all(set(finding) == fields for finding in report["findings"])
    gpus = next(finding for finding in report["findings"] if finding["name"] == "GPUs")
    if gpus["seen"].startswith("none"):
        assert (gpus["verdict"], report["verdict"]) == ("no-go", "no-go")


def test_without_torch_it_says_so() -> None:
    code = "import sys; sys.modules['torch'] = None; from feplb.cli import main; sys.exit(main())"
    seen = run_doctor("--lane", "host", code=code)
    assert (seen.returncode, seen.stderr) == (1, "")
    assert "no-go  torch            cannot be loaded: " in seen.stdout
    assert seen.stdout.splitlines()[-1] == "no-go for the host lane: torch"


def test_a_misspelt_switch() -> None:
    seen = run_doctor("--lane", "host", FEPLB_LAYN="host")
    assert seen.returncode == 1
    assert "unknown environment variable FEPLB_LAYN" in seen.stdout


def test_wrong_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--arena-mib", "0"], ["--ranks", "-1"], ["--arena-mib", "nan"]):
        assert main(["doctor", *arguments]) == 2
        seen = capsys.readouterr()
        assert seen.err.startswith(f"feplb doctor: {arguments[0]} ")
        assert seen.err.endswith("expected 1 or more\n")
        assert seen.out == ""
    with pytest.raises(SystemExit) as stopped:
        main(["doctor", "--lane", "fast"])
    assert stopped.value.code == 2


def test_everything_is_read_with_stand_ins() -> None:
    facts = facts_module.read_facts(core=CudaCore(), nvml=Nvml(num_gpus=8))  # type: ignore[arg-type]
    assert len(facts.topology.gpus) == 8
    assert facts.core.cuda is not None
    assert len(facts.core.cuda.devices) == 8
    assert facts.environment == config.read_environment()
    if facts.torch.cuda is None:
        assert (facts.torch.uuids, facts.torch.cuda_problem) == ((), "")


def test_every_public_name_is_loaded_when_used() -> None:
    rooms = [name for names in feplb._ROOMS.values() for name in names]
    assert sorted(rooms) == sorted(feplb.__all__)
    assert set(feplb.__all__) <= set(dir(feplb))
    with pytest.raises(AttributeError, match="no attribute 'Balance'"):
        feplb.Balance  # noqa: B018
