"""The ranks of an EP group, and which of them form one domain. Collective, by torch.distributed.

A domain is the ranks that reach each other's memory: those of one host, or of several hosts whose
GPUs one NVLink fabric joins (NVL72), where ``FEPLB_DOMAIN`` gives them one name. An EP group over
other hosts is several domains; each balances its own rows, and ``check()`` alone goes round the
whole group.

Example, an EP group of global ranks 8, 9, 10, 11, of which 8 and 9 run on one host and 10 and 11 on
another: on rank 10, ``Peers`` has rank 2 of 4, and its domain has group ranks (2, 3), global ranks
(10, 11), rank 0 of 2.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import logging
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")

logger = logging.getLogger(__name__)

_TEXT_BYTES = 1024  # of what a rank tells the others in check()


class Peers:
    """The ranks of one process group.

    Args:
        group: None without ``torch.distributed``: one rank alone. Kept.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        in_group = dist.is_initialized()
        self._group = group
        self.rank = dist.get_rank(group) if in_group else 0
        self.num_ranks = dist.get_world_size(group) if in_group else 1
        self.global_ranks: list[int] = (
            dist.get_process_group_ranks(group or dist.group.WORLD) if in_group else [0]
        )
        self._told: Any = None

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
        for rank, (text, _) in zip(self.global_ranks, answers, strict=True):
            if text is not None:
                raise RuntimeError(f"rank {rank} could not build its Balancer: {text}")
        return [value for _, value in answers]

    def hear(self, deadline_s: float) -> list[str]:
        """What every rank of the group has to say; empty where all is well.

        Raises:
            RuntimeError: not everyone has answered by the deadline, or the group is broken.
        Thread/stream: collective with ``hear`` and ``tell``; blocks, GIL released, until the
            deadline.
        """
        work, heard = self._exchange("")
        work.wait(dt.timedelta(seconds=deadline_s))
        return [bytes(h.tolist()).rstrip(b"\0").decode(errors="ignore") for h in heard]

    def tell(self, text: str) -> None:
        """Answer those who ``hear`` with ``text`` (cut off where it is long); waits for nobody."""
        self._told = self._exchange(text)  # kept: it is read when they come

    def _exchange(self, text: str) -> tuple[Any, list[torch.Tensor]]:
        is_device_group = dist.get_backend(self._group) == "nccl"
        said = text.encode()[: _TEXT_BYTES - 1].ljust(_TEXT_BYTES, b"\0")
        own = torch.frombuffer(bytearray(said), dtype=torch.uint8)
        if is_device_group:
            own = own.to("cuda")
        heard = [torch.empty_like(own) for _ in range(self.num_ranks)]
        work = dist.all_gather(heard, own, group=self._group, async_op=True)
        return work, heard


@dataclass(frozen=True)
class DomainRanks:
    """The ranks of this rank's domain, in the order of the group."""

    rank: int  # this rank's place among them
    group_ranks: tuple[int, ...]
    global_ranks: tuple[int, ...]
    # A domain of the group spans hosts: all of them then connect in the same way, by fabric handles
    # and sockets.
    over_hosts: bool = False

    @property
    def num_ranks(self) -> int:
        """How many they are."""
        return len(self.group_ranks)


def find_domain(peers: Peers, named: str | None, *, moves_nothing: bool) -> DomainRanks:
    """Split the group by host, or by name.

    Args:
        named: what this rank's domain is called where its host's name would not do; None: by host.
        moves_nothing: the policy is none, so that a rank alone in its domain misses nothing.
    Raises:
        ValueError: no two ranks share a domain, so that nothing could ever be balanced; or ranks of
            one domain do not see each other's processes.
    Thread/stream: collective, blocks.
    """
    said = peers.gather((named or _host(), _namespace("pid"), _kernel()))
    places = [place for place, _, _ in said]
    own = places[peers.rank]
    ranks = tuple(rank for rank, place in enumerate(places) if place == own)
    if peers.num_ranks > 1 and len(set(places)) == peers.num_ranks and not moves_nothing:
        raise ValueError(
            f"each of the group's {peers.num_ranks} ranks is alone on its host (rank 0 on "
            f"{places[0]}, rank 1 on {places[1]}), so nothing could be balanced. Make EP groups of "
            'ranks that share a host, or set policy="none".'
        )
    hosts_of: dict[str, set[str]] = {}
    for place, _, host in said:
        hosts_of.setdefault(place, set()).add(host)
    over_hosts = any(len(hosts) > 1 for hosts in hosts_of.values())
    for rank in ranks:
        namespace, mine = said[rank][1], said[ranks[0]][1]
        if namespace != mine and not over_hosts:
            raise ValueError(
                f"ranks {peers.global_ranks[ranks[0]]} and {peers.global_ranks[rank]} are in one "
                f"domain ({own}) but in different pid namespaces ({mine}, {namespace}), so neither "
                "would notice the other's death. Run them in one container, share the host's pid "
                "namespace, or give each container its own FEPLB_DOMAIN."
            )
    global_ranks = tuple(peers.global_ranks[rank] for rank in ranks)
    domain = DomainRanks(ranks.index(peers.rank), ranks, global_ranks, over_hosts)
    if peers.num_ranks > 1 and domain.num_ranks == 1 and not moves_nothing:
        alone = domain.global_ranks[0]
        logger.warning("rank %d is alone in its domain (%s): nothing to balance with", alone, own)
    return domain


def _host() -> str:
    return f"{platform.node()} {_kernel()}"


def _kernel() -> str:
    """The same in all containers of a host."""
    with contextlib.suppress(OSError), open("/proc/sys/kernel/random/boot_id") as file:
        return file.read().strip()
    return platform.node()


def _namespace(name: str) -> str:
    with contextlib.suppress(OSError):
        return os.readlink(f"/proc/self/ns/{name}")
    return "unknown"
