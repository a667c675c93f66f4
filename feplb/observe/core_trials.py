"""What feplb's own core and torch say and can do here, tried for real.

The copy-engine lane is tried by the core, which knows the driver: this file asks it through two
functions (``CudaTrials``), and says so where this build has none.
"""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from types import ModuleType
from typing import Any, Protocol, cast

from feplb.observe.arena_peer import try_peer

_TRIAL_BYTES = 1 << 20
DRIVER = "libcuda.so.1"
_WAYS = {"vmm": "vmm", "cuda_ipc": "ipc"}  # trial -> BalancerConfig.arena_handle


class CudaTrials(Protocol):
    """What the core offers where it has the copy-engine lane."""

    def cuda_facts(self, library: str) -> Mapping[str, Any]:
        """What the driver at ``library`` says, without making a context.

        Returns:
            driver: newest CUDA it brings, as 1000 x major + 10 x minor (12080);
            devices: one mapping per visible device, by ordinal: name, uuid ("GPU-..." or bare),
            compute_capability (major, minor), async_engines, vmm, posix_fd, fabric;
            peer_access: [n][n] truth values, can_access_peer of every ordered pair.
        Raises:
            RuntimeError: no driver, or one that does not start.
        """

    def cuda_trials(self, device: int, library: str) -> Sequence[Mapping[str, Any]]:
        """Try what the lane does on one device, and undo it.

        Returns:
            One mapping per trial: name, ok, seen (a sentence). Names: "context" (if it fails the
            others are not tried), "plain_copy", "vmm" (arena created,
            exported and imported), "cuda_ipc" (the same by CUDA IPC), "pinned_board" (shared
            memory registered), "stream_values" (stream write-value and wait-value), "batch_copy".
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """Something that was done here, and what was seen."""

    name: str
    ok: bool
    seen: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CudaDevice:
    """One visible device, and the trials on it."""

    name: str
    uuid: str
    compute_capability: tuple[int, int]
    async_engines: int
    vmm: bool
    posix_fd: bool
    fabric: bool
    trials: tuple[Trial, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class CudaFacts:
    """What the core says of CUDA.

    Attributes:
        driver: newest CUDA that the driver brings, e.g. (12, 8).
        no_peer_access: ordered pairs of ordinals that the driver gives no peer access.
    """

    driver: tuple[int, int]
    devices: tuple[CudaDevice, ...]
    no_peer_access: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class CoreFacts:
    """The compiled core.

    Attributes:
        problem: why it cannot be loaded; "" where it is.
        build: what it was built for.
        host_lane: shared memory made and removed, and a plan.
        board_bytes: count board of 8 ranks x 256 local experts.
        cuda: None where the core has no copy-engine lane, or CUDA does not start.
        cuda_problem: why `cuda` is None.
    """

    problem: str = ""
    build: str = ""
    host_lane: tuple[Trial, ...] = ()
    board_bytes: int = 0
    cuda: CudaFacts | None = None
    cuda_problem: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class TorchFacts:
    """torch in this process.

    Attributes:
        problem: why it cannot be loaded; "" where it is.
        cuda: CUDA it was built with; None for a CPU build. hip: the same for ROCm.
        uuids: of the devices it sees, by ordinal.
        cuda_problem: why it sees none although it was built with CUDA.
    """

    version: str = ""
    problem: str = ""
    cuda: str | None = None
    hip: str | None = None
    uuids: tuple[str, ...] = ()
    cuda_problem: str = ""


# ------------------------------------------------------------------------------------- the core


def read_core(core: ModuleType | None = None, library: str | None = None) -> CoreFacts:
    """Load the core (or take the one given) and try both lanes. Blocks for milliseconds.

    ``library``: the CUDA driver, where it is not the system's.
    """
    if core is None:
        try:
            from feplb import _core as core
        except ImportError as error:
            return CoreFacts(problem=str(error))
    assert core is not None
    cuda, cuda_problem = _read_cuda(core, library or DRIVER)
    return CoreFacts(
        build=str(sysconfig.get_config_var("SOABI")),
        host_lane=(
            _tried("shared memory", lambda: _try_shared_memory(core)),
            _tried("plan", lambda: _try_plan(core)),
        ),
        board_bytes=core.board_bytes(8, 256),
        cuda=cuda,
        cuda_problem=cuda_problem,
    )


def _tried(name: str, trial: Callable[[], str]) -> Trial:
    try:
        return Trial(name=name, ok=True, seen=trial())
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        return Trial(name=name, ok=False, seen=str(error))
    except (AttributeError, TypeError) as error:
        seen = f"the core was built from other sources ({str(error).splitlines()[0]})"
        return Trial(name=name, ok=False, seen=seen)


def _try_shared_memory(core: Any) -> str:
    name = f"/feplb-doctor-{os.getpid()}-{os.urandom(4).hex()}"
    made = core.SharedMemory.create(name, _TRIAL_BYTES)
    try:
        core.SharedMemory.open(name, _TRIAL_BYTES)
    finally:
        made.unlink()
    return f"{_TRIAL_BYTES >> 20} MiB of shared memory created, mapped twice, removed"


def _try_plan(core: Any) -> str:
    import numpy as np

    from feplb.scheduler.plan import PlanLimits

    # 2 ranks x 2 experts, loads 8 | 0: expert 0 of rank 0 goes to rank 1, and 4 | 4 remain.
    counts = np.array([[4, 4], [0, 0]], dtype=np.int32)
    limits = PlanLimits(
        num_dynamic=2, num_slots=1, num_grad_slots=1, max_recv_rows=8, max_return_rows=8
    )
    moves, _ = core.make_plan("greedy", counts, core.PlanLimits(**asdict(limits)), None)
    if moves.tolist() != [[0, 0, 1, 0, 4]]:
        raise RuntimeError(f"the plan of a known call is {moves.tolist()}, expected one move")
    return "a known call planned"


def _read_cuda(core: Any, library: str) -> tuple[CudaFacts | None, str]:
    if not (hasattr(core, "cuda_facts") and hasattr(core, "cuda_trials")):
        return (
            None,
            "this build of feplb's core has no copy-engine lane, so nothing of it was tried",
        )
    trials = cast("CudaTrials", core)
    try:
        facts = trials.cuda_facts(library)
    except RuntimeError as error:
        return None, str(error)
    access = facts["peer_access"]
    return CudaFacts(
        driver=(facts["driver"] // 1000, facts["driver"] % 1000 // 10),
        devices=tuple(
            _device(each, _trials_on(trials, index, library))
            for index, each in enumerate(facts["devices"])
        ),
        no_peer_access=tuple(
            (first, second)
            for first, row in enumerate(access)
            for second, may in enumerate(row)
            if first != second and not may
        ),
    ), ""


def _trials_on(core: CudaTrials, device: int, library: str) -> tuple[Trial, ...]:
    try:
        said = core.cuda_trials(device, library)
    except RuntimeError as error:
        return (Trial(name="trials", ok=False, seen=str(error)),)
    trials = [
        Trial(name=str(each["name"]), ok=bool(each["ok"]), seen=str(each["seen"])) for each in said
    ]
    return tuple(_with_a_peer(core, device, library, trials))


def _with_a_peer(
    core: CudaTrials, device: int, library: str, trials: Sequence[Trial]
) -> Iterator[Trial]:
    """The same; what one process could share, a second one has tried to open."""
    ways = [_WAYS[trial.name] for trial in trials if trial.name in _WAYS and trial.ok]
    opened = try_peer(core, library, device, ways) if ways and hasattr(core, "CudaLane") else {}
    for trial in trials:
        problem = opened.get(_WAYS.get(trial.name, ""))
        if problem is None:
            yield trial
        elif problem:
            yield Trial(name=trial.name, ok=False, seen=f"opened by a second process: {problem}")
        else:
            yield replace(trial, seen=f"{trial.seen}; a second process opened one")


def _device(said: Mapping[str, Any], trials: tuple[Trial, ...]) -> CudaDevice:
    major, minor = said["compute_capability"]
    return CudaDevice(
        name=str(said["name"]),
        uuid=str(said["uuid"]),
        compute_capability=(int(major), int(minor)),
        async_engines=int(said["async_engines"]),
        vmm=bool(said["vmm"]),
        posix_fd=bool(said["posix_fd"]),
        fabric=bool(said["fabric"]),
        trials=trials,
    )


# ---------------------------------------------------------------------------------------- torch


def read_torch() -> TorchFacts:
    """Load torch and, where it was built with CUDA, start that. Blocks for seconds."""
    try:
        import torch
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        # OSError: a shared library is missing; the last two: packages that do not fit together.
        return TorchFacts(problem=str(error).partition("\n")[0])
    uuids: tuple[str, ...] = ()
    problem = ""
    if torch.version.cuda is not None:
        try:
            torch.cuda.init()
            devices = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
            uuids = tuple(str(getattr(device, "uuid", "")) for device in devices)
        except (RuntimeError, AssertionError) as error:
            problem = str(error).partition("\n")[0]
    return TorchFacts(
        version=str(torch.__version__),
        cuda=torch.version.cuda,
        hip=torch.version.hip,
        uuids=uuids,
        cuda_problem=problem,
    )
