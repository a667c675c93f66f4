"""Calls of the system that a container's seccomp profile denies: what start-up and doctor say."""

from __future__ import annotations

import ctypes
import errno
import struct
from typing import Any

import pytest
from balancer_cases import PLAIN, Arm, build
from balancer_scenarios import attempt, call_and_check
from conftest import put
from ranks import run_ranks
from stand_in import environment

from feplb.observe.processes import try_processes

PIDFD_OPEN, PIDFD_GETFD = 434, 438  # the same on every architecture
_NO_NEW_PRIVILEGES, _SECCOMP, _FILTER = 38, 22, 2
_LOAD, _JUMP_IF_EQUAL, _RETURN = 0x20, 0x15, 0x06  # of a filter program
_ALLOW, _FAIL_WITH = 0x7FFF0000, 0x00050000


def deny(call: int) -> None:
    """From here on the call fails with EPERM, in this process and in all that it starts."""
    steps = [
        (_LOAD, 0, 0, 0),  # the number of the call
        (_JUMP_IF_EQUAL, 0, 1, call),
        (_RETURN, 0, 0, _FAIL_WITH | errno.EPERM),
        (_RETURN, 0, 0, _ALLOW),
    ]
    filters = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *each) for each in steps))
    program = struct.pack("HxxxxxxP", len(steps), ctypes.addressof(filters))
    libc = ctypes.CDLL(None, use_errno=True)
    given = ctypes.c_char_p(program)
    if libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0) or libc.prctl(_SECCOMP, _FILTER, given, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl")


@pytest.fixture(autouse=True)
def _stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    put(monkeypatch, environment())


def start_denied(rank: int, num_ranks: int, call: int) -> tuple[str, str]:
    """How a Balancer starts, and whether it carries data; or what is said."""
    deny(call)
    found: list[Any] = []

    def start() -> None:
        with build(deadline_s=5.0) as balancer:
            found.append(call_and_check(Arm(rank, num_ranks, PLAIN, balancer)))

    return attempt(start), "".join(found)


def test_pidfd_open_denied_is_said_with_what_to_allow() -> None:
    for said, _ in run_ranks(start_denied, 2, PIDFD_OPEN):
        assert "pidfd_open of rank" in said
        assert "Operation not permitted; ranks of one domain must see" in said
        assert "a seccomp profile that allows pidfd_open" in said


def test_pidfd_getfd_denied_stops_nothing() -> None:
    assert run_ranks(start_denied, 2, PIDFD_GETFD) == [("None", "same bits")] * 2


def try_denied(rank: int, num_ranks: int, call: int) -> tuple[str, str, str]:
    deny(call)
    tried = try_processes()
    return tried.own_pidfd, tried.peer_pidfd, tried.peer_getfd


def test_doctor_sees_what_is_denied() -> None:
    denied = "Operation not permitted"
    assert run_ranks(try_denied, 1, PIDFD_GETFD)[0] == ("", "", denied)
    assert run_ranks(try_denied, 1, PIDFD_OPEN)[0] == (denied,) * 3
