"""What the operating system allows this process: limits of the container, memory, cores, driver.

Read only. Every reader takes the folders it reads, so that tests can lay out others.
"""

from __future__ import annotations

import os
import platform
import re
import resource
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

_FIRST_PID_NAMESPACE = 4026531836  # the inode of the one that the kernel starts with
_SYS_PTRACE = 19


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """None: not known, or no limit where the name says limit.

    Attributes:
        shm_bytes, shm_free: of /dev/shm; None where there is none.
        memory_limit: of the control group, bytes.
        cpus: cores this process may run on; cpu_limit: cores' worth of time it may use.
        memlock_limit, files_limit: soft limits (bytes that may be locked, open files).
        own_pids: whether this is a PID namespace of its own, as in a container.
        seccomp: whether system calls are filtered.
        ptrace_scope: yama's, None without it; may_ptrace: CAP_SYS_PTRACE.
        kernel_driver: version of the NVIDIA kernel module, "" without one.
        gpu_nodes: how many /dev/nvidia0, 1, ... there are.
        nvcc: its version, "" without one.
    """

    system: str
    python: str
    shm_bytes: int | None
    shm_free: int | None
    memory_available: int | None
    memory_limit: int | None
    cpus: int
    cpu_limit: float | None
    memlock_limit: int | None
    files_limit: int | None
    own_pids: bool | None
    seccomp: bool | None
    ptrace_scope: int | None
    may_ptrace: bool
    kernel_driver: str
    gpu_nodes: int
    nvcc: str


def read_machine(
    *,
    proc: Path = Path("/proc"),
    cgroup: Path = Path("/sys/fs/cgroup"),
    dev: Path = Path("/dev"),
) -> Machine:
    """Read it all. Raises nothing for what is missing."""
    status = _fields(proc / "self/status")
    meminfo = _fields(proc / "meminfo")
    shm = _disk(dev / "shm")
    available = meminfo.get("MemAvailable", "").split()
    return Machine(
        system=f"{platform.system()} {platform.release()}",
        python=platform.python_version(),
        shm_bytes=shm[0] if shm else None,
        shm_free=shm[1] if shm else None,
        memory_available=int(available[0]) << 10 if available else None,
        memory_limit=_memory_limit(proc, cgroup),
        cpus=_cpus(),
        cpu_limit=_cpu_limit(proc, cgroup),
        memlock_limit=_soft_limit("RLIMIT_MEMLOCK"),
        files_limit=_soft_limit("RLIMIT_NOFILE"),
        own_pids=_own_pids(proc),
        seccomp=None if "Seccomp" not in status else status["Seccomp"] != "0",
        ptrace_scope=_number(proc / "sys/kernel/yama/ptrace_scope"),
        may_ptrace=bool(int(status.get("CapEff", "0"), 16) >> _SYS_PTRACE & 1),
        kernel_driver=_kernel_driver(proc),
        gpu_nodes=len([each for each in dev.glob("nvidia*") if each.name[6:].isdigit()]),
        nvcc=_nvcc(),
    )


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""


def _number(path: Path) -> int | None:
    text = _text(path)
    return int(text) if text.lstrip("-").isdigit() else None


def _fields(path: Path) -> dict[str, str]:
    pairs = (line.split(":", 1) for line in _text(path).splitlines() if ":" in line)
    return {name: value.strip() for name, value in pairs}


def _disk(path: Path) -> tuple[int, int] | None:
    try:
        seen = shutil.disk_usage(path)
    except OSError:
        return None
    return seen.total, seen.free


def _cpus() -> int:
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _soft_limit(name: str) -> int | None:
    soft, _ = resource.getrlimit(getattr(resource, name))
    return None if soft == resource.RLIM_INFINITY else soft


def _own_pids(proc: Path) -> bool | None:
    try:
        return (proc / "self/ns/pid").stat().st_ino != _FIRST_PID_NAMESPACE
    except OSError:
        return None


# ------------------------------------------------------------------------------- control groups


def _memory_limit(proc: Path, cgroup: Path) -> int | None:
    unified = [_number(folder / "memory.max") for folder in _groups(proc, cgroup, "")]
    older = _groups(proc, cgroup / "memory", "memory")
    numbers = [*unified, *(_number(folder / "memory.limit_in_bytes") for folder in older)]
    # Without a limit version 1 says the largest number of pages.
    limits = [number for number in numbers if number is not None and number < 1 << 60]
    return min(limits, default=None)


def _cpu_limit(proc: Path, cgroup: Path) -> float | None:
    limits = []
    for folder in _groups(proc, cgroup, ""):
        quota, _, period = _text(folder / "cpu.max").partition(" ")
        if quota.isdigit() and period.isdigit():
            limits.append(int(quota) / int(period))
    for folder in _groups(proc, cgroup / "cpu", "cpu"):
        share, every = (_number(folder / f"cpu.cfs_{name}_us") for name in ("quota", "period"))
        if share is not None and every and share > 0:
            limits.append(share / every)
    return min(limits, default=None)


def _groups(proc: Path, mounted: Path, controller: str) -> list[Path]:
    """This process's group and those above it; version 2 names no controller."""
    for line in _text(proc / "self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            inner = mounted / path.lstrip("/")
            depth = len(inner.parts) - len(mounted.parts)
            return [inner, *list(inner.parents)[:depth]]
    return [mounted]


# --------------------------------------------------------------------------------------- NVIDIA


def _kernel_driver(proc: Path) -> str:
    found = re.search(r"Kernel Module.*?\s(\d+\.\d[\d.]*)", _text(proc / "driver/nvidia/version"))
    return found.group(1) if found else ""


def _nvcc() -> str:
    path = shutil.which("nvcc")
    if path is None:
        return ""
    try:
        said = subprocess.run([path, "--version"], capture_output=True, timeout=20, check=False)
    except (OSError, subprocess.SubprocessError):
        return ""
    found = re.search(r"release (\d+\.\d+)", said.stdout.decode(errors="replace"))
    return found.group(1) if found else "of unknown version"
