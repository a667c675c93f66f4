"""Findings about the host: Python, torch, core, memory, limits of a container, processes."""

from __future__ import annotations

from collections.abc import Iterator

from feplb.observe.facts import Facts, Question
from feplb.observe.findings import Finding, go, no_go, no_go_if, note
from feplb.observe.packages import torch_finding

MIB = 1 << 20
_DOCKER_SHM = 64 * MIB  # what a container gets unless told otherwise
_FEW_FILES = 256


def limit_findings(facts: Facts, question: Question, lane: str) -> Iterator[Finding]:
    """Memory, cores, files, and what processes may do with each other."""
    yield _shared_memory(facts, question, lane)
    yield _memory(facts, question, lane)
    yield _cores(facts, question)
    yield _open_files(facts)
    yield _peers(facts)
    yield _passed_fds(facts, lane)
    yield _getfd(facts)


def size(count: int) -> str:
    """Bytes for readers."""
    return f"{count / (1 << 30):.1f} GiB" if count >= 1 << 30 else f"{count / MIB:.0f} MiB"


def ranks_here(facts: Facts, question: Question) -> int:
    """Ranks of this host that memory must do for."""
    return question.ranks or max(len(facts.job_gpus), 2)


# ------------------------------------------------------------------------------------- software


def software_findings(facts: Facts) -> Iterator[Finding]:
    """Python, torch, the core, and feplb's own switches."""
    machine = facts.machine
    if machine.system.startswith("Linux"):
        yield go("python", f"{machine.python} on {machine.system}")
    else:
        yield no_go(
            "python",
            f"{machine.python} on {machine.system}",
            "feplb's lanes are for Linux; plan, simulate and view work anywhere.",
            "Run the job on Linux 5.3 or newer.",
        )
    yield _torch(facts)
    yield from _core(facts)
    yield from _environment(facts)


def _torch(facts: Facts) -> Finding:
    torch = facts.torch
    if torch.problem:
        return no_go(
            "torch",
            f"cannot be loaded: {torch.problem}",
            "Without it no layer runs.",
            "Install torch 2.8 or newer for this Python, and look at the reason above.",
        )
    finding = torch_finding(torch.version)
    if finding.verdict != "go":
        return finding
    built = f"with CUDA {torch.cuda}" if torch.cuda else "without CUDA"
    return go("torch", f"{torch.version}, built {f'with ROCm {torch.hip}' if torch.hip else built}")


def _core(facts: Facts) -> Iterator[Finding]:
    from feplb import __version__

    core = facts.core
    rebuild = "pip install --no-build-isolation -e . in feplb's folder, with this Python."
    if core.problem:
        yield no_go(
            "feplb core",
            f"cannot be loaded: {core.problem}",
            "Nothing of feplb runs without it.",
            rebuild,
        )
        return
    seen = f"feplb {__version__}, core built for {core.build}"
    broken = [trial for trial in core.host_lane if not trial.ok]
    yield go("feplb core", seen)
    for trial in broken:
        yield no_go(
            "host lane",
            f"{trial.name}: {trial.seen}",
            "Every lane needs it, for planning and for what ranks share.",
            rebuild
            if trial.name == "plan"
            else "The reason says what to give; see /dev/shm below.",
        )
    if not broken:
        yield go("host lane", f"tried: {'; '.join(trial.seen for trial in core.host_lane)}")


def _environment(facts: Facts) -> Iterator[Finding]:
    if facts.environment is None:
        wrong, _, rest = facts.environment_problem.partition("; ")
        yield no_go(
            "FEPLB variables", wrong, "feplb stops at a switch it does not know.",
            rest or "Correct it.",
        )  # fmt: skip
        return
    environment = facts.environment
    values = {
        "FEPLB_LANE": environment.lane,
        "FEPLB_DOMAIN": environment.domain,
        "FEPLB_LIBCUDA": environment.cuda_library,
        "FEPLB_LOG": environment.log_level,
    }
    listed = ", ".join(f"{name}={value}" for name, value in values.items() if value is not None)
    if environment.off:
        yield note(
            "FEPLB variables",
            ", ".join(filter(None, ["FEPLB_OFF=1", listed])),
            "Every policy is none: nothing moves.",
            "Unset FEPLB_OFF to balance.",
        )
    else:
        yield go("FEPLB variables", listed or "none set")


# --------------------------------------------------------------------------------------- memory


def _shared_memory(facts: Facts, question: Question, lane: str) -> Finding:
    machine, name = facts.machine, "/dev/shm"
    more = (
        "Give it more (docker --shm-size; in Kubernetes an emptyDir of medium Memory at "
        "/dev/shm), or lower max_rows, num_slots or num_grad_slots."
    )
    if machine.shm_bytes is None or machine.shm_free is None:
        return no_go(name, "not there", "Ranks share the count board and flags in it.",
                     "Mount a tmpfs at /dev/shm.")  # fmt: skip
    seen = f"{size(machine.shm_free)} free of {size(machine.shm_bytes)}"
    ranks = ranks_here(facts, question)
    arenas = ranks * (question.arena_bytes or 0) if lane == "host" else 0
    need = facts.core.board_bytes + arenas
    if machine.shm_free < need:
        arena = f"{ranks} arenas of {size(question.arena_bytes or 0)} and " if arenas else ""
        return no_go(
            name, seen, f"Too little: {arena}the count board need {need / MIB:.1f} MiB.", more
        )
    if lane == "host" and not arenas and machine.shm_bytes <= _DOCKER_SHM:
        return note(
            name,
            seen,
            "A container's default: few arenas fit. print(balancer.memory) says what a rank takes, "
            "--arena-mib judges by it.",
            more,
        )
    if arenas:
        return go(name, seen, f"{ranks} arenas of {size(question.arena_bytes or 0)} fit.")
    if lane == "host":
        return go(name, seen, "All ranks' arenas must fit: --arena-mib judges for one's size.")
    return go(name, seen, "It holds the count board and flags.")


def _memory(facts: Facts, question: Question, lane: str) -> Finding:
    machine = facts.machine
    limit, free = machine.memory_limit, machine.memory_available
    seen = "; ".join([
        "no limit by control group" if limit is None else f"control group limit {size(limit)}",
        "free memory unknown" if free is None else f"{size(free)} available",
    ])  # fmt: skip
    need = ranks_here(facts, question) * (question.arena_bytes or 0) if lane == "host" else 0
    most = min((each for each in (limit, free) if each is not None), default=None)
    if most is not None and need > most:
        return no_go(
            "memory",
            seen,
            f"Too little for the ranks' arenas, {size(need)}: shared memory counts against it.",
            "Raise the container's memory limit, or lower max_rows, num_slots or num_grad_slots.",
        )
    return go("memory", seen)


# ---------------------------------------------------------------------------- cores, files, peers


def _cores(facts: Facts, question: Question) -> Finding:
    machine = facts.machine
    usable = min(float(machine.cpus), machine.cpu_limit or machine.cpus)
    limit = "" if machine.cpu_limit is None else f", limited to the time of {machine.cpu_limit:g}"
    ranks = ranks_here(facts, question)
    seen = f"{machine.cpus} for this process{limit}"
    if usable < 2 * ranks:
        return note(
            "cores",
            seen,
            f"{ranks} ranks want two each, for Python and for feplb's threads. Where they share, "
            "results are the same; times say nothing.",
            "For speed give each rank two cores or more.",
        )
    return go("cores", seen)


def _open_files(facts: Facts) -> Finding:
    limit = facts.machine.files_limit
    seen = "no limit" if limit is None else f"at most {limit}"
    if limit is not None and limit < _FEW_FILES:
        return note(
            "open files",
            seen,
            "torch and feplb open one or more per peer and may run out.",
            "ulimit -n 4096 (docker: --ulimit nofile=4096).",
        )
    return go("open files", seen)


def _peers(facts: Facts) -> Finding:
    trials, machine = facts.processes, facts.machine
    problem = trials.own_pidfd or trials.peer_pidfd
    where = "a PID namespace of its own" if machine.own_pids else "the first PID namespace"
    if problem:
        return no_go(
            "watching peers",
            f"pidfd_open: {problem}",
            "A rank could not notice that a peer has died.",
            "Use Linux 5.3 or newer, and a seccomp profile that allows pidfd_open (docker: "
            "--security-opt seccomp=unconfined shows whether it is that).",
        )
    together = "Ranks must share it (one container, or --pid=host)." if machine.own_pids else ""
    return go("watching peers", f"pidfd_open works, in {where}", together)


def _passed_fds(facts: Facts, lane: str) -> Finding:
    problem = facts.processes.passed_fd
    if problem:
        return no_go_if(
            lane == "ce",
            "passing handles",
            f"a file descriptor over a Unix socket: {problem}",
            "Memory handles of the copy-engine lane go this way.",
            "Use a seccomp profile that allows sendmsg with SCM_RIGHTS and memfd_create.",
        )
    return go("passing handles", "a file descriptor passed over a Unix socket")


def _getfd(facts: Facts) -> Finding:
    problem, machine = facts.processes.peer_getfd, facts.machine
    if not problem:
        return go("pidfd_getfd", "allowed between processes")
    seen = [f"denied between processes: {problem}"]
    seen += [] if machine.ptrace_scope is None else [f"yama ptrace_scope {machine.ptrace_scope}"]
    seen += ["system calls are filtered (seccomp)"] if machine.seccomp else []
    seen += [] if machine.may_ptrace else ["no CAP_SYS_PTRACE"]
    return note(
        "pidfd_getfd",
        "; ".join(seen),
        "feplb does not use it: handles go over a Unix socket. torch needs it to share memory of "
        "expandable_segments between processes.",
        "If torch is to do that: docker --cap-add=SYS_PTRACE, or ptrace_scope 0.",
    )
