"""bench/plan_latency.py runs, and what bench/report.py prints and writes is what others read."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from feplb import _core
from feplb.scheduler import PlanLimits
from feplb.scheduler.policies import core_limits

BENCH = Path(__file__).parents[1] / "bench"
sys.path.insert(0, str(BENCH))

import report  # noqa: E402


def test_quick_run_writes_the_rows_it_prints(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    command = [sys.executable, str(BENCH / "plan_latency.py"), "--quick", "--json", str(file)]
    shown = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    content = json.loads(file.read_text())
    assert sorted(content) == ["bench", "commit", "lane", "machine", "rows"]
    assert content["bench"] == "plan_latency"
    assert shown.startswith(f"plan_latency commit={content['commit']}")
    sizes = {(row["ranks"], row["experts"], row["num_dynamic"]) for row in content["rows"]}
    assert {(8, 128, 4), (8, 128, 16)} <= sizes
    for row in content["rows"]:
        assert 0 < row["us_p50"] <= row["us_p99"]
        if row["straggler_before"] is not None:  # the hand-over row plans nothing of its own
            assert row["straggler_after"] < row["straggler_before"]


def test_statistics_by_hand() -> None:
    samples = [4.0, 1.0, 2.0, 3.0, 5.0]
    assert report.median(samples) == 3.0
    assert report.iqr(samples) == 2.0
    assert report.percentile(samples, 100) == 5.0


def test_a_wide_table_is_broken_to_fit(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "24")
    rows = [{"name": "a", "us_p50": 0.5, "moved_rows": 123456, "straggler_after": 1234.5}]
    report.Report(bench="demo", lane="none", machine="here", commit="none").table(rows)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 24
    assert lines == [
        "",
        "        us   moved",
        "name   p50    rows",
        "   a  0.50  123456",
        "",
        "      straggler",
        "name      after",
        "   a       1234",
    ]


def test_timing_returns_one_figure_per_input() -> None:
    limits = core_limits(
        PlanLimits(
            num_dynamic=2, num_slots=9, num_grad_slots=9, max_recv_rows=99, max_return_rows=99
        )
    )
    counts = np.arange(3 * 2 * 2, dtype=np.int32).reshape(3, 2, 2)
    times_us = _core.time_plans("greedy", counts, limits, 3)
    assert times_us.shape == (3,)
    assert (times_us >= 0).all()
    with pytest.raises(ValueError, match="repeats=0, expected at least 1"):
        _core.time_plans("greedy", counts, limits, 0)
