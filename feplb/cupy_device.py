"""What the core submits to one rank's GPU, in Python and on the caller's thread: streams, events,
flags and copies.

Over CuPy's runtime calls, and over cuda-python's driver calls for what CuPy lacks: flags that
streams write and await, batches of copies, where the GPU sees pinned memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .cupy_gpu import NO_CODE, Gpu, on_gpu

_COMPUTE = 0  # StreamKind::kCompute of csrc/device.h; the others are streams of ours
_NUM_STREAMS = 4
# Recorded points of one stream that somebody may still wait for: a call records a handful.
_NUM_EVENTS = 256
_CHUNK_BYTES = 8 << 20  # copies of this size let what is more urgent in between
_MOST_FLAGS = 255  # of one cuStreamBatchMemOp
_PORTABLE_AND_MAPPED = 1 | 2  # of cudaHostRegister, for which CuPy has no names
_CAPTURED = 906  # a code of the runtime
_SUBMITTING = "submitting a copy"


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


@dataclass
class _Stream:
    """One stream, and the points recorded in it."""

    handle: int
    events: list[int]
    recorded: int = 0
    awaited: tuple[int, int] = (0, 0)  # stream and position of the latest point it waits for
    word: int = 0  # of the GPU's memory, for flags that are copied


@dataclass(frozen=True)
class PeerArena:
    """Where a peer's arena is mapped, and on which of the GPUs that this process sees it lies."""

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
        self.peers: list[PeerArena] = []  # for copies="peer", which must know both GPUs
        self._runtime, self._driver = gpu.runtime, gpu.driver
        self._copies, self._flags = copies, flags
        self._wait_flags = gpu.wait_flags()
        self._pinned: list[_Pinned] = []
        self._streams: list[_Stream] = []
        self._words = 0
        self._attributes: Any = None
        self._mem_ops: list[Any] = []

    @on_gpu
    def start(self, board: int, board_bytes: int, page: int, page_bytes: int) -> None:
        """Pin the count board and the core's page, and make the streams.

        Raises:
            RuntimeError: memory could not be pinned; nothing of this rank's is left behind.
        """
        runtime, call = self._runtime, self.gpu.call
        try:
            self._pin(board, board_bytes)
            self._pin(page, page_bytes)
            self._words = call("allocating the flag words", runtime.malloc, 8 * _NUM_STREAMS)
            for kind in range(_NUM_STREAMS):
                stream = _Stream(0, [], word=self._words + 8 * kind)
                self._streams.append(stream)
                create, flags = runtime.eventCreateWithFlags, runtime.eventDisableTiming
                for _ in range(_NUM_EVENTS):
                    stream.events.append(call("creating an event", create, flags))
                if kind != _COMPUTE:
                    create, flags = runtime.streamCreateWithFlags, runtime.streamNonBlocking
                    stream.handle = call("creating a stream", create, flags)
        except RuntimeError:
            self._give_back()
            raise

    def _pin(self, host: int, num_bytes: int) -> None:
        register = self._runtime.hostRegister
        _, status, text = self.gpu.attempt(register, host, num_bytes, _PORTABLE_AND_MAPPED)
        if status != 0:
            raise RuntimeError(
                f"pinning {num_bytes} bytes of the count board failed: {text}. Raise the memlock "
                "limit (ulimit -l, or --ulimit memlock=-1)."
            )
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

    @on_gpu
    def is_captured(self, handle: int) -> bool:
        """The stream is being captured into a CUDA graph."""
        is_captured, status, text = self.gpu.attempt(self._runtime.streamIsCapturing, handle)
        if status not in (0, _CAPTURED, NO_CODE):
            raise RuntimeError(f"asking whether the compute stream is captured failed: {text}")
        return bool(is_captured) or status != 0  # no code: CuPy found a capture that has failed

    def bind_compute(self, handle: int) -> None:
        """This is the compute stream from here on; the core orders it behind the one before."""
        compute = self._streams[_COMPUTE]
        compute.handle, compute.awaited = handle, (0, 0)

    @on_gpu
    def record(self, kind: int) -> int:
        """The position of a point in the stream: all that it was given so far."""
        stream = self._streams[kind]
        stream.recorded += 1
        event = stream.events[stream.recorded % _NUM_EVENTS]
        self.gpu.call("recording an event", self._runtime.eventRecord, event, stream.handle)
        return stream.recorded

    @on_gpu
    def after_event(self, kind: int, recorded_in: int, position: int) -> None:
        """The stream goes on once another one has come to a point recorded in it."""
        stream = self._streams[kind]
        if stream.awaited[0] == recorded_in and stream.awaited[1] >= position:
            return
        event = self._streams[recorded_in].events[position % _NUM_EVENTS]
        self.gpu.call("waiting for an event", self._runtime.streamWaitEvent, stream.handle, event)
        stream.awaited = (recorded_in, position)

    # -------------------------------------------------------------------------------------- flags

    @on_gpu
    def wait_flag(self, address: int, epoch: int) -> None:
        """The compute stream goes on once the flag has reached ``epoch``, cyclically."""
        self.gpu.ask(
            "enqueueing the wait for a flag",
            self._driver.cuStreamWaitValue32(
                self._streams[_COMPUTE].handle,
                self._flag(address),
                epoch,
                self._wait_flags,
            ),
        )

    @on_gpu
    def write_flags(self, kind: int, addresses: Sequence[int], epochs: Sequence[int]) -> None:
        """Each flag becomes its epoch once all before it in the stream is done and visible."""
        ways = {"memops": self._write_together, "write": self._write_each, "copy": self._copy_each}
        words = [self._flag(address) for address in addresses]
        ways[self._flags](self._streams[kind], list(zip(words, epochs, strict=True)))

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

    def _write_each(self, stream: _Stream, words: list[tuple[int, int]]) -> None:
        for address, value in words:
            answer = self._driver.cuStreamWriteValue32(stream.handle, address, value, 0)
            self.gpu.ask("enqueueing a flag", answer)

    def _copy_each(self, stream: _Stream, words: list[tuple[int, int]]) -> None:
        for address, value in words:
            self._write_each(stream, [(stream.word, value)])
            self._copy("enqueueing a flag's copy", address, stream.word, 4, stream.handle)

    # ------------------------------------------------------------------------------------- copies

    @on_gpu
    def copy_batch(
        self, kind: int, destinations: Sequence[int], sources: Sequence[int], sizes: Sequence[int]
    ) -> None:
        """Copies without an order among them."""
        ways = {"batch": self._submit_batch, "plain": self._submit_each, "peer": self._submit_peer}
        chunks = [
            (to + done, source + done, min(_CHUNK_BYTES, size - done))
            for to, source, size in zip(destinations, sources, sizes, strict=True)
            for done in range(0, size, _CHUNK_BYTES)
        ]
        ways[self._copies](self._streams[kind].handle, chunks)

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

    def _submit_each(self, stream: int, chunks: list[tuple[int, int, int]]) -> None:
        for to, source, size in chunks:
            self._copy(_SUBMITTING, to, source, size, stream)

    def _copy(self, what: str, to: int, source: int, size: int, stream: int) -> None:
        anywhere = self._runtime.memcpyDefault
        self.gpu.call(what, self._runtime.memcpyAsync, to, source, size, anywhere, stream)

    def _submit_peer(self, stream: int, chunks: list[tuple[int, int, int]]) -> None:
        own, copy = self.gpu.ordinal, self._runtime.memcpyPeerAsync
        for to, source, size in chunks:
            there = (p.ordinal for p in self.peers if p.address <= to < p.address + p.num_bytes)
            self.gpu.call(_SUBMITTING, copy, to, next(there, own), source, own, size, stream)

    @on_gpu
    def put(self, to: int, source: int, num_bytes: int) -> None:
        """From the host to the GPU; blocks until it is done."""
        kind = self._runtime.memcpyHostToDevice
        self.gpu.call("copying to the GPU", self._runtime.memcpy, to, source, num_bytes, kind)

    @on_gpu
    def get(self, to: int, source: int, num_bytes: int) -> None:
        """From the GPU to the host; blocks until it is done."""
        kind = self._runtime.memcpyDeviceToHost
        self.gpu.call("copying from the GPU", self._runtime.memcpy, to, source, num_bytes, kind)

    # ---------------------------------------------------------------------------------------- end

    @on_gpu
    def stop(self) -> None:
        """Once the compute stream has drained; blocks until the copies accepted so far are done."""
        for stream in self._streams[_COMPUTE + 1 :]:
            self.gpu.attempt(self._runtime.streamSynchronize, stream.handle)
        self._give_back()

    # Nobody can do anything about what the driver will not take back.
    def _give_back(self) -> None:
        runtime, attempt = self._runtime, self.gpu.attempt
        for kind, stream in enumerate(self._streams):
            if kind != _COMPUTE and stream.handle:
                attempt(runtime.streamDestroy, stream.handle)
            for event in stream.events:
                attempt(runtime.eventDestroy, event)
        if self._words:
            attempt(runtime.free, self._words)
        for pinned in self._pinned:
            attempt(runtime.hostUnregister, pinned.host)
        self._streams, self._pinned, self._words = [], [], 0
