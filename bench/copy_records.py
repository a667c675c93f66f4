"""What CUPTI says of the copies of this process: read from torch.profiler's trace, or from CUPTI
itself through ctypes, whose records also name the kind of channel that carried a copy.

Layouts are those of cupti_activity.h from CUDA 11.6 to 13: CUpti_ActivityMemcpy5 and 6,
CUpti_ActivityMemcpyPtoP4. CUPTI serves one subscriber per process: no profiler beside it.
"""

from __future__ import annotations

import ctypes
import importlib.util
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

MEMCPY, CONCURRENT_KERNEL, MEMCPY_PEER = 1, 10, 22  # CUpti_ActivityKind
KINDS = {1: "HtoD", 2: "DtoH", 8: "DtoD", 9: "HtoH", 10: "PtoP"}  # CUpti_ActivityMemcpyKind
CHANNELS = {0: "INVALID", 1: "COMPUTE", 2: "ASYNC_MEMCPY", 3: "DECOMP"}  # CUpti_ChannelType

_HEAD = struct.Struct("<IBBBBQQQIII")  # kind, copy kind, 3 bytes, bytes, start, end, 3 ids
_CHANNEL_AT = {MEMCPY: 80, MEMCPY_PEER: 88}
_BUFFER_BYTES = 1 << 20


@dataclass(frozen=True)
class CopyRecord:
    """One copy. channel: "" where the source does not say."""

    kind: str
    num_bytes: int
    stream: int
    channel: str = ""


@dataclass(frozen=True)
class Seen:
    """What ran while the copies did."""

    copies: tuple[CopyRecord, ...]
    kernels: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        return {"copies": [asdict(copy) for copy in self.copies], "kernels": list(self.kernels)}

    @classmethod
    def from_json(cls, said: Mapping[str, Any]) -> Seen:
        return cls(tuple(CopyRecord(**copy) for copy in said["copies"]), tuple(said["kernels"]))


def seen_in_trace(trace: Mapping[str, Any]) -> Seen:
    """Copies and kernels of a Chrome trace, as torch.profiler writes it."""
    copies, kernels = [], []
    for event in trace["traceEvents"]:
        if event.get("cat") == "gpu_memcpy":
            kind = event["name"].split()[1] if " " in event["name"] else event["name"]
            said = event.get("args", {})
            copies.append(CopyRecord(kind, int(said.get("bytes", 0)), int(said.get("stream", -1))))
        elif event.get("cat") == "kernel":
            kernels.append(str(event["name"]))
    return Seen(tuple(copies), tuple(kernels))


def record_at(record: bytes) -> CopyRecord | None:
    """A record of CUPTI's that is a copy's, else None."""
    kind, copy_kind, _, _, _, num_bytes, _, _, _, _, stream = _HEAD.unpack_from(record)
    if kind not in _CHANNEL_AT:
        return None
    (channel,) = struct.unpack_from("<I", record, _CHANNEL_AT[kind])
    return CopyRecord(
        KINDS.get(copy_kind, f"kind {copy_kind}"), num_bytes, stream,
        CHANNELS.get(channel, f"type {channel}"),
    )  # fmt: skip


def cupti_libraries() -> Iterator[str]:
    """Where pip's packages have libcupti, newest first; then what the loader finds."""
    spec = importlib.util.find_spec("nvidia")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        found = sorted(Path(folder).glob("*/lib/libcupti.so.*"), reverse=True)
        yield from map(str, found)
    for version in (13, 12):
        yield f"libcupti.so.{version}"


class Cupti:
    """CUPTI's activity records of this process, from ``start`` on; before CUDA is used.

    Raises:
        OSError: no libcupti can be opened.
        RuntimeError: it refuses.
    """

    def __init__(self) -> None:
        tried = []
        for path in cupti_libraries():
            try:
                self._library = ctypes.CDLL(path)
                self.path = path
                break
            except OSError as error:
                tried.append(str(error))
        else:
            raise OSError("libcupti could not be opened: " + "; ".join(tried))
        self._copies: list[CopyRecord] = []
        self._num_kernels = 0
        self._buffers: dict[int, Any] = {}
        pointer, size = ctypes.c_void_p, ctypes.c_size_t
        requested: Any = ctypes.CFUNCTYPE(
            None, ctypes.POINTER(pointer), ctypes.POINTER(size), ctypes.POINTER(size)
        )
        completed: Any = ctypes.CFUNCTYPE(None, pointer, ctypes.c_uint32, pointer, size, size)
        self._callbacks = requested(self._give), completed(self._take)  # kept alive

    def start(self) -> None:
        """Record copies and kernels from here on."""
        self._call("cuptiActivityRegisterCallbacks", *self._callbacks)
        for kind in (MEMCPY, MEMCPY_PEER, CONCURRENT_KERNEL):
            self._call("cuptiActivityEnable", ctypes.c_int(kind))

    def stop(self) -> Seen:
        """Everything since; the device must be idle."""
        self._call("cuptiActivityFlushAll", ctypes.c_uint32(1))
        return Seen(tuple(self._copies), ("a kernel",) * self._num_kernels)

    def _call(self, name: str, *arguments: Any) -> None:
        result = getattr(self._library, name)(*arguments)
        if result != 0:
            raise RuntimeError(f"{name} said {result}")

    def _give(self, buffer: Any, size: Any, most: Any) -> None:
        made = ctypes.create_string_buffer(_BUFFER_BYTES + 8)
        address = (ctypes.addressof(made) + 7) // 8 * 8  # records are aligned to 8 bytes
        self._buffers[address] = made
        buffer[0], size[0], most[0] = address, _BUFFER_BYTES, 0

    def _take(self, context: Any, stream: Any, buffer: int, size: int, valid: int) -> None:
        del context, stream, size
        for address in self._records(buffer, valid):
            kind = ctypes.c_uint32.from_address(address).value
            if kind == CONCURRENT_KERNEL:
                self._num_kernels += 1
            elif kind in _CHANNEL_AT:
                copy = record_at(ctypes.string_at(address, _CHANNEL_AT[kind] + 4))
                if copy is not None:
                    self._copies.append(copy)
        self._buffers.pop(buffer, None)

    def _records(self, buffer: int, valid: int) -> Iterator[int]:
        record = ctypes.c_void_p()
        following: Callable[..., int] = self._library.cuptiActivityGetNextRecord
        while (
            following(ctypes.c_void_p(buffer), ctypes.c_size_t(valid), ctypes.byref(record)) == 0
            and record.value
        ):
            yield record.value
