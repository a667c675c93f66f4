"""What doctor says of host, container and packages: each trouble is one finding."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
from doctor_cases import (
    ALLOWED,
    ENVIRONMENT,
    GIB,
    NODE,
    ROOT,
    CudaCore,
    check,
    cpu_machine,
    found,
    node,
)

import feplb
from feplb import _core
from feplb.observe import packages
from feplb.observe.core_trials import TorchFacts, read_core
from feplb.observe.doctor import judge
from feplb.observe.facts import Question

# ------------------------------------------------------------------------- bad input, any lane


def test_too_little_shared_memory() -> None:
    docker = replace(NODE, shm_bytes=64 << 20, shm_free=64 << 20)
    facts = cpu_machine(machine=docker)
    check(judge(facts, Question()), "/dev/shm", "note", "64 MiB free of 64 MiB", "--shm-size")
    report = judge(facts, Question(arena_bytes=20 << 20, ranks=4))
    check(report, "/dev/shm", "no-go", "4 arenas of 20 MiB and the count board need 80.0 MiB",
          "--shm-size", "lower max_rows")  # fmt: skip
    check(
        judge(facts, Question(arena_bytes=15 << 20, ranks=4)),
        "/dev/shm",
        "go",
        "4 arenas of 15 MiB",
    )
    # The copy-engine lane has its arenas on the GPUs.
    on_gpus = judge(node(machine=docker), Question(arena_bytes=GIB))
    check(on_gpus, "/dev/shm", "go", "count board")


def test_no_shared_memory() -> None:
    facts = cpu_machine(machine=replace(NODE, shm_bytes=None, shm_free=None))
    check(judge(facts, Question()), "/dev/shm", "no-go", "not there", "Mount a tmpfs")


def test_a_small_control_group() -> None:
    facts = cpu_machine(machine=replace(NODE, memory_limit=2 * GIB))
    report = judge(facts, Question(arena_bytes=GIB, ranks=4))
    check(
        report, "memory", "no-go", "limit 2.0 GiB", "4.0 GiB", "Raise the container's memory limit"
    )
    check(judge(facts, Question()), "memory", "go", "limit 2.0 GiB; 900.0 GiB available")
    unknown = cpu_machine(machine=replace(NODE, memory_available=None))
    check(judge(unknown, Question()), "memory", "go", "no limit", "free memory unknown")


def test_few_cores() -> None:
    facts = cpu_machine(machine=replace(NODE, cpus=8, cpu_limit=1.5))
    check(
        judge(facts, Question()), "cores", "note", "8 for this process, limited to the time of 1.5"
    )


def test_few_files() -> None:
    facts = cpu_machine(machine=replace(NODE, files_limit=64))
    check(judge(facts, Question()), "open files", "note", "at most 64", "ulimit -n")


@pytest.mark.parametrize("trial", ["own_pidfd", "peer_pidfd"])
def test_pidfd_open_denied(trial: str) -> None:
    denied = replace(ALLOWED, **{trial: "Function not implemented"})
    check(judge(cpu_machine(processes=denied), Question()), "watching peers", "no-go",
          "pidfd_open: Function not implemented", "Linux 5.3")  # fmt: skip


def test_pidfd_getfd_denied() -> None:
    denied = replace(ALLOWED, peer_getfd="Operation not permitted")
    locked = replace(NODE, seccomp=True, may_ptrace=False, ptrace_scope=1)
    report = judge(node(processes=denied, machine=locked), Question())
    check(report, "pidfd_getfd", "note", "Operation not permitted", "ptrace_scope 1", "seccomp",
          "no CAP_SYS_PTRACE", "feplb does not use it", "--cap-add=SYS_PTRACE")  # fmt: skip
    assert report.verdict == "go"


def test_handles_that_cannot_be_passed() -> None:
    denied = replace(ALLOWED, passed_fd="Operation not permitted")
    check(judge(node(processes=denied), Question()), "passing handles", "no-go", "SCM_RIGHTS")
    check(judge(cpu_machine(processes=denied), Question()), "passing handles", "note", "SCM_RIGHTS")


def test_a_container_of_its_own() -> None:
    facts = cpu_machine(machine=replace(NODE, own_pids=True))
    check(judge(facts, Question()), "watching peers", "go", "of its own", "--pid=host")


def test_a_core_that_cannot_be_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "feplb._core", None)
    monkeypatch.delattr(feplb, "_core")
    report = judge(cpu_machine(core=read_core()), Question())
    check(
        report, "feplb core", "no-go", "cannot be loaded", "pip install --no-build-isolation -e ."
    )


def test_a_core_of_other_sources() -> None:
    core = CudaCore()
    core.make_plan = lambda *arguments: (_ for _ in ()).throw(TypeError("incompatible\narguments"))
    report = judge(node(core=core), Question())
    check(report, "host lane", "no-go", "plan: the core was built from other sources",
          "(incompatible)", "pip install")  # fmt: skip


def test_a_core_that_plans_something_else() -> None:
    core = CudaCore()
    core.make_plan = lambda *arguments: (_core.make_plan(*arguments)[0][:0], 0)
    check(
        judge(node(core=core), Question()),
        "host lane",
        "no-go",
        "plan: the plan of a known call is []",
    )


def test_shared_memory_that_cannot_be_made() -> None:
    core = CudaCore()

    class Refusing:
        @staticmethod
        def create(name: str, size: int) -> None:
            raise RuntimeError("reserving 1048576 bytes: No space left; /dev/shm has 0 bytes free")

    core.SharedMemory = Refusing
    check(
        judge(node(core=core), Question()), "host lane", "no-go", "No space left", "/dev/shm below"
    )


def test_a_wrong_switch_is_a_finding() -> None:
    problem = "unknown environment variable FEPLB_X; feplb knows FEPLB_LOG. Unset it or correct it."
    facts = cpu_machine(environment=None, environment_problem=problem)
    check(judge(facts, Question()), "FEPLB variables", "no-go", "FEPLB_X", "Unset it")


def test_switches_are_shown() -> None:
    off = replace(ENVIRONMENT, off=True, lane="host", domain="a")
    report = judge(node(environment={"off": True, "lane": "host", "domain": "a"}), Question())
    assert (report.lane, report.because) == ("host", "FEPLB_LANE")
    check(judge(cpu_machine(environment=off), Question()), "FEPLB variables", "note",
          "FEPLB_OFF=1, FEPLB_LANE=host, FEPLB_DOMAIN=a", "nothing moves")  # fmt: skip


def test_torch_missing_or_too_old() -> None:
    gone = cpu_machine(torch=TorchFacts(problem="No module named 'torch'"))
    check(judge(gone, Question()), "torch", "no-go", "No module named 'torch'", "Install torch 2.8")
    for torch, built in [(TorchFacts(version="2.13.0", cuda="13.0"), "with CUDA 13.0"),
                         (TorchFacts(version="2.13.0", hip="7.0"), "with ROCm 7.0"),
                         (TorchFacts(version="2.8.0"), "without CUDA")]:  # fmt: skip
        check(judge(cpu_machine(torch=torch), Question()), "torch", "go", f"built {built}")
    old = cpu_machine(torch=TorchFacts(version="2.7.1"))
    check(judge(old, Question()), "torch", "no-go", "2.7.1. feplb needs 2.8 or newer")


def test_another_system() -> None:
    facts = cpu_machine(machine=replace(NODE, system="Darwin 24.1"))
    check(judge(facts, Question()), "python", "no-go", "Darwin 24.1", "Linux 5.3")


# --------------------------------------------------------------------------------------- packages

VERSIONS = [
    ({"megatron-core": "0.16.1"}, "megatron-core", "go", "0.16 to 0.20."),
    ({"megatron-core": "0.20.0rc0"}, "megatron-core", "go", "Only 0.16.1 is tested"),
    ({"megatron-core": "0.15.3"}, "megatron-core", "note", "refuses it"),
    ({"megatron-core": "0.21.0"}, "megatron-core", "note", "Install megatron-core 0.16.1"),
    ({"deep_ep": "1.2.1+9af0e0d"}, "deep_ep", "go", "V1"),
    ({"deep_ep": "2.1.0", "torch": "2.10.0"}, "deep_ep", "go", "ElasticBuffer (V2) work"),
    ({"deep_ep": "2.1.0", "torch": "2.9.1"}, "deep_ep", "note", "torch 2.10"),
    ({"deep_ep": "2.1.0", "megatron-core": "0.16.1"}, "deep_ep", "note", "hybrid-ep"),
    ({"deep_ep": "1.1.0"}, "deep_ep", "note", "Outside 1.2 to 2.x"),
    ({"deep_ep": "3.0"}, "deep_ep", "note", "Outside 1.2 to 2.x"),
    ({"transformers": "5.23.0"}, "transformers", "note", "no integration"),
    ({"cupy-cuda12x": "14.2.0"}, "cupy", "note", "pip install cuda-python"),
    ({"cupy-cuda12x": "14.2.0", "cuda-bindings": "12.9.4"}, "cupy", "go", "cuda-bindings 12.9.4"),
    ({"cupy-cuda12x": "14.2.0", "cupy": "14.2.0"}, "cupy", "note", "Keep one"),
    ({}, "other packages", "go", "not installed: torch, megatron-core, deep_ep"),
]


@pytest.mark.parametrize(("installed", "name", "verdict", "words"), VERSIONS)
def test_versions(installed: dict[str, str], name: str, verdict: str, words: str) -> None:
    check(judge(cpu_machine(packages=installed), Question()), name, verdict, words)


def test_what_is_not_installed_is_listed() -> None:
    without = found(judge(cpu_machine(packages={"triton": "3.9.0"}), Question()), "other packages")
    assert without.seen == (
        "triton 3.9.0; not installed: torch, megatron-core, deep_ep, transformers, cuda-bindings, "
        "nvidia-ml-py, cupy"
    )
    cupy = cpu_machine(packages={"cupy-cuda12x": "14.2.0"})
    assert "cupy" not in found(judge(cupy, Question()), "other packages").seen


def test_the_ranges_are_those_of_the_house() -> None:
    checks = (ROOT / "feplb/integrations/megatron_checks.py").read_text()
    assert f"OLDEST, NEWEST = {packages.MEGATRON[0]}, {packages.MEGATRON[1]}" in checks
    assert "torch>={}.{}".format(*packages.TORCH) in (ROOT / "pyproject.toml").read_text()
    assert "1.2 and 2.x" in (ROOT / "docs/deepep.md").read_text()
    assert packages.DEEPEP == ((1, 2), (2,))


def test_installed_packages_are_read_without_importing_them() -> None:
    assert packages.read_packages()["torch"].startswith("2.")
    code = (
        "import sys; from feplb.observe import packages; packages.read_packages(); "
        "assert not {'torch', 'megatron', 'triton', 'pynvml'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
