"""How the ranks of a domain come together: compared, given memory, and proven. Collective.

Every step that can fail on one rank is told to all, so that nobody waits for a rank that gave up.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .config import BalancerConfig, Environment, LayerSpec
from .gpu_costs import machine_of
from .lane_rates import measure_rates
from .lanes import Lane, ProvenLane, open_lane
from .memory import MemoryReport
from .mesh import connect_mesh
from .peers import DomainRanks, Peers

_LEAST_ARENA_BYTES = 64  # a rank alone reserves nothing, but a mapping is never empty


@dataclass(frozen=True)
class Reservation:
    """What every rank of a domain reserves, as the core takes it."""

    shapes: list[dict[str, Any]]
    num_slots: int
    num_grad_slots: int
    memory: MemoryReport


def identity(
    config: BalancerConfig, policy: str, layers: Sequence[LayerSpec], gpu: str
) -> dict[str, str]:
    """What must be equal on all ranks of a group, by the name an error calls it."""
    return {
        "torch version": str(torch.__version__),
        "torch threads": str(torch.get_num_threads()),
        "config": repr((config, policy)),
        "layers": repr(tuple(layers)),
        "GPU": gpu,
    }


def _compare(identities: Sequence[dict[str, str]], global_ranks: Sequence[int]) -> None:
    for rank, other in zip(global_ranks, identities, strict=True):
        for name, first in identities[0].items():
            if other[name] != first:
                raise ValueError(
                    f"ranks differ in {name}: rank {global_ranks[0]} has {first}, rank {rank} has "
                    f"{other[name]}. Nothing was reserved. All ranks must be equal in it."
                )


class _Segments:
    """Shared memory of one domain, under its name: "board" and the arenas as "0", "1", ...; in a
    domain over several hosts a "board-0", "board-1", ... for each rank."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._created: dict[str, Any] = {}

    def create(self, part: str, size: int) -> None:
        """Reserve a part; ``open`` gives it out."""
        from . import _core

        self._created[part] = _core.SharedMemory.create(f"{self.name}-{part}", size)

    def open(self, part: str, size: int) -> Any:
        """A part that this rank or another has created."""
        from . import _core

        return self._created.get(part) or _core.SharedMemory.open(f"{self.name}-{part}", size)

    def remove(self, num_ranks: int) -> None:
        """No name stays, and nothing is held here: the Domain keeps what it needs.

        All names, and not this rank's alone: one that was killed cannot remove its own.
        """
        from . import _core

        ranks = range(num_ranks)
        for part in ("board", *ranks, *(f"board-{rank}" for rank in ranks)):
            _core.SharedMemory.remove(f"{self.name}-{part}")
        self._created.clear()


@dataclass(frozen=True)
class _Parts:
    """What this rank creates or opens: its arena, and the board by its part's name."""

    arena_bytes: int
    mapped_bytes: int  # the arena, and what lies behind it
    board: str
    board_bytes: int


def _parts(domain: DomainRanks, memory: MemoryReport) -> _Parts:
    """Hosts share no board: each rank has its own, and flags lie behind the arenas of the GPUs."""
    from . import _core

    arena_bytes = max(memory.arena_bytes, _LEAST_ARENA_BYTES)
    if not domain.over_hosts:
        return _Parts(arena_bytes, arena_bytes, "board", memory.board_bytes)
    mapped_bytes = arena_bytes + _core.flag_bytes(domain.num_ranks)
    return _Parts(arena_bytes, mapped_bytes, f"board-{domain.rank}", memory.board_bytes)


def _given_away(sockets: list[int]) -> list[int]:
    """All of them, to whoever asks first."""
    given, sockets[:] = list(sockets), []
    return given


def connect(
    peers: Peers, domain: DomainRanks, own: dict[str, str], environment: Environment,
    config: BalancerConfig, reservation: Reservation,
) -> tuple[Any, ProvenLane]:  # fmt: skip
    """Build this rank's C++ Domain and prove its lane; ``open_together`` starts it.

    Returns:
        (the Domain, its lane).
    Raises:
        ValueError: ranks differ in ``own`` (both named).
        RuntimeError: memory, processes, hosts or the lane are not to be had.
    Thread/stream: collective, blocks.
    """
    from . import _core

    said = peers.gather((own, os.getpid(), os.urandom(4).hex()))
    _compare([identity for identity, _, _ in said], peers.global_ranks)
    lanes: list[Lane] = []
    peers.together(lambda: lanes.append(open_lane(config, environment, domain)))
    lane = lanes[0]
    # Over hosts the end of a socket tells of a peer's end.
    pids = [0 if domain.over_hosts else said[rank][1] for rank in domain.group_ranks]
    # Named with job, restart count, group and pid, and unlinked before anything runs.
    job = f"{environment.job_id}-{environment.restart_count}"
    first = said[domain.group_ranks[0]]
    segments = _Segments(f"/feplb-{job}-{first[2]}-{first[1]}")
    parts = _parts(domain, reservation.memory)
    sockets: list[int] = []

    def create() -> None:
        lane.reserve(segments.create, domain.rank, parts.mapped_bytes)
        if domain.over_hosts or domain.rank == 0:
            segments.create(parts.board, parts.board_bytes)

    def build() -> Any:
        return _core.Domain(
            rank=domain.rank,
            config_hash=int.from_bytes(hashlib.sha256(repr(own).encode()).digest()[:8], "little"),
            deadline_s=config.deadline_s,
            layers=reservation.shapes,
            num_slots=reservation.num_slots,
            num_grad_slots=reservation.num_grad_slots,
            pids=pids,
            global_ranks=list(domain.global_ranks),
            board=segments.open(parts.board, parts.board_bytes),
            arenas=lane.arenas(segments.open, domain, parts.mapped_bytes),
            lane=lane.core,
            sockets=_given_away(sockets),
            flags_at=parts.arena_bytes,
        )

    domains: list[Any] = []
    try:
        peers.together(create)
        lane.share(peers, domain, segments.name, parts.mapped_bytes, config.deadline_s)
        if domain.over_hosts:
            sockets += connect_mesh(peers, domain, environment, config.deadline_s)
        peers.together(lambda: domains.append(build()))
    except BaseException:
        domains.clear()  # the traceback keeps this frame, and must not keep mappings
        for fd in _given_away(sockets):
            if fd >= 0:
                os.close(fd)
        raise
    finally:
        segments.remove(domain.num_ranks)
    canary = min(lane.canary_bytes, parts.arena_bytes // domain.num_ranks // 64 * 64)
    rates = measure_rates(peers, domain, domains[0], canary, has_links=lane.has_links)
    peers.together(lambda: domains[0].prove_lane(canary))
    machine = machine_of(own["GPU"]) if own["GPU"] else None
    return domains[0], ProvenLane(lane.device, rates, lane.description, machine)


def open_together(peers: Peers, core: Any) -> None:
    """Start the Domain's threads; nobody begins before everybody is open. Collective, blocks."""
    core.open()
    peers.gather(None)
