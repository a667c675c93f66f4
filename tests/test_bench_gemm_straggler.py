"""bench/gemm_straggler.py by hand, and whole, small, on the CPU with a clock that counts rows."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

import gemm_straggler as bench
from gpu_timing import Work, machine_of, times_in_turn

from feplb.kernels.stream_gemm import StreamGemm
from feplb.scheduler.machines import GLM5, MACHINES, unit_costs
from feplb.scheduler.plan import Move, Plan

COUNTS = np.array([[5, 3], [1, 1]])
PLAN = Plan.from_moves(
    [
        Move(expert_idx=0, owner_rank=0, dst_rank=1, row_start=2, row_end=5),
        Move(expert_idx=1, owner_rank=0, dst_rank=1, row_start=2, row_end=3),
    ]
)
COSTS = unit_costs(MACHINES["h100"], GLM5, rows_per_rank=1024)
SMALL = bench.Size(
    hidden=16, width=16, num_experts=16, num_tokens=64, degrees=(2, 4), steps=2, repeats=1,
    dtype=torch.float32, device="cpu",
)  # fmt: skip


def test_segments_of_owner_and_helper() -> None:
    assert bench.segments_of(PLAN, COUNTS, 0) == [(0, 2, 0), (2, 4, 1)]
    assert bench.segments_of(PLAN, COUNTS, 1) == [(0, 1, 0), (1, 2, 1), (2, 5, 2), (5, 6, 3)]


def test_received_parts_of_one_expert_share_its_weights() -> None:
    parts = [(0, 2), (2, 3)]
    moves = [
        Move(expert_idx=0, owner_rank=0, dst_rank=1, row_start=start, row_end=end)
        for start, end in parts
    ]
    found = bench.segments_of(Plan.from_moves(moves), COUNTS, 1)
    assert [index for _, _, index in found] == [0, 1, 2, 2]


def test_the_ceiling_levels_every_rank() -> None:
    level = bench.level_counts(COUNTS)
    assert level.sum(axis=1).tolist() == [5, 5]


@pytest.mark.parametrize("ep", [2, 4, 8])
def test_every_arm_computes_every_row_once(ep: int) -> None:
    counts = bench.calibrated(ep, seed=3, step=0, num_experts=64, num_tokens=512)
    found = bench.all_segments(counts, COSTS)
    assert len(found) == ep * (len(bench.ARMS) + 1)
    most = {
        arm: max(segments[-1][1] for (name, _), segments in found.items() if name == arm)
        for arm, _ in found
    }
    assert most["none"] == counts.sum(axis=1).max()
    assert most[bench.CEILING] <= most["refine 1R"] <= most["none"]
    assert most["split g128"] < most["none"]


def test_straggler_and_what_is_removed_by_hand() -> None:
    assert bench.straggler([3.0, 1.0]) == 1.0
    measured = [
        bench.Measured("none", (3.0, 1.0)), bench.Measured("greedy", (2.5, 1.5)),
        bench.Measured("none", (5.0, 1.0)), bench.Measured("greedy", (3.0, 3.0)),
    ]  # fmt: skip
    none, greedy = bench.table_rows(8, measured)
    assert none["straggler_ms"] == 1.5
    assert none["removed_pct"] == 0
    assert greedy["straggler_ms"] == 0.25
    assert greedy["removed_pct"] == pytest.approx(100 * (1 - 0.25 / 1.5))
    assert greedy["paper_removed_pct"] == pytest.approx(68.3, abs=0.05)
    assert none["paper_removed_pct"] is None
    assert none["slowest_rank_ms"] == 4.0


def test_whole_bench_with_a_clock_that_counts_launches() -> None:
    """The clock runs the work, then says 1 ms more each time: all arms get all their samples."""
    calls = 0

    def once(work: Work) -> float:
        nonlocal calls
        work()
        calls += 1
        return 1.0

    measured = bench.measure(SMALL, 2, StreamGemm(1), once, COSTS)
    arms = len(bench.ARMS) + 1
    assert calls == 2 * 2 * arms * SMALL.steps  # a warm-up and a repeat of every rank
    assert len(measured) == arms * SMALL.steps
    assert all(each.rank_ms == (1.0, 1.0) for each in measured)


def test_a_wrong_product_is_not_timed() -> None:
    class Wrong(StreamGemm):
        def multiply_rows(self, source: Any, out: Any, table: Any, **how: Any) -> None:
            super().multiply_rows(source, out, table, **how)
            out.rows.mul_(1.5)

    with pytest.raises(RuntimeError, match="off by"):
        bench.measure(SMALL, 2, Wrong(1), lambda _: 1.0, COSTS)


def test_times_in_turn_runs_every_work_in_every_round() -> None:
    ran: list[str] = []
    works = {name: (lambda name=name: ran.append(name)) for name in "ab"}

    def once(work: Work) -> float:
        work()
        return float(len(ran))

    times = times_in_turn(once, works, 2, rounds=reversed)
    assert ran == ["a", "b", "b", "a", "b", "a"]
    assert times == {"a": [4.0, 6.0], "b": [3.0, 5.0]}


def test_the_preset_follows_the_gpus_name() -> None:
    assert machine_of("NVIDIA H200")[0] == "h200"
    assert machine_of("NVIDIA H100 80GB HBM3")[0] == "h100"
    assert machine_of("another")[0] == "h100"


def test_without_a_gpu_nothing_is_measured(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    file = tmp_path / "rows.json"
    assert bench.main(["--quick", "--json", str(file)]) == 0
    assert "nothing was measured" in capsys.readouterr().out
    assert json.loads(file.read_text())["rows"] == []
