"""What bench/straggler.py adds to the engine's figures: plan times, and optima by a solver."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt
from report import median

from feplb.scheduler.cost_model import UnitCosts
from feplb.scheduler.microbatches import MicroBatch
from feplb.scheduler.optimum import best_whole
from feplb.scheduler.plan import Plan
from feplb.scheduler.policies import core_limits, load_core
from feplb.scheduler.simulate import Arm, place

MOST_INPUTS = 400  # distinct inputs timed; the rivals' Python gets fewer
MOST_RIVAL_INPUTS = 20
PASSES = 3


def plan_us(arm: Arm, domains: Sequence[MicroBatch], costs: UnitCosts) -> float:
    """Median microseconds of one domain's plan, over distinct inputs.

    Ours are timed in the C++ core, counts to plan, on one thread. A rival's is the wall time of its
    re-make in Python, which says little about the original.
    """
    if not arm.is_ours:
        return _rival_us(arm, domains[:MOST_RIVAL_INPUTS], costs)
    inputs = np.stack([each.counts for each in domains[:MOST_INPUTS]]).astype(np.int32)
    limits = core_limits(arm.limits(domains[0].counts))
    units = asdict(costs) if arm.policy == "auto" else None
    return median(load_core().time_plans(arm.policy, inputs, limits, PASSES, units))


def _rival_us(arm: Arm, domains: Sequence[MicroBatch], costs: UnitCosts) -> float:
    times = []
    for domain in domains:
        start = time.perf_counter()
        place(arm, domain, costs)
        times.append((time.perf_counter() - start) * 1e6)
    return median(times)


@dataclass(slots=True, kw_only=True)
class Optima:
    """Asks the solver how few rows the fullest rank can have, and counts what it proved.

    Args:
        seconds: for each program.
    """

    seconds: float
    asked: int = 0
    proven: int = 0

    def best_load(self, arm: Arm, counts: npt.NDArray[np.int64], plan: Plan) -> int | None:
        """Of whole experts within the arm's limits; None for policies that this is not about."""
        if not (arm.is_ours and arm.policy in ("greedy", "refine")):
            return None
        limits = arm.limits(counts)
        found = best_whole(counts, limits, time_limit_s=self.seconds, known=plan)
        self.asked += 1
        self.proven += found.proven
        return found.max_load

    def __str__(self) -> str:
        return (
            f"gap of greedy and refine: to the best plan that is known of {self.asked} programs, "
            f"{self.proven} of them proven optimal within {self.seconds:g} s"
        )
