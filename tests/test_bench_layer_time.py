"""bench/layer_time.py runs, and its figures follow from its samples as its columns say."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

BENCH = Path(__file__).parents[1] / "bench"
sys.path.insert(0, str(BENCH))

import layer_arms  # noqa: E402
import layer_figures  # noqa: E402
import layer_time  # noqa: E402
from layer_arms import Piece, Routing, Unit, pieces_under  # noqa: E402

from feplb.scheduler import Move, Plan  # noqa: E402

ARMS = ["no_balancer", "no_balancer_aa", "none", "greedy", "plan_ideal", "ceiling"]
Row = dict[str, Any]


@pytest.fixture(scope="module")
def quick_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[Row]]:
    file = tmp_path_factory.mktemp("layer_time") / "rows.json"
    script = str(BENCH / "layer_time.py")
    command = [sys.executable, script, "--lane", "host", "--quick", "--json", str(file)]
    result = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    content = json.loads(file.read_text())
    assert sorted(content) == ["bench", "commit", "lane", "machine", "rows"]
    assert (content["bench"], content["lane"]) == ("layer_time", "host")
    return result.stdout, content["rows"]


def of_scope(rows: list[Row], *scopes: str) -> list[Row]:
    return [row for row in rows if row["scope"] in scopes]


def test_one_row_per_configuration_with_every_column(quick_run: tuple[str, list[Row]]) -> None:
    rows = quick_run[1]
    columns = {*layer_figures.COLUMNS, *layer_figures.PAIRED_COLUMNS}
    assert all(set(row) == columns for row in rows)
    seen = [
        tuple(row[name] for name in ("imbalance", "arm", "pass", "scope", "rows_per_expert"))
        for row in of_scope(rows, "experts", "layer")
    ]
    expected = {
        (imbalance, arm, pass_name, scope, size)
        for imbalance in (1.0, 1.25, 1.5, 1.75)
        for arm in ARMS
        for pass_name in ("fwd", "fwd_bwd")
        for scope in ("experts", "layer")
        for size in layer_time.QUICK.rows_per_expert
    }
    assert len(seen) == len(expected)
    assert set(seen) == expected


def test_times_and_percentages_are_where_they_belong(quick_run: tuple[str, list[Row]]) -> None:
    rows = of_scope(quick_run[1], "experts", "layer")
    for row in rows:
        assert row["ms_p50"] > 0
        assert (row["ceiling_recovered_pct"] is None) == (row["imbalance"] == 1.0)
        has_plan = row["arm"] in ("greedy", "plan_ideal") and row["imbalance"] > 1.0
        assert (row["plan_ideal_pct"] is not None) == has_plan
        assert (row["of_plan_ideal_pct"] is not None) == (has_plan and row["arm"] == "greedy")
        balanced = row["arm"] in ("greedy", "plan_ideal", "ceiling")
        assert row["max_mean"] < 1.1 if balanced else abs(row["max_mean"] - row["imbalance"]) < 0.01


def test_bytes_are_those_of_the_plan(quick_run: tuple[str, list[Row]]) -> None:
    shape = layer_time.QUICK.shape
    row_bytes, expert_bytes = 4 * shape.hidden, 4 * 3 * shape.hidden * shape.ffn
    for row in of_scope(quick_run[1], "experts", "layer"):
        unit = Unit(rows_per_expert=row["rows_per_expert"], imbalance=row["imbalance"], seed=0)
        plan = layer_arms.plan_of("greedy", unit.counts(shape), shape)
        # forward: rows there, outputs back, weights; backward: grad rows and rows there, grad rows
        # back, weights and weight grads.
        rows, experts = (2, 1) if row["pass"] == "fwd" else (5, 3)
        expected = rows * row_bytes * plan.num_rows_moved + experts * expert_bytes * len(plan.moves)
        assert row["moved_mb"] == pytest.approx(expected / 1e6 if row["arm"] == "greedy" else 0)


def test_calls_that_move_nothing_are_paired(quick_run: tuple[str, list[Row]]) -> None:
    text, rows = quick_run
    paired = of_scope(rows, "experts_paired", "empty_paired")
    assert len(paired) == 2 * 2 * 4
    for row in paired:
        assert row["paired_us_low"] <= row["paired_us"] <= row["paired_us_high"]
        assert row["arm"] != "no_balancer" or row["paired_pct"] == 0
    assert "promised" in text


def test_percentages_by_hand() -> None:
    unit = Unit(rows_per_expert=64, imbalance=1.5, seed=0)
    schedule = replace(layer_time.QUICK, rows_per_expert=(64,))
    ns = dict(zip(ARMS, (205, 205, 200, 120, 110, 100), strict=True))
    samples = [
        layer_figures.Sample(
            unit=replace(unit, scope=scope, imbalance=imbalance), arm=arm,
            ns=(ns[arm] // 2, ns[arm]), moved_bytes=(0, 0),
            copy_cpu_ns=(0, 0), core_share=1.0,
        )
        for scope in layer_figures.SCOPES for imbalance in layer_figures.IMBALANCES for arm in ARMS
    ]  # fmt: skip
    rows = layer_figures.table_rows(samples, schedule)
    greedy = next(row for row in rows if (row["arm"], row["imbalance"]) == ("greedy", 1.5))
    assert greedy["ceiling_recovered_pct"] == pytest.approx(100 * (100 - 60) / (100 - 50))
    assert greedy["plan_ideal_pct"] == pytest.approx(100 * (100 - 55) / (100 - 50))
    assert greedy["of_plan_ideal_pct"] == pytest.approx(100 * (100 - 60) / (100 - 55))
    assert greedy["ratio"] == pytest.approx(60 / 102)


def test_the_slower_rank_ends_a_sample_and_bytes_add_up() -> None:
    one = layer_figures.Sample(
        unit=Unit(rows_per_expert=1, imbalance=1.0, seed=0), arm="none", ns=(5, 7),
        moved_bytes=(1, 2), copy_cpu_ns=(10, 20), core_share=0.5,
    )  # fmt: skip
    other = replace(one, ns=(3, 9), moved_bytes=(4, 8), core_share=1.0)
    both = one.with_other_rank(other)
    assert (both.ns, both.moved_bytes, both.copy_cpu_ns) == ((5, 9), (5, 10), (20, 40))
    assert both.core_share == 1.0


def test_scaled_keeps_proportions_and_hits_the_total() -> None:
    assert layer_arms.scaled(np.array([6, 2]), 4).tolist() == [3, 1]
    assert layer_arms.scaled(np.array([1, 1, 1]), 4).tolist() == [2, 1, 1]


def test_pieces_of_a_split_expert_and_their_routing() -> None:
    # 2 ranks x 2 experts; rows 2 to 3 of expert 0 of rank 0 move to rank 1.
    counts = np.array([[4, 2], [1, 1]])
    plan = Plan.from_moves([Move(expert_idx=0, owner_rank=0, dst_rank=1, row_start=2, row_end=4)])
    pieces = [pieces_under(plan, counts, rank) for rank in (0, 1)]
    assert pieces[0] == [Piece(0, 0, 0, 2), Piece(0, 1, 0, 2)]
    assert pieces[1] == [Piece(1, 0, 0, 1), Piece(1, 1, 0, 1), Piece(0, 0, 2, 4)]
    # Padded to 3 pieces a rank: 0 1 - | 3 4 5. Half of each expert's rows come from each rank, so
    # the rows 0 and 1 of expert 0 are those of source rank 0.
    routing = Routing(counts, top_k=2)
    per_source = [np.bincount(each.reshape(-1), minlength=4) for each in routing.choices]
    assert np.sum(per_source, axis=0).tolist() == [4, 2, 1, 1]
    assert all(len(set(token)) == 2 for each in routing.choices for token in each.tolist())
    routed = [np.bincount(each.reshape(-1), minlength=6) for each in routing.to_pieces(pieces)]
    assert np.sum(routed, axis=0).tolist() == [2, 2, 0, 1, 1, 2]
    assert (routed[0][0], routed[1][5]) == (2, 2)


@pytest.mark.parametrize(
    ("gpus", "given", "said"),
    [
        (0, ["--lane", "ce"], "No CUDA device here: nothing was measured."),
        (1, [], "One GPU here: nothing was measured."),
        (1, ["--lane", "ce"], "bench/layer_emulated.py"),
    ],
)
def test_fewer_than_two_gpus_measure_nothing_over_the_ce_lane(
    gpus: int, given: list[str], said: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpus > 0)
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    file = tmp_path / "rows.json"
    assert layer_time.main([*given, "--quick", "--json", str(file)]) == 0
    assert said in capsys.readouterr().out
    assert json.loads(file.read_text())["rows"] == []
