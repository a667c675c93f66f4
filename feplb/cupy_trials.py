"""What the cupy lane does on a GPU, tried for real and undone: for `feplb doctor`.

Everything waits for a bounded time, and a stream's wait that is not met is lifted by the host.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import multiprocessing
import time
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.connection import Connection
from typing import Any

from .cupy_device import CupyDevice
from .cupy_gpu import Arena, Gpu, Packages
from .cupy_lane import choose_copy_call, import_packages

_TRIAL_BYTES = 1 << 20
_PAGE_BYTES = 4096
_PEER_S = 60.0  # a process that imports CuPy anew
_DEADLINE_S = 10.0
_LIFT = 1 << 30
_COMPUTE, _PUSHES = 0, 1  # kinds of streams

Import = Callable[[], Packages]


def try_cupy(ordinal: int = 0, packages_of: Import = import_packages) -> dict[str, Any]:
    """Import the packages, and try what the lane does on one GPU. Blocks for seconds.

    Args:
        packages_of: what imports them, importable itself: a second process calls it too.
    Returns:
        problem: why the packages or the GPU are not to be had, "" where they are; versions: a
        sentence; trials: as the core's (``observe.core_trials.CudaTrials``), named "ipc",
        "pinned", "stream_values", "copies", "batch_copies".
    """
    found: dict[str, Any] = {"problem": "", "versions": "", "trials": []}
    try:
        packages = packages_of()
        found["versions"] = _versions(packages)
        gpu = Gpu(packages, ordinal)
    except (RuntimeError, OSError) as error:
        return {**found, "problem": str(error)}
    trials: Mapping[str, Callable[[], str]] = {
        "ipc": lambda: _try_ipc(gpu, packages_of),
        "pinned": lambda: _try_pinning(gpu),
        "stream_values": lambda: _try_flags(gpu),
        "copies": lambda: _try_copies(gpu, "plain"),
        "batch_copies": lambda: _try_copies(gpu, choose_copy_call("batch", packages)),
    }
    for name, trial in trials.items():
        try:
            seen, is_ok = trial(), True
        except (RuntimeError, OSError) as error:
            seen, is_ok = str(error), False
        found["trials"].append({"name": name, "ok": is_ok, "seen": seen})
    return found


def _versions(packages: Packages) -> str:
    supported, built = packages.runtime.driverGetVersion(), packages.driver.CUDA_VERSION
    driver, bindings = (f"{n // 1000}.{n % 1000 // 10}" for n in (supported, built))
    return f"imported; the driver brings CUDA {driver}, cuda.bindings is of CUDA {bindings}"


# ------------------------------------------------------------------------------------------ arenas


def _try_ipc(gpu: Gpu, packages_of: Import) -> str:
    """A second process opens an allocation of this one and reads it."""
    arena = Arena(gpu)
    arena.allocate(_TRIAL_BYTES)
    pattern = bytes(range(256))
    kept = ctypes.create_string_buffer(pattern, len(pattern))
    with gpu.current():
        runtime, kind = gpu.runtime, gpu.runtime.memcpyHostToDevice
        address = ctypes.addressof(kept)
        gpu.call(
            "copying to the GPU", runtime.memcpy, arena.address, address, len(pattern), kind
        )  # fmt: skip
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    job = (packages_of, gpu.ordinal, arena.export(), len(pattern), there)
    peer = context.Process(target=_read_as_peer, args=job, daemon=True)
    peer.start()
    there.close()
    try:
        if not here.poll(_PEER_S):
            raise RuntimeError(f"a second process did not open the handle within {_PEER_S:.0f} s")
        said = here.recv()
    except EOFError:
        raise RuntimeError("a second process died when it opened the handle") from None
    finally:
        peer.join(timeout=_DEADLINE_S)
        peer.kill()
    if isinstance(said, str):
        raise RuntimeError(said)
    if said != pattern:
        raise RuntimeError("a second process opened the handle and read other bytes")
    return "opened by a second process, same bytes"


def _read_as_peer(
    packages_of: Import, ordinal: int, handle: bytes, num_bytes: int, answer: Connection
) -> None:
    """The body of that process; text is an error."""
    try:
        gpu = Gpu(packages_of(), ordinal)
        arena = Arena(gpu)
        arena.open(handle)
        read = ctypes.create_string_buffer(num_bytes)
        with gpu.current():
            runtime, kind = gpu.runtime, gpu.runtime.memcpyDeviceToHost
            to = ctypes.addressof(read)
            gpu.call("copying from the GPU", runtime.memcpy, to, arena.address, num_bytes, kind)
        del arena
        answer.send(read.raw)
    except RuntimeError as error:
        answer.send(str(error))


# ------------------------------------------------------------------------------- flags and copies


class _Words:
    """32-bit words of a page that the lane has pinned."""

    def __init__(self, page: mmap.mmap) -> None:
        self._words = (ctypes.c_uint32 * (_PAGE_BYTES // 4)).from_buffer(page)

    def address(self, at: int) -> int:
        return ctypes.addressof(self._words) + 4 * at

    def write(self, at: int, value: int) -> None:
        self._words[at] = value

    def reaches(self, at: int, value: int) -> bool:
        """Whether the word gets there in time."""
        deadline = time.monotonic() + _DEADLINE_S
        while self._words[at] < value:
            if time.monotonic() > deadline:
                return False
            time.sleep(1e-4)
        return True


@contextlib.contextmanager
def _lane(gpu: Gpu, copies: str) -> Iterator[tuple[CupyDevice, _Words]]:
    """The lane over a page of its own, with a compute stream of its own."""
    board, page = (mmap.mmap(-1, _PAGE_BYTES) for _ in range(2))
    words, device = _Words(board), CupyDevice(gpu, copies, "memops")
    device.start(words.address(0), _PAGE_BYTES, _Words(page).address(0), _PAGE_BYTES)
    stream = 0
    try:
        with gpu.current():
            create, flags = gpu.runtime.streamCreateWithFlags, gpu.runtime.streamNonBlocking
            stream = gpu.call("creating a stream", create, flags)
        device.bind_compute(stream)
        yield device, words
    finally:
        device.stop()
        if stream:
            with gpu.current():
                gpu.attempt(gpu.runtime.streamSynchronize, stream)
                gpu.attempt(gpu.runtime.streamDestroy, stream)


def _try_pinning(gpu: Gpu) -> str:
    with _lane(gpu, "plain"):
        return "host memory pinned and seen by the GPU"


def _try_flags(gpu: Gpu) -> str:
    flag, passed = 0, 1
    with _lane(gpu, "plain") as (device, words):
        device.wait_flag(words.address(flag), 7)
        try:
            device.write_flags(_COMPUTE, [words.address(passed)], [1])
            device.write_flags(_PUSHES, [words.address(flag)], [7])
            if not words.reaches(flag, 7):
                raise RuntimeError("the flag was never written")
            if not words.reaches(passed, 1):
                raise RuntimeError("a stream's wait did not see what another stream wrote")
        except RuntimeError:
            words.write(flag, 7 + _LIFT)
            raise
    return "written by one stream, awaited by another"


def _try_copies(gpu: Gpu, call: str) -> str:
    arena, half = Arena(gpu), _TRIAL_BYTES // 2
    arena.allocate(2 * _TRIAL_BYTES)
    pattern = bytes(i * 31 & 0xFF for i in range(256)) * (_TRIAL_BYTES // 256)
    sent = ctypes.create_string_buffer(pattern, _TRIAL_BYTES)
    seen = ctypes.create_string_buffer(_TRIAL_BYTES)
    source, to = arena.address, arena.address + _TRIAL_BYTES
    with _lane(gpu, call) as (device, words):
        device.put(source, ctypes.addressof(sent), _TRIAL_BYTES)
        device.copy_batch(_PUSHES, [to, to + half], [source, source + half], [half, half])
        device.write_flags(_PUSHES, [words.address(0)], [1])
        if not words.reaches(0, 1):
            raise RuntimeError("the flag behind the copies was never written")
        device.get(ctypes.addressof(seen), to, _TRIAL_BYTES)
    if seen.raw != pattern:
        raise RuntimeError("what arrived is not what was sent")
    return "two copies, flag behind them, same bytes"
