"""The ends of the scale, and the plainest way between: none, force_balanced, lpt."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from feplb.scheduler.baselines.exact import equal_loads
from feplb.scheduler.baselines.outcome import (
    BaselineInput,
    Outcome,
    Rows,
    at_home,
    checked_counts,
    copies_of,
    plan_of,
)
from feplb.scheduler.plan import Plan


def none(counts: npt.ArrayLike, given: BaselineInput) -> Outcome:
    """Plain expert parallelism: every row on its owner."""
    checked_counts(counts)
    return Outcome(policy="none", plan=Plan(), reroutes=False)


def force_balanced(counts: npt.ArrayLike, given: BaselineInput) -> Outcome:
    """The ceiling: as many rows on every rank, at no price.

    Source: the "force-balanced ideal" that UltraEP (arXiv 2606.04101) measures itself against.
    Loads differ by one row at most. No copies are counted, so it is not realisable (is_ideal).
    """
    rows = checked_counts(counts)
    plan = plan_of(equal_loads(rows), rows.shape[1])
    return Outcome(policy="force_balanced", plan=plan, reroutes=True, is_ideal=True)


def lpt(counts: npt.ArrayLike, given: BaselineInput, *, num_dynamic: int | None = None) -> Outcome:
    """Longest processing time first: dynamic experts, busiest first, to the emptiest rank.

    Source: Graham's rule (SIAM J. Appl. Math. 1969), here for whole experts. The
    num_dynamic busiest experts of each rank are taken off and placed again whole, ties to the
    owner, then to the lowest rank. A rank hosts at most num_slots experts of others (no limit where
    not given); the owner always has room.

    Left open by the rule, decided in its favour: without num_dynamic every number of dynamic
    experts is tried and the least max load taken, then the fewest copies; a plan that lowers
    nothing is dropped, so the max load never exceeds the un-balanced one. Rows move after the
    dispatch, as in feplb, so the difference to feplb is the decision alone.

    Raises:
        ValueError: num_dynamic is not from 0 to num_local_experts.
    """
    rows = checked_counts(counts)
    num_local_experts = rows.shape[1]
    if num_dynamic is not None and not 0 <= num_dynamic <= num_local_experts:
        raise ValueError(f"lpt: num_dynamic={num_dynamic}, expected 0 to {num_local_experts}")
    tries = range(1, num_local_experts + 1) if num_dynamic is None else [num_dynamic]
    num_slots = rows.size if given.num_slots is None else given.num_slots
    best = at_home(rows)
    best_key = (int(best.sum(axis=0).max()), 0)
    for num in tries:
        placed = _placed_again(rows, num, num_slots)
        key = (int(placed.sum(axis=0).max()), len(copies_of(placed > 0, num_local_experts)))
        if key < best_key:
            best, best_key = placed, key
    copies = copies_of(best > 0, num_local_experts)
    return Outcome(
        policy="lpt", plan=plan_of(best, num_local_experts), copies=copies, reroutes=False
    )


def _placed_again(counts: Rows, num_dynamic: int, num_slots: int) -> Rows:
    """placed [num_experts, num_ranks] once the num_dynamic busiest of each rank went by LPT."""
    num_ranks, num_local_experts = counts.shape
    rows = counts.ravel().tolist()
    busiest = np.argsort(-counts, axis=1, kind="stable")[:, :num_dynamic]
    dynamic = (busiest + np.arange(num_ranks)[:, None] * num_local_experts).ravel().tolist()
    placed = at_home(counts)
    placed[dynamic] = 0
    loads: list[int] = placed.sum(axis=0).tolist()
    slots = [num_slots] * num_ranks
    for expert in sorted(dynamic, key=lambda one: (-rows[one], one)):
        owner = expert // num_local_experts
        free = [rank for rank in range(num_ranks) if slots[rank] or rank == owner]
        dst = min(free, key=lambda rank: (loads[rank], rank != owner, rank))
        slots[dst] -= dst != owner and rows[expert] > 0
        loads[dst] += rows[expert]
        placed[expert, dst] = rows[expert]
    return placed
