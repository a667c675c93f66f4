"""A GPU through CuPy and cuda-python: its context, how calls are made and what errors say; and its
memory, which ranks share by CUDA IPC.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar, cast

Method = TypeVar("Method", bound=Callable[..., Any])

# Codes of the runtime.
_OUT_OF_MEMORY = 2
_NO_PEER_ACCESS = (217, 801)
NO_CODE = -1


@dataclass(frozen=True)
class Packages:
    """What the lane calls.

    Args:
        runtime: ``cupy.cuda.runtime``.
        driver: ``cuda.bindings.driver``.
        is_stand_in: they work on memory of the host: its tensors may be given for a GPU's.
    """

    runtime: Any
    driver: Any
    is_stand_in: bool = False


class Gpu:
    """The primary context of one GPU, the one PyTorch uses too; held while this lives.

    Raises:
        RuntimeError: there is no such GPU, or no driver.
    """

    def __init__(self, packages: Packages, ordinal: int) -> None:
        self.runtime, self.driver, self.ordinal = packages.runtime, packages.driver, ordinal
        self._pid = os.getpid()
        self._device: Any = None
        count = self.call("counting GPUs", self.runtime.getDeviceCount)
        if not 0 <= ordinal < count:
            raise RuntimeError(
                f"GPU {ordinal} is not among the {count} this process sees; look at "
                "CUDA_VISIBLE_DEVICES"
            )
        device = self.ask("opening a GPU", self.driver.cuDeviceGet(ordinal))
        self.context = int(
            self.ask("taking a GPU's context", self.driver.cuDevicePrimaryCtxRetain(device))
        )
        self._device = device

    def ask(self, what: str, answer: tuple[Any, ...]) -> Any:
        """The value in the ``answer`` of a driver call, None where it has none.

        Raises:
            RuntimeError: the driver refused; names ``what``, and the driver's own words.
        """
        error = answer[0]
        if int(error) != 0:
            name, text = (
                call(error)[1] or b"unknown"
                for call in (self.driver.cuGetErrorName, self.driver.cuGetErrorString)
            )
            raise RuntimeError(f"{what} failed: {name.decode()} ({int(error)}): {text.decode()}")
        return answer[1] if len(answer) > 1 else None

    def wait_flags(self) -> int:
        """How streams await flags; where the GPU can, what came over a bus before is seen then."""
        driver = self.driver
        device = self.ask("opening a GPU", driver.cuDeviceGet(self.ordinal))
        attribute = driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_CAN_FLUSH_REMOTE_WRITES
        error, said = driver.cuDeviceGetAttribute(attribute, device)
        can_flush = int(error) == 0 and bool(said)
        known = driver.CUstreamWaitValue_flags
        at_least = int(known.CU_STREAM_WAIT_VALUE_GEQ)
        return at_least | int(known.CU_STREAM_WAIT_VALUE_FLUSH) if can_flush else at_least

    def attempt(self, function: Callable[..., Any], *args: Any) -> tuple[Any, int, str]:
        """A function of CuPy: (what it returns, 0, ""), or (None, its error's code, its text).

        The error itself is dropped: its frames would keep memory alive.
        """
        try:
            return function(*args), 0, ""
        except RuntimeError as error:
            return None, getattr(error, "status", NO_CODE), str(error)

    def call(self, what: str, function: Callable[..., Any], *args: Any) -> Any:
        """What a function of CuPy returns.

        Raises:
            RuntimeError: as ``ask``.
        """
        value, status, text = self.attempt(function, *args)
        if status != 0:
            raise RuntimeError(f"{what} failed: {text}")
        return value

    @contextlib.contextmanager
    def current(self) -> Iterator[None]:
        """Makes the context the thread's own; one that the thread had comes back afterwards."""
        driver = self.driver
        before = int(self.ask("asking for the current context", driver.cuCtxGetCurrent()))
        if before == 0:
            self.ask("making a context current", driver.cuCtxSetCurrent(self.context))
        elif before != self.context:
            self.ask("making a context current", driver.cuCtxPushCurrent(self.context))
        try:
            yield
        finally:
            if before not in (0, self.context):
                driver.cuCtxPopCurrent()

    def uuids(self) -> list[bytes]:
        """Of every GPU that this process sees, by ordinal."""
        driver = self.driver
        devices = [
            self.ask("opening a GPU", driver.cuDeviceGet(ordinal))
            for ordinal in range(self.call("counting GPUs", self.runtime.getDeviceCount))
        ]
        return [
            bytes(self.ask("asking a GPU for its uuid", driver.cuDeviceGetUuid(device)).bytes)
            for device in devices
        ]

    def __del__(self) -> None:
        if self._device is not None and self._pid == os.getpid():
            self.driver.cuDevicePrimaryCtxRelease(self._device)


def on_gpu(method: Method) -> Method:
    """A method of something with a ``gpu``, run with that GPU's context current."""

    @functools.wraps(method)
    def run(self: Any, *args: Any) -> Any:
        with self.gpu.current():
            return method(self, *args)

    return cast(Method, run)


class Arena:
    """A rank's arena: this one's own, or a peer's that is mapped here. Given back when it dies; the
    exporter's should die last.
    """

    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu
        self.address = 0
        self._is_own = False
        self._pid = os.getpid()

    @on_gpu
    def allocate(self, num_bytes: int) -> None:
        """Zero-filled.

        Raises:
            RuntimeError: the GPU has not so much memory left.
        """
        runtime, call = self.gpu.runtime, self.gpu.call
        address, status, text = self.gpu.attempt(runtime.malloc, num_bytes)
        if status == _OUT_OF_MEMORY:
            raise RuntimeError(
                f"GPU {self.gpu.ordinal} has not the {num_bytes} bytes that feplb's arena takes: "
                f"{text}. Lower max_rows, num_slots or num_grad_slots, or leave more memory free."
            )
        if status != 0:
            raise RuntimeError(f"allocating an arena of {num_bytes} bytes failed: {text}")
        self.address, self._is_own = address, True
        call("clearing the arena", runtime.memset, address, 0, num_bytes)
        call("clearing the arena", runtime.streamSynchronize, 0)

    @on_gpu
    def export(self) -> bytes:
        """What a peer opens it with."""
        export = self.gpu.runtime.ipcGetMemHandle
        handle: bytes = self.gpu.call("exporting the arena by CUDA IPC", export, self.address)
        return handle

    @on_gpu
    def open(self, handle: bytes) -> None:
        """Map a peer's.

        Raises:
            RuntimeError: CUDA IPC was refused.
        """
        address, status, text = self.gpu.attempt(self.gpu.runtime.ipcOpenMemHandle, handle)
        if status in _NO_PEER_ACCESS:
            raise RuntimeError(
                f"GPU {self.gpu.ordinal} cannot reach a peer's memory: {text}. The cupy lane needs "
                "NVLink between all GPUs of a domain; give each NVLink domain a FEPLB_DOMAIN of "
                "its own, or use lane='host'."
            )
        if status != 0:
            raise RuntimeError(
                f"CUDA IPC of a peer's arena was refused: {text}. Containers need --ipc=host (or "
                "one container for all ranks) and the GPUs of all ranks; or use lane='ce', which "
                "has another way (arena_handle='vmm')."
            )
        self.address = address

    @on_gpu
    def _give_back(self) -> None:
        give_back = self.gpu.runtime.free if self._is_own else self.gpu.runtime.ipcCloseMemHandle
        give_back(self.address)

    def __del__(self) -> None:
        if self.address and self._pid == os.getpid():
            with contextlib.suppress(RuntimeError):  # nobody is there to be told
                self._give_back()
