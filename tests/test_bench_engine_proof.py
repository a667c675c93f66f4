"""bench/engine_proof.py in parts: records by hand, the starvation test with engines that are made
up, and feplb's copies over the stand-in driver.
"""

from __future__ import annotations

import ctypes
import json
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import stand_in
import torch
from virtual_time import Timed, VirtualTime

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

import copy_records
import engine_proof as bench
from copy_records import CopyRecord, Seen
from copy_ways import CONTROL, Direction

from feplb import _core


def test_copies_and_kernels_of_a_trace() -> None:
    events = [
        {"cat": "gpu_memcpy", "name": "Memcpy HtoD (Pinned -> Device)",
         "args": {"bytes": 16, "stream": 13}},
        {"cat": "kernel", "name": "add", "args": {"stream": 7}},
        {"cat": "cuda_driver", "name": "cuMemcpyBatchAsync"},
        {"ph": "M", "name": "process_name"},
    ]  # fmt: skip
    seen = copy_records.seen_in_trace({"traceEvents": events})
    assert seen == Seen((CopyRecord("HtoD", 16, 13),), ("add",))
    assert Seen.from_json(json.loads(json.dumps(seen.as_json()))) == seen


def cupti_record(kind: int, copy_kind: int, num_bytes: int, stream: int, channel: int) -> bytes:
    """As cupti_activity.h of CUDA 13 lays it out, field by field."""
    head = struct.pack("<I4BQQQ", kind, copy_kind, 1, 2, 0, num_bytes, 5, 6)
    ids = struct.pack("<III", 0, 1, stream)
    if kind == copy_records.MEMCPY:
        rest = struct.pack("<II4xQQIII4xQ", 9, 8, 0, 0, 0, 77, channel, 1)
    else:
        rest = struct.pack("<IIIIIQQIII", 0, 1, 1, 1, 9, 0, 0, 0, 77, channel)
    return head + ids + rest


@pytest.mark.parametrize("kind", [copy_records.MEMCPY, copy_records.MEMCPY_PEER])
def test_a_record_of_cupti(kind: int) -> None:
    record = cupti_record(kind, 8, 1 << 20, 14, 2)
    assert copy_records.record_at(record) == CopyRecord("DtoD", 1 << 20, 14, "ASYNC_MEMCPY")


def test_a_record_of_something_else_is_no_copy() -> None:
    assert copy_records.record_at(cupti_record(3, 8, 1, 1, 1) + bytes(8)) is None


def test_without_libcupti_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copy_records, "cupti_libraries", lambda: iter(["/nowhere/libcupti.so"]))
    with pytest.raises(OSError, match="libcupti could not be opened: /nowhere"):
        copy_records.Cupti()


@pytest.mark.parametrize(
    ("stdout", "stderr", "said"),
    [
        ('{"error": "no libcupti"}\n', "", "not read, no libcupti"),
        ("", "Traceback\nRuntimeError: boom\n", "failed: RuntimeError: boom"),
        ("warning\nnot json", "", "failed: it said nothing"),
    ],
)
def test_a_child_without_records_is_told(stdout: str, stderr: str, said: str) -> None:
    rows, text = bench.channel_rows_of(stdout, stderr)
    assert rows == []
    assert said in text


def test_the_childs_records_become_rows() -> None:
    copy = CopyRecord("HtoD", bench.COPY_BYTES, 13, "ASYNC_MEMCPY")
    seen = {"feplb, batch|H2D": Seen((copy,), ()).as_json()}
    rows, _ = bench.channel_rows_of(json.dumps({"library": "x", "seen": seen}), "")
    assert rows[0]["channels"] == "ASYNC_MEMCPY"
    assert rows[0]["all_bytes"] is True
    assert rows[0]["kernels"] == 0


# ------------------------------------------------------------------------------------ starvation

DIRECTION = Direction("H2D", torch.zeros(1), torch.zeros(1))


class Kernel:
    """Runs for so many seconds from its launch."""

    def __init__(self, clock: Any, seconds: float, *, starts: bool = True) -> None:
        self.clock, self.seconds, self.starts = clock, seconds, starts
        self.end = Timed(clock, 0.0)

    def launch(self) -> None:
        self.end = Timed(self.clock, self.clock.monotonic() + self.seconds)

    def has_started(self) -> bool:
        return self.starts


class Copy:
    """Takes ``seconds``; or, on SMs, arrives when the kernel has left them."""

    def __init__(self, name: str, kernel: Kernel, *, on_sms: bool, seconds: float = 0.01) -> None:
        self.name, self._kernel = name, kernel
        self._on_sms, self._seconds = on_sms, seconds

    def submit(self, direction: Direction) -> None:
        pass

    def wait(self, ticket: None) -> int:
        clock = self._kernel.clock
        if self._on_sms:
            self._kernel.end.synchronize()
        else:
            clock.until(clock.now + self._seconds)
        return clock.monotonic_ns()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> VirtualTime:
    made = VirtualTime()
    monkeypatch.setattr(bench, "time", made)
    return made


def starved(clock: VirtualTime, name: str, *, on_sms: bool, seconds: float = 0.01) -> bench.Starved:
    kernel = Kernel(clock, 0.2)
    way = Copy(name, kernel, on_sms=on_sms, seconds=seconds)
    return bench.starve(way, DIRECTION, kernel, lambda: kernel.end)


def test_a_copy_that_ends_just_before_the_kernel_has_not_escaped(clock: VirtualTime) -> None:
    late = starved(clock, "feplb, batch", on_sms=False, seconds=0.19)
    assert late.kernel_was_running
    assert not late.escaped
    assert late.arrived_ms == pytest.approx(190)
    assert late.kernel_ms == pytest.approx(200)


def test_an_engine_escapes_and_sms_do_not(clock: VirtualTime) -> None:
    control = starved(clock, CONTROL, on_sms=True)
    rows = bench.starvation_rows(
        [
            control,
            starved(clock, "feplb, batch", on_sms=False),
            starved(clock, "feplb, plain", on_sms=True),
        ]
    )
    assert [row["engine"] for row in rows] == [bench.SMS, bench.ENGINE, bench.SMS]
    assert bench.broken_promises(rows, [DIRECTION]) == [
        "feplb, plain, H2D: SMs, expected copy engine"
    ]


@pytest.mark.parametrize("control", [True, False])
def test_without_a_control_that_starves_nothing_is_claimed(
    clock: VirtualTime, control: bool
) -> None:
    samples = [starved(clock, CONTROL, on_sms=False)] if control else []
    rows = bench.starvation_rows([*samples, starved(clock, "feplb, batch", on_sms=False)])
    assert {row["engine"] for row in rows} == {bench.UNKNOWN}
    assert len(bench.broken_promises(rows, [DIRECTION])) == 1


def test_a_copy_inside_the_gpu_may_take_sms(clock: VirtualTime) -> None:
    inside = Direction("H2D", DIRECTION.dst, DIRECTION.src, must_be_engine=False)
    rows = bench.starvation_rows(
        [starved(clock, CONTROL, on_sms=True), starved(clock, "feplb, batch", on_sms=True)]
    )
    assert bench.broken_promises(rows, [inside]) == []


def test_a_kernel_that_never_starts_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "START_S", 0.05)
    kernel = Kernel(VirtualTime(), 0.01, starts=False)
    with pytest.raises(RuntimeError, match="not seen to start"):
        bench.starve(Copy("x", kernel, on_sms=False), DIRECTION, kernel, lambda: kernel.end)


def test_without_a_gpu_nothing_is_measured(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench.main(["--quick"]) == 0
    assert "nothing was measured" in capsys.readouterr().out


# ------------------------------------------------------------------------------------ CopyStream


@pytest.fixture
def memory() -> Any:
    """(library, address of 1 MiB of the stand-in's device memory)."""
    library = str(stand_in.library())
    driver = ctypes.CDLL(library)
    context, address = ctypes.c_void_p(), ctypes.c_uint64()
    assert driver.cuInit(0) == 0
    assert driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0) == 0
    assert driver.cuCtxSetCurrent(context) == 0
    assert driver.cuMemAlloc(ctypes.byref(address), ctypes.c_size_t(1 << 20)) == 0
    yield library, address.value
    assert driver.cuMemFree(address) == 0
    assert driver.cuCtxSetCurrent(None) == 0


@pytest.mark.parametrize("copy_call", ["batch", "plain"])
def test_copies_arrive_and_the_clock_is_pythons(memory: Any, copy_call: str) -> None:
    library, address = memory
    stream = _core.CopyStream(library=library, ordinal=0, copy_call=copy_call)
    assert stream.calls == copy_call
    source = np.arange(1 << 20, dtype=np.uint8)
    half = len(source) // 2
    start = time.monotonic_ns()
    stream.after(0)
    ticket = stream.copy(
        [(address, source.ctypes.data, half), (address + half, source.ctypes.data + half, half)]
    )
    arrived = stream.wait(ticket, 10.0)
    assert start < arrived <= time.monotonic_ns()
    assert stream.done(ticket)
    assert not stream.done(ticket + 1)
    assert ctypes.string_at(address, len(source)) == source.tobytes()


def test_a_copy_that_does_not_arrive_is_an_error_in_time(memory: Any) -> None:
    stream = _core.CopyStream(library=memory[0], ordinal=0)
    with pytest.raises(RuntimeError, match="has not arrived within"):
        stream.wait(1, 0.05)


def test_copies_of_a_stream_without_ranks_name_no_peers(memory: Any) -> None:
    with pytest.raises(ValueError, match="has no ranks"):
        _core.CopyStream(library=memory[0], ordinal=0, copy_call="peer")


@pytest.mark.gpu
def test_engines_carry_what_crosses_the_edge_of_this_gpu() -> None:
    """Within it the table says what was seen: an engine, or SMs."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    command = [sys.executable, str(Path(bench.__file__)), "--quick"]
    seen = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    print(seen.stdout)
    assert seen.returncode == 0, seen.stdout + seen.stderr
