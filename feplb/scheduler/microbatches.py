"""Micro-batches to try policies on: of a named workload or of a recorded trace, one after another.

The calibrated workload and those that draw afresh at every step give independent micro-batches: the
calibrated one is another layer each time, so that no layer's own bias dominates a mean. Traces go
through their steps and their layers at once. The micro-batch before (what history has seen) is the
same layer's step before.
"""

from __future__ import annotations

from dataclasses import dataclass

from feplb.scheduler.named_workloads import WORKLOADS, make_by_source
from feplb.scheduler.shares import Rows
from feplb.scheduler.traces import Trace


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """What policies are given.

    Args:
        counts: [ep_size, num_local_experts], rows that each rank owns for each local expert.
        by_source: [ep_size, num_experts], selections that the tokens of each rank make, or None.
        previous: counts of the same layer's micro-batch before, or None.
    """

    counts: Rows
    by_source: Rows | None = None
    previous: Rows | None = None

    def domains(self, size: int) -> list[MicroBatch]:
        """The same rows, cut into domains of `size` ranks each.

        Rows that come from other domains enter through the rank of the same place, as a dispatch
        over nodes sends them.
        """
        ep_size, num_local_experts = self.counts.shape
        if size < 1 or ep_size % size:
            raise ValueError(f"domain={size}, expected a divisor of ep={ep_size}")
        if size == ep_size:
            return [self]
        return [self._cut(first, size, num_local_experts) for first in range(0, ep_size, size)]

    def _cut(self, first: int, size: int, num_local_experts: int) -> MicroBatch:
        ranks = slice(first, first + size)
        experts = slice(first * num_local_experts, (first + size) * num_local_experts)
        sources = None
        if self.by_source is not None:
            mine = self.by_source[:, experts]
            sources = mine.reshape(-1, size, mine.shape[1]).sum(axis=0)
        return MicroBatch(
            counts=self.counts[ranks],
            by_source=sources,
            previous=None if self.previous is None else self.previous[ranks],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where micro-batches come from; make() gives one.

    Args:
        workload: one of WORKLOADS.
        ep_size: ranks of the EP group; must divide the experts.
        seed: with the index, decides the counts.
        num_experts, top_k: 128 and 8 if left out, or the trace's.
        num_tokens: tokens per rank.
        trace: for the workloads that replay one.
    """

    workload: str
    ep_size: int
    seed: int = 0
    num_experts: int | None = None
    num_tokens: int = 4096
    top_k: int | None = None
    trace: Trace | None = None

    def make(self, index: int, *, history: bool = False) -> MicroBatch:
        """The micro-batch of this index, 0 or more; history: with the one before.

        Raises:
            ValueError: as make_counts().
        """
        step, layer = self._place(index)
        by_source = self._by_source(step, layer)
        previous = None
        if history and step > 0:
            previous = self._by_source(step - 1, layer).sum(axis=0).reshape(self.ep_size, -1)
        counts: Rows = by_source.sum(axis=0).reshape(self.ep_size, -1)
        return MicroBatch(counts=counts, by_source=by_source, previous=previous)

    def _place(self, index: int) -> tuple[int, int]:
        """(step, layer) of an index; from step 1 on, so that there is a step before."""
        if self.workload == "calibrated":
            return 1, index
        return index + 1, index % self.trace.num_layers if self.trace is not None else 0

    def _by_source(self, step: int, layer: int) -> Rows:
        return make_by_source(
            self.workload,
            self.ep_size,
            seed=self.seed,
            step=step,
            layer=layer,
            num_experts=self.num_experts,
            num_tokens=self.num_tokens,
            top_k=self.top_k,
            trace=self.trace,
        )


def without_trace() -> tuple[str, ...]:
    """Names of the workloads that need no file."""
    return tuple(name for name, workload in WORKLOADS.items() if not workload.needs_trace)
