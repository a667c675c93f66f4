"""bench/cost_check.py runs, and its figures follow from its samples as its columns say."""

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

import cost_figures  # noqa: E402
import cost_samples  # noqa: E402
import cost_timeline  # noqa: E402
from cost_samples import CEILING, Constants, RankSample, Routing, Sample  # noqa: E402
from cost_timeline import Gemms, Step, phases_of  # noqa: E402
from layer_arms import Shape  # noqa: E402

from feplb.costs import LaneRates  # noqa: E402
from feplb.scheduler import Move  # noqa: E402
from feplb.scheduler.cost_model import UnitCosts, predict  # noqa: E402

ARMS = {"none", "greedy", "refine", "split", "auto", CEILING}
Row = dict[str, Any]

# ------------------------------------------------------------------------------------ it runs


@pytest.fixture(scope="module")
def quick_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[Row], Path]:
    folder = tmp_path_factory.mktemp("cost_check")
    file, picture = folder / "rows.json", folder / "scatter.png"
    command = [sys.executable, str(BENCH / "cost_check.py"), "--quick"]
    command += ["--json", str(file), "--plot", str(picture)]
    result = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    content = json.loads(file.read_text())
    assert sorted(content) == ["bench", "commit", "lane", "machine", "rows"]
    assert (content["bench"], content["lane"]) == ("cost_check", "host")
    return result.stdout, content["rows"], picture


def of_table(rows: list[Row], table: str) -> list[Row]:
    return [row for row in rows if row["table"] == table]


def test_every_arm_of_every_routing_has_a_row_with_every_column(
    quick_run: tuple[str, list[Row], Path],
) -> None:
    _, rows, _ = quick_run
    assert all(set(row) == set(cost_figures.COLUMNS) for row in rows)
    arms = of_table(rows, "arms")
    seen = {(row["spread"], row["imbalance"], row["arm"]) for row in arms}
    assert seen == {(s, i, a) for s in (0.3, 1.0) for i in (1.0, 1.5) for a in ARMS}
    for row in arms:
        assert min(row["measured_ms"], row["core_ms"], row["startup_ms"], row["fitted_ms"]) > 0
        assert (row["recovered_pct"] is None) == (row["imbalance"] == 1.0)
        assert row["arm"] not in ("none", CEILING) or row["copies"] == 0
    greedy = next(row for row in arms if (row["arm"], row["imbalance"]) == ("greedy", 1.5))
    assert greedy["copies"] > 0


def test_phases_and_choices_have_their_rows(quick_run: tuple[str, list[Row], Path]) -> None:
    text, rows, picture = quick_run
    phases = of_table(rows, "phases")
    names = {"agree", *cost_timeline.MODELLED, "finish"}
    assert {(row["pass"], row["rank"], row["phase"]) for row in phases} == {
        (p, r, n) for p in ("forward", "backward") for r in ("owner", "helper") for n in names
    }
    for row in phases:
        assert (row["startup_ms"] is None) == (row["phase"] in ("agree", "finish"))
    kept = [row for row in phases if row["phase"] == "kept_a"]
    assert all(row["measured_ms"] > 0 for row in kept)
    choices = of_table(rows, "choices")
    assert len(choices) == 4
    assert all(row["startup_regret_pct"] >= 0 for row in choices)
    assert "lost to other work" in text
    assert picture.read_bytes().startswith(b"\x89PNG")


# ------------------------------------------------------------------------------------- timeline


def test_phases_by_hand() -> None:
    steps = [
        Step("wait_plan", 100, 110),
        Step("forward", 110, 150, 40, 7, 2),
        Step("await_rows", 151, 161),
        Step("forward", 162, 170, 8, 3, 1),
        Step("post_returns", 172, 173),
        Step("forward", 173, 180, 7, 2, 1),
        Step("await_returns", 181, 184),
        Step("release_returns", 190, 191),
        Step("finish", 192, 195),
        Step("wait_plan", 200, 215),
        Step("await_rows", 230, 240),
        Step("post_returns", 250, 251),
        Step("post_grads", 260, 261),
        Step("await_returns", 280, 281),
        Step("release_returns", 283, 284),
        Step("finish", 284, 285),
        Step("await_grads", 290, 299),
    ]
    forward, backward = phases_of(steps, 90, 310)
    names = ("agree", *cost_timeline.MODELLED, "finish")
    assert [forward[name] for name in names] == [20, 41, 10, 11, 0, 9, 3, 6, 0, 5]
    assert [backward[name] for name in names] == [20, 15, 10, 10, 10, 20, 1, 2, 25, 2]
    assert sum(forward.values()) + sum(backward.values()) == 310 - 90
    assert cost_timeline.waiting_ns(steps) == 10 + 10 + 3 + 3 + 15 + 10 + 1 + 1 + 9
    assert cost_timeline.gemms_of(steps) == {"forward": Gemms(cpu_ns=55, rows=12, experts=4)}
    with pytest.raises(ValueError, match="1 calls in a sample"):
        phases_of(steps[:9], 90, 200)


def test_predicted_phases_add_up_to_the_call() -> None:
    costs = UnitCosts(row_forward=10, row_push=1, weight_push=5, row_return=1)
    move = Move(expert_idx=0, owner_rank=0, dst_rank=1, row_start=4, row_end=6)
    call = predict([[6], [2]], [move], costs).forward
    helper = cost_figures.predicted_phases(call, 1)
    assert helper == pytest.approx(
        {"kept_a": 18e-9, "arrival": 0, "received": 20e-9, "wgrad": 0, "kept_b": 2e-9,
         "way_home": 0, "place": 0, "late": 0}
    )  # fmt: skip
    assert sum(helper.values()) == pytest.approx(call.by_rank[1] / 1e9)


# -------------------------------------------------------------------------------------- figures


ROUTING = Routing(rows_per_expert=4, spread=0.3, imbalance=1.5, seed=0)
SHAPE = Shape(hidden=16, ffn=16, experts=4)
MOVE = Move(expert_idx=0, owner_rank=0, dst_rank=1, row_start=0, row_end=2)
COSTS = UnitCosts(row_forward=10**9, row_dgrad=10**9, row_wgrad=10**9)  # 1 ms a row


def sample(
    arm: str, ns: tuple[int, int], core: tuple[int, int] = (1, 1), moves: tuple[Move, ...] = (),
    lost: tuple[int, int] = (0, 0), routing: Routing = ROUTING,
) -> Sample:  # fmt: skip
    """ns, core (backward's too) and lost of the two ranks."""
    phases = dict.fromkeys(("agree", *cost_timeline.MODELLED, "finish"), 10**6)
    return Sample(
        tuple(
            RankSample(
                routing=routing, arm=arm, ns=ns[rank], lost_ns=lost[rank],
                core_ns=(core[rank], core[1 - rank]), phases=(phases, phases),
                gemms={name: Gemms(3000, 10, 2) for name in cost_samples.GEMMS},
                moved_bytes=0, copy_cpu_ns=0, moves=moves,
            )
            for rank in range(2)
        )
    )  # fmt: skip


def constants(fitted: UnitCosts = COSTS) -> Constants:
    return Constants(
        costs={"startup": COSTS, "fitted": fitted}, gflops=1.0, gflops_of={},
        lane_rates=LaneRates(1.0, 1.0), copy_thread_gbps=1.0,
    )  # fmt: skip


def test_the_slower_rank_counts_and_of_each_pass_the_one_that_took_most() -> None:
    both = sample("none", (5_000_000, 7_000_000), core=(2_000_000, 3_000_000), lost=(10, 700_000))
    assert both.ms == 7.0
    assert both.core_ms == 6.0
    assert both.lost_pct == pytest.approx(10.0)


def test_the_less_disturbed_half_is_kept() -> None:
    lost = [(0, 500), (100, 0), (0, 0)]
    samples = [sample("none", (1000, 1000), lost=each) for each in lost]
    other = sample("greedy", (1000, 1000), lost=(999, 0))
    assert cost_samples.least_disturbed([*samples, other]) == [samples[1], samples[2], other]


def test_errors_and_shares_by_hand() -> None:
    counts = ROUTING.counts(SHAPE)
    most, mean = int(counts.sum(axis=1).max()), 16
    assert most == 24
    times = {"none": 150, "greedy": 110, CEILING: 100}
    samples = [sample(arm, (ms * 10**6, 1), (ms * 10**6, 1)) for arm, ms in times.items()]
    rows = cost_figures.arm_rows(samples, constants(replace(COSTS, row_wgrad=0)), SHAPE)
    greedy = next(row for row in rows if row["arm"] == "greedy")
    assert greedy["recovered_pct"] == pytest.approx(80.0)
    assert greedy["core_recovered_pct"] == pytest.approx(80.0)
    assert greedy["startup_ms"] == pytest.approx(3 * most)  # its plan here is empty
    assert greedy["startup_err_pct"] == pytest.approx(100 * (72 / 110 - 1))
    assert greedy["fitted_err_pct"] == pytest.approx(100 * (48 / 110 - 1))
    assert greedy["startup_recovered_pct"] == pytest.approx(0.0)
    even = next(row for row in rows if row["arm"] == CEILING)
    assert even["startup_ms"] == pytest.approx(3 * mean)
    assert even["startup_recovered_pct"] == pytest.approx(100.0)


def test_choices_by_hand() -> None:
    # The model sees 72 ms without moves and 3 * 22 with MOVE, which was measured to be slower.
    samples = [
        sample("none", (100_000_000, 0)),
        sample("greedy", (104_000_000, 0)),  # the same plan: one arm with none, median 102
        sample("split", (112_200_000, 0), moves=(MOVE,)),
        sample("auto", (112_200_000, 0), moves=(MOVE,)),
    ]
    (row,) = cost_figures.choice_rows(samples, constants(), SHAPE)
    assert (row["fastest"], row["startup_choice"]) == ("none", "split")
    assert row["startup_regret_pct"] == pytest.approx(10.0)
    assert row["startup_rank_correlation"] == pytest.approx(-1.0)
    assert row["auto_regret_pct"] == pytest.approx(10.0)


def test_rank_correlation_by_hand() -> None:
    assert cost_figures.rank_correlation([1, 2, 3, 4], [10, 20, 40, 30]) == pytest.approx(0.8)
    # Ties share the mean rank: 0, 1.5, 1.5, 3 against 0, 1, 2, 3.
    expected = float(np.corrcoef([0, 1.5, 1.5, 3], [0, 1, 2, 3])[0, 1])
    assert cost_figures.rank_correlation([1, 5, 5, 9], [1, 2, 3, 4]) == pytest.approx(expected)
    assert cost_figures.rank_correlation([1, 1], [1, 2]) is None


def test_the_fitted_rate_leaves_out_what_a_gemm_costs_beside_its_rows() -> None:
    # 10 rows of 1,000 operations; 3,000 ns of which 2 x 500 are not the rows': 10,000 / 2,000 ns.
    assert cost_samples.gemm_gflops([Gemms(3000, 10, 2)], 1000, 500_000) == pytest.approx(5.0)
    # At most three quarters of the time: 10,000 / 750 ns.
    assert cost_samples.gemm_gflops([Gemms(3000, 10, 2)], 1000, 10**9) == pytest.approx(
        10_000 / 750
    )
