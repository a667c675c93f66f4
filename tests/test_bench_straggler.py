"""bench/straggler.py runs, its rows are the promised ones, and wrong input is one sentence."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from feplb.scheduler import POLICIES, make_plan
from feplb.scheduler.baselines import BASELINES
from feplb.scheduler.microbatches import MicroBatch, Source
from feplb.scheduler.simulate import Arm
from feplb.scheduler.traces import Trace, write_trace

BENCH = Path(__file__).parents[1] / "bench"
sys.path.insert(0, str(BENCH))

import straggler  # noqa: E402
import straggler_pareto  # noqa: E402
from straggler_timing import Optima  # noqa: E402

COLUMNS = [
    *("workload", "ep", "policy", "copy_budget", "grain_rows"),
    *("straggler_before", "straggler_after", "removed_pct", "layer_ceiling_recovered_pct"),
    *("max_over_mean_p50", "max_over_mean_p99"),
    *("copies_per_rank", "copies_per_owner_max", "copied_mib_per_rank", "moved_rows_pct"),
    *("plan_us_p50", "gap_to_optimum_pct"),
]


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    assert straggler.main(["--quick", *arguments]) == 0
    return capsys.readouterr().out.splitlines()


def test_a_quick_run_writes_every_policy_at_every_size(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "rows.json"
    lines = run(capsys, "--json", str(file))
    assert max(map(len, lines)) <= 100
    rows: list[dict[str, Any]] = json.loads(file.read_text())["rows"]
    assert all(list(row) == COLUMNS for row in rows)
    assert {row["ep"] for row in rows} == {2, 4, 8}
    assert {row["policy"] for row in rows} == {*POLICIES, *BASELINES}
    names = "policy", "copy_budget", "grain_rows"
    at = {tuple(row[name] for name in names): row for row in rows if row["ep"] == 8}
    assert {key for key in at if key[0] in ("refine", "split")} == {
        ("refine", 8, None), ("refine", 16, None), ("split", None, 128), ("split", None, 16),
    }  # fmt: skip
    assert at["none", None, None]["layer_ceiling_recovered_pct"] == 0
    assert at["force_balanced", None, None]["layer_ceiling_recovered_pct"] == 100
    assert at["split", None, 16]["gap_to_optimum_pct"] == pytest.approx(0, abs=0.01)
    assert at["auto", None, None]["removed_pct"] > at["greedy", None, None]["removed_pct"]


def test_the_papers_figures_stand_beside(capsys: pytest.CaptureFixture[str]) -> None:
    lines = run(capsys, "--policies", "greedy", "fastermoe")
    rows = [line.split() for line in lines if line.strip().startswith("FasterMoE")]
    # policy, EP, before, the paper's, left, the paper's, removed, the paper's
    assert [(row[1], row[3], row[5]) for row in rows] == [
        ("2", "2278", "1014"),
        ("4", "4649", "2471"),
        ("8", "6666", "4036"),
    ]
    assert sum(line.strip().startswith("FEPLB (greedy)") for line in lines) == 3


def test_a_wide_group_leaves_what_lies_between_domains(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "rows.json"
    common = ["--ep", "16", "--policies", "force_balanced", "--json", str(file)]
    lines = run(capsys, *common)
    assert any("EP 16 in domains of 8" in line for line in lines)
    inside = json.loads(file.read_text())["rows"][0]["removed_pct"]
    run(capsys, *common, "--domain", "16")
    assert 60 < inside < json.loads(file.read_text())["rows"][0]["removed_pct"] == 100


def test_a_rack_is_one_domain_of_288_experts(capsys: pytest.CaptureFixture[str]) -> None:
    lines = run(capsys, "--ep", "72", "--policies", "none", "split", "--steps", "2")
    assert any("EP 72 in domains of 72" in line for line in lines)


def test_a_trace_is_replayed(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    recorded = np.array([[[50, 10, 10, 10, 5, 5, 5, 5]]])  # ranks of 80 | 20: 0.6 above the mean
    write_trace(tmp_path / "one.json", Trace(name="one", recorded=recorded, top_k=2))
    file = tmp_path / "rows.json"
    arguments = ["--trace", str(tmp_path / "one.json"), "--ep", "2", "--tokens", "1000"]
    run(capsys, *arguments, "--policies", "none", "--json", str(file))
    (row,) = json.loads(file.read_text())["rows"]
    assert (row["workload"], row["straggler_before"]) == ("replay", 0.6 * 1000 * 2)


def test_pareto_and_pictures(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    common = ["--ep", "4", "--steps", "2", "--policies", "none", "split"]
    lines = run(capsys, *common, "--plot", str(tmp_path))
    assert any("max / mean against weight copies" in line for line in lines)
    pictures = sorted(path.name for path in tmp_path.glob("*.png"))
    assert pictures == ["pareto_calibrated_EP_4.png", "removed_calibrated_EP_4.png"]


def test_pareto_points_by_hand() -> None:
    # 6 | 2: two rows in one copy make it even; none at all may stay at max / mean 1.5.
    batches = [[MicroBatch(counts=np.array([[6], [2]]))]]
    split = Arm(policy="split", grain_rows=1)
    exact = straggler_pareto.reached(split, 1.0, batches)
    assert (exact.max_over_mean, exact.copies) == (1.0, 1.0)
    loose = straggler_pareto.reached(Arm(policy="split", grain_rows=1, target=1.5), 1.5, batches)
    assert (loose.max_over_mean, loose.copies) == (1.5, 0.0)


def test_the_solver_is_asked_for_whole_experts_only() -> None:
    # 5 + 3 | 0 + 0, mean 4: whole experts leave 5, which moving the 3 reaches.
    counts = np.array([[5, 3], [0, 0]])
    optima = Optima(seconds=5.0)
    arm = Arm(policy="refine", copies_per_rank=1)
    plan = make_plan("refine", counts, arm.limits(counts))
    assert optima.best_load(arm, counts, plan) == 5
    assert optima.best_load(Arm(policy="lpt"), counts, plan) is None
    assert (optima.asked, optima.proven) == (1, 1)
    assert "1 of them proven optimal" in str(optima)


def test_an_optimum_gives_a_gap(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    arguments = ["--ep", "2", "--steps", "2", "--optimum", "1", "--json", str(file)]
    run(capsys, *arguments, "--policies", "greedy", "refine")
    rows = json.loads(file.read_text())["rows"]
    gaps = [row["gap_to_optimum_pct"] for row in rows]
    assert all(gap >= 0 for gap in gaps)
    assert gaps[-1] < 0.15  # 2R copies


BAD = [
    (["--workloads", "W9"], "workload 'W9', expected one of calibrated"),
    (["--workloads", "replay"], "workload replay replays a trace; give one with --trace FILE"),
    (["--gpu", "h1"], "--gpu h1, expected one of h100"),
    (["--ep", "3"], "calibrated: ep_size=3, expected a divisor of num_experts=128"),
    (["--ep", "0"], "--ep 0, expected 1 or more"),
    (["--ep", "8", "--domain", "3"], "domain=3, expected a divisor of ep=8"),
    (["--policies", "best"], "policy 'best', expected one of none"),
    (["--optimum", "0"], "--optimum 0, expected seconds above 0"),
    (["--tokens", "0"], "--tokens 0, expected 1 or more"),
    (["--trace", "nowhere.json"], "nowhere.json"),
]


@pytest.mark.parametrize(("arguments", "sentence"), BAD)
def test_wrong_input_is_one_sentence(
    capsys: pytest.CaptureFixture[str], arguments: list[str], sentence: str
) -> None:
    assert straggler.main(["--quick", *arguments]) == 2
    seen = capsys.readouterr()
    assert sentence in seen.err
    assert (seen.err.count("\n"), seen.out) == (1, "")


def test_a_truncated_trace_is_one_sentence(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "cut.json"
    path.write_text('{"format": "feplb_trace_v1", "top_k": 2, "counts": [[[1, 1')
    assert straggler.main(["--quick", "--trace", str(path)]) == 2
    seen = capsys.readouterr()
    assert str(path) in seen.err
    assert seen.err.count("\n") == 1


def test_the_engine_sees_independent_layers() -> None:
    source = Source(workload="calibrated", ep_size=8, seed=1)
    first, second = source.make(0).counts, source.make(1).counts
    assert abs(np.corrcoef(first.ravel(), second.ravel())[0, 1]) < 0.4
