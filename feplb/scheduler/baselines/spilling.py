"""LLEP, Least-Loaded Expert Parallelism: busiest experts first, what exceeds a cap is spilled.

Source: arXiv 2601.17111; SalesforceAIResearch/LeastLoadedEP 0349746, llep/gpt_oss_llep.py.
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
    rerouted,
)
from feplb.scheduler.plan import load_imbalance


def llep(
    counts: npt.ArrayLike,
    given: BaselineInput,
    *,
    alpha: float = 1.1,
    gate: float = 1.0,
    min_chunk: int = 1024,
) -> Outcome:
    """LPT with spill and split; the name says the alpha, llep_1.1.

    Loads are effective ones: rows assigned, and those of owned experts not yet looked at. Where no
    helper has room for a chunk worth it, the rest is forced on the least loaded, so the max load
    may pass the cap. Slots are not limited by its rules, so num_slots is not asked.

    Args:
        alpha: cap of a rank's rows, in mean loads (EP_MAX_TOKENS_FACTOR, 1.1 in the code; the
            target of its balance).
        gate: plain expert parallelism where max / mean is below. 1.3 is suggested for speed; 1.0,
            no gate, balances best and is what its users set, so it is our default.
        min_chunk: fewest rows for a helper, unless they are all that is left
            (EP_MIN_TOKENS_PER_GEMM).
    """
    rows = checked_counts(counts)
    policy = f"llep_{alpha}"
    loads: list[int] = rows.sum(axis=1).tolist()
    if load_imbalance(loads) < gate or len(loads) == 1:
        return rerouted(policy, at_home(rows), rows.shape[1])
    mean = sum(loads) // len(loads)
    # A mean below one row would leave no room anywhere: the code then takes all rows as the cap.
    cap = max(1, int(alpha * mean) if mean else sum(loads))
    return rerouted(policy, _Spill(rows, cap, min_chunk).run(), rows.shape[1])


class _Spill:
    """One run of the rule, with the loads it keeps."""

    def __init__(self, counts: Rows, cap: int, min_chunk: int) -> None:
        self.counts = counts
        self.cap = cap
        self.min_chunk = min_chunk
        self.loads: list[int] = counts.sum(axis=1).tolist()  # effective, this expert's rows off
        self.placed = np.zeros((counts.size, len(self.loads)), dtype=np.int64)

    def run(self) -> Rows:
        rows: list[int] = self.counts.ravel().tolist()
        for expert in sorted(range(len(rows)), key=lambda one: (-rows[one], one)):
            owner = expert // self.counts.shape[1]
            self.loads[owner] -= rows[expert]
            kept = min(rows[expert], max(0, self.cap - self.loads[owner]))
            self._give(expert, owner, kept)
            if kept < rows[expert]:
                self._spill(expert, owner, rows[expert] - kept, keeps_some=kept > 0)
        return self.placed

    def _give(self, expert: int, rank: int, num_rows: int) -> None:
        self.placed[expert, rank] += num_rows
        self.loads[rank] += num_rows

    def _spill(self, expert: int, owner: int, rest: int, *, keeps_some: bool) -> None:
        helpers = self._by_load(owner)
        for rank in helpers:
            part = min(rest, self.cap - self.loads[rank])
            if part > 0 and (part >= self.min_chunk or part == rest):
                self._give(expert, rank, part)
                rest -= part
        if rest:
            # The code sorts the helpers again only where the owner keeps a part of the expert.
            self._give(expert, (self._by_load(owner) if keeps_some else helpers)[0], rest)

    def _by_load(self, owner: int) -> list[int]:
        others = [rank for rank in range(len(self.loads)) if rank != owner]
        return sorted(others, key=lambda rank: (self.loads[rank], rank))
