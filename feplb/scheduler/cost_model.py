"""Predicts how long a layer's experts take under a plan: what `auto` decides by.

The order of work is two_phase.py's: kept A, received, kept B, place what came home; in backward the
weight grads of received rows go home last and are added after the layer. Integers throughout
(picoseconds), so that csrc/cost.cpp gives the same answer on every rank.

What is modelled, per rank:
  GEMM     rows in tiles, or the reading of the expert's weights where that takes longer, and what
           it costs beside its rows
  copies   one engine per source, first in first out: rows of all moves, then their weights, then
           (when it has computed them) outputs, then weight grads; a destination takes in what all
           its sources send no faster than its own link, which may have another rate
  hiding   level 1 under kept A, the way back under kept B, weight grads until the owner asks for
           them after the dispatch's backward
  core     where a copy thread shares it, copies and GEMMs of a rank take longer by each other
  at home  placing returned rows; adding weight grads, behind what runs in that window

Worked example, 2 ranks, one expert each, 6 and 2 rows; 2 of rank 0's rows go to rank 1. A row takes
10 ps to compute and 1 to copy each way, the weights 5 to copy, all else nothing. Rank 1 holds back
2 ps of its 20 ps of own work as kept B, for the way back takes as long. It has rows and weights at
2 + 5 = 7, but computes kept A until 18, the received rows until 38, kept B until 40; at 40 the
outputs are home. Rank 0 computes its 4 rows until 40. The call takes 40 ps, 60 without the plan.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from feplb.scheduler.plan import Move, Plan

PICO = 10**12


def picoseconds(amount: float, giga_per_second: float) -> int:
    """How long `amount` (bytes, operations) takes at a rate in 10^9 per second."""
    return round(amount / (giga_per_second * 1e9) * PICO)


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitCosts:
    """What one row, expert or copy of a layer costs, picoseconds; the same on every rank.

    Args:
        tile_rows: rows that a GEMM computes together; an expert's last tile costs as a full one.
        row_forward, row_dgrad, row_wgrad: computing one row.
        weight_read: least time of one expert's GEMMs, which must read its weights.
        gemm: of each of an expert's GEMMs (forward, dgrad, wgrad), beside its rows.
        row_push, row_push_backward: one row and its side data to the helper (backward: grad rows,
            and rows again).
        weight_push: one expert's weights to the helper.
        row_return, row_return_backward: one output row (grad row) home.
        grad_push: one expert's weight grads home.
        row_place, grad_add: at home, one returned row, one expert's weight grads.
        late_window: how long after the layer's backward late grads may still arrive for nothing;
            adding them takes its time behind it.
        start: from the plan to the first copy.
        copy: of each copy, whatever its size.
        inbound_permille: what a destination takes to take a copy in, in thousandths of what its
            source takes to send it: 1000 times the source's rate over the destination's.
        shares_core: 1 where the engine is a thread on the core of its rank's GEMMs, so that each
            takes its time from the other; 0 where it is an engine.
    """

    tile_rows: int = 1
    row_forward: int = 0
    row_dgrad: int = 0
    row_wgrad: int = 0
    weight_read: int = 0
    gemm: int = 0
    row_push: int = 0
    row_push_backward: int = 0
    weight_push: int = 0
    row_return: int = 0
    row_return_backward: int = 0
    grad_push: int = 0
    row_place: int = 0
    grad_add: int = 0
    late_window: int = 0
    start: int = 0
    copy: int = 0
    shares_core: int = 0
    inbound_permille: int = 1000

    def __post_init__(self) -> None:
        for field in fields(self):
            least, value = int(field.name == "tile_rows"), getattr(self, field.name)
            if not isinstance(value, int) or not least <= value < 2**62:
                raise ValueError(
                    f"UnitCosts.{field.name}: {value!r}, expected an integer from {least}, in ps"
                )
        if self.shares_core > 1:
            raise ValueError(f"UnitCosts.shares_core: {self.shares_core}, expected 0 or 1")


@dataclass(frozen=True, slots=True)
class RankPhases:
    """When one rank is through with each phase of a call, picoseconds from its start.

    Args:
        kept_a: it has computed kept A.
        arrived: ... and level 1 is there, so that received rows can be computed.
        received: what goes home at level 2 is computed.
        wgrad: ... and the weight grads of received rows (forward: the same as received).
        kept_b: it has computed kept B.
        home: ... and its own rows are back.
        placed: ... and in their places.
        end: ... and late weight grads are added, less the late window.
    """

    kept_a: int
    arrived: int
    received: int
    wgrad: int
    kept_b: int
    home: int
    placed: int
    end: int


@dataclass(frozen=True, slots=True)
class CallTime:
    """Predicted end of one call, picoseconds from its start.

    Args:
        phases: of each rank, [num_ranks].
        engine: how long each rank's engine is busy, [num_ranks].
    """

    phases: tuple[RankPhases, ...]
    engine: tuple[int, ...]

    @property
    def by_rank(self) -> tuple[int, ...]:
        """When each rank has its outputs, [num_ranks]."""
        return tuple(rank.end for rank in self.phases)

    @property
    def slowest(self) -> int:
        """What every rank waits for."""
        return max(self.by_rank, default=0)


@dataclass(frozen=True, slots=True)
class LayerTime:
    """Forward and backward of one layer's experts, predicted."""

    forward: CallTime
    backward: CallTime

    @property
    def total(self) -> int:
        """Picoseconds, the slowest rank's of each."""
        return self.forward.slowest + self.backward.slowest


def predict(counts: npt.ArrayLike, plan: Plan | Sequence[Move], costs: UnitCosts) -> LayerTime:
    """Layer time of the experts under a plan.

    Args:
        counts: [num_ranks, num_local_experts] rows that each rank owns.
        plan: of the same counts.
        costs: of the layer.
    """
    moves = plan.moves if isinstance(plan, Plan) else plan
    rows = np.asarray(counts).tolist()
    return LayerTime(
        _Call(rows, moves, costs, backward=False).run(),
        _Call(rows, moves, costs, backward=True).run(),
    )


def ceiling(counts: npt.ArrayLike, costs: UnitCosts) -> int:
    """Picoseconds of forward and backward were the work spread evenly, for nothing."""
    time = predict(counts, (), costs)
    ranks = len(time.forward.by_rank)
    return (sum(time.forward.by_rank) + sum(time.backward.by_rank)) // max(1, ranks)


def recovered(counts: npt.ArrayLike, plan: Plan, costs: UnitCosts) -> float:
    """Share of the way from un-balanced to the ceiling that a plan goes; 1.0 if there is none."""
    none, best = predict(counts, (), costs).total, ceiling(counts, costs)
    if none == best:
        return 1.0
    return (none - predict(counts, plan, costs).total) / (none - best)


def rows_on_the_way_back(num_ranks: int, moves: Sequence[Move]) -> list[tuple[int, int]]:
    """Rows whose way back each rank's kept B should cover, [num_ranks] of (out, in).

    in: what comes back to it, and what others send to the same owners: each of them takes in no
    faster than its own link. out: what it sends back, and what one of its helpers does, who sends
    all it has got in a row. The way back takes as long as the longer of the two.
    """
    sent, got = [0] * num_ranks, [0] * num_ranks
    for move in moves:
        sent[move.owner_rank] += move.num_rows
        got[move.dst_rank] += move.num_rows
    rows_out, rows_in = list(got), list(sent)
    for move in moves:
        owner, helper = move.owner_rank, move.dst_rank
        rows_out[owner] = max(rows_out[owner], min(got[helper], sent[owner]))
        rows_in[helper] = max(rows_in[helper], sent[owner])
    return list(zip(rows_out, rows_in, strict=True))


class _Work(NamedTuple):
    """When a rank has computed what."""

    kept_a: int
    received: int
    wgrad: int
    kept_b: int


class _Call:
    """One call of all ranks; csrc/cost.cpp is its twin, line by line."""

    def __init__(
        self, counts: list[list[int]], moves: Sequence[Move], costs: UnitCosts, *, backward: bool
    ) -> None:
        self.counts, self.moves, self.costs, self.backward = counts, moves, costs, backward
        self.engine = [costs.start] * len(counts)  # when it is free
        self.busy = [0] * len(counts)

    def run(self) -> CallTime:
        arrived = self._push()
        received = self._received()
        worked = self._compute(arrived, self._kept(), received)
        computed = [work.received for work in worked]
        home = self._return(computed)
        sent = [0] * len(self.counts)
        for move in self.moves:
            sent[move.owner_rank] += move.num_rows
        home = [max(work.kept_b, at) for work, at in zip(worked, home, strict=True)]
        placed = [at + rows * self.costs.row_place for at, rows in zip(home, sent, strict=True)]
        ends = self._late(computed, received, placed) if self.backward else placed
        phases = tuple(
            RankPhases(
                kept_a=work.kept_a,
                arrived=max(work.kept_a, arrived[r]),
                received=work.received,
                wgrad=work.wgrad,
                kept_b=work.kept_b,
                home=home[r],
                placed=placed[r],
                end=ends[r],
            )
            for r, work in enumerate(worked)
        )
        return CallTime(phases, tuple(self.busy))

    # ------------------------------------------------------------------------------- the engine

    def _copy(self, source: int, ready: int, duration: int) -> int:
        """Queue a copy that may start at `ready`; when it has arrived."""
        duration = (duration + self.costs.copy) * (1 + self.costs.shares_core)
        self.engine[source] = max(self.engine[source], ready) + duration
        self.busy[source] += duration
        return self.engine[source]

    def _inbound(self, duration: int) -> int:
        """How long a destination takes to take in what its sources send in `duration`."""
        return duration * self.costs.inbound_permille // 1000

    def _push(self) -> list[int]:
        """Level 1, rows first; when everything that a helper needs has arrived."""
        costs = self.costs
        per_row = costs.row_push_backward if self.backward else costs.row_push
        arrived, inbound = [0] * len(self.counts), [0] * len(self.counts)
        for move in self.moves:
            self._copy(move.owner_rank, costs.start, move.num_rows * per_row)
            inbound[move.dst_rank] += move.num_rows * per_row
        for move in self.moves:
            at = self._copy(move.owner_rank, costs.start, costs.weight_push)
            inbound[move.dst_rank] += costs.weight_push
            arrived[move.dst_rank] = max(arrived[move.dst_rank], at)
        return [
            max(at, costs.start + self._inbound(width)) if width else 0
            for at, width in zip(arrived, inbound, strict=True)
        ]

    def _return(self, computed: list[int]) -> list[int]:
        """Level 2; when an owner has all its rows back."""
        per_row = self.costs.row_return_backward if self.backward else self.costs.row_return
        home, inbound, first = ([0] * len(self.counts) for _ in range(3))
        for move in self.moves:
            owner, ready = move.owner_rank, computed[move.dst_rank]
            width = move.num_rows * per_row
            home[owner] = max(home[owner], self._copy(move.dst_rank, ready, width))
            first[owner] = min(first[owner], ready) if inbound[owner] else ready
            inbound[owner] += width
        return [max(home[r], first[r] + self._inbound(inbound[r])) for r in range(len(home))]

    # -------------------------------------------------------------------------------- the GEMMs

    def _gemm(self, rows: int, row_time: int) -> int:
        if rows == 0:
            return 0
        tile = self.costs.tile_rows
        return max(-(-rows // tile) * tile * row_time, self.costs.weight_read) + self.costs.gemm

    def _segment(self, rows: int) -> int:
        """All of one expert's GEMMs in this call."""
        if not self.backward:
            return self._gemm(rows, self.costs.row_forward)
        return self._gemm(rows, self.costs.row_dgrad) + self._gemm(rows, self.costs.row_wgrad)

    def _kept(self) -> list[int]:
        """Time of what each rank computes of its own experts."""
        left = [list(row) for row in self.counts]
        for move in self.moves:
            left[move.owner_rank][move.expert_idx] -= move.num_rows
        return [sum(self._segment(rows) for rows in of_rank) for of_rank in left]

    def _received(self) -> list[tuple[int, int]]:
        """Of each rank's received rows: time of what goes back at level 2, and of their wgrad."""
        costs, times = self.costs, [[0, 0] for _ in self.counts]
        first = costs.row_dgrad if self.backward else costs.row_forward
        for move in self.moves:
            times[move.dst_rank][0] += self._gemm(move.num_rows, first)
            if self.backward:
                times[move.dst_rank][1] += self._gemm(move.num_rows, costs.row_wgrad)
        return [(first, second) for first, second in times]

    def _stolen(self) -> list[tuple[int, int]]:
        """Of each rank's core, by its copies of level 1, and by those of levels 2 and 3."""
        costs, times = self.costs, [[0, 0] for _ in self.counts]
        push = costs.row_push_backward if self.backward else costs.row_push
        back = costs.row_return_backward if self.backward else costs.row_return
        for move in self.moves:
            times[move.owner_rank][0] += move.num_rows * push + costs.weight_push + 2 * costs.copy
            times[move.dst_rank][1] += move.num_rows * back + costs.copy
            if self.backward:
                times[move.dst_rank][1] += costs.grad_push + costs.copy
        return [(first * costs.shares_core, then * costs.shares_core) for first, then in times]

    def _compute(
        self, arrived: list[int], kept: list[int], received: list[tuple[int, int]]
    ) -> list[_Work]:
        """What each rank's GEMMs do, and when."""
        per_row = self.costs.row_return_backward if self.backward else self.costs.row_return
        returning, stolen = rows_on_the_way_back(len(kept), self.moves), self._stolen()
        works = []
        for rank, work in enumerate(kept):
            rows_out, rows_in = returning[rank]
            kept_b = min(work, max(rows_out * per_row, self._inbound(rows_in * per_row)))
            kept_a = work - kept_b + min(work, stolen[rank][0])
            computed = max(kept_a, arrived[rank]) + received[rank][0]
            wgrad = computed + received[rank][1]
            # At most what is left to compute: an idle core loses nothing. (Kept B is whole experts,
            # and longer than the way back, so all of what is kept may count as left.)
            lost = min(work + received[rank][1], stolen[rank][1])
            works.append(_Work(kept_a, computed, wgrad, wgrad + kept_b + lost))
        return works

    def _late(
        self, computed: list[int], received: list[tuple[int, int]], ends: list[int]
    ) -> list[int]:
        """Level 3: weight grads arrive in the late window; an owner adds all of them behind it."""
        costs = self.costs
        arrived, adding = [0] * len(ends), [0] * len(ends)
        for move in self.moves:
            owner, helper = move.owner_rank, move.dst_rank
            at = self._copy(helper, computed[helper] + received[helper][1], costs.grad_push)
            arrived[owner] = max(arrived[owner], at)
            adding[owner] += costs.grad_add
        return [
            max(end, at - costs.late_window) + adds
            for end, at, adds in zip(ends, arrived, adding, strict=True)
        ]
