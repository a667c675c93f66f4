"""How the ranks of a domain find each other: compared, given memory, and proven. Collective.

Every step that can fail on one rank is told to all, so that nobody waits for a rank that gave up.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from .config import BalancerConfig, Environment, LayerSpec
from .memory import MemoryReport

T = TypeVar("T")

_CANARY_BYTES = 1 << 20


@dataclass(frozen=True)
class Reservation:
    """What every rank of a domain reserves, as the core takes it."""

    shapes: list[dict[str, Any]]
    num_slots: int
    num_grad_slots: int
    memory: MemoryReport


class Peers:
    """The ranks of one process group, while the domain is being built.

    Args:
        group: None without ``torch.distributed``: one rank alone.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        in_group = dist.is_initialized()
        self._group = group
        self.rank = dist.get_rank(group) if in_group else 0
        self.num_ranks = dist.get_world_size(group) if in_group else 1

    def gather(self, value: T) -> list[T]:
        """``value`` of every rank; blocks."""
        if self.num_ranks == 1:
            return [value]
        values: list[Any] = [None] * self.num_ranks
        dist.all_gather_object(values, value, group=self._group)
        return values

    def together(self, step: Callable[[], T]) -> list[T]:
        """Run ``step`` on every rank; where one fails all raise, that one its own error."""
        error: Exception | None = None
        value: Any = None
        try:
            value = step()
        except (RuntimeError, ValueError, OSError) as caught:
            error = caught
        answers = self.gather((None if error is None else str(error), value))
        if error is not None:
            # Without the frames that failed, and in no cycle: they hold mappings and files.
            try:
                raise error.with_traceback(None)
            finally:
                del error
        for rank, (text, _) in enumerate(answers):
            if text is not None:
                raise RuntimeError(f"rank {rank} could not build its Balancer: {text}")
        return [value for _, value in answers]


def identity(config: BalancerConfig, policy: str, layers: Sequence[LayerSpec]) -> dict[str, str]:
    """What must be equal on all ranks of a domain, by the name an error calls it."""
    return {
        "host": _boot_id(),
        "pid namespace": _namespace("pid"),
        "torch version": str(torch.__version__),
        "torch threads": str(torch.get_num_threads()),
        "config": repr((config, policy)),
        "layers": repr(tuple(layers)),
    }


def _compare(identities: Sequence[dict[str, str]]) -> None:
    for rank, other in enumerate(identities):
        for name, mine in identities[0].items():
            if other[name] != mine:
                raise ValueError(
                    f"ranks differ in {name}: rank 0 has {mine}, rank {rank} has {other[name]}. "
                    "Nothing was reserved. All ranks of a domain must be equal in it."
                )


def connect(
    peers: Peers, own: dict[str, str], environment: Environment, config: BalancerConfig,
    reservation: Reservation,
) -> tuple[Any, float]:  # fmt: skip
    """Build this rank's C++ Domain and open it.

    Returns:
        (the Domain, the slowest rank's rate through the lane in GB/s).
    Raises:
        ValueError: ranks differ in ``own`` (both named).
        RuntimeError: shared memory, processes or the lane are not to be had.
    Thread/stream: collective, blocks.
    """
    from . import _core

    said = peers.gather((own, os.getpid(), os.urandom(4).hex()))
    _compare([identity for identity, _, _ in said])
    pids = [pid for _, pid, _ in said]
    # Named with job, restart count, group and pid, and unlinked before anything runs.
    job = f"{environment.job_id}-{environment.restart_count}"
    name = f"/feplb-{job}-{said[0][2]}-{pids[0]}"
    arena_bytes = max(reservation.memory.arena_bytes, 64)
    board_bytes = reservation.memory.board_bytes
    created: dict[str, Any] = {}

    def create() -> None:
        arena = f"{name}-{peers.rank}"
        created[arena] = _core.SharedMemory.create(arena, arena_bytes)
        if peers.rank == 0:
            created[f"{name}-board"] = _core.SharedMemory.create(f"{name}-board", board_bytes)

    def segment(part: str, size: int) -> Any:
        return created.get(part) or _core.SharedMemory.open(part, size)

    def build() -> Any:
        return _core.Domain(
            rank=peers.rank,
            config_hash=int.from_bytes(hashlib.sha256(repr(own).encode()).digest()[:8], "little"),
            deadline_s=config.deadline_s,
            layers=reservation.shapes,
            num_slots=reservation.num_slots,
            num_grad_slots=reservation.num_grad_slots,
            pids=pids,
            names=[],
            board=segment(f"{name}-board", board_bytes),
            arenas=[segment(f"{name}-{rank}", arena_bytes) for rank in range(peers.num_ranks)],
        )

    domains: list[Any] = []
    try:
        peers.together(create)
        peers.together(lambda: domains.append(build()))
    except BaseException:
        domains.clear()  # the traceback keeps this frame, and must not keep mappings
        raise
    finally:
        for memory in created.values():
            memory.unlink()
        created.clear()  # the Domain keeps what it needs
    canary = min(_CANARY_BYTES, arena_bytes // peers.num_ranks // 64 * 64)
    rates = peers.together(lambda: float(domains[0].prove_lane(canary)))
    domains[0].open()
    peers.gather(None)  # nobody begins before everybody is open
    return domains[0], min(rates)


def _boot_id() -> str:
    with contextlib.suppress(OSError), open("/proc/sys/kernel/random/boot_id") as file:
        return f"{platform.node()} {file.read().strip()}"
    return platform.node()


def _namespace(name: str) -> str:
    with contextlib.suppress(OSError):
        return os.readlink(f"/proc/self/ns/{name}")
    return "unknown"
