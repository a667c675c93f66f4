"""UltraEP's quota planner: replicas in a rank's spare slots, found for the least load threshold.

Source: arXiv 2606.04101; Dots-Infra/UltraEP 94cab09, csrc/kernels/placement.cu.
"""

from __future__ import annotations

import math

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

# Times that the first search adds a hundredth of the load before the slower one takes over.
NUM_RETRIES = 2

Export = tuple[int, int, int]  # expert, dst_rank, rows


def ultraep(
    counts: npt.ArrayLike,
    given: BaselineInput,
    *,
    balance_threshold: float = 1.0,
    eps: float = 0.01,
    min_rows: int = 1024,
) -> Outcome:
    """The planner as shipped: quick tries at the wanted load, then bisection of the load.

    2 slots per rank unless num_slots says otherwise. A threshold that nothing exceeds always
    succeeds, so the max load never passes the un-balanced one. All ranks are one domain. The
    kernel parts of the tie-breaks (which warp reports first) are left out: ties go to the lowest
    rank; its four-way search of the threshold is a bisection here.

    Args:
        balance_threshold: wanted max / mean; reached is about 1 + eps times it.
        eps: ULTRA_EP_QUOTA_ORACLE_EPS.
        min_rows: fewest rows for a replica, in the bisection only
            (ULTRA_EP_QUOTA_MIN_TOKENS_PER_REPLICA).
    """
    rows = checked_counts(counts)
    num_ranks, num_local_experts = rows.shape
    num_slots = 2 if given.num_slots is None else given.num_slots
    loads = rows.sum(axis=1)
    placed = at_home(rows)
    if num_slots and num_ranks > 1 and loads.any():
        low = math.ceil(int(loads.sum()) / num_ranks * max(balance_threshold, 1.0))
        high = max(int(loads.max()), low)
        exports = _quick(rows, num_slots, math.ceil(low * (1 + eps)), high)
        if exports is None:
            exports = _bisected(rows, num_slots, low, high, min_rows)
        for expert, dst, part in exports:
            placed[expert, expert // num_local_experts] -= part
            placed[expert, dst] += part
    return rerouted("ultraep", placed, num_local_experts)


def _quick(counts: Rows, num_slots: int, threshold: int, high: int) -> list[Export] | None:
    for _ in range(1 + NUM_RETRIES):
        exports = _Exports(counts, num_slots, threshold, min_rows=None).run()
        if exports is not None:
            return exports
        threshold = min(high, threshold + max(1, (high + 99) // 100))
    return None


def _bisected(counts: Rows, num_slots: int, low: int, high: int, min_rows: int) -> list[Export]:
    best: list[Export] = []  # of threshold `high`, which no rank exceeds
    while low < high:
        middle = (low + high) // 2
        exports = _Exports(counts, num_slots, middle, min_rows=min_rows).run()
        if exports is None:
            low = middle + 1
        else:
            best, high = exports, middle
    return best


class _Exports:
    """One try to bring every rank to the threshold.

    min_rows: fewest rows of a replica; None: as many as would do if all helpers took the same.
    """

    def __init__(
        self, counts: Rows, num_slots: int, threshold: int, *, min_rows: int | None
    ) -> None:
        loads = counts.sum(axis=1)
        self.counts = counts
        self.min_rows = min_rows
        self.fullest_first = np.argsort(-loads, kind="stable").tolist()
        self.excess: list[int] = np.maximum(loads - threshold, 0).tolist()
        self.slack: list[int] = np.maximum(threshold - loads, 0).tolist()
        self.slots = [num_slots] * len(loads)
        self.exports: list[Export] = []

    def run(self) -> list[Export] | None:
        """The exports, or None where a rank stays above the threshold."""
        if sum(self.excess) > sum(self.slack):
            return None
        for owner in self.fullest_first:
            need = self.excess[owner]
            for expert_idx in np.argsort(-self.counts[owner], kind="stable").tolist():
                if need > 0:
                    need = self._export(owner, expert_idx, need)
            if need > 0:
                return None
        return self.exports

    def _export(self, owner: int, expert_idx: int, need: int) -> int:
        """Give rows of one expert to its helpers; one row stays. Returns what is still needed."""
        left = int(self.counts[owner, expert_idx]) - 1
        helpers = [r for r, slack in enumerate(self.slack) if slack > 0 and self.slots[r]]
        while need > 0 and left > 0 and helpers:
            floor = -(-need // len(helpers)) if self.min_rows is None else self.min_rows
            dst = max(helpers, key=lambda rank: (self.slack[rank], -rank))
            part = min(need, self.slack[dst], left)
            if part < floor:
                break
            self.exports.append((owner * self.counts.shape[1] + expert_idx, dst, part))
            self.slack[dst] -= part
            self.slots[dst] -= 1
            need -= part
            left -= part
            helpers.remove(dst)
        return need
