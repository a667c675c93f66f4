"""MindSpeed-MM's EP Balance: the fullest rank's busiest expert is doubled on the emptiest rank.

Source: Ascend/MindSpeed-MM 57069cd5, ep_balance/greedy_dup_experts_planner.py.
"""

from __future__ import annotations

import numpy.typing as npt

from feplb.scheduler.baselines.outcome import (
    BaselineInput,
    Outcome,
    at_home,
    checked_counts,
    rerouted,
)


def mindspeed_mm(
    counts: npt.ArrayLike, given: BaselineInput, *, threshold_rows: int = 1
) -> Outcome:
    """Greedy duplication, 2 slots per rank unless num_slots says otherwise (as shipped).

    The helper is filled to the mean, or half-way to what the fullest rank still owns where it is
    above. The fullest rank is the one with most rows of its own left, received ones not counted.
    The rule ends at the first step that gives nothing or repeats a copy.

    Args:
        threshold_rows: stop when max and min load differ by no more; 1 as shipped. Larger values
            are our way to fewer copies; the original has the constant only.
    """
    rows = checked_counts(counts)
    num_ranks, num_local_experts = rows.shape
    placed = at_home(rows)
    left = rows.tolist()
    own: list[int] = rows.sum(axis=1).tolist()
    loads = list(own)
    mean = sum(loads) // num_ranks
    held: list[set[int]] = [set() for _ in loads]
    num_slots = 2 if given.num_slots is None else given.num_slots
    while max(loads) - min(loads) > threshold_rows:
        owner = own.index(max(own))
        expert_idx = left[owner].index(max(left[owner]))
        expert = owner * num_local_experts + expert_idx
        free = [r for r in range(num_ranks) if r != owner and len(held[r]) < num_slots]
        dst = min(free, key=lambda rank: (loads[rank], rank), default=owner)
        limit = mean if loads[dst] < mean else (loads[dst] + own[owner]) // 2
        part = min(limit - loads[dst], left[owner][expert_idx])
        if dst == owner or part <= 0 or expert in held[dst]:
            break
        held[dst].add(expert)
        left[owner][expert_idx] -= part
        own[owner] -= part
        loads[owner] -= part
        loads[dst] += part
        placed[expert, owner] -= part
        placed[expert, dst] += part
    return rerouted("mindspeed_mm", placed, num_local_experts)
