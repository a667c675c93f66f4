"""The cupy lane: what the ce lane does, in Python, for installs where the core shall not call the
driver itself.

Over CuPy's runtime calls (memory, streams, events, copies, CUDA IPC), and over cuda-python's driver
calls for what CuPy lacks: flags that streams write and await, batches of copies, where the GPU sees
pinned memory. Every submission is made on the caller's thread. The one file that knows these
packages; it imports them when a lane is opened.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

import torch

from .config import BalancerConfig

if TYPE_CHECKING:
    from .lanes import OpenSegment
    from .peers import DomainRanks, Peers

P = ParamSpec("P")
T = TypeVar("T")

_CANARY_BYTES = 64 << 20  # at 400 GB/s many times what the submission takes
_COMPUTE = 0  # StreamKind::kCompute of device.h; the others are streams of ours
_NUM_STREAMS = 4
# Recorded points of one stream that somebody may still wait for: a call records a handful.
_NUM_EVENTS = 256
_CHUNK_BYTES = 8 << 20  # copies of this size let what is more urgent in between
_MOST_FLAGS = 255  # of one cuStreamBatchMemOp
_PORTABLE_AND_MAPPED = 1 | 2  # of cudaHostRegister, for which CuPy has no names
_OUT_OF_MEMORY, _CAPTURED = 2, 906
_FIRST_DRIVER_WITH_BATCHES = 12080


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


def import_packages() -> Packages:
    """Import CuPy and cuda-python.

    Raises:
        RuntimeError: one of them cannot be imported; with the line that installs both.
    """
    try:
        import cupy
        from cuda.bindings import driver
    except ImportError as error:
        known = (torch.version.cuda or "").partition(".")[0]
        lines = [
            f"pip install cupy-cuda{major}x 'cuda-python=={major}.*'"
            for major in ("12", "13")
            if known in (major, "")
        ]
        raise RuntimeError(
            f"lane='cupy' needs CuPy and cuda-python, and they cannot be imported here "
            f"({type(error).__name__}: {error}). Install them for the CUDA version of PyTorch, "
            f"{' or '.join(lines)}; or use lane='ce', which needs neither."
        ) from error
    return Packages(cupy.cuda.runtime, driver)


# ------------------------------------------------------------------------------------------- GPU


class Gpu:
    """The primary context of one GPU, the one PyTorch uses too; held while this lives.

    Raises:
        RuntimeError: there is no such GPU, or no driver.
    """

    def __init__(self, packages: Packages, ordinal: int) -> None:
        self.runtime, self.driver, self.ordinal = packages.runtime, packages.driver, ordinal
        self._pid = os.getpid()
        self._device: Any = None
        count = self.runtime.getDeviceCount()
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
            raise RuntimeError(f"{what} failed: {name.decode()} ({text.decode()})")
        return answer[1] if len(answer) > 1 else None

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
            for ordinal in range(self.runtime.getDeviceCount())
        ]
        return [
            bytes(self.ask("asking a GPU for its uuid", driver.cuDeviceGetUuid(device)).bytes)
            for device in devices
        ]

    def __del__(self) -> None:
        if self._device is not None and self._pid == os.getpid():
            self.driver.cuDevicePrimaryCtxRelease(self._device)


def _on_gpu(method: Callable[Concatenate[Any, P], T]) -> Callable[Concatenate[Any, P], T]:
    """A method of something with a ``gpu``, run with that GPU's context current."""

    @functools.wraps(method)
    def run(self: Any, *args: P.args, **kwargs: P.kwargs) -> T:
        with self.gpu.current():
            return method(self, *args, **kwargs)

    return run


# ---------------------------------------------------------------------------------------- memory


class Arena:
    """A rank's arena: this one's own, or a peer's that is mapped here. Given back when it dies; the
    exporter's should die last.
    """

    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu
        self.address = 0
        self._is_own = False
        self._pid = os.getpid()

    @_on_gpu
    def allocate(self, num_bytes: int) -> None:
        """Zero-filled.

        Raises:
            RuntimeError: the GPU has not so much memory left.
        """
        runtime = self.gpu.runtime
        try:
            self.address = runtime.malloc(num_bytes)
        except RuntimeError as error:
            if getattr(error, "status", None) != _OUT_OF_MEMORY:
                raise
            raise RuntimeError(
                f"GPU {self.gpu.ordinal} has not the {num_bytes} bytes that feplb's arena takes: "
                f"{error}. Lower max_rows, num_slots or num_grad_slots, or leave more memory free."
            ) from error
        self._is_own = True
        runtime.memset(self.address, 0, num_bytes)
        runtime.streamSynchronize(0)

    @_on_gpu
    def export(self) -> bytes:
        """What a peer opens it with."""
        handle: bytes = self.gpu.runtime.ipcGetMemHandle(self.address)
        return handle

    @_on_gpu
    def open(self, handle: bytes) -> None:
        """Map a peer's.

        Raises:
            RuntimeError: CUDA IPC was refused.
        """
        try:
            self.address = self.gpu.runtime.ipcOpenMemHandle(handle)
        except RuntimeError as error:
            raise RuntimeError(
                f"CUDA IPC of a peer's arena was refused: {error}. Containers need --ipc=host (or "
                "one container for all ranks) and the GPUs of all ranks; or use lane='ce', which "
                "has another way (arena_handle='vmm')."
            ) from error

    @_on_gpu
    def _give_back(self) -> None:
        give_back = self.gpu.runtime.free if self._is_own else self.gpu.runtime.ipcCloseMemHandle
        give_back(self.address)

    def __del__(self) -> None:
        if self.address and self._pid == os.getpid():
            with contextlib.suppress(RuntimeError):  # nobody is there to be told
                self._give_back()


@dataclass
class _Pinned:
    """Host memory that the GPU's streams write to and wait on."""

    host: int
    num_bytes: int
    device: int  # where the GPU sees it

    def at(self, address: int) -> int:
        return self.device + address - self.host

    def has(self, address: int) -> bool:
        return self.host <= address < self.host + self.num_bytes


# ---------------------------------------------------------------------------------------- device


@dataclass
class _Stream:
    """One stream, and the points recorded in it."""

    handle: int
    events: list[int]
    recorded: int = 0
    awaited: tuple[int, int] = (0, 0)  # stream and position of the latest point it waits for
    word: int = 0  # of the GPU's memory, for flags that are copied


@dataclass(frozen=True)
class _PeerArena:
    address: int
    num_bytes: int
    ordinal: int


class CupyDevice:
    """What the core calls (``_core.PythonLane``); csrc/device.h says what each method must do.

    Addresses, sizes and stream handles are plain ints. One thread at a time.

    Args:
        copies: ``"batch"``, ``"plain"`` or ``"peer"``, see ``BalancerConfig.copy_call``.
        flags: ``"memops"``, ``"write"`` or ``"copy"``, see ``BalancerConfig.flag_call``.
    """

    def __init__(self, gpu: Gpu, copies: str, flags: str) -> None:
        self.gpu = gpu
        self.peers: list[_PeerArena] = []  # for copies="peer", which must know both GPUs
        self._runtime, self._driver = gpu.runtime, gpu.driver
        self._submit = {
            "batch": self._submit_batch, "plain": self._submit_plain, "peer": self._submit_peer
        }[copies]  # fmt: skip
        self._write = {
            "memops": self._write_together, "write": self._write_word, "copy": self._copy_word
        }[flags]  # fmt: skip
        self._pinned: list[_Pinned] = []
        self._streams: list[_Stream] = []
        self._words = 0
        self._attributes: Any = None
        self._mem_ops: list[Any] = []

    @_on_gpu
    def start(self, board: int, board_bytes: int, page: int, page_bytes: int) -> None:
        """Pin the count board and the core's page, and make the streams.

        Raises:
            RuntimeError: memory could not be pinned; nothing of this rank's is left behind.
        """
        try:
            self._pin(board, board_bytes)
            self._pin(page, page_bytes)
            self._words = self._runtime.malloc(8 * _NUM_STREAMS)
            for kind in range(_NUM_STREAMS):
                stream = _Stream(0, [], word=self._words + 8 * kind)
                self._streams.append(stream)
                for _ in range(_NUM_EVENTS):
                    event = self._runtime.eventCreateWithFlags(self._runtime.eventDisableTiming)
                    stream.events.append(event)
                if kind != _COMPUTE:
                    flags = self._runtime.streamNonBlocking
                    stream.handle = self._runtime.streamCreateWithFlags(flags)
        except RuntimeError:
            self._give_back()
            raise

    def _pin(self, host: int, num_bytes: int) -> None:
        try:
            self._runtime.hostRegister(host, num_bytes, _PORTABLE_AND_MAPPED)
        except RuntimeError as error:
            raise RuntimeError(
                f"pinning {num_bytes} bytes of the count board failed: {error}. Raise the memlock "
                "limit (ulimit -l, or --ulimit memlock=-1)."
            ) from error
        self._pinned.append(_Pinned(host, num_bytes, 0))
        answer = self._driver.cuMemHostGetDevicePointer(host, 0)
        device = self.gpu.ask("asking where the GPU sees the count board", answer)
        self._pinned[-1].device = int(device)

    def _flag(self, address: int) -> int:
        """Where the GPU sees a word of pinned memory."""
        pinned = next((each for each in self._pinned if each.has(address)), None)
        assert pinned is not None, "a flag lies outside the count board"
        return pinned.at(address)

    # ------------------------------------------------------------------------- streams and events

    @_on_gpu
    def bind_compute(self, handle: int) -> None:
        """What another stream was given before comes first.

        Raises:
            RuntimeError: the stream is being captured into a CUDA graph.
        """
        try:
            is_captured = self._runtime.streamIsCapturing(handle)
        except RuntimeError as error:
            if getattr(error, "status", _CAPTURED) != _CAPTURED:
                raise
            is_captured = True
        if is_captured:
            raise RuntimeError(
                "feplb was called while its stream is captured into a CUDA graph. A balanced layer "
                "plans on the host in every call and cannot be captured. Nothing was sent. Leave "
                "the MoE layer out of the graph."
            )
        compute = self._streams[_COMPUTE]
        if handle == compute.handle:
            return
        position = self.record(_COMPUTE) if compute.recorded else 0
        compute.handle, compute.awaited = handle, (0, 0)
        if position:
            self.after_event(_COMPUTE, _COMPUTE, position)

    @_on_gpu
    def record(self, kind: int) -> int:
        """The position of a point in the stream: all that it was given so far."""
        stream = self._streams[kind]
        stream.recorded += 1
        self._runtime.eventRecord(stream.events[stream.recorded % _NUM_EVENTS], stream.handle)
        return stream.recorded

    @_on_gpu
    def after_event(self, kind: int, recorded_in: int, position: int) -> None:
        """The stream goes on once another one has come to a point recorded in it."""
        stream = self._streams[kind]
        if stream.awaited[0] == recorded_in and stream.awaited[1] >= position:
            return
        event = self._streams[recorded_in].events[position % _NUM_EVENTS]
        self._runtime.streamWaitEvent(stream.handle, event)
        stream.awaited = (recorded_in, position)

    # -------------------------------------------------------------------------------------- flags

    @_on_gpu
    def wait_flag(self, address: int, epoch: int) -> None:
        """The compute stream goes on once the flag has reached ``epoch``, cyclically."""
        self.gpu.ask(
            "enqueueing the wait for a flag",
            self._driver.cuStreamWaitValue32(
                self._streams[_COMPUTE].handle,
                self._flag(address),
                epoch,
                int(self._driver.CUstreamWaitValue_flags.CU_STREAM_WAIT_VALUE_GEQ),
            ),
        )

    @_on_gpu
    def write_flags(self, kind: int, addresses: Sequence[int], epochs: Sequence[int]) -> None:
        """Each flag becomes its epoch once all before it in the stream is done and visible."""
        words = [self._flag(address) for address in addresses]
        self._write(self._streams[kind], list(zip(words, epochs, strict=True)))

    def _write_together(self, stream: _Stream, words: list[tuple[int, int]]) -> None:
        kind = self._driver.CUstreamBatchMemOpType.CU_STREAM_MEM_OP_WRITE_VALUE_32
        for first in range(0, len(words), _MOST_FLAGS):
            some = words[first : first + _MOST_FLAGS]
            while len(self._mem_ops) < len(some):  # making one takes longer than the call
                self._mem_ops.append(self._driver.CUstreamBatchMemOpParams())
            operations = self._mem_ops[: len(some)]
            for operation, (address, value) in zip(operations, some, strict=True):
                operation.operation = kind
                write = operation.writeValue
                write.operation, write.flags = kind, 0
                write.address, write.value = address, value
            answer = self._driver.cuStreamBatchMemOp(stream.handle, len(some), operations, 0)
            self.gpu.ask("enqueueing flags", answer)

    def _write_word(self, stream: _Stream, words: list[tuple[int, int]]) -> None:
        for address, value in words:
            answer = self._driver.cuStreamWriteValue32(stream.handle, address, value, 0)
            self.gpu.ask("enqueueing a flag", answer)

    def _copy_word(self, stream: _Stream, words: list[tuple[int, int]]) -> None:
        for address, value in words:
            self._write_word(stream, [(stream.word, value)])
            anywhere = self._runtime.memcpyDefault
            self._runtime.memcpyAsync(address, stream.word, 4, anywhere, stream.handle)

    # ------------------------------------------------------------------------------------- copies

    @_on_gpu
    def copy_batch(
        self, kind: int, destinations: Sequence[int], sources: Sequence[int], sizes: Sequence[int]
    ) -> None:
        """Copies without an order among them."""
        chunks = [
            (to + done, source + done, min(_CHUNK_BYTES, size - done))
            for to, source, size in zip(destinations, sources, sizes, strict=True)
            for done in range(0, size, _CHUNK_BYTES)
        ]
        self._submit(self._streams[kind].handle, chunks)

    def _submit_batch(self, stream: int, chunks: list[tuple[int, int, int]]) -> None:
        driver = self._driver
        if self._attributes is None:
            order = driver.CUmemcpySrcAccessOrder.CU_MEMCPY_SRC_ACCESS_ORDER_STREAM
            overlap = driver.CUmemcpyFlags.CU_MEMCPY_FLAG_PREFER_OVERLAP_WITH_COMPUTE
            self._attributes = driver.CUmemcpyAttributes()
            self._attributes.srcAccessOrder, self._attributes.flags = order, int(overlap)
        answer = driver.cuMemcpyBatchAsync(
            [driver.CUdeviceptr(to) for to, _, _ in chunks],
            [driver.CUdeviceptr(source) for _, source, _ in chunks],
            [size for _, _, size in chunks],
            len(chunks),
            [self._attributes],
            [0],
            1,
            stream,
        )
        self.gpu.ask(f"submitting a batch of {len(chunks)} copies", answer)

    def _submit_plain(self, stream: int, chunks: list[tuple[int, int, int]]) -> None:
        anywhere = self._runtime.memcpyDefault
        for to, source, size in chunks:
            self._runtime.memcpyAsync(to, source, size, anywhere, stream)

    def _submit_peer(self, stream: int, chunks: list[tuple[int, int, int]]) -> None:
        own = self.gpu.ordinal
        for to, source, size in chunks:
            there = (p.ordinal for p in self.peers if p.address <= to < p.address + p.num_bytes)
            self._runtime.memcpyPeerAsync(to, next(there, own), source, own, size, stream)

    @_on_gpu
    def put(self, to: int, source: int, num_bytes: int) -> None:
        """From the host to the GPU; blocks until it is done."""
        self._runtime.memcpy(to, source, num_bytes, self._runtime.memcpyHostToDevice)

    @_on_gpu
    def get(self, to: int, source: int, num_bytes: int) -> None:
        """From the GPU to the host; blocks until it is done."""
        self._runtime.memcpy(to, source, num_bytes, self._runtime.memcpyDeviceToHost)

    # ---------------------------------------------------------------------------------------- end

    @_on_gpu
    def stop(self) -> None:
        """Once the compute stream has drained; blocks until the copies accepted so far are done."""
        for stream in self._streams[_COMPUTE + 1 :]:
            self._runtime.streamSynchronize(stream.handle)
        self._give_back()

    def _give_back(self) -> None:
        for kind, stream in enumerate(self._streams):
            if kind != _COMPUTE and stream.handle:
                self._runtime.streamDestroy(stream.handle)
            for event in stream.events:
                self._runtime.eventDestroy(event)
        if self._words:
            self._runtime.free(self._words)
        for pinned in self._pinned:
            self._runtime.hostUnregister(pinned.host)
        self._streams, self._pinned, self._words = [], [], 0


# ------------------------------------------------------------------------------------------ lane


class CupyLane:
    """One rank's end, on the GPU that is current when the Balancer is built; see ``lanes.Lane``.

    Raises:
        ValueError: arenas were to be shared in a way that CuPy has not.
        RuntimeError: no CuPy, no cuda-python, no driver, or one without what the config asks for.
    """

    def __init__(self, config: BalancerConfig) -> None:
        from . import _core

        if config.arena_handle == "vmm":
            raise ValueError(
                "lane='cupy' shares arenas by CUDA IPC alone. Use arena_handle='ipc' or 'auto', or "
                "lane='ce'."
            )
        packages = import_packages()
        has_gpu = torch.cuda.is_available()
        if not has_gpu and not packages.is_stand_in:
            raise RuntimeError(
                f"lane='cupy': PyTorch {torch.__version__} sees no GPU (torch.cuda.is_available() "
                "is False). Install a CUDA build of it, or use lane='host'."
            )
        ordinal = torch.cuda.current_device() if has_gpu else 0
        self.device = torch.device("cuda", ordinal) if has_gpu else torch.device("cpu")
        self._gpu = Gpu(packages, ordinal)
        self._copies = _copy_call(config.copy_call, packages)
        flags = "memops" if config.flag_call == "auto" else config.flag_call
        self._lane = CupyDevice(self._gpu, self._copies, flags)
        self.core: Any = _core.PythonLane(self._lane)
        self.description = f"cupy ({self._copies} copies, flags by {flags}, ipc arena)"
        self.canary_bytes = _CANARY_BYTES
        self._arenas: list[Arena] = [Arena(self._gpu)]  # this rank's own, later all

    def reserve(self, create: OpenSegment, rank: int, num_bytes: int) -> None:
        self._arenas[0].allocate(num_bytes)

    def share(
        self, peers: Peers, domain: DomainRanks, name: str, num_bytes: int, deadline_s: float
    ) -> None:
        own = self._arenas[0]
        said = peers.together(lambda: (own.export(), self._gpu.uuids(), self._gpu.ordinal))
        of_ranks = [said[rank] for rank in domain.group_ranks]

        def open_all() -> None:
            self._arenas = [
                own if rank == domain.rank else self._open(handle)
                for rank, (handle, _, _) in enumerate(of_ranks)
            ]
            if self._copies == "peer":
                gpus = [uuids[ordinal] for _, uuids, ordinal in of_ranks]
                self._name_peers(gpus, said[peers.rank][1], num_bytes)

        peers.together(open_all)

    def _open(self, handle: bytes) -> Arena:
        arena = Arena(self._gpu)
        arena.open(handle)
        return arena

    def _name_peers(self, gpus: Sequence[bytes], visible: Sequence[bytes], num_bytes: int) -> None:
        if not set(gpus) <= set(visible):
            raise RuntimeError(
                'copy_call="peer" must know the GPUs of all ranks, and this process does not see '
                'them. Make them visible (CUDA_VISIBLE_DEVICES), or use "plain" or "batch".'
            )
        self._lane.peers = [
            _PeerArena(arena.address, num_bytes, visible.index(gpu))
            for arena, gpu in zip(self._arenas, gpus, strict=True)
        ]

    def arenas(self, open_segment: OpenSegment, domain: DomainRanks, num_bytes: int) -> list[Any]:
        from . import _core

        held, self._arenas = self._arenas, []
        return [_core.PythonMapping(address=arena.address, owner=arena) for arena in held]


def _copy_call(wanted: str, packages: Packages) -> str:
    """``auto``: batches, where driver and bindings have them."""
    supported = packages.runtime.driverGetVersion()
    # Bindings of CUDA 13 know a form of the call that drivers before it have not.
    needed = max(_FIRST_DRIVER_WITH_BATCHES, packages.driver.CUDA_VERSION // 1000 * 1000)
    has_batches = hasattr(packages.driver, "cuMemcpyBatchAsync") and supported >= needed
    if wanted == "batch" and not has_batches:
        raise RuntimeError(
            f'copy_call="batch" needs cuda-python 12.8 or newer, not newer than the driver, which '
            f"supports CUDA {supported // 1000}.{supported % 1000 // 10} here (cuda-python: "
            f'{packages.driver.CUDA_VERSION // 1000}). Update them, or use "plain".'
        )
    if wanted != "auto":
        return wanted
    return "batch" if has_batches else "plain"
