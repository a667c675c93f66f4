"""Sockets between the ranks of a domain that spans hosts: one from every rank to every other.

What a count board in shared memory does on one host, the core's relay does over them: it carries
headers, releases and failures, and notices the end of a peer by the end of its socket. Used at
start-up only; everything waited for has a deadline.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import time
from collections.abc import Sequence

from .config import Environment
from .peers import DomainRanks, Peers

_TOKEN_BYTES = 16
_HELLO = struct.Struct(f"{_TOKEN_BYTES}si")  # the listener's token, the rank that connects
# A host that has gone without a word is noticed after about ten seconds.
_KEEPALIVE = {socket.TCP_KEEPIDLE: 2, socket.TCP_KEEPINTVL: 2, socket.TCP_KEEPCNT: 4}


def own_address(environment: Environment) -> str:
    """Under which other hosts reach this one: the address that the way to the job's master has."""
    if environment.host_address:
        return environment.host_address
    master = environment.master_address or socket.gethostname()
    family, kind, _, _, target = socket.getaddrinfo(master, 1, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(target)  # sends nothing: the kernel chooses the interface
        return str(probe.getsockname()[0])


def connect_mesh(
    peers: Peers, domain: DomainRanks, environment: Environment, deadline_s: float
) -> list[int]:
    """Connect this rank with every other rank of its domain.

    Returns:
        [num_ranks] file descriptors of the sockets, -1 in this rank's place; they are the caller's.
    Raises:
        RuntimeError: a rank could not be reached by the deadline; names both and what to set.
    Thread/stream: collective over the group of ``peers``; blocks until the deadline.
    """
    with contextlib.ExitStack() as open_until_done:
        token = os.urandom(_TOKEN_BYTES)

        def listen() -> tuple[socket.socket, str]:
            address = own_address(environment)
            family = socket.AF_INET6 if ":" in address else socket.AF_INET
            try:
                listener = socket.create_server(
                    (address, 0), family=family, backlog=domain.num_ranks
                )
            except OSError as error:
                raise RuntimeError(
                    f"this host cannot be reached by others under FEPLB_HOST_ADDRESS={address}: "
                    f"{error}. Set it to an address of this host."
                ) from error
            return open_until_done.enter_context(listener), address

        made: list[tuple[socket.socket, str]] = []
        peers.together(lambda: made.append(listen()))
        listener, address = made[0]
        said = peers.gather((address, listener.getsockname()[1], token))
        places = [said[rank] for rank in domain.group_ranks]
        sockets: dict[int, socket.socket] = {}
        try:
            peers.together(lambda: sockets.update(_reach(domain, places, deadline_s)))
            peers.together(lambda: sockets.update(_answer(domain, listener, token, deadline_s)))
        except BaseException:
            for made_socket in sockets.values():
                made_socket.close()
            raise
    return [
        _tuned(sockets[rank]).detach() if rank in sockets else -1
        for rank in range(domain.num_ranks)
    ]


def _reach(
    domain: DomainRanks, places: Sequence[tuple[str, int, bytes]], deadline_s: float
) -> dict[int, socket.socket]:
    """Connect to every rank below this one; who listens need not have answered yet."""
    made: dict[int, socket.socket] = {}
    for rank in range(domain.rank):
        address, port, token = places[rank]
        try:
            made[rank] = socket.create_connection((address, port), timeout=deadline_s)
            made[rank].sendall(_HELLO.pack(token, domain.rank))
        except OSError as error:
            for other in made.values():
                other.close()
            raise RuntimeError(
                f"rank {domain.global_ranks[domain.rank]} cannot reach rank "
                f"{domain.global_ranks[rank]} at {address}, port {port}: {error}. They are in one "
                "domain over several hosts, which needs TCP between its hosts. Set "
                "FEPLB_HOST_ADDRESS on each host to an address that the others reach, or give each "
                "host a FEPLB_DOMAIN of its own."
            ) from error
    return made


def _answer(
    domain: DomainRanks, listener: socket.socket, token: bytes, deadline_s: float
) -> dict[int, socket.socket]:
    """Take the connection of every rank above this one; others are turned away."""
    made: dict[int, socket.socket] = {}
    until = time.monotonic() + deadline_s
    try:
        while len(made) < domain.num_ranks - 1 - domain.rank:
            listener.settimeout(max(until - time.monotonic(), 0.001))
            caller, _ = listener.accept()
            caller.settimeout(max(until - time.monotonic(), 0.001))
            hello = caller.recv(_HELLO.size, socket.MSG_WAITALL)
            said, rank = _HELLO.unpack(hello) if len(hello) == _HELLO.size else (b"", -1)
            if said == token and domain.rank < rank < domain.num_ranks and rank not in made:
                made[rank] = caller
            else:
                caller.close()
    except OSError as error:
        for other in made.values():
            other.close()
        missing = sorted(set(range(domain.rank + 1, domain.num_ranks)) - set(made))
        raise RuntimeError(
            f"rank {domain.global_ranks[missing[0]]} has not connected within {deadline_s} s "
            f"(deadline_s): {error}. Its host must reach {listener.getsockname()[0]}; set "
            "FEPLB_HOST_ADDRESS on each host to an address that the others reach."
        ) from error
    return made


def _tuned(connection: socket.socket) -> socket.socket:
    """Small messages go at once, and a silent end is noticed."""
    connection.setblocking(False)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in _KEEPALIVE.items():
        connection.setsockopt(socket.IPPROTO_TCP, option, value)
    return connection
