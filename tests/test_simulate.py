"""The engine behind bench/straggler.py and `feplb simulate`: by hand, and what always holds."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from feplb.scheduler import Move, Plan
from feplb.scheduler.baselines import BaselineInput, Outcome, WeightCopy
from feplb.scheduler.cost_model import UnitCosts
from feplb.scheduler.machines import GLM5, MACHINES, ExpertShape, unit_costs
from feplb.scheduler.microbatches import MicroBatch, Source
from feplb.scheduler.paper_times import BEFORE, fitted, paper_cells
from feplb.scheduler.simulate import Arm, Sample, arms_of, costs_of, samples_of
from feplb.scheduler.summary import figures
from feplb.scheduler.what_if import StepShape

ROOT = Path(__file__).resolve().parent.parent
ONLY_ROWS = UnitCosts(row_forward=10)  # no backward, copies for nothing
SMALL = ExpertShape(hidden=1024, ffn_hidden=1024)  # 6 MiB of weights
COUNTS = np.array([[6], [2]])  # mean 4
H100 = unit_costs(MACHINES["h100"], GLM5, rows_per_rank=32768)


def moving(num_rows: int, *, reroutes: bool = True, ahead: bool = False) -> Arm:
    """An arm that moves the first rows of rank 0's only expert to rank 1."""

    def baseline(counts: npt.ArrayLike, given: BaselineInput) -> Outcome:
        move = Move(expert_idx=0, owner_rank=0, dst_rank=1, row_start=0, row_end=num_rows)
        return Outcome(
            policy="moving",
            plan=Plan.from_moves([move]),
            copies=(WeightCopy(0, 0, 1),),
            reroutes=reroutes,
            copies_ahead=ahead,
        )

    return Arm(policy="moving", baseline=baseline)


def sample_of(arm: Arm, costs: UnitCosts, counts: npt.NDArray[np.int64] = COUNTS) -> Sample:
    batch = MicroBatch(counts=counts)
    return samples_of(batch, [arm], costs, domain=len(counts), with_engines=True)[0]


# -------------------------------------------------------------------------------------- by hand


def test_the_worked_example_of_the_module() -> None:
    # un-balanced 6 rows of 10 ps; even 4; with one row moved 5.
    sample = sample_of(moving(1), ONLY_ROWS)
    assert (sample.none_ps, sample.plan_ps, sample.ceiling_ps) == (60, 50, 40)
    assert sample.recovered == 0.5
    row = figures([sample], 2, SMALL)
    expected = {
        "straggler_before": 2.0,
        "straggler_after": 1.0,
        "removed_pct": 50.0,
        "layer_ceiling_recovered_pct": 50.0,
        "max_over_mean_p50": 1.25,
        "max_over_mean_p99": 1.25,
        "copies_per_rank": 0.5,
        "copies_per_owner_max": 1,
        "copied_mib_per_rank": 3.0,
        "moved_rows_pct": 12.5,
        "gap_to_optimum_pct": 25.0,  # 5 rows where 4 can be, of a mean of 4
    }
    assert {name: row[name] for name in expected} == expected


def test_means_are_of_sums_not_of_shares() -> None:
    # 2 of 2 rows removed in one micro-batch, 0 of 6 in the other: a quarter, not a half.
    far = np.array([[14], [2]])  # mean 8
    samples = [sample_of(moving(2), ONLY_ROWS), sample_of(Arm(policy="none"), ONLY_ROWS, far)]
    row = figures(samples, 2, SMALL)
    assert row["removed_pct"] == pytest.approx(25.0)
    assert row["layer_ceiling_recovered_pct"] == pytest.approx(25.0)


def test_rows_cost_a_rival_that_reroutes_nothing_but_its_weights_do() -> None:
    # Rank 1 keeps 2 rows, until 20, and computes one more when the weights are there, after 70;
    # a backward of no time waits for them again.
    costs = replace(ONLY_ROWS, row_push=1000, row_return=1000, row_place=1000, weight_push=70)
    assert sample_of(moving(1), costs).plan_ps == 70 + 10 + 70
    assert sample_of(moving(1, ahead=True), costs).plan_ps == 50
    after_dispatch = sample_of(moving(1, reroutes=False), costs).plan_ps
    assert after_dispatch >= 1000 + 70 + 10 + 1000 + 1000


def test_a_rerouted_copy_pays_the_fixed_time_once_each_way() -> None:
    costs = UnitCosts(copy=3, weight_push=10, grad_push=20, row_push=5, row_return_backward=5)
    met = costs_of(costs, reroutes=True, copies_ahead=False)
    assert (met.copy, met.weight_push, met.grad_push) == (0, 13, 23)
    assert (met.row_push, met.row_return_backward) == (0, 0)
    assert costs_of(costs, reroutes=False, copies_ahead=False) == costs


def test_a_copy_without_rows_still_travels() -> None:
    def idle(counts: npt.ArrayLike, given: BaselineInput) -> Outcome:
        return Outcome(policy="idle", plan=Plan(), copies=(WeightCopy(0, 0, 1),), reroutes=True)

    costs = replace(ONLY_ROWS, weight_push=500)
    sample = sample_of(Arm(policy="idle", baseline=idle), costs)
    assert (sample.copies, sample.moved_rows) == (1, 0)
    assert sample.engine_ps == 2 * 500  # forward, and again in backward


def test_an_invalid_plan_is_refused_by_name() -> None:
    with pytest.raises(RuntimeError, match=r"moving made an invalid plan: .*<= 6"):
        sample_of(moving(7), ONLY_ROWS)


def test_wide_groups_are_balanced_inside_domains_only() -> None:
    # Domains 6 | 2 and 2 | 2, mean 3: the first reaches 4 | 4, so one row in three remains.
    batch = MicroBatch(counts=np.array([[6], [2], [2], [2]]))
    arms = arms_of(["split", "force_balanced"])[1:]
    arms[0] = replace(arms[0], grain_rows=1)
    split, ideal = samples_of(batch, arms, ONLY_ROWS, domain=2)
    assert (split.max_before, split.max_after, split.mean_load) == (6, 4, 3.0)
    assert (split.none_ps, split.plan_ps, split.ceiling_ps) == (60, 40, 30)
    assert (ideal.max_after, ideal.plan_ps) == (4, 40)
    assert split.best_load == 4


def test_rows_of_other_domains_enter_through_the_rank_of_the_same_place() -> None:
    by_source = np.arange(16).reshape(4, 4)
    counts = by_source.sum(axis=0).reshape(4, 1)
    first, second = MicroBatch(counts=counts, by_source=by_source).domains(2)
    assert first.by_source is not None
    assert first.by_source.tolist() == [[0 + 8, 1 + 9], [4 + 12, 5 + 13]]
    assert second.counts.tolist() == counts[2:].tolist()
    with pytest.raises(ValueError, match="domain=3, expected a divisor of ep=4"):
        MicroBatch(counts=counts).domains(3)


def test_nothing_to_remove_says_nothing() -> None:
    row = figures([sample_of(Arm(policy="none"), ONLY_ROWS, np.array([[4], [4]]))], 2, SMALL)
    assert (row["removed_pct"], row["layer_ceiling_recovered_pct"]) == (None, None)


def test_a_whole_step() -> None:
    # 10 layers of 10 ms and 100 of all else: one ms less a layer is 10 of 200.
    row = StepShape(layers=10, rest_ms=100.0).row(10.0, 9.0)
    assert row["modelled step time saved %"] == "5.00"
    share = StepShape.of(None, None, 40.0)
    assert share is not None
    assert share.row(10.0, 9.0) == {"modelled step time saved %": "4.00"}


# ------------------------------------------------------------------------------- what always holds


@pytest.mark.parametrize("ep_size", [2, 4, 8, 16])
def test_none_recovers_nothing_and_the_ceiling_everything(ep_size: int) -> None:
    source = Source(workload="calibrated", ep_size=ep_size, seed=7)
    arms = arms_of(["none", "force_balanced"])
    batches = [source.make(index) for index in range(3)]
    samples = [samples_of(batch, arms, H100, domain=ep_size) for batch in batches]
    none, ideal = (figures(of_arm, ep_size, GLM5) for of_arm in zip(*samples, strict=True))
    assert (none["removed_pct"], none["layer_ceiling_recovered_pct"]) == (0.0, 0.0)
    assert (ideal["removed_pct"], ideal["layer_ceiling_recovered_pct"]) == (100.0, 100.0)


def test_core_and_python_come_to_the_same_samples() -> None:
    batch = Source(workload="calibrated", ep_size=8, seed=7).make(0)
    arms = arms_of(["none", "greedy", "refine", "split", "auto"])
    fast = samples_of(batch, arms, H100, domain=8)
    slow = samples_of(batch, arms, H100, domain=8, with_engines=True)
    assert [replace(sample, engine_ps=0) for sample in slow] == fast


def test_auto_is_never_modelled_slower_than_none() -> None:
    for name in ("calibrated", "W0_balanced", "zipf_3"):
        batch = Source(workload=name, ep_size=8, seed=7).make(0)
        (sample,) = samples_of(batch, arms_of(["auto"]), H100, domain=8)
        assert sample.plan_ps <= sample.none_ps, name


def test_micro_batches_come_from_names_and_have_a_past() -> None:
    source = Source(workload="W6_rotating_hotspot", ep_size=4, seed=1)
    batch, later = source.make(2, history=True), source.make(3, history=True)
    assert batch.by_source is not None
    assert (batch.by_source.sum(axis=0) == batch.counts.ravel()).all()
    assert later.previous is not None
    assert (later.previous == batch.counts).all()
    assert batch.counts.tolist() == source.make(2).counts.tolist()


def test_an_unknown_policy_is_named() -> None:
    with pytest.raises(ValueError, match="policy 'best', expected one of none, greedy, refine"):
        arms_of(["best"])


# -------------------------------------------------------------------------------- the paper's times


def test_four_cells_give_the_constants_by_hand() -> None:
    # Of 128 experts 64 and 32 a rank: 32 of them, and no rows, are 3.2 - 1.6 ms.
    no_rows = {2: 0.0, 4: 0.0}
    constants = fitted(no_rows, {2: (8.2, 9.4), 4: (6.6, 6.2)})
    assert constants.expert_ms == pytest.approx((0.05, 0.1))
    assert constants.rest_ms == pytest.approx((5.0, 3.0))
    assert 1 / constants.row_ms == pytest.approx(7170, rel=0.01)


def test_the_papers_other_cells_are_predicted_within_ten_percent() -> None:
    _, cells = paper_cells(MACHINES["h100"], steps=60, seed=3)
    made_from = [cell for cell in cells if cell.is_fitted]
    predicted = [cell for cell in cells if not cell.is_fitted]
    assert {(cell.ep_size, cell.arm) for cell in made_from} == {(2, "before"), (4, "before")}
    # A row is a whole number of picoseconds: half of one in 139,482 is 4e-4 %.
    assert max(abs(cell.off_pct) for cell in made_from) < 1e-3
    assert len(predicted) == 2 + 2 * len(BEFORE)
    assert max(abs(cell.off_pct) for cell in predicted) < 10


# ------------------------------------------------------------------------------------------ imports


def test_the_scheduler_needs_no_torch() -> None:
    """The package's own __init__ aside: a stand-in takes its place, and torch cannot be had."""
    code = (
        "import sys, types; package = types.ModuleType('feplb'); "
        f"package.__path__ = [{str(ROOT / 'feplb')!r}]; sys.modules['feplb'] = package; "
        "sys.modules['torch'] = None; from feplb.cli import main; "
        "sys.exit(main(['simulate', '--steps', '2']))"
    )
    command = [sys.executable, "-c", code]
    seen = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    assert seen.returncode == 0, seen.stderr
    assert "modelled" in seen.stdout
