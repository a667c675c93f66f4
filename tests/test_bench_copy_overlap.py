"""bench/copy_overlap.py with copies and GEMMs that are made up: arithmetic, covering, the check."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from virtual_time import Timed, VirtualTime

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

import copy_overlap as bench
from copy_ways import Direction

MIB = 1 << 20


def test_copies_in_a_row_walk_around_the_buffer() -> None:
    assert bench.in_a_row(MIB, 3, 2 * MIB) == [(0, MIB), (MIB, MIB), (0, MIB)]
    assert bench.in_a_row(2 * MIB, 2, 2 * MIB) == [(0, 2 * MIB)] * 2


def test_how_many_copies_last_so_long() -> None:
    # 1 ms at 100 GB/s is 100 MB.
    assert bench.count_lasting(1.0, 10_000_000, 100.0) == 10
    assert bench.count_lasting(1.0, 1 << 30, 100.0) == 1
    assert bench.count_lasting(1e9, 1, 100.0) == bench.MOST_IN_A_ROW


def test_a_row_by_hand() -> None:
    loaded = [bench.Loaded(6.0, 40.0), bench.Loaded(5.5, None), bench.Loaded(None, 42.0)]
    row = bench.row_of("lane", "H2D", 4 * MIB, [[10.0, 12.0], [50.0]], 5.0, loaded)
    assert row["gemm_pct"] == pytest.approx(115.0)
    assert row["beside_gemm_gbps"] == 41.0
    assert row["one_copy_gbps"] == 11.0
    assert row["in_a_row_gbps"] == 50.0
    assert row["mib"] == 4


def test_what_was_never_covered_is_no_figure() -> None:
    row = bench.row_of("lane", "H2D", MIB, [[1.0], [1.0]], 5.0, [bench.Loaded(None, None)])
    assert row["gemm_pct"] is row["beside_gemm_gbps"] is row["gemm_pct_iqr"] is None


class Copies:
    """Copies that last as their bytes over a rate say; and carry the bytes, unless told not to."""

    name = "made up"

    def __init__(self, clock: VirtualTime, gbps: float, *, loses: bool = False) -> None:
        self.clock, self.gbps, self.loses = clock, gbps, loses

    def submit(self, direction: Direction, pieces: Any = None) -> Timed:
        for at, size in pieces[: -1 if self.loses else None]:
            if direction.dst.numel() >= at + size:
                direction.dst[at : at + size] = direction.src[at : at + size]
        seconds = sum(size for _, size in pieces) / self.gbps / 1e9
        return Timed(self.clock, self.clock.now + seconds)

    def wait(self, ticket: Timed) -> int:
        ticket.synchronize()
        return self.clock.monotonic_ns()

    def done(self, ticket: Timed) -> bool:
        return ticket.query()


def gemm_of(clock: VirtualTime, ms: float) -> bench.Beside:
    """A GEMM that always takes ``ms``, on a GPU that starts it at once."""
    launched = [0]

    def started(work: Any) -> tuple[Timed, Timed]:
        launched[0] = 0
        work()
        return Timed(clock, clock.now), Timed(clock, clock.now + launched[0] * ms / 1e3)

    def launch(times: int) -> None:
        launched[0] += times

    return bench.Beside(launch, ms, started)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> VirtualTime:
    made = VirtualTime()
    monkeypatch.setattr(bench, "time", made)
    return made


NOTHING = Direction("made up", torch.empty(0), torch.empty(0))


def test_gemm_and_copies_cover_each_other(clock: VirtualTime) -> None:
    # 20 ms GEMMs; a copy of 1 MiB at 0.5 GB/s takes 2 ms.
    sample = bench.under_load(Copies(clock, 0.5), NOTHING, MIB, 0.5, gemm_of(clock, 20.0))
    assert sample.gemm_ms == pytest.approx(20.0)
    assert sample.copy_gbps == pytest.approx(0.5)


def test_copies_faster_than_they_were_alone_cover_nothing(clock: VirtualTime) -> None:
    sample = bench.under_load(Copies(clock, 1000.0), NOTHING, MIB, 0.5, gemm_of(clock, 20.0))
    assert sample.gemm_ms is None
    assert sample.copy_gbps is not None


def test_copies_that_outlast_the_gemms_were_not_beside_them(clock: VirtualTime) -> None:
    sample = bench.under_load(Copies(clock, 0.05), NOTHING, MIB, 0.5, gemm_of(clock, 20.0))
    assert sample.gemm_ms == pytest.approx(20.0)
    assert sample.copy_gbps is None


def test_rates_alone_are_those_of_the_copies(clock: VirtualTime) -> None:
    way = Copies(clock, 50.0)
    (row,) = bench.measure([way], [NOTHING], [4 * MIB], gemm_of(clock, 5.0), repeats=2)
    assert row["one_copy_gbps"] == pytest.approx(50.0)
    assert row["in_a_row_gbps"] == pytest.approx(50.0)
    assert row["beside_gemm_gbps"] == pytest.approx(50.0)
    assert row["gemm_pct"] == pytest.approx(100.0)


def test_a_lost_piece_fails_the_check(clock: VirtualTime, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    bytes_of = Direction("made up", *(torch.zeros(4 * MIB, dtype=torch.uint8) for _ in range(2)))
    bench.check_copies([Copies(clock, 100.0)], [bytes_of])
    with pytest.raises(RuntimeError, match="not what was sent"):
        bench.check_copies([Copies(clock, 100.0, loses=True)], [bytes_of])


def test_without_a_gpu_nothing_is_measured(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench.main(["--quick"]) == 0
    assert "nothing was measured" in capsys.readouterr().out
