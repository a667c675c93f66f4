"""How long does one plan take?

C++ planning on one thread: counts in memory -> plan in memory, capacity checks included. Distinct
inputs from the calibrated routing, each plan checked before any is timed. Every call is timed alone
with steady_clock; an input's figure is the median of the passes over all inputs (a pass repeats
none), less what the clock itself costs (csrc/bindings.cpp, time_each). Percentiles are over inputs.

The last rows are another question (bench/handover.py): from handing over the counts to reading the
plan in Python, two processes, the mover on the same core as its rank.
"""

from __future__ import annotations

from argparse import Namespace
from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt
from handover import handover_row
from report import Report, Row, arguments, iqr, median, percentile

from feplb import _core
from feplb.scheduler import PlanLimits, make_plan, plan_violations, token_straggler
from feplb.scheduler.machines import GLM5, MACHINES, unit_costs
from feplb.scheduler.policies import core_limits
from feplb.scheduler.workloads import calibrated

NUM_LAYERS = 100
NUM_TOKENS, TOP_K = 4096, 8


@dataclass(frozen=True, kw_only=True)
class Case:
    """target_us: the median this size must stay below, where one is promised.

    max_copies and search_steps as in PlanLimits; cold: 8 MiB of other memory are written before
    each plan, as a layer's GEMMs do.
    """

    ranks: int
    experts: int
    num_dynamic: int
    target_us: float | None = None
    policy: str = "greedy"
    max_copies: int = 0
    search_steps: int = 0
    cold: bool = False

    def limits(self) -> PlanLimits:
        """8 slots (paper: max_num_dyn) and, each way, as many rows as a rank has on average."""
        return PlanLimits(
            num_dynamic=self.num_dynamic,
            num_slots=8,
            num_grad_slots=8,
            min_tokens=64,
            max_recv_rows=NUM_TOKENS * TOP_K,
            max_return_rows=NUM_TOKENS * TOP_K,
            max_copies=self.max_copies,
            search_steps=self.search_steps,
        )


CASES = (
    Case(ranks=8, experts=128, num_dynamic=4, target_us=1.0),
    Case(ranks=8, experts=128, num_dynamic=16, target_us=3.0),
    Case(ranks=2, experts=128, num_dynamic=4),
    Case(ranks=2, experts=128, num_dynamic=64),
    Case(ranks=4, experts=128, num_dynamic=4),
    Case(ranks=4, experts=128, num_dynamic=32),
    Case(ranks=8, experts=256, num_dynamic=4),
    Case(ranks=8, experts=256, num_dynamic=32),
    Case(ranks=72, experts=288, num_dynamic=4),
    Case(policy="refine", ranks=2, experts=128, num_dynamic=64),
    Case(policy="refine", ranks=4, experts=128, num_dynamic=32),
    Case(policy="refine", ranks=8, experts=128, num_dynamic=16, max_copies=8, target_us=25.0),
    Case(policy="refine", ranks=8, experts=128, num_dynamic=16, max_copies=8, cold=True),
    Case(policy="refine", ranks=8, experts=128, num_dynamic=16, max_copies=8, search_steps=400,
         target_us=100.0),
    Case(policy="refine", ranks=8, experts=128, num_dynamic=16, max_copies=16),
    Case(policy="refine", ranks=72, experts=288, num_dynamic=4),
    Case(policy="refine", ranks=64, experts=512, num_dynamic=8),
    Case(policy="split", ranks=8, experts=128, num_dynamic=16, target_us=2.0),
    Case(policy="split", ranks=8, experts=128, num_dynamic=16, cold=True),
    Case(policy="split", ranks=72, experts=288, num_dynamic=4, target_us=12.0),
    Case(policy="split", ranks=64, experts=512, num_dynamic=8),
    Case(policy="auto", ranks=8, experts=128, num_dynamic=16),
    Case(policy="auto", ranks=8, experts=128, num_dynamic=16, cold=True),
)  # fmt: skip
COSTS = unit_costs(MACHINES["h100"], GLM5, rows_per_rank=NUM_TOKENS * TOP_K)
EVICTED_BYTES, COLD_INPUTS = 8 << 20, 400
COLUMNS = (
    *("policy", "ranks", "experts", "num_dynamic", "search_steps", "cold", "inputs", "moves_mean"),
    *("straggler_before", "straggler_after", "us_p50", "us_p99", "us_iqr", "target_us"),
)


def inputs_for(ranks: int, experts: int, num_inputs: int) -> npt.NDArray[np.int32]:
    """Distinct counts [num_inputs, ranks, experts / ranks] over layers and steps."""
    counts = [
        calibrated(
            ranks,
            seed=0,
            layer=index % NUM_LAYERS,
            step=index // NUM_LAYERS,
            num_experts=experts,
            num_tokens=NUM_TOKENS,
            top_k=TOP_K,
        )
        for index in range(num_inputs)
    ]
    return np.stack(counts).astype(np.int32)


def check_plans(case: Case, inputs: npt.NDArray[np.int32]) -> Row:
    """What the plans do, once each of them has been found valid."""
    num_moves, before, after = [], [], []
    for index, counts in enumerate(inputs):
        plan = make_plan(case.policy, counts, case.limits(), costs=COSTS)
        if violations := plan_violations(plan, counts, case.limits()):
            raise SystemExit(f"{case}, input {index}: " + "; ".join(violations))
        num_moves.append(len(plan.moves))
        before.append(token_straggler(plan.loads_before(counts)))
        after.append(token_straggler(plan.loads_after(counts)))
    return {
        "moves_mean": float(np.mean(num_moves)),
        "straggler_before": float(np.mean(before)),
        "straggler_after": float(np.mean(after)),
    }


def time_case(case: Case, inputs: npt.NDArray[np.int32], passes: int) -> Row:
    evicted = EVICTED_BYTES if case.cold else 0
    sample = inputs[:COLD_INPUTS] if case.cold else inputs
    times_us = _core.time_plans(
        case.policy, sample, core_limits(case.limits()), passes, asdict(COSTS), evicted
    )
    return {
        "us_p50": median(times_us),
        "us_p99": percentile(times_us, 99),
        "us_iqr": iqr(times_us),
        "target_us": case.target_us,
    }


def plan_rows(num_inputs: int, passes: int) -> list[Row]:
    """The C++ part: one row per case, checks first."""
    rows: list[Row] = []
    inputs: dict[tuple[int, int], npt.NDArray[np.int32]] = {}
    for case in CASES:
        size = case.ranks, case.experts
        if size not in inputs:
            inputs[size] = inputs_for(*size, num_inputs // 4 if case.ranks > 8 else num_inputs)
        rows.append(
            {
                "policy": case.policy,
                "ranks": case.ranks,
                "experts": case.experts,
                "num_dynamic": case.num_dynamic,
                "search_steps": case.search_steps or None,
                "cold": case.cold,
                "inputs": len(inputs[size]),
                **check_plans(case, inputs[size]),
                **time_case(case, inputs[size], passes),
            }
        )
    return rows


def main(options: Namespace) -> None:
    num_inputs, passes = (400, 3) if options.quick else (4000, 7)
    report = Report(bench="plan_latency", lane="none")
    report.header(threads=1, passes=passes, check="plan_violations")
    rows = plan_rows(num_inputs, passes)
    samples = 300 if options.quick else 2000
    rows += [handover_row("greedy", 4, samples, after_experts=after) for after in (False, True)]
    report.table(rows, COLUMNS)
    print("\nstraggler: max - mean of the rank loads in rows, mean over inputs")
    report.write(options.json, rows)


if __name__ == "__main__":
    main(arguments(__doc__.splitlines()[0]).parse_args())
