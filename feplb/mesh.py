"""Sockets between the ranks of a domain that spans hosts: one from every rank to every other.

What a count board in shared memory does on one host, the core's relay does over them: it carries
headers, releases and failures, and notices the end of a peer by the end of its socket. Used at
start-up only; everything waited for has a deadline.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
import struct
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from .config import Environment
from .peers import DomainRanks, Peers

if TYPE_CHECKING:
    from typing_extensions import Self

_TOKEN_BYTES = 16
_HELLO = struct.Struct(f"{_TOKEN_BYTES}si")  # the listener's token, the rank that connects
# A host that has gone without a word is noticed after about ten seconds: where nothing is on its
# way by keepalive, else by the time that bytes may go without an answer (milliseconds).
_TCP_OPTIONS = {
    socket.TCP_NODELAY: 1,
    socket.TCP_KEEPIDLE: 2,
    socket.TCP_KEEPINTVL: 2,
    socket.TCP_KEEPCNT: 4,
    socket.TCP_USER_TIMEOUT: 8_000,
}
# So many strangers may wait at the door before the ranks of a domain.
_MOST_STRANGERS = 128


def own_address(environment: Environment) -> str:
    """Under which other hosts reach this one: the address that the way to the job's master has.

    Raises:
        RuntimeError: there is no such way, or the master's name is not known.
    """
    if environment.host_address:
        return environment.host_address
    master = environment.master_address or socket.gethostname()
    problem: OSError | None = None
    try:
        for family, kind, _, _, target in socket.getaddrinfo(master, 1, type=socket.SOCK_DGRAM):
            try:
                with socket.socket(family, kind) as probe:
                    probe.connect(target)  # sends nothing: the kernel chooses the interface
                    return str(probe.getsockname()[0])
            except OSError as error:
                problem = error
    except OSError as error:
        problem = error
    raise RuntimeError(
        f"this host has no way to {master} (MASTER_ADDR): {problem}. Set FEPLB_HOST_ADDRESS on "
        "each host to an address that the others reach."
    )


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
                    (address, 0), family=family, backlog=domain.num_ranks + _MOST_STRANGERS
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
            peers.together(lambda: _reach(domain, places, deadline_s, sockets))
            peers.together(lambda: _answer(domain, listener, token, deadline_s, sockets))
        except BaseException:
            for made_socket in sockets.values():
                made_socket.close()
            raise
    return [sockets[rank].detach() if rank in sockets else -1 for rank in range(domain.num_ranks)]


def _reach(
    domain: DomainRanks, places: Sequence[tuple[str, int, bytes]], deadline_s: float,
    made: dict[int, socket.socket],
) -> None:  # fmt: skip
    """Connect to every rank below this one; who listens need not have answered yet."""
    for rank in range(domain.rank):
        address, port, token = places[rank]
        try:
            made[rank] = socket.create_connection((address, port), timeout=deadline_s)
            made[rank].sendall(_HELLO.pack(token, domain.rank))
            _tune(made[rank])
        except OSError as error:
            raise RuntimeError(
                f"rank {domain.global_ranks[domain.rank]} cannot reach rank "
                f"{domain.global_ranks[rank]} at {address}, port {port}: {error}. They are in one "
                "domain over several hosts, which needs TCP between its hosts. Set "
                "FEPLB_HOST_ADDRESS on each host to an address that the others reach, or give each "
                "host a FEPLB_DOMAIN of its own."
            ) from error


def _answer(
    domain: DomainRanks, listener: socket.socket, token: bytes, deadline_s: float,
    made: dict[int, socket.socket],
) -> None:  # fmt: skip
    """Take the connection of every rank above this one.

    Others are turned away; whoever says nothing keeps nobody waiting.
    """
    missing = set(range(domain.rank + 1, domain.num_ranks))
    until = time.monotonic() + deadline_s
    try:
        with _Door(listener) as door:
            while missing:
                if time.monotonic() >= until:
                    raise TimeoutError("timed out")
                for caller, hello in door.callers(until - time.monotonic()):
                    said, rank = _HELLO.unpack(hello)
                    if said == token and rank in missing:
                        made[rank] = caller
                        missing.remove(rank)
                        _tune(caller)
                    else:
                        caller.close()
    except OSError as error:
        raise RuntimeError(
            f"rank {domain.global_ranks[min(missing, default=domain.rank)]} has not connected "
            f"within {deadline_s} s (deadline_s): {error}. Its host must reach "
            f"{listener.getsockname()[0]}; set FEPLB_HOST_ADDRESS on each host to an address that "
            "the others reach."
        ) from error


class _Door:
    """Those who have connected to a listener, until they have said who they are."""

    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener
        self._listener.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(listener, selectors.EVENT_READ)
        self._heard: dict[socket.socket, bytes] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._selector.close()
        for caller in self._heard:
            caller.close()

    def callers(self, timeout_s: float) -> list[tuple[socket.socket, bytes]]:
        """Those who have said all of a hello, each the caller's from here on, and the hello."""
        found = []
        for key, _ in self._selector.select(max(timeout_s, 0.0)):
            if key.fileobj is self._listener:
                self._let_in()
                continue
            caller = key.fileobj
            assert isinstance(caller, socket.socket)
            more = b""
            with contextlib.suppress(ConnectionError):
                more = caller.recv(_HELLO.size - len(self._heard[caller]))
            self._heard[caller] += more
            if more and len(self._heard[caller]) < _HELLO.size:
                continue
            self._selector.unregister(caller)
            hello = self._heard.pop(caller)
            if more:
                found.append((caller, hello))
            else:
                caller.close()
        return found

    def _let_in(self) -> None:
        with contextlib.suppress(BlockingIOError, ConnectionError):  # gone already
            caller, _ = self._listener.accept()
            caller.setblocking(False)
            self._selector.register(caller, selectors.EVENT_READ)
            self._heard[caller] = b""


def _tune(connection: socket.socket) -> None:
    """Small messages go at once, and a silent end is noticed."""
    connection.setblocking(False)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in _TCP_OPTIONS.items():
        connection.setsockopt(socket.IPPROTO_TCP, option, value)
