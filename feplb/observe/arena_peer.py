"""Whether a second process may open this one's GPU memory, tried and not guessed.

A container or a virtual GPU may let a process export memory, and refuse whoever opens it. Run as a
module this file is the process that opens: ``python -m feplb.observe.arena_peer``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

_BYTES = 1 << 20
_DEADLINE_S = 60.0  # it takes a context on the GPU
_NO_FD = -1


def try_peer(core: Any, library: str, ordinal: int, ways: list[str]) -> dict[str, str]:
    """By way ("vmm", "ipc"): why a second process could not open an arena, "" where it could.

    Blocks for seconds; leaves no process, no descriptor and no memory.
    """
    try:
        lane = core.CudaLane(
            library=library, ordinal=ordinal, copy_call="auto", flag_call="auto"
        )  # fmt: skip
        arenas = {way: lane.create_arena(_BYTES, way) for way in ways}
        fd = arenas["vmm"].export_fd() if "vmm" in arenas else _NO_FD
        try:
            handle = arenas["ipc"].export_ipc() if "ipc" in arenas else b""
            return _opened_by_a_peer(library, ordinal, fd, handle)
        finally:
            if fd != _NO_FD:
                os.close(fd)
    except (OSError, RuntimeError, ValueError, subprocess.SubprocessError) as error:
        return dict.fromkeys(ways, f"a second process could not try it ({error})")


def _opened_by_a_peer(library: str, ordinal: int, fd: int, handle: bytes) -> dict[str, str]:
    opens = [sys.executable, "-m", __name__, library, str(ordinal), str(fd), handle.hex()]
    done = subprocess.run(
        opens, capture_output=True, timeout=_DEADLINE_S, check=False, text=True,
        pass_fds=[] if fd == _NO_FD else [fd],
    )  # fmt: skip
    if done.returncode != 0:
        last = done.stderr.strip().rpartition("\n")[2]
        raise RuntimeError(last or f"it ended with status {done.returncode}")
    said: dict[str, str] = json.loads(done.stdout)
    return said


def _as_peer(library: str, ordinal: str, fd: str, handle: str) -> None:
    from feplb import _core

    lane = _core.CudaLane(
        library=library, ordinal=int(ordinal), copy_call="auto", flag_call="auto"
    )  # fmt: skip
    found = {}
    if int(fd) != _NO_FD:
        found["vmm"] = _said(lambda: lane.open_fd(_BYTES, int(fd)))
    if handle:
        found["ipc"] = _said(lambda: lane.open_ipc(_BYTES, bytes.fromhex(handle)))
    sys.stdout.write(json.dumps(found))


def _said(trial: Callable[[], object]) -> str:
    try:
        trial()
    except (RuntimeError, ValueError) as error:
        return str(error)
    return ""


if __name__ == "__main__":
    _as_peer(*sys.argv[1:])
