"""The GPU benches from main() to the file they write, with a GPU that is made up.

What only a GPU does (its clock, its copies, its spinning kernel) is replaced; experts are small.
The figures mean nothing: that tables and rows come out is what is tested.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_bench_copy_overlap import Copies, gemm_of
from test_bench_layer_emulated import SMALL as SMALL_LAYER
from test_bench_layer_emulated import RowClock
from virtual_time import Timed, VirtualTime

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

import copy_overlap
import engine_proof
import ep_overhead
import gemm_straggler
import gpu_timing
import layer_emulated
import permute
from copy_records import CopyRecord, Seen
from copy_ways import Direction
from expert_operands import Size

from feplb import SwiGLU, gpu_compute
from feplb.kernels import measure_tiles, tiles

FACTS = {"gpu": "a made-up H100", "gpus": 1}
KIB = 1 << 10

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="what a GPU does is made up")


class StepClock:
    """Every run takes a millisecond more than the last."""

    def __init__(self, *, flush: bool = True) -> None:
        self.now = 0.0

    def once(self, work: Callable[[], object]) -> float:
        work()
        self.now += 1.0
        return self.now


def main_rows(bench: Any, tmp_path: Path) -> list[dict[str, Any]]:
    """What ``bench --quick`` writes."""
    file = tmp_path / "rows.json"
    assert bench.main(["--quick", "--json", str(file)]) == 0
    rows: list[dict[str, Any]] = json.loads(file.read_text())["rows"]
    return rows


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is there, and its facts are known."""
    for bench in (gemm_straggler, layer_emulated, copy_overlap, engine_proof, ep_overhead, permute):
        monkeypatch.setattr(bench, "has_gpu", lambda: True)
        monkeypatch.setattr(bench, "gpu_facts", lambda: dict(FACTS))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    monkeypatch.setattr(tiles, "HOPPER", tiles.INTERPRETER)


def test_gemm_straggler(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    size = gemm_straggler.Size(
        hidden=16, width=16, num_experts=8, num_tokens=16, degrees=(2,), steps=1, repeats=1,
        dtype=torch.float32, device="cpu",
    )  # fmt: skip
    monkeypatch.setattr(gemm_straggler, "QUICK", size)
    monkeypatch.setattr(gemm_straggler, "DeviceClock", StepClock)
    rows = main_rows(gemm_straggler, tmp_path)
    arms = [arm.label for arm in gemm_straggler.ARMS]
    assert [row["policy"] for row in rows] == [*arms, gemm_straggler.CEILING]
    assert "one after the other on one GPU" in capsys.readouterr().out


def test_layer_emulated(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    size = replace(SMALL_LAYER, num_experts=8, num_tokens=8, ep=2, steps=1)
    monkeypatch.setattr(layer_emulated, "QUICK", size)

    class Experts(SwiGLU):
        def __init__(self, gemm: object) -> None:
            pass

        def warm_up(self, hidden: int, width: int, **_: object) -> None:
            assert (hidden, width) == (16, 16)

    monkeypatch.setattr(gpu_compute, "TritonSwiGLU", Experts)

    class Clock(RowClock):
        def __init__(self, *, copies_beside: bool) -> None:
            super().__init__()

        def begin(self, arrives_ms: list[float]) -> None:
            super().begin(arrives_ms)
            self.now = 1.0

    monkeypatch.setattr(layer_emulated, "GpuClock", Clock)
    rows = main_rows(layer_emulated, tmp_path)
    assert len(rows) == len(gemm_straggler.ARMS) + 1
    assert all(row["emulated"] for row in rows)
    assert "EMULATED on one GPU" in capsys.readouterr().out


def test_copy_overlap(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = VirtualTime()
    dst, src = (torch.zeros(1 << 20, dtype=torch.uint8) for _ in range(2))
    monkeypatch.setattr(copy_overlap, "time", clock)
    monkeypatch.setattr(copy_overlap, "LaneCopy", lambda _: Copies(clock, 50.0))
    monkeypatch.setattr(copy_overlap, "TorchCopy", lambda: Copies(clock, 40.0))
    monkeypatch.setattr(copy_overlap, "directions", lambda _: [Direction("D2D", dst, src)])
    monkeypatch.setattr(copy_overlap, "gemm_beside", lambda *_: gemm_of(clock, 5.0))
    rows = main_rows(copy_overlap, tmp_path)
    assert [row["mib"] for row in rows] == [1, 16, 128] * 2
    rates = [row["in_a_row_gbps"] for row in rows]
    assert rates == pytest.approx([50.0] * 3 + [40.0] * 3, rel=1e-3)
    assert "all bytes arrived" in capsys.readouterr().out


class Spin:
    """A kernel of the virtual clock."""

    milliseconds = 60.0

    def __init__(self, clock: VirtualTime) -> None:
        self.clock, self.end = clock, Timed(clock, 0.0)

    def launch(self) -> None:
        self.end = Timed(self.clock, self.clock.now + 0.06)

    def has_started(self) -> bool:
        return True


class OnSms(Copies):
    """Arrives when the kernel has left the SMs."""

    name = engine_proof.CONTROL

    def __init__(self, clock: VirtualTime, spin: Spin) -> None:
        super().__init__(clock, 50.0)
        self._spin = spin

    def wait(self, ticket: Timed) -> int:
        self._spin.end.synchronize()
        return super().wait(ticket)


@pytest.mark.parametrize("is_engine", [True, False])
def test_engine_proof(
    is_engine: bool,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    clock = VirtualTime()
    spin = Spin(clock)
    tensors = [torch.zeros(KIB, dtype=torch.uint8) for _ in range(2)]
    found = [Direction("H2D", *tensors), Direction("D2D", *tensors, must_be_engine=False)]

    class Whole(Copies):
        def submit(self, direction: Direction, pieces: Any = None) -> Timed:
            return super().submit(direction, [(0, KIB)])

    class WholeOnSms(OnSms):
        def submit(self, direction: Direction, pieces: Any = None) -> Timed:
            return Copies.submit(self, direction, [(0, KIB)])

    def lane(copy_call: str) -> Copies:
        made = Whole(clock, 50.0) if is_engine else WholeOnSms(clock, spin)
        made.name = f"feplb, {copy_call}"
        return made

    monkeypatch.setattr(engine_proof, "time", clock)
    monkeypatch.setattr(engine_proof, "directions", lambda _: found)
    monkeypatch.setattr(engine_proof, "LaneCopy", lane)
    monkeypatch.setattr(
        engine_proof, "TorchCopy",
        lambda by_kernel=False: WholeOnSms(clock, spin) if by_kernel else Whole(clock, 50.0),
    )  # fmt: skip
    monkeypatch.setattr(engine_proof, "event_on_current_stream", lambda: spin.end)
    monkeypatch.setitem(sys.modules, "spinning", type("m", (), {"Spin": lambda *_: spin}))
    seen = Seen((CopyRecord("HtoD", KIB, 13),), ())
    monkeypatch.setattr(engine_proof, "profiled", lambda _: _Seen(seen))
    monkeypatch.setattr(engine_proof, "channel_rows", lambda: ([], "CUPTI: not read"))
    file = tmp_path / "rows.json"
    status = engine_proof.main(["--quick", "--json", str(file)])
    rows = json.loads(file.read_text())["rows"]
    starved = {
        (row["copy"], row["direction"]): row["engine"]
        for row in rows
        if row["test"] == "starvation"
    }
    expected = engine_proof.ENGINE if is_engine else engine_proof.SMS
    assert starved["feplb, batch", "H2D"] == expected
    assert starved[engine_proof.CONTROL, "D2D"] == engine_proof.SMS
    assert status == (0 if is_engine else 1)
    assert sum(row["test"] == "records" for row in rows) == 3 * 2
    assert "CUPTI: not read" in capsys.readouterr().out


def test_permute(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    size = Size(hidden=24, width=16, num_experts=2, num_tokens=2, dtype=torch.float32, device="cpu")

    def device_times(work: Callable[[], object], repeats: int) -> list[float]:
        work()
        return [1.0] * repeats

    monkeypatch.setattr(permute, "Size", lambda: size)
    monkeypatch.setattr(permute, "COPY_BYTES", KIB)
    monkeypatch.setattr(measure_tiles, "device_times", device_times)
    rows = main_rows(permute, tmp_path)
    assert {row["to_show_pct"] for row in rows} == {85.0}
    assert [row["shown"] for row in rows] == [row["rate_pct"] >= 85 for row in rows]
    assert "to show: 85 % of a large device copy" in capsys.readouterr().out


class _Seen:
    """A profiler that has seen this."""

    def __init__(self, seen: Seen) -> None:
        self._seen = seen

    def __enter__(self) -> Callable[[], Seen]:
        return lambda: self._seen

    def __exit__(self, *_: object) -> None:
        pass


def test_ep_overhead_on_one_gpu_says_that_the_papers_figure_is_unmeasured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    samples = [
        ep_overhead.Sample(name, copies, 10.0 + copies)
        for name in ep_overhead.PASSES
        for copies in (False, True)
    ]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(ep_overhead, "on_one_gpu", lambda _: (ep_overhead.STAND_IN, samples))
    rows = main_rows(ep_overhead, tmp_path)
    assert [row["overhead_pct"] for row in rows] == pytest.approx([10.0, 10.0])
    assert "unmeasured" in capsys.readouterr().out


def test_the_clock_flushes_sleeps_and_times_in_that_order(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    class Event:
        def __init__(self, *, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            order.append("event")

        def synchronize(self) -> None:
            order.append("wait")

        def elapsed_time(self, last: object) -> float:
            return 2.5

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda _: order.append("sleep"))
    clock = gpu_timing.DeviceClock(flush=False)
    assert clock.times(lambda: order.append("work"), 1, warm_up=0) == [2.5]
    assert order == ["sleep", "event", "work", "event", "wait"]
