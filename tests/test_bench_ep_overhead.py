"""bench/ep_overhead.py: splits and figures by hand, the exchange between real processes, and the
sampling with copies that are made up.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import run_ranks
from test_bench_copy_overlap import NOTHING, Copies, gemm_of
from virtual_time import VirtualTime

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

import copy_overlap
import ep_overhead as bench
from ep_overhead import Sample


def test_splits_of_a_rank() -> None:
    by_source = np.array([[1, 2, 3, 4], [5, 6, 7, 8]])  # two ranks with two experts each
    assert bench.splits_of(by_source, 0) == ([3, 7], [3, 11])
    assert bench.splits_of(by_source, 1) == ([11, 15], [7, 15])


def exchange(rank: int, num_ranks: int) -> tuple[str, int]:
    by_source = np.arange(num_ranks * 4).reshape(num_ranks, 4)
    made = bench.AllToAll(*bench.splits_of(by_source, rank), torch.empty(0, 8))
    bench.check_exchange(made)
    return made.name, len(made.at_owners)


def test_rows_come_back_over_real_processes() -> None:
    found = run_ranks(exchange, 2)
    assert found == [("gloo all-to-all, 2 ranks", 0 + 1 + 4 + 5), ("gloo all-to-all, 2 ranks", 18)]


def two_samples(rank: int, ranks: int, repeats: int) -> tuple[str, list[Sample]]:
    """In place of a GPU's."""
    name, rows = exchange(rank, ranks)
    return name, [Sample("dispatch", False, float(rows + repeats))]


def test_one_process_per_gpu_and_the_slowest_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "BACKEND", "gloo")
    monkeypatch.setattr(bench, "sample_rank", two_samples)
    name, samples = bench.over_gpus(2, 7)
    assert name == "gloo all-to-all, 2 ranks"
    assert samples == [Sample("dispatch", False, 18.0 + 7)]


def test_the_stand_in_is_called_one_and_a_wrong_exchange_is_not_timed() -> None:
    made = bench.KernelCopies(5, torch.empty(0, 8))
    assert made.name == bench.STAND_IN
    bench.check_exchange(made)
    made.combine = made.back.zero_  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="did not come back"):
        bench.check_exchange(made)


def test_the_slowest_rank_counts_and_all_must_be_covered() -> None:
    first = [Sample("dispatch", True, 1.0), Sample("combine", True, 5.0)]
    second = [Sample("dispatch", True, 2.0, covered=False), Sample("combine", True, 4.0)]
    assert bench.slowest([first, second]) == [
        Sample("dispatch", True, 2.0, covered=False), Sample("combine", True, 5.0),
    ]  # fmt: skip


def test_overhead_by_hand() -> None:
    samples = [
        Sample("dispatch", False, 10.0), Sample("dispatch", True, 10.1),
        Sample("dispatch", True, 99.0, covered=False),
        Sample("combine", False, 20.0), Sample("combine", True, 30.0, covered=False),
    ]  # fmt: skip
    dispatch, combine = bench.table_rows("nccl all-to-all, 8 ranks", samples)
    assert dispatch["overhead_pct"] == pytest.approx(1.0)
    assert dispatch["paper_below_pct"] == 1.0
    assert dispatch["samples"] == 1
    assert combine["overhead_pct"] is combine["with_copies_ms"] is None


def test_the_papers_figure_does_not_stand_beside_the_stand_ins() -> None:
    samples = [Sample(name, copies, 1.0) for name in bench.PASSES for copies in (False, True)]
    assert all(row["paper_below_pct"] is None for row in bench.table_rows(bench.STAND_IN, samples))


def test_every_pass_is_sampled_with_and_without_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = VirtualTime()
    monkeypatch.setattr(bench, "COPY_BYTES", 1 << 16)
    monkeypatch.setattr(copy_overlap, "time", clock)
    gpu = gemm_of(clock, 1.0)
    meetings: list[int] = []

    class Passes:
        name = "made up"

        def dispatch(self) -> None:
            gpu.launch(10)

        def combine(self) -> None:
            gpu.launch(5)

    direction = type(NOTHING)("made up", *(torch.zeros(1 << 16, dtype=torch.uint8),) * 2)
    samples = bench.sample_passes(
        Passes(), Copies(clock, 0.01), direction, gpu.started, 2, lambda: meetings.append(1)
    )
    assert len(samples) == 2 * 4
    assert len(meetings) == 2 * 3 + 2 * 4
    assert all(sample.covered for sample in samples)
    of_dispatch = [s.milliseconds for s in samples if s.pass_name == "dispatch"]
    assert of_dispatch == pytest.approx([10.0] * 4)


def test_without_a_gpu_nothing_is_measured(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench.main(["--quick"]) == 0
    assert "nothing was measured" in capsys.readouterr().out
