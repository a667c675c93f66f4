"""The exact optimum: what no plan can beat, found by a solver, for tests and benches.

best_whole() is the least largest load of whole experts; fewest_copies_whole() and best_split() the
fewest weight copies that reach a load. Each is a mixed-integer program (program.py) for scipy's
HiGHS, under a time limit: where that ends first, the best plan found stands beside the bound that
was proven. Far too slow for training. Needs scipy at the first program, not at import.

Legend: counts [num_ranks, num_local_experts], rows that each rank owns per local expert.

What was seen on workloads.calibrated, 128 experts, all dynamic, 20 s a program on a busy core:
Whole experts: EP 2 is proven within 2 s, EP 8 with 4 copies within 11 s, EP 4 with 4 copies in 13
of 20 steps; EP 4 and EP 8 with 8 copies never, since fractions of copies reach the mean. Split in
grains of 128 rows: EP 2 and EP 4 within 2 s, EP 8 in 1 of 5 steps (bound 4 to 6 of 6 to 8 copies).
What pays: leaving out copies that no better plan can have; the fewest sends of each rank as a row;
for EP 8 with 8 copies, asking for a load instead of the least (_descended: 108 rows left instead of
131, mean of 8 steps). What does not: a row for the fewest copies into each rank, or out of each
group of ranks.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace

import numpy.typing as npt

from feplb.scheduler.plan import Plan, PlanLimits
from feplb.scheduler.program import Aim, Problem, num_columns, solved, split_floor

__all__ = ["Optimum", "best_split", "best_whole", "fewest_copies_whole", "split_floor"]

# Above so many columns times copies, with a copy per rank or more, nothing was proven in 20 s:
# the time goes into better plans, not into the bound.
HOPELESS_SIZE = 4000


@dataclass(frozen=True, slots=True, kw_only=True)
class Optimum:
    """A plan, and how far it can be from the best one.

    Args:
        max_load: rows of the fullest rank under the plan.
        bound: what no plan within the limits goes below: rows of the fullest rank (best_whole), or
            weight copies of a plan that reaches the load asked for (the others); inf where no plan
            reaches it.
        plan: the best plan found; valid also where the time was too short.
        proven: the plan is an optimum, or, where its max_load is above the one asked for, no plan
            reaches that.
    """

    max_load: int
    bound: float
    plan: Plan
    proven: bool

    @property
    def num_copies(self) -> int:
        """Weight copies of the plan: pairs of an expert and a helper."""
        return len(self.plan.moves)


def best_whole(
    counts: npt.ArrayLike,
    limits: PlanLimits,
    *,
    time_limit_s: float,
    known: Plan | None = None,
) -> Optimum:
    """The plan of whole experts, each on at most one helper, whose fullest rank has fewest rows.

    Args:
        counts: [num_ranks, num_local_experts] integers; rows that each rank owns per local expert.
        limits: all but target_ppm and grain_rows; max_copies as the planner reads it.
        time_limit_s: for the solver, in seconds; making its program is not counted.
        known: a plan of whole experts that the solver must beat, and that comes back otherwise.
    Raises:
        ValueError: counts are not such integers, or `known` is no plan within the limits.
        RuntimeError: scipy is missing.
    """
    problem = Problem.of(counts, limits)
    start = problem.checked(known)
    bound = problem.least_load(problem.max_load(start))
    return _lowest(problem, start, bound, time_limit_s)


def fewest_copies_whole(
    counts: npt.ArrayLike,
    limits: PlanLimits,
    *,
    target_load: int,
    time_limit_s: float,
    known: Plan | None = None,
) -> Optimum:
    """The plan of whole experts with the fewest copies that leaves no rank above target_load rows.

    Arguments and errors as best_whole's. Where no such plan was found, the plan is `known` (or
    empty) and its max_load is above target_load.
    """
    problem = Problem.of(counts, limits)
    return _fewest(problem, problem.checked(known), target_load, time_limit_s)


def best_split(
    counts: npt.ArrayLike,
    limits: PlanLimits,
    *,
    grain_rows: int,
    time_limit_s: float,
    target_load: int | None = None,
    known: Plan | None = None,
) -> Optimum:
    """The plan with the fewest copies that leaves no rank above target_load, experts split at will.

    Each copy takes a multiple of grain_rows, or all rows of its expert.

    Args:
        grain_rows: rows, at least 1; stands for limits.grain_rows.
        target_load: rows; None: split_floor(), or, where the limits keep every plan above that,
            the least load that they allow.
        counts, limits, time_limit_s, known: as best_whole's.
    Raises:
        ValueError: as best_whole; grain_rows is below 1.
        RuntimeError: scipy is missing.
    """
    if grain_rows < 1:
        raise ValueError(f"best_split: grain_rows={grain_rows}, expected at least 1")
    problem = Problem.of(counts, limits, grain_rows)
    floor = split_floor(problem.loads, grain_rows)
    floor = max(floor, problem.least_load(problem.max_load(Plan())))
    target = floor if target_load is None else target_load
    plans = [problem.checked(known), problem.paired(target)]
    start = min(plans, key=lambda plan: (max(problem.max_load(plan), target), len(plan.moves)))
    if target_load is not None or problem.max_load(start) <= floor:
        return _fewest(problem, start, target, time_limit_s)
    deadline = time.monotonic() + time_limit_s
    found = _fewest(problem, start, floor, time_limit_s / 2)
    if found.max_load <= floor:
        return found
    lowest = _lowest(problem, start, floor, (deadline - time.monotonic()) / 2)
    best = _fewest(problem, lowest.plan, lowest.max_load, deadline - time.monotonic())
    return replace(best, proven=best.proven and lowest.proven)


def _lowest(problem: Problem, start: Plan, bound: int, time_limit_s: float) -> Optimum:
    """The plan with the least largest load, start if none is better; bound: no load is below it."""
    high = problem.max_load(start)
    if high <= bound:
        return Optimum(max_load=high, bound=high, plan=start, proven=True)
    size = num_columns(problem, high) * problem.max_copies
    if problem.max_copies >= len(problem.rows) and size > HOPELESS_SIZE:
        return _descended(problem, start, bound, time_limit_s)
    aim = Aim(low=bound, high=high - 1, most_copies=problem.max_copies)
    answer = solved(problem, aim, time_limit_s)
    plan = answer.plan or start
    load = problem.max_load(plan)
    bound = high if answer.is_infeasible else min(load, bound + answer.bound)
    return Optimum(max_load=load, bound=bound, plan=plan, proven=load == bound)


def _descended(problem: Problem, start: Plan, bound: int, time_limit_s: float) -> Optimum:
    """As _lowest, by going down: a plan at a quarter of what is left above the bound, and so on.

    A program with the load given finds plans where the one that minimises it finds none.
    """
    deadline = time.monotonic() + time_limit_s
    plan, high, share = start, problem.max_load(start), 0.25
    while high > bound and (left := deadline - time.monotonic()) > time_limit_s / 20:
        target = bound + int((high - bound) * share)
        aim = Aim(low=target, high=target, most_copies=problem.max_copies)
        answer = solved(problem, aim, left / 2)
        if answer.plan is not None:
            plan, high = answer.plan, problem.max_load(answer.plan)
        elif answer.is_infeasible:
            bound = target + 1
        else:
            share = (1 + share) / 2
    return Optimum(max_load=high, bound=bound, plan=plan, proven=high <= bound)


def _fewest(problem: Problem, start: Plan, target: int, time_limit_s: float) -> Optimum:
    """The plan with the fewest copies that reaches target rows; start if no better is found."""
    start = Plan() if problem.max_load(Plan()) <= target else start
    reaches = problem.max_load(start) <= target
    num_copies = len(start.moves) if reaches else math.inf
    bound = min(num_copies, problem.least_copies(target))
    plan, is_infeasible = start, False
    if bound < num_copies:
        most = len(start.moves) - 1 if reaches else problem.max_copies
        aim = Aim(low=target, high=target, most_copies=most)
        answer = solved(problem, aim, time_limit_s)
        plan, is_infeasible = answer.plan or start, answer.is_infeasible
        num_copies = len(plan.moves) if answer.plan else num_copies
        bound = num_copies if is_infeasible else min(num_copies, max(bound, answer.bound))
    return Optimum(
        max_load=problem.max_load(plan), bound=bound, plan=plan, proven=bound == num_copies
    )
