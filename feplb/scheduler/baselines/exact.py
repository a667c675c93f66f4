"""MoonEP: every rank computes exactly as many rows.

Source: MoonshotAI/MoonEP (Kimi K3 report, section 5.2.1; the planner as in
zheliuyu/MoonEP-Triton-Distributed 43ac94c).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from feplb.scheduler.baselines.outcome import (
    BaselineInput,
    Outcome,
    Rows,
    at_home,
    checked_counts,
    even_parts,
    rerouted,
)


def moonep(counts: npt.ArrayLike, given: BaselineInput) -> Outcome:
    """Fill the emptiest rank to the mean from the fullest one, until all are there.

    A rank receives from one owner only, so its slots are bounded by num_local_experts and
    num_slots is not asked. There are at most num_ranks - 1 pairs; a pair needs a second copy
    where the owner's busiest expert has too few rows left.

    Where rows do not divide evenly (the original always has S * K a rank), the fullest ranks keep
    the odd rows, so loads differ by one at most and fewest rows move. Its token padding, which
    can only add rows, is left out.
    """
    rows = checked_counts(counts)
    return rerouted("moonep", equal_loads(rows), rows.shape[1])


def equal_loads(counts: Rows) -> Rows:
    """placed [num_experts, num_ranks] with equal loads, by MoonEP's rule."""
    num_local_experts = counts.shape[1]
    left = counts.tolist()
    placed = at_home(counts)
    for owner, quotas in enumerate(_quotas(counts.sum(axis=1))):
        while max(quotas) > 0:
            dst = quotas.index(max(quotas))
            expert_idx = left[owner].index(max(left[owner]))
            part = min(left[owner][expert_idx], quotas[dst])
            left[owner][expert_idx] -= part
            quotas[dst] -= part
            expert = owner * num_local_experts + expert_idx
            placed[expert, owner] -= part
            placed[expert, dst] += part
    return placed


def _quotas(loads: Rows) -> list[list[int]]:
    """Rows that each rank hands to each other, [num_ranks, num_ranks].

    A rank may hand over more than it has above the mean; it is then filled like any other.
    """
    caps = np.empty_like(loads)
    caps[np.argsort(-loads, kind="stable")] = even_parts(loads.sum(), len(loads))
    over: list[int] = (loads - caps).tolist()
    quotas = [[0] * len(over) for _ in over]
    while max(over) > 0:
        owner, dst = over.index(max(over)), over.index(min(over))
        quotas[owner][dst] = -over[dst]
        over[owner] += over[dst]
        over[dst] = 0
    return quotas
