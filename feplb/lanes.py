"""Lanes: how the bytes of a domain travel, opened on this rank and shared with its peers.

``host``: arenas in shared memory of the host, copied by threads. ``ce``: arenas on the GPUs, copied
by their copy engines; a peer gets a rank's arena as a file descriptor over a Unix socket ("vmm"),
as a CUDA IPC handle ("ipc") or as a fabric handle ("fabric"). ``cupy``: the same in Python
(cupy_lane.py). Used at start-up only; everything a lane waits for has a deadline.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch

from .config import BalancerConfig, Environment
from .costs import LaneRates
from .cupy_lane import CupyLane
from .links import check_fabric, check_nvlink
from .observe.nvlink import read_topology
from .peers import DomainRanks, Peers
from .scheduler.machines import Machine

if TYPE_CHECKING:
    from typing_extensions import Self

_DRIVER = "libcuda.so.1"
_HOST_CANARY_BYTES = 1 << 20
_CE_CANARY_BYTES = 64 << 20  # at 400 GB/s five times what the submission takes

# Opens the shared-memory segment of the domain's name with this ending.
OpenSegment = Callable[[str, int], Any]


class Lane(Protocol):
    """One rank's end of a lane.

    Attributes:
        device: where rows, weights and gradients live.
        core: what the C++ Domain is given.
        description: for the log: what was chosen.
        canary_bytes: what start-up pushes to each peer to prove and to measure the lane.
        has_links: a rank takes in what its peers push by a link, at a rate of its own.
    """

    device: torch.device
    core: Any
    description: str
    canary_bytes: int
    has_links: bool

    def reserve(self, create: OpenSegment, rank: int, num_bytes: int) -> None:
        """Reserve this rank's arena."""
        ...

    def share(
        self, peers: Peers, domain: DomainRanks, name: str, num_bytes: int, deadline_s: float
    ) -> None:
        """Hand it to the peers, where that takes more than a name. Collective, blocks."""
        ...

    def arenas(self, open_segment: OpenSegment, domain: DomainRanks, num_bytes: int) -> list[Any]:
        """Every rank's arena, mapped here."""
        ...


def lane_name(config: BalancerConfig, environment: Environment) -> str:
    """What the config, or FEPLB_LANE, asks for; ``auto``: ce where PyTorch has a GPU."""
    wanted = config.lane if config.lane != "auto" else environment.lane or "auto"
    if wanted == "auto":
        return "ce" if torch.cuda.is_available() else "host"
    return wanted


def gpu_of(config: BalancerConfig, environment: Environment) -> str:
    """Name of the GPU that this rank's rows will live on; "" where that is the CPU."""
    has_gpu = lane_name(config, environment) != "host" and torch.cuda.is_available()
    return torch.cuda.get_device_name() if has_gpu else ""


def open_lane(config: BalancerConfig, environment: Environment, domain: DomainRanks) -> Lane:
    """This rank's end of the lane.

    Raises:
        RuntimeError: the machine has no such lane.
        ValueError: the lane has not what the config asks for, or does not go over hosts.
    """
    name = lane_name(config, environment)
    if name == "ce":
        return CopyEngineLane(config, environment, over_hosts=domain.over_hosts)
    if domain.over_hosts:
        raise ValueError(
            f"lane={name!r}: FEPLB_DOMAIN gives ranks of several hosts one name, and only the ce "
            "lane goes over hosts (GPUs of one NVLink fabric). Give each host a name of its own, "
            'or use lane="ce".'
        )
    return CupyLane(config) if name == "cupy" else HostLane()


# ----------------------------------------------------------------------------------------- host


class HostLane:
    """Shared memory of one host."""

    def __init__(self) -> None:
        from . import _core

        self.device = torch.device("cpu")
        self.core: Any = _core.HostLane()
        self.description = "host"
        self.canary_bytes = _HOST_CANARY_BYTES
        self.has_links = False

    def reserve(self, create: OpenSegment, rank: int, num_bytes: int) -> None:
        create(str(rank), num_bytes)

    def share(
        self, peers: Peers, domain: DomainRanks, name: str, num_bytes: int, deadline_s: float
    ) -> None:
        pass  # peers open it by its name

    def arenas(self, open_segment: OpenSegment, domain: DomainRanks, num_bytes: int) -> list[Any]:
        return [open_segment(str(rank), num_bytes) for rank in range(domain.num_ranks)]


# ------------------------------------------------------------------------------------------- ce


class CopyEngineLane:
    """The GPU that is current when the Balancer is built.

    Args:
        over_hosts: peers may be on other hosts, so only fabric handles will do.
    Raises:
        RuntimeError: no driver, one that is too old, or one without what the config asks for.
        ValueError: the config asks for a way that does not go over hosts.
    """

    def __init__(
        self, config: BalancerConfig, environment: Environment, *, over_hosts: bool = False
    ) -> None:
        from . import _core

        self._library = environment.cuda_library or _DRIVER
        ordinal = torch.cuda.current_device() if torch.cuda.is_available() else 0
        self.core: Any = _core.CudaLane(
            library=self._library,
            ordinal=ordinal,
            copy_call=config.copy_call,
            flag_call=config.flag_call,
        )
        # The stand-in of the tests lets tensors of the host be a GPU's.
        if not torch.cuda.is_available() and not self.core.is_stand_in:
            raise RuntimeError(
                f"lane='ce': {self._library} is there, but PyTorch {torch.__version__} has no CUDA "
                "(torch.cuda.is_available() is False). Install a CUDA build of it, or use "
                "lane='host'."
            )
        is_real = not self.core.is_stand_in
        self.device = torch.device("cuda", ordinal) if is_real else torch.device("cpu")
        self._ordinal = ordinal
        self._way = self._choose_way(config.arena_handle, over_hosts)
        where = ", flags in GPU memory" if over_hosts else ""
        self.description = f"ce ({self.core.calls}{where}, {self._way} arena)"
        self.canary_bytes = _CE_CANARY_BYTES
        self.has_links = True
        self._own: Any = None
        self._over_hosts = over_hosts
        self._opened: list[Any] = []

    def _choose_way(self, asked: str, over_hosts: bool) -> str:
        if asked == "auto" and not over_hosts:
            return "vmm" if self.core.has_vmm else "ipc"
        if over_hosts and asked not in ("auto", "fabric"):
            raise ValueError(
                f"arena_handle={asked!r} ends at the host, and FEPLB_DOMAIN gives ranks of several "
                'hosts one name. Use "fabric" or "auto", or give each host a name of its own.'
            )
        if (over_hosts or asked == "fabric") and not self.core.has_fabric:
            raise RuntimeError(
                f"GPU {self._ordinal} has no fabric handles (CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_"
                "FABRIC_SUPPORTED is 0), which a domain over several hosts needs: NVLink that "
                "joins the hosts (NVL72), its fabric up and nvidia-imex running. Give each host a "
                "FEPLB_DOMAIN of its own, or leave FEPLB_DOMAIN unset."
            )
        return asked if asked != "auto" else "fabric"

    def reserve(self, create: OpenSegment, rank: int, num_bytes: int) -> None:
        self._own = self.core.create_arena(num_bytes, self._way)

    def share(
        self, peers: Peers, domain: DomainRanks, name: str, num_bytes: int, deadline_s: float
    ) -> None:
        self._find_peers(peers, domain)
        if self._way == "vmm":
            self._share_descriptors(peers, domain, name, num_bytes, deadline_s)
            return
        if self._way == "fabric":
            said = peers.together(self._own.export_fabric)
            handles = [said[rank] for rank in domain.group_ranks]
            peers.together(lambda: self._open(domain, handles, num_bytes, self.core.open_fabric))
            return
        named = peers.together(lambda: (os.getpid(), self._own.export_ipc()))
        _refuse_threads([named[rank][0] for rank in domain.group_ranks], domain.global_ranks)
        handles = [named[rank][1] for rank in domain.group_ranks]
        peers.together(lambda: self._open(domain, handles, num_bytes, self.core.open_ipc))

    def _share_descriptors(
        self, peers: Peers, domain: DomainRanks, name: str, num_bytes: int, deadline_s: float
    ) -> None:
        own: list[int] = []
        fds: list[int] = []
        try:
            # One step after the other: nobody waits for a descriptor that a peer does not have.
            peers.together(lambda: own.append(self._own.export_fd()))
            with _Sockets(name, domain, deadline_s) as sockets:
                peers.together(sockets.listen)
                peers.together(lambda: fds.extend(sockets.exchange(own[0])))
            peers.together(lambda: self._open(domain, fds, num_bytes, self.core.open_fd))
        finally:
            for fd in own + fds:
                if fd >= 0:
                    os.close(fd)

    def _find_peers(self, peers: Peers, domain: DomainRanks) -> None:
        """Check how the GPUs are joined, and tell the core which ones the peers have, if seen."""
        from . import _core

        def own_uuid() -> tuple[str, list[str]]:
            uuids = [gpu["uuid"] for gpu in _core.cuda_facts(self._library)["devices"]]
            return uuids[self._ordinal], uuids

        said = peers.together(own_uuid)
        visible = said[peers.rank][1]
        of_ranks = [said[rank][0] for rank in domain.group_ranks]
        if not self.core.is_stand_in:  # it has no NVML beside it
            self._check_links(peers, domain, of_ranks)
        if all(uuid in visible for uuid in of_ranks):
            self.core.set_peer_ordinals([visible.index(uuid) for uuid in of_ranks])

    def _check_links(self, peers: Peers, domain: DomainRanks, uuids: Sequence[str]) -> None:
        if not self._over_hosts:
            peers.together(lambda: check_nvlink(uuids, domain.global_ranks))
            return
        own = uuids[domain.rank]
        said = peers.together(lambda: read_topology([own]).gpus[0])  # NVML sees its own host alone
        gpus = [said[rank] for rank in domain.group_ranks]
        peers.together(lambda: check_fabric(gpus, domain.global_ranks))

    def _open(
        self, domain: DomainRanks, handles: Sequence[Any], num_bytes: int, opener: Any
    ) -> None:
        self._opened = [
            self._own if rank == domain.rank else opener(num_bytes, handle)
            for rank, handle in enumerate(handles)
        ]

    def arenas(self, open_segment: OpenSegment, domain: DomainRanks, num_bytes: int) -> list[Any]:
        opened, self._opened, self._own = self._opened, [], None
        return opened


def _refuse_threads(pids: Sequence[int], global_ranks: Sequence[int]) -> None:
    for b, pid in enumerate(pids):
        a = pids.index(pid)
        if a != b:
            raise ValueError(
                f"ranks {global_ranks[a]} and {global_ranks[b]} are threads of one process ({pid}) "
                "and arenas go as CUDA IPC handles, which cannot be opened in the process that "
                "made them. Set arena_handle='vmm', or give each rank a process of its own."
            )


class _Sockets:
    """Passes one file descriptor from every rank of a domain to every other.

    Sockets have names in the abstract namespace: nothing is left behind, whoever dies. Whoever
    connects must be a process of this user.
    """

    def __init__(self, name: str, domain: DomainRanks, deadline_s: float) -> None:
        self._name = name
        self._domain = domain
        self._deadline_s = deadline_s
        self._listener = self._socket()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()

    def _socket(self) -> socket.socket:
        made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        made.settimeout(self._deadline_s)
        return made

    def _address(self, rank: int) -> str:
        return f"\0{self._name.strip('/')}-{rank}"

    def listen(self) -> None:
        """Before any rank connects."""
        self._listener.bind(self._address(self._domain.rank))
        self._listener.listen(self._domain.num_ranks)

    def exchange(self, own: int) -> list[int]:
        """Every rank's descriptor, -1 in this rank's place; they are the caller's.

        Raises:
            RuntimeError: a peer did not answer, or another user's process did.
        """
        others = [r for r in range(self._domain.num_ranks) if r != self._domain.rank]
        fds = [-1] * self._domain.num_ranks
        asked: dict[int, socket.socket] = {}
        try:
            for rank in others:
                asked[rank] = self._socket()
                asked[rank].connect(self._address(rank))
            for _ in others:
                self._serve(own)
            for rank in others:
                _, received, _, _ = socket.recv_fds(asked[rank], 1, 1)
                if not received:
                    raise RuntimeError(
                        f"rank {self._domain.global_ranks[rank]} sent no descriptor of its arena"
                    )
                fds[rank] = received[0]
        except OSError as error:
            for fd in fds:
                if fd >= 0:
                    os.close(fd)
            raise RuntimeError(
                f"passing arenas between ranks failed: {error}. The ranks of a domain need one "
                "network namespace (one container, or --network=host); or use "
                "arena_handle='ipc'."
            ) from error
        finally:
            for connection in asked.values():
                connection.close()
        return fds

    def _serve(self, own: int) -> None:
        connection, _ = self._listener.accept()
        with connection:
            size = struct.calcsize("3i")
            credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
            _, uid, _ = struct.unpack("3i", credentials)
            if uid != os.getuid():
                raise RuntimeError(f"user {uid} asked for this rank's arena; only its own user may")
            socket.send_fds(connection, [b"a"], [own])


@dataclass(frozen=True)
class ProvenLane:
    """A lane that has carried a pattern between all ranks.

    Args:
        device: where rows, weights and gradients live.
        rates: measured, each that of the slowest rank.
        description: for the log.
        machine: rates of the GPU; None where rows live on the CPU.
    """

    device: torch.device
    rates: LaneRates
    description: str
    machine: Machine | None = None
