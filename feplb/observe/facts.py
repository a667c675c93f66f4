"""Everything that doctor reads, before anything is judged, and what it is asked to judge for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from feplb.config import Environment, read_environment
from feplb.observe.core_trials import CoreFacts, TorchFacts, read_core, read_torch
from feplb.observe.cupy_findings import NOT_TRIED, CupyFacts, read_cupy
from feplb.observe.machine import Machine, read_machine
from feplb.observe.nvlink import Topology, read_topology
from feplb.observe.packages import read_packages
from feplb.observe.processes import ProcessTrials, try_processes


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What is judged.

    Args:
        lane: "host", "ce" or "cupy"; None: FEPLB_LANE, else "ce" where a GPU is seen, else "host".
        arena_bytes: of one rank (``print(balancer.memory)``), above 0; None: not known.
        ranks: of this host, above 0; None: one per GPU, or 2.
    """

    lane: str | None = None
    arena_bytes: int | None = None
    ranks: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What was read and tried here.

    Attributes:
        environment: None where a FEPLB_* variable is wrong; environment_problem says how.
        packages: distribution -> version, of those feplb works with.
    """

    machine: Machine
    processes: ProcessTrials
    core: CoreFacts
    torch: TorchFacts
    topology: Topology
    packages: Mapping[str, str]
    environment: Environment | None
    environment_problem: str = ""
    cupy: CupyFacts = NOT_TRIED

    @property
    def has_gpu(self) -> bool:
        """Whether a GPU is at hand, masked or not."""
        seen = (self.topology.gpus, self.visible, self.machine.gpu_nodes)
        return any(seen)

    @property
    def visible(self) -> tuple[str, ...]:
        """Bare UUIDs of the devices CUDA shows this process, by ordinal."""
        listed = self.torch.uuids
        if self.core.cuda is not None:
            listed = tuple(device.uuid for device in self.core.cuda.devices)
        return tuple(bare(uuid) for uuid in listed)

    @property
    def is_masked(self) -> bool:
        """Whether CUDA shows this process one device of several."""
        return len(self.visible) == 1 and len(self.topology.gpus) > 1

    @property
    def job_gpus(self) -> tuple[int, ...]:
        """The GPUs of the job on this host, as indices into the topology.

        Those that CUDA shows; all where it shows only one: the job's launcher masks the others.
        """
        some = range(len(self.topology.gpus))
        if self.is_masked or not self.visible:
            return tuple(some)
        return tuple(at for at in some if bare(self.topology.gpus[at].uuid) in self.visible)


def bare(uuid: str) -> str:
    """A UUID as torch writes it: NVML and CUDA put "GPU-" before it."""
    return uuid.removeprefix("GPU-").lower()


def read_facts(
    *,
    lane: str | None = None,
    cupy: Callable[[], Mapping[str, Any]] | None = None,
    core: ModuleType | None = None,
    nvml: Any = None,
) -> Facts:
    """Read and try everything. Blocks for seconds (torch); changes nothing that stays.

    Args:
        lane: as in ``Question``.
        cupy: tries the cupy lane (``feplb.cupy_trials.try_cupy``); called where that is judged.
        core: in place of feplb._core. nvml: in place of pynvml.
    """
    environment, problem = None, ""
    try:
        environment = read_environment()
    except ValueError as error:
        problem = str(error)
    wanted = lane or (environment.lane if environment else None)
    return Facts(
        machine=read_machine(),
        processes=try_processes(),
        core=read_core(core, environment.cuda_library if environment else None),
        torch=read_torch(),
        topology=read_topology(nvml=nvml),
        packages=read_packages(),
        environment=environment,
        environment_problem=problem,
        cupy=read_cupy(cupy) if wanted == "cupy" and cupy is not None else NOT_TRIED,
    )
