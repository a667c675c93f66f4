"""What processes of one host may do with each other here, tried and not guessed.

A rank watches its peers by pidfd_open, and passes memory handles over a Unix socket (SCM_RIGHTS).
pidfd_getfd is tried for what else runs in the job: torch needs it to share expandable segments.
Run as a file this module is the peer that tries: it loads nothing but the standard library.
"""

from __future__ import annotations

import ctypes
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

_PIDFD_GETFD = 438  # the same on every architecture
_DEADLINE_S = 20.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessTrials:
    """Each "" where it worked, else what the system said.

    Attributes:
        own_pidfd: pidfd_open of this process.
        peer_pidfd: pidfd_open of one child by another, as between ranks.
        peer_getfd: pidfd_getfd of one child by another.
        passed_fd: a file descriptor sent and received over a Unix socket.
    """

    own_pidfd: str
    peer_pidfd: str
    peer_getfd: str
    passed_fd: str


def try_processes() -> ProcessTrials:
    """Try all of it. Blocks while two children start; leaves no process and no descriptor."""
    peer_pidfd, peer_getfd = _from_a_peer()
    return ProcessTrials(
        own_pidfd=_said(lambda: os.close(os.pidfd_open(os.getpid()))),
        peer_pidfd=peer_pidfd,
        peer_getfd=peer_getfd,
        passed_fd=_said(_pass_fd),
    )


def _said(trial: Callable[[], None]) -> str:
    try:
        trial()
    except (OSError, AttributeError) as error:  # no such function: not Linux, or Python without it
        return (
            os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)
        )
    return ""


def _pass_fd() -> None:
    left, right = socket.socketpair(socket.AF_UNIX)
    fd = os.memfd_create("feplb-doctor")
    with left, right:
        try:
            socket.send_fds(left, [b"x"], [fd])
            _, received, _, _ = socket.recv_fds(right, 1, 1)
            if not received:
                raise OSError("the descriptor did not arrive")
            os.close(received[0])
        finally:
            os.close(fd)


def _from_a_peer() -> tuple[str, str]:
    waits = [sys.executable, "-I", "-S", "-c", "import sys; sys.stdin.read()"]
    try:
        with subprocess.Popen(waits, stdin=subprocess.PIPE) as watched:
            tries = [sys.executable, "-I", "-S", str(Path(__file__)), str(watched.pid)]
            done = subprocess.run(tries, capture_output=True, timeout=_DEADLINE_S, check=True)
        opened, got = json.loads(done.stdout)
        return str(opened), str(got)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        return (f"could not be tried ({error})",) * 2


def _get_fd(pid: int) -> None:
    pidfd = os.pidfd_open(pid)
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        fd = libc.syscall(_PIDFD_GETFD, pidfd, 0, 0)
        if fd < 0:
            raise OSError(ctypes.get_errno(), "pidfd_getfd")
        os.close(fd)
    finally:
        os.close(pidfd)


def _as_peer(pid: int) -> None:
    opened = _said(lambda: os.close(os.pidfd_open(pid)))
    sys.stdout.write(json.dumps([opened, opened or _said(lambda: _get_fd(pid))]))


if __name__ == "__main__":
    _as_peer(int(sys.argv[1]))
