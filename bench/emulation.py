"""What bench/layer_emulated.py needs of the plan and the cost model: one rank's work, and when its
copies would have arrived. Pure integers and times; no device.

Times are milliseconds from the start of the call, which all ranks begin together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from feplb.call import RoutedMove, kept_segments, rows_on_the_way_back, split_kept
from feplb.compute import Segment

# The copies' part of the model alone: their engines, given when the ranks have computed.
from feplb.scheduler.cost_model import UnitCosts
from feplb.scheduler.cost_model import _Call as ModelledCall
from feplb.scheduler.machines import ExpertShape, Machine
from feplb.scheduler.plan import Plan
from feplb.scheduler.shares import Rows

PICO_PER_MS = 10**9


@dataclass(frozen=True)
class RankWork:
    """What one rank computes, in the order of design.md section 5.

    Args:
        kept_a, kept_b: rows of this rank, weight index = local expert.
        received: rows of others, packed, weight index = slot.
        returned: (start, end) of this rank's rows that come home.
        pushed_bytes, pushed_backward_bytes: level 1, the larger of both directions.
        returned_bytes: level 2, likewise; grad_bytes: level 3, likewise.
    """

    kept_a: tuple[Segment, ...]
    received: tuple[Segment, ...]
    kept_b: tuple[Segment, ...]
    returned: tuple[tuple[int, int], ...] = ()
    pushed_bytes: int = 0
    pushed_backward_bytes: int = 0
    returned_bytes: int = 0
    grad_bytes: int = 0

    @property
    def num_rows(self) -> int:
        """Rows of this rank's own that its buffers must hold."""
        ends = [end for _, end, _ in (*self.kept_a, *self.kept_b)]
        return max([*ends, *(end for _, end in self.returned)], default=0)

    @property
    def num_received(self) -> int:
        return self.received[-1][1] if self.received else 0


def rank_work(
    plan: Plan, counts: Rows, rank: int, machine: Machine, expert: ExpertShape
) -> RankWork:
    """The work of one rank under a plan."""
    first = [0, *counts[rank].cumsum().tolist()]
    sent = [
        RoutedMove(m.expert_idx, m.dst_rank, m.row_start, m.row_end, 0, 0)
        for m in plan.moves
        if m.owner_rank == rank
    ]
    received: list[Segment] = []
    slots: dict[tuple[int, int], int] = {}
    for move in plan.moves:
        if move.dst_rank == rank:
            end = received[-1][1] if received else 0
            slot = slots.setdefault((move.owner_rank, move.expert_idx), len(slots))
            received.append((end, end + move.num_rows, slot))
    kept = kept_segments(counts[rank].tolist(), sent)
    kept_a, kept_b = split_kept(kept, rows_in_kept_b(plan, rank, machine, expert))
    out_rows = sum(move.num_rows for move in sent)
    in_rows = received[-1][1] if received else 0
    rows, experts = max(out_rows, in_rows), max(len(sent), len(received))
    weight_bytes = expert.num_parameters * expert.element_bytes
    return RankWork(
        tuple(kept_a), tuple(received), tuple(kept_b),
        returned=tuple(
            (first[m.expert_idx] + m.row_start, first[m.expert_idx] + m.row_end) for m in sent
        ),
        pushed_bytes=rows * expert.row_bytes + experts * weight_bytes,
        pushed_backward_bytes=2 * rows * expert.row_bytes + experts * weight_bytes,
        returned_bytes=rows * expert.row_bytes,
        grad_bytes=experts * expert.num_parameters * expert.grad_bytes,
    )  # fmt: skip


def rows_in_kept_b(plan: Plan, rank: int, machine: Machine, expert: ExpertShape) -> int:
    """As Balancer chooses it, at the preset's rates; 0 where the rank sends and gets nothing."""
    if not any(rank in (move.owner_rank, move.dst_rank) for move in plan.moves):
        return 0
    returning = max(rows_on_the_way_back(rank, plan.as_array()))
    row_s = expert.flops_per_row / (machine.gemm_tflops * 1e12)
    return int(returning * expert.row_bytes / (machine.lane_gbps * 1e9) / row_s) + 1


class Copies:
    """When copies of one call arrive, modelled; the ranks' own times are measured and given."""

    def __init__(self, counts: Rows, plan: Plan, costs: UnitCosts, *, backward: bool) -> None:
        self._moves = plan.moves
        self._costs = costs
        self._call = ModelledCall(counts.tolist(), plan.moves, costs, backward=backward)
        self._backward = backward

    def pushed(self) -> list[float]:
        """Level 1: when each rank has what it received; 0 where it receives nothing."""
        return [at / PICO_PER_MS for at in self._call._push()]

    def returned(self, computed_ms: Sequence[float]) -> list[float]:
        """Level 2: when each rank has its rows back, 0 where none were away; after pushed()."""
        computed = [round(at * PICO_PER_MS) for at in computed_ms]
        return [at / PICO_PER_MS for at in self._call._return(computed)]

    def with_late_grads(
        self, ends_ms: Sequence[float], ready_ms: Sequence[float], add_ms: float
    ) -> list[float]:
        """Level 3, after returned(): ends of the ranks, with weight grads that hold them up.

        They arrive while the dispatch's backward runs, and are added on the compute stream behind
        it. It is an all-to-all: no rank is through with it before the slowest has begun it. What
        comes back is what is left without that window, as if the adds ran before it.

        Args:
            ready_ms: when each helper has the weight grads of its received rows.
            add_ms: adding those of one expert at home, measured.
        """
        costs, ends = self._costs, list(ends_ms)
        arrived, adds = [0.0] * len(ends), [0] * len(ends)
        for move in self._moves:
            ready = round(ready_ms[move.dst_rank] * PICO_PER_MS)
            arrival = self._call._copy(move.dst_rank, ready, costs.grad_push) / PICO_PER_MS
            arrived[move.owner_rank] = max(arrived[move.owner_rank], arrival)
            adds[move.owner_rank] += 1
        window = costs.late_window / PICO_PER_MS
        dispatched = max(ends) + window
        for owner, num_adds in enumerate(adds):
            if num_adds:
                added = max(dispatched, arrived[owner]) + num_adds * add_ms
                ends[owner] = added - window
        return ends


def recovered_pct(none_ms: float, arm_ms: float, ceiling_ms: float) -> float | None:
    """Share of the way from un-balanced to the ceiling; None where there is none to go."""
    way = none_ms - ceiling_ms
    return 100 * (none_ms - arm_ms) / way if way > 0 else None
