"""The driver without a GPU (tests/driver): built once, opened in libcuda's place, and asked.

With the variables of ``environment()`` the whole Balancer runs over the ce lane with tensors of the
host. Inside a rank, ``StandIn`` is the very library that its Balancer has open.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from cpp_build import BUILD, FLAGS, ROOT, compile_to

SOURCE = ROOT / "tests" / "driver" / "stand_in.cpp"
# What a driver makes, by the names the stand-in counts it under.
KINDS = (
    "context", "stream", "queue", "event", "allocation", "physical memory", "reservation",
    "mapping", "ipc mapping", "pin",
)  # fmt: skip


@cache
def library() -> Path:
    """Build it, unless it is up to date."""
    # A copy of the file is another driver: nothing is one of a kind in a process.
    flags = [*FLAGS, "-O2", "-fPIC", "-shared", "-fno-gnu-unique"]
    return compile_to(BUILD / "tests-driver" / "libcuda_stand_in.so", SOURCE, flags)


def environment(**settings: object) -> dict[str, str]:
    """The variables of a machine whose driver is the stand-in; ``settings`` as ledger.h has them,
    by their names without STAND_IN_, in small letters.
    """
    named = {f"STAND_IN_{name.upper()}": str(value) for name, value in settings.items()}
    return {"FEPLB_LANE": "ce", "FEPLB_LIBCUDA": str(library()), **named}


class StandIn:
    """The stand-in that this process has open."""

    def __init__(self) -> None:
        self.functions = ctypes.CDLL(os.environ["FEPLB_LIBCUDA"])
        for name in ("stand_in_calls", "stand_in_alive", "stand_in_failures"):
            getattr(self.functions, name).restype = ctypes.c_int64

    def fail(self, symbol: str, code: int, after: int = 0) -> None:
        """From the call on that follows ``after`` more; code 0: no longer."""
        self.functions.stand_in_fail(symbol.encode(), code, ctypes.c_int64(after))

    def fail_once(self, symbol: str, code: int, after: int = 0) -> None:
        """Only the call that follows ``after`` more."""
        self.functions.stand_in_fail_once(symbol.encode(), code, ctypes.c_int64(after))

    def block(self, symbol: str, milliseconds: int) -> None:
        """Hold every call for so long; 0: no longer."""
        self.functions.stand_in_block(symbol.encode(), ctypes.c_int64(milliseconds))

    def calls(self, symbol: str = "") -> int:
        """How often a function was called; without a name, all of them."""
        count: int = self.functions.stand_in_calls(symbol.encode())
        return count

    def failures(self) -> int:
        """How many calls failed as they were told to."""
        count: int = self.functions.stand_in_failures()
        return count

    def used_after_free(self) -> int:
        """Allocations that were freed while another process had them open."""
        count: int = self.functions.stand_in_alive(b"use after free")
        return count

    def say_capturing(self, status: int) -> None:
        """What every stream answers when it is asked."""
        self.functions.stand_in_set_capturing(status)

    def alive(self) -> Mapping[str, int]:
        """What the driver has made and nobody has given back."""
        counts = {kind: self.functions.stand_in_alive(kind.encode()) for kind in KINDS}
        return {kind: count for kind, count in counts.items() if count}
