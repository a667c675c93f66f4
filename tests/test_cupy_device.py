"""The cupy lane's device alone, over the stand-in driver, with streams that are behind: what comes
after what. Each program runs in a process of its own.
"""

from __future__ import annotations

import ctypes
import mmap
import time
from collections.abc import Callable, Iterator
from typing import Any

import cupy_stand_in
import pytest
from ranks import run_ranks
from stand_in import StandIn

from feplb.cupy_device import CupyDevice
from feplb.cupy_gpu import Gpu

COMPUTE, PUSHES, RETURNS = 0, 1, 2
PAGE = 4096
CHUNK = 8 << 20
HELD_S = 0.05  # what must not happen is looked for so long


@pytest.fixture(scope="module", autouse=True)
def _machine(cupy_machine: None) -> None:
    """For all of this file."""


class Bench:
    """A started device with a compute stream of the driver's, a board of flags and some memory.

    Only the board's flag 0 lets a stream go on that was held.
    """

    def __init__(self, copies: str = "batch", flags: str = "memops", memory: int = 4096) -> None:
        packages = cupy_stand_in.packages()
        self.gpu = Gpu(packages, 0)
        self.runtime = packages.runtime
        self.device = CupyDevice(self.gpu, copies, flags)
        self._pages = mmap.mmap(-1, 2 * PAGE)  # shared: the GPU sees it elsewhere
        self.board = ctypes.addressof(ctypes.c_char.from_buffer(self._pages))
        with self.gpu.current():
            self.memory = self.runtime.malloc(memory)
            self.stream = self.runtime.streamCreateWithFlags(1)
        self.device.start(self.board, PAGE, self.board + PAGE, PAGE)
        self.device.bind_compute(self.stream)

    def flag(self, number: int) -> int:
        return self.board + 4 * number

    def seen(self, number: int) -> int:
        return ctypes.c_uint32.from_address(self.flag(number)).value

    def hold(self, kind: int = COMPUTE) -> None:
        if kind == COMPUTE:
            self.device.wait_flag(self.flag(0), 1)
            return
        handle, flag = self.device._streams[kind].handle, self.device._flag(self.flag(0))
        with self.gpu.current():
            assert self.gpu.driver.cuStreamWaitValue32(handle, flag, 1, 0) == (0,)

    def let_go(self) -> None:
        ctypes.c_uint32.from_address(self.flag(0)).value = 1

    def fill(self, text: bytes) -> int:
        """Plain memory of the host, which stands for a tensor."""
        self.tensor = ctypes.create_string_buffer(text, len(text))
        return ctypes.addressof(self.tensor)

    def read(self, size: int, offset: int = 0) -> bytes:
        return ctypes.string_at(self.memory + offset, size)


def soon(condition: Callable[[], bool]) -> bool:
    end = time.monotonic() + 10
    while not condition() and time.monotonic() < end:
        time.sleep(0.001)
    return condition()


def stays_away(condition: Callable[[], bool]) -> bool:
    time.sleep(HELD_S)
    return not condition()


def copy_after_compute(bench: Bench) -> Iterator[bool]:
    source = bench.fill(b"rows")
    bench.hold()
    position = bench.device.record(COMPUTE)
    bench.device.after_event(PUSHES, COMPUTE, position)
    bench.device.copy_batch(PUSHES, [bench.memory], [source], [4])
    bench.device.write_flags(PUSHES, [bench.flag(1), bench.flag(2)], [7, 8])
    yield stays_away(lambda: bench.read(4) == b"rows" or bench.seen(1) != 0)
    bench.let_go()
    yield soon(lambda: (bench.seen(1), bench.seen(2)) == (7, 8))
    yield bench.read(4) == b"rows"


def compute_after_copy(bench: Bench) -> Iterator[bool]:
    bench.hold(RETURNS)
    done = bench.device.record(RETURNS)
    bench.device.after_event(COMPUTE, RETURNS, done)
    bench.device.write_flags(COMPUTE, [bench.flag(3)], [5])
    yield stays_away(lambda: bench.seen(3) != 0)
    bench.let_go()
    yield soon(lambda: bench.seen(3) == 5)


def events_are_not_used_too_early(bench: Bench) -> Iterator[bool]:
    """As many points as there are events, and one more, while somebody waits for the last."""
    for _ in range(300):
        bench.device.record(COMPUTE)
    bench.hold()
    held = bench.device.record(COMPUTE)
    bench.device.after_event(PUSHES, COMPUTE, held)
    bench.device.after_event(PUSHES, COMPUTE, held - 1)  # says nothing new
    bench.device.write_flags(PUSHES, [bench.flag(4)], [9])
    yield stays_away(lambda: bench.seen(4) != 0)
    bench.let_go()
    yield soon(lambda: bench.seen(4) == 9)


def a_wait_is_asked_for_once(bench: Bench) -> Iterator[bool]:
    driver = StandIn()
    position = bench.device.record(COMPUTE)
    for _ in range(3):
        bench.device.after_event(PUSHES, COMPUTE, position)
    yield driver.calls("cuStreamWaitEvent") == 1
    bench.device.after_event(PUSHES, COMPUTE, bench.device.record(COMPUTE))
    yield driver.calls("cuStreamWaitEvent") == 2


def large_copies_go_in_chunks(bench: Bench) -> Iterator[bool]:
    """Two and a half chunks, then 4 bytes; in a batch the order does not matter."""
    size = 2 * CHUNK + CHUNK // 2
    text = bytes(range(1, 252)) * (size // 251 + 1)
    source = bench.fill(text[:size])
    targets = [bench.memory, bench.memory + size]
    before = StandIn().calls("cuMemcpyAsync")
    bench.device.copy_batch(PUSHES, targets, [source, source], [size, 4])
    bench.device.write_flags(PUSHES, [bench.flag(1)], [1])
    yield soon(lambda: bench.seen(1) == 1)
    yield bench.read(size) == text[:size]
    yield bench.read(4, size) == text[:4]
    yield StandIn().calls("cuMemcpyAsync") - before == 4


def more_flags_than_one_call_takes(bench: Bench) -> Iterator[bool]:
    numbers = range(1, 301)
    bench.device.write_flags(PUSHES, [bench.flag(n) for n in numbers], list(numbers))
    yield soon(lambda: bench.seen(300) == 300)
    yield [bench.seen(n) for n in numbers] == list(numbers)
    yield StandIn().calls("cuStreamBatchMemOp") == 2


def it_gives_everything_back(bench: Bench) -> Iterator[bool]:
    driver, runtime = StandIn(), bench.runtime
    bench.device.copy_batch(PUSHES, [bench.memory], [bench.fill(b"last")], [4])
    bench.device.stop()
    yield bench.read(4) == b"last"
    yield driver.calls("cuStreamSynchronize") == 3  # destroying a stream would not wait for it
    with bench.gpu.current():
        runtime.free(bench.memory)
        runtime.streamDestroy(bench.stream)
    yield driver.alive() == {"context": 1}
    bench.__dict__.clear()
    yield driver.alive() == {}


CASES: dict[str, tuple[Callable[[Bench], Iterator[bool]], dict[str, Any]]] = {
    program.__name__: (program, {})
    for program in (
        copy_after_compute, compute_after_copy,
        events_are_not_used_too_early, a_wait_is_asked_for_once, more_flags_than_one_call_takes,
        it_gives_everything_back,
    )
}  # fmt: skip
CASES["large_copies_go_in_chunks"] = (
    large_copies_go_in_chunks,
    {"copies": "plain", "memory": 4 * CHUNK},
)
for _flags in ("write", "copy"):
    CASES[f"copy_after_compute, {_flags}"] = (copy_after_compute, {"flags": _flags})


def run(rank: int, num_ranks: int, name: str) -> list[bool]:
    program, settings = CASES[name]
    bench = Bench(**settings)
    return list(program(bench))


@pytest.mark.parametrize("name", CASES)
def test_what_comes_after_what(name: str) -> None:
    (found,) = run_ranks(run, 1, name)
    assert found
    assert all(found), found
