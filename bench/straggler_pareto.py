"""Max / mean against weight copies: ours beside LLEP, UltraEP and MindSpeed-MM.

Each rival is run at several targets by its own parameter. For every point it reaches, the target of
ours is sought that gives the same mean max / mean over the workload, and the copies compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from report import Report, Row
from tqdm import tqdm

from feplb.scheduler.baselines import Outcome, llep, mindspeed_mm, ultraep
from feplb.scheduler.cost_model import UnitCosts
from feplb.scheduler.microbatches import MicroBatch
from feplb.scheduler.plan import rank_loads
from feplb.scheduler.simulate import Arm, place

TARGETS = (1.00, 1.01, 1.02, 1.05, 1.10)
EXACT = 1e-4  # max / mean: nearer is the same
HALVINGS = 8  # of the search for our target


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """Means over micro-batches; copies are of the whole EP group."""

    arm: str
    target: float
    max_over_mean: float
    copies: float


def rivals_at(target: float, mean_rows: float) -> list[Arm]:
    """The three rivals at a wanted max / mean, each by its own parameter.

    MindSpeed-MM has none: it stops where max and min differ by few rows, half of which lie above
    the mean.
    """
    rows = max(1, round(2 * (target - 1) * mean_rows))
    return [
        Arm(policy="llep", baseline=partial(llep, alpha=target)),
        Arm(policy="ultraep", baseline=partial(ultraep, balance_threshold=target)),
        Arm(policy="mindspeed_mm", baseline=partial(mindspeed_mm, threshold_rows=rows)),
    ]


def ours_at(target: float) -> list[Arm]:
    """Whole experts, and row ranges in two grains; 1 where every row counts."""
    return [
        Arm(policy="refine", copies_per_rank=2, target=target),
        Arm(policy="split", grain_rows=16, target=target),
        Arm(policy="split", grain_rows=1, target=target),
    ]


def pareto_points(
    micro_batches: Sequence[MicroBatch], domain: int, targets: Sequence[float] = TARGETS
) -> tuple[list[Point], list[Row]]:
    """Every arm's points, and one row per rival's point with ours at the same max / mean."""
    mean_rows = float(rank_loads(micro_batches[0].counts).mean())
    domains = [batch.domains(domain) for batch in micro_batches]
    points: list[Point] = []
    rows: list[Row] = []
    for target in tqdm(targets, desc="pareto", unit="target", disable=None, leave=False):
        points += [reached(arm, target, domains) for arm in ours_at(target)]
        for arm in rivals_at(target, mean_rows):
            rival = reached(arm, target, domains)
            points.append(rival)
            rows.append(_against(rival, domains))
    return points, rows


def reached(arm: Arm, target: float, batches: Sequence[Sequence[MicroBatch]]) -> Point:
    """What the arm comes to on micro-batches, each cut into its domains."""
    ratios, copies = [], []
    for domains in batches:
        outcomes = [place(arm, each, UnitCosts()) for each in domains]
        loads = np.concatenate(
            [o.loads_after(each.counts) for o, each in zip(outcomes, domains, strict=True)]
        )
        ratios.append(loads.max() / loads.mean())
        copies.append(sum(_num_copies(outcome) for outcome in outcomes))
    return Point(
        arm=arm.label,
        target=target,
        max_over_mean=float(np.mean(ratios)),
        copies=float(np.mean(copies)),
    )


def _num_copies(outcome: Outcome) -> int:
    return outcome.num_copies or len(outcome.plan.moves)


def _against(rival: Point, batches: Sequence[Sequence[MicroBatch]]) -> Row:
    found = [_same(index, rival, batches) for index in range(len(ours_at(1.0)))]
    reach = [point for point in found if point.max_over_mean <= rival.max_over_mean + EXACT]
    best = min(reach or found, key=lambda point: point.copies)
    return {
        "rival": rival.arm,
        "its_target": rival.target,
        "max/mean": f"{rival.max_over_mean:.4f}",
        "copies": rival.copies,
        "ours": best.arm,
        "max/mean_ours": f"{best.max_over_mean:.4f}",
        "copies_ours": best.copies,
        "no more_copies": "yes" if reach and best.copies <= rival.copies else "no",
    }


def _same(index: int, rival: Point, batches: Sequence[Sequence[MicroBatch]]) -> Point:
    """Ours with the largest target found whose mean max / mean is not above the rival's."""
    low, high = 1.0, 1 + 2 * (rival.max_over_mean - 1) + 2 * EXACT
    best = reached(ours_at(low)[index], low, batches)
    for _ in range(HALVINGS if best.max_over_mean <= rival.max_over_mean else 0):
        middle = (low + high) / 2
        point = reached(ours_at(middle)[index], middle, batches)
        if point.max_over_mean <= rival.max_over_mean + EXACT:
            low, best = middle, point
        else:
            high = middle
    return best


def print_pareto(report: Report, rows: Sequence[Row]) -> None:
    print("copies: of the whole EP group; ours at the rival's max / mean; all means")
    report.table(rows)
