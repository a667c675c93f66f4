"""CuPy and cuda-python without a GPU: the functions of ``cupy.cuda.runtime`` and
``cuda.bindings.driver`` that the cupy lane calls, over the stand-in driver (stand_in.py).

As strict about types as the real ones, and with their results: CuPy's functions return values and
raise, the driver's return tuples that begin with the error.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

from feplb import cupy_lane
from feplb.cupy_gpu import Packages

Answer = tuple[Any, ...]


class CUDARuntimeError(RuntimeError):
    """As ``cupy.cuda.runtime`` raises it."""

    def __init__(self, status: int, text: str) -> None:
        self.status = status
        super().__init__(text)


class CUdeviceptr(int):
    """An address, as batches take it."""


class CUstreamWaitValue_flags(IntEnum):  # noqa: N801 - as the driver's header has it
    """How a wait compares."""

    CU_STREAM_WAIT_VALUE_GEQ = 0
    CU_STREAM_WAIT_VALUE_FLUSH = 1 << 30


class CUdevice_attribute(IntEnum):  # noqa: N801 - as the driver's header has it
    """What a GPU can do."""

    CU_DEVICE_ATTRIBUTE_CAN_FLUSH_REMOTE_WRITES = 98


class CUstreamBatchMemOpType(IntEnum):
    """Kinds of memory operations."""

    CU_STREAM_MEM_OP_WRITE_VALUE_32 = 2


class CUmemcpySrcAccessOrder(IntEnum):
    """When a source is read."""

    CU_MEMCPY_SRC_ACCESS_ORDER_STREAM = 1


class CUmemcpyFlags(IntEnum):
    """Hints for a copy."""

    CU_MEMCPY_FLAG_PREFER_OVERLAP_WITH_COMPUTE = 1


@dataclass
class CUmemcpyAttributes:
    """Of the copies of a batch."""

    srcAccessOrder: Any = None  # noqa: N815
    flags: int = 0


@dataclass
class _WriteValue:
    operation: Any = None
    address: int = 0
    value: int = 0
    flags: int = 0


@dataclass
class CUstreamBatchMemOpParams:
    """One memory operation."""

    operation: Any = None
    writeValue: _WriteValue = field(default_factory=_WriteValue)  # noqa: N815


@dataclass
class CUuuid:
    """A GPU's name."""

    bytes: bytes


# ---------------------------------------------------------------- what the stand-in driver is given


class _MemOp(ctypes.Structure):
    _fields_ = (
        ("operation", ctypes.c_int),
        ("address", ctypes.c_uint64),
        ("value", ctypes.c_uint64),
        ("flags", ctypes.c_uint),
        ("alias", ctypes.c_uint64),
        ("pad", ctypes.c_uint64),
    )


class _CopyAttributes(ctypes.Structure):
    _fields_ = (
        ("source_access_order", ctypes.c_int),
        ("source_hint", ctypes.c_int * 2),
        ("destination_hint", ctypes.c_int * 2),
        ("flags", ctypes.c_uint),
    )


class _IpcHandle(ctypes.Structure):
    _fields_ = (("reserved", ctypes.c_ubyte * 64),)


def _word(number: int) -> ctypes.c_uint64:
    assert isinstance(number, int), number
    return ctypes.c_uint64(number)


def _words(numbers: Sequence[int]) -> Any:
    return (ctypes.c_uint64 * len(numbers))(*numbers)


class _Library:
    """The stand-in that this process has open."""

    def __init__(self, path: str, *, holds_gil: bool) -> None:
        self._functions = ctypes.CDLL(path)
        self._waits = ctypes.PyDLL(path) if holds_gil else self._functions

    def ask(self, symbol: str, *arguments: Any) -> int:
        """The driver's error, 0 if there was none."""
        where = self._waits if symbol == "cuStreamWaitValue32" else self._functions
        error: int = getattr(where, symbol)(*arguments)
        return error

    def text(self, symbol: str, error: int) -> bytes:
        text = ctypes.c_char_p()
        self.ask(symbol, ctypes.c_int(error), ctypes.byref(text))
        return text.value or b""


# -------------------------------------------------------------------------------------------- CuPy


class Runtime:
    """Stands in for ``cupy.cuda.runtime``."""

    memcpyHostToDevice, memcpyDeviceToHost, memcpyDefault = 1, 2, 4  # noqa: N815
    streamNonBlocking, eventDisableTiming = 1, 2  # noqa: N815

    def __init__(self, library: _Library) -> None:
        self._library = library

    def _check(self, symbol: str, *arguments: Any) -> None:
        error = self._library.ask(symbol, *arguments)
        if error != 0:
            name, text = (
                self._library.text(function, error).decode()
                for function in ("cuGetErrorName", "cuGetErrorString")
            )
            raise CUDARuntimeError(error, f"{name}: {text}")

    def _made(self, symbol: str, *arguments: Any) -> int:
        made = ctypes.c_uint64()
        self._check(symbol, ctypes.byref(made), *arguments)
        return made.value

    def driverGetVersion(self) -> int:  # noqa: N802
        version = ctypes.c_int()
        self._check("cuDriverGetVersion", ctypes.byref(version))
        return version.value

    def getDeviceCount(self) -> int:  # noqa: N802
        count = ctypes.c_int()
        self._check("cuDeviceGetCount", ctypes.byref(count))
        return count.value

    def malloc(self, size: int) -> int:
        return self._made("cuMemAlloc", _word(size))

    def free(self, ptr: int) -> None:
        self._check("cuMemFree", _word(ptr))

    def memset(self, ptr: int, value: int, size: int) -> None:
        ctypes.memset(ptr, value, size)

    def memcpy(self, dst: int, src: int, size: int, kind: int) -> None:
        symbol = {self.memcpyHostToDevice: "cuMemcpyHtoD", self.memcpyDeviceToHost: "cuMemcpyDtoH"}
        self._check(symbol[kind], _word(dst), _word(src), _word(size))

    def memcpyAsync(self, dst: int, src: int, size: int, kind: int, stream: int) -> None:  # noqa: N802
        assert kind == self.memcpyDefault
        self._check("cuMemcpyAsync", _word(dst), _word(src), _word(size), _word(stream))

    def memcpyPeerAsync(  # noqa: N802
        self, dst: int, dst_device: int, src: int, src_device: int, size: int, stream: int
    ) -> None:
        there, here = (
            self._made("cuDevicePrimaryCtxRetain", ctypes.c_int(device))
            for device in (dst_device, src_device)
        )
        self._check(
            "cuMemcpyPeerAsync",
            _word(dst), _word(there), _word(src), _word(here), _word(size), _word(stream),
        )  # fmt: skip
        for device in (dst_device, src_device):
            self._check("cuDevicePrimaryCtxRelease", ctypes.c_int(device))

    def ipcGetMemHandle(self, devPtr: int) -> bytes:  # noqa: N802, N803
        handle = _IpcHandle()
        self._check("cuIpcGetMemHandle", ctypes.byref(handle), _word(devPtr))
        return bytes(handle.reserved)

    def ipcOpenMemHandle(self, handle: bytes, flags: int = 1) -> int:  # noqa: N802
        assert isinstance(handle, bytes), handle
        given = _IpcHandle.from_buffer_copy(handle)
        return self._made("cuIpcOpenMemHandle", given, ctypes.c_uint(flags))

    def ipcCloseMemHandle(self, devPtr: int) -> None:  # noqa: N802, N803
        self._check("cuIpcCloseMemHandle", _word(devPtr))

    def hostRegister(self, ptr: int, size: int, flags: int) -> None:  # noqa: N802
        self._check("cuMemHostRegister", _word(ptr), _word(size), ctypes.c_uint(flags))

    def hostUnregister(self, ptr: int) -> None:  # noqa: N802
        self._check("cuMemHostUnregister", _word(ptr))

    def streamCreateWithFlags(self, flags: int) -> int:  # noqa: N802
        return self._made("cuStreamCreate", ctypes.c_uint(flags))

    def streamDestroy(self, stream: int) -> None:  # noqa: N802
        self._check("cuStreamDestroy", _word(stream))

    def streamSynchronize(self, stream: int) -> None:  # noqa: N802
        self._check("cuStreamSynchronize", _word(stream))

    def streamIsCapturing(self, stream: int) -> bool:  # noqa: N802
        status = ctypes.c_int()
        self._check("cuStreamIsCapturing", _word(stream), ctypes.byref(status))
        return status.value != 0

    def streamWaitEvent(self, stream: int, event: int, flags: int = 0) -> None:  # noqa: N802
        self._check("cuStreamWaitEvent", _word(stream), _word(event), ctypes.c_uint(flags))

    def eventCreateWithFlags(self, flags: int) -> int:  # noqa: N802
        return self._made("cuEventCreate", ctypes.c_uint(flags))

    def eventDestroy(self, event: int) -> None:  # noqa: N802
        self._check("cuEventDestroy", _word(event))

    def eventRecord(self, event: int, stream: int) -> None:  # noqa: N802
        self._check("cuEventRecord", _word(event), _word(stream))


# ------------------------------------------------------------------------------------- cuda-python


class Driver:
    """Stands in for ``cuda.bindings.driver``."""

    CUDA_VERSION = 13000
    CUdeviceptr = CUdeviceptr
    CUstreamWaitValue_flags = CUstreamWaitValue_flags
    CUdevice_attribute = CUdevice_attribute
    CUstreamBatchMemOpType = CUstreamBatchMemOpType
    CUstreamBatchMemOpParams = CUstreamBatchMemOpParams
    CUmemcpySrcAccessOrder = CUmemcpySrcAccessOrder
    CUmemcpyFlags = CUmemcpyFlags
    CUmemcpyAttributes = CUmemcpyAttributes

    def __init__(self, library: _Library) -> None:
        self._library = library

    def _ask(self, symbol: str, *arguments: Any) -> tuple[int]:
        return (self._library.ask(symbol, *arguments),)

    def _made(self, symbol: str, made: Any, *arguments: Any) -> Answer:
        (error,) = self._ask(symbol, ctypes.byref(made), *arguments)
        return (error, made.value if error == 0 else None)

    def cuGetErrorName(self, error: int) -> Answer:  # noqa: N802
        return 0, self._library.text("cuGetErrorName", error)

    def cuGetErrorString(self, error: int) -> Answer:  # noqa: N802
        return 0, self._library.text("cuGetErrorString", error)

    def cuDeviceGet(self, ordinal: int) -> Answer:  # noqa: N802
        return self._made("cuDeviceGet", ctypes.c_int(), ctypes.c_int(ordinal))

    def cuDeviceGetUuid(self, dev: int) -> Answer:  # noqa: N802
        uuid = ctypes.create_string_buffer(16)
        (error,) = self._ask("cuDeviceGetUuid", uuid, ctypes.c_int(dev))
        return error, CUuuid(uuid.raw)

    def cuDeviceGetAttribute(self, attrib: int, dev: int) -> Answer:  # noqa: N802
        value = ctypes.c_int()
        out = ctypes.byref(value)
        (error,) = self._ask("cuDeviceGetAttribute", out, ctypes.c_int(attrib), ctypes.c_int(dev))
        return error, value.value

    def cuDevicePrimaryCtxRetain(self, dev: int) -> Answer:  # noqa: N802
        return self._made("cuDevicePrimaryCtxRetain", ctypes.c_uint64(), ctypes.c_int(dev))

    def cuDevicePrimaryCtxRelease(self, dev: int) -> Answer:  # noqa: N802
        return self._ask("cuDevicePrimaryCtxRelease", ctypes.c_int(dev))

    def cuCtxGetCurrent(self) -> Answer:  # noqa: N802
        return self._made("cuCtxGetCurrent", ctypes.c_uint64())

    def cuCtxSetCurrent(self, ctx: int) -> Answer:  # noqa: N802
        return self._ask("cuCtxSetCurrent", _word(ctx))

    def cuCtxPushCurrent(self, ctx: int) -> Answer:  # noqa: N802
        return self._ask("cuCtxPushCurrent", _word(ctx))

    def cuCtxPopCurrent(self) -> Answer:  # noqa: N802
        return self._made("cuCtxPopCurrent", ctypes.c_uint64())

    def cuMemHostGetDevicePointer(self, p: int, flags: int) -> Answer:  # noqa: N802
        made = ctypes.c_uint64()
        return self._made("cuMemHostGetDevicePointer", made, _word(p), ctypes.c_uint(flags))

    def cuStreamWaitValue32(self, stream: int, addr: int, value: int, flags: int) -> Answer:  # noqa: N802
        given = (_word(stream), _word(addr), ctypes.c_uint32(value), ctypes.c_uint(flags))
        return self._ask("cuStreamWaitValue32", *given)

    def cuStreamWriteValue32(self, stream: int, addr: int, value: int, flags: int) -> Answer:  # noqa: N802
        given = (_word(stream), _word(addr), ctypes.c_uint32(value), ctypes.c_uint(flags))
        return self._ask("cuStreamWriteValue32", *given)

    def cuStreamBatchMemOp(  # noqa: N802
        self, stream: int, count: int, operations: list[CUstreamBatchMemOpParams], flags: int
    ) -> Answer:
        assert len(operations) == count
        given = (_MemOp * count)()
        for to, operation in zip(given, operations, strict=True):
            write = operation.writeValue
            assert operation.operation is write.operation
            to.operation, to.flags = write.operation, write.flags
            to.address, to.value = write.address, write.value
        return self._ask(
            "cuStreamBatchMemOp", _word(stream), ctypes.c_uint(count), given, ctypes.c_uint(flags)
        )

    def cuMemcpyBatchAsync(  # noqa: N802
        self, dsts: list[CUdeviceptr], srcs: list[CUdeviceptr], sizes: list[int], count: int,
        attrs: list[CUmemcpyAttributes], attrsIdxs: list[int], numAttrs: int, hStream: int,  # noqa: N803
    ) -> Answer:  # fmt: skip
        if not all(isinstance(address, CUdeviceptr) for address in (*dsts, *srcs)):
            raise TypeError("addresses of a batch must be CUdeviceptr")
        assert len(dsts) == len(srcs) == len(sizes) == count
        given = (_CopyAttributes * numAttrs)()
        for to, attributes in zip(given, attrs, strict=True):
            to.source_access_order, to.flags = attributes.srcAccessOrder, attributes.flags
        failed = ctypes.c_uint64()
        return self._ask(
            "cuMemcpyBatchAsync", _words(dsts), _words(srcs), _words(sizes), _word(count), given,
            _words(attrsIdxs), _word(numAttrs), ctypes.byref(failed), _word(hStream),
        )  # fmt: skip


def packages(*, holds_gil: bool = False) -> Packages:
    """Over the driver that FEPLB_LIBCUDA names.

    Args:
        holds_gil: a wait on the default stream, where the stand-in runs it at once, keeps the GIL.
    """
    library = _Library(os.environ["FEPLB_LIBCUDA"], holds_gil=holds_gil)
    return Packages(Runtime(library), Driver(library), is_stand_in=True)


def install(*, holds_gil: bool = False) -> None:
    """From here on the lane finds these packages and no others."""
    cupy_lane.import_packages = functools.partial(packages, holds_gil=holds_gil)
