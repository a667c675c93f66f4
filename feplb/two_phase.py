"""The autograd functions: in which order copies, waits and GEMMs happen, forward and backward.

Legend: N rows on this rank, H hidden, E local experts.

One forward call on one rank, in this order (``core`` is the C++ Domain, whose methods wait without
the GIL until their deadline):

    begin, wait_plan           level 0, every rank's counts
    post_rows                  level 1: the mover pushes rows and weights of sent moves
    kept A                     GEMMs of rows that stay, while the pushes travel
    await_rows, received       GEMMs of rows that came, in the middle ...
    post_returns               level 2: ... so that their way back hides under
    kept B                     the rest of the rows that stay
    await_returns, place       outputs that come home

Backward is the same with grad rows, then adds level 3: weight grads of received rows go home and
are added late, in the backward of ``prepare_weights`` (or here, where it was left out).

What backward needs goes through ``save_for_backward``, the plan too (a tensor): a non-reentrant
checkpoint recomputes inside the first read of ``saved_tensors`` and keeps the context's other
attributes from the first forward. So backward reads ``saved_tensors`` before it publishes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .call import (
    KIND_BACKWARD,
    KIND_FORWARD,
    Agreement,
    CallBits,
    RoutedMove,
    SavedCall,
    WeightLayout,
    flatten_weights,
    kept_segments,
    pack_plan,
    split_kept,
    unpack_call,
)
from .compute import ExpertCompute, Saved, Segment
from .config import LayerSpec
from .domain_calls import DomainCalls
from .late_grads import LateGrads, LateNode


@dataclass
class ForwardCall:
    """Everything of one call that is not a tensor; kept by the context for backward."""

    domain: DomainCalls
    layer: int
    spec: LayerSpec
    compute: ExpertCompute
    counts: list[int]
    micro_batch: int
    begun: bool
    weights: WeightLayout
    bits: CallBits
    late: LateNode | None
    grad_sinks: Any
    states: list[Any] = field(default_factory=list)


# -------------------------------------------------------------------------------------- forward


class _ForwardPass:
    """One forward call on one rank, up to its last copy submitted."""

    def __init__(self, call: ForwardCall, rows: Tensor, rest: Sequence[Tensor]) -> None:
        num_row_data = len(call.spec.row_data)
        self.call = call
        self.rows = rows
        self.row_data = tuple(rest[:num_row_data])
        self.weights = call.weights.per_tensor(rest[num_row_data:])
        self.out = torch.empty_like(rows)
        self.saved: list[Saved] = []

    def run(self) -> tuple[Tensor, Tensor]:
        """Returns (out [N, H], the packed plan)."""
        call, core = self.call, self.call.domain.core
        if not call.begun:
            call.domain.refuse_capture(call.layer, call.micro_batch)
            call.domain.publish_forward(
                call.layer, call.micro_batch, call.bits.packed(), call.counts
            )
        agreement = call.domain.wait_plan(call.layer, call.counts)
        with call.domain.failing_all(call.layer, call.micro_batch, "forward"):
            call.domain.post_rows(
                [self.rows, *self.row_data], self.weights, agreement.sent, call.counts
            )
            kept = kept_segments(call.counts, agreement.sent)
            kept_a, kept_b = split_kept(kept, call.domain.rows_in_kept_b(call.spec, agreement))
            self._kept(kept_a)
            core.await_rows()
            self._received(agreement)
            core.release_weights()
            core.release_rows()
            core.post_returns()
            self._kept(kept_b)
            core.await_returns()
            self._place(agreement)
            core.release_returns()
            core.finish()
        # Kept A, received, kept B: the order in which they ran and were saved.
        return self.out, pack_plan(agreement, call.micro_batch, len(kept_a), self.saved)

    def _kept(self, segments: list[Segment]) -> None:
        self.saved.append(
            self.call.compute.forward(
                self.rows, self.row_data, segments, self.weights,
                out=self.out, save=self.call.bits.grad_mode,
            )
        )  # fmt: skip

    def _received(self, agreement: Agreement) -> None:
        if not agreement.received:
            self.saved.append(Saved(()))
            return
        views = self.call.domain.views.received(
            self.call.layer, KIND_FORWARD, agreement.seq, agreement.received
        )
        self.saved.append(
            self.call.compute.forward(
                views.rows[0], views.rows[1:], views.segments, views.weights,
                out=views.outbox[0], save=self.call.bits.grad_mode,
            )
        )  # fmt: skip

    def _place(self, agreement: Agreement) -> None:
        if agreement.sent:
            call = self.call
            call.domain.views.place_returns(
                call.layer, KIND_FORWARD, agreement.seq, agreement.sent, call.counts, [self.out]
            )


class _RunExperts(torch.autograd.Function):
    """``run_experts`` for autograd: one node per call, joined by every rank in grad mode."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, call: ForwardCall, rows: Tensor, *rest: Tensor) -> Tensor:
        del anchor  # its only use is to make this node exist on every rank
        with call.domain.own_precision():
            step = _ForwardPass(call, rows.detach(), [tensor.detach() for tensor in rest])
            out, packed = step.run()
        if call.bits.grad_mode:
            tensors = [t for part in step.saved for t in part.tensors]
            call.states = [part.state for part in step.saved]
            ctx.call = call
            ctx.save_for_backward(packed, rows, *rest, *tensors)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        call: ForwardCall = ctx.call
        # A checkpoint recomputes in here, which is a forward call of its own.
        saved = unpack_call(ctx.saved_tensors, call.states, len(call.spec.row_data))
        with call.domain.one_caller("backward"), call.domain.own_precision():
            step = _BackwardPass(call, saved, grad_out.contiguous())
            step.run()
        with call.domain.failing_all(call.layer, saved.micro_batch, "backward"):
            grad_weights = step.finish_weights()
        return (None, None, step.grad_rows, *step.grad_row_data, *grad_weights)


# ------------------------------------------------------------------------------------- backward


def _zero_untouched(grads: Sequence[Any], computed: Sequence[Segment], num_experts: int) -> None:
    """Experts this rank computed no row of have zero grads, not garbage; grads[t] None: none."""
    untouched = set(range(num_experts)) - {expert for _, _, expert in computed}
    for expert in untouched:
        for grad in grads:
            if grad is not None:
                grad[expert].zero_()


class _BackwardPass:
    """One backward call on one rank."""

    def __init__(self, call: ForwardCall, saved: SavedCall, grad_out: Tensor) -> None:
        self.call = call
        self.saved = saved
        self.grad_out = grad_out
        self.weights = call.weights.per_tensor(saved.weights)
        self.grad_rows = torch.empty_like(saved.rows)
        self.grad_row_data: list[Tensor | None] = [
            torch.empty_like(data) if need else None
            for data, need in zip(saved.row_data, call.bits.row_data, strict=True)
        ]
        self.flat_grads: list[Tensor | None] = self._empty_weight_grads()
        self.tensors = tuple(t for t, need in enumerate(call.bits.weights) if need)
        self.sent: tuple[RoutedMove, ...] = ()
        self.seq = 0

    def _empty_weight_grads(self) -> list[Tensor | None]:
        needs = self.call.weights.per_tensor(list(range(len(self.saved.weights))))
        grads: list[Tensor | None] = [None] * len(self.saved.weights)
        for need, at in zip(self.call.bits.weights, needs, strict=True):
            for i in [at] if isinstance(at, int) else at:
                grads[i] = torch.empty_like(self.saved.weights[i]) if need else None
        return grads

    def run(self) -> None:
        call, core = self.call, self.call.domain.core
        call.domain.refuse_capture(call.layer, call.micro_batch, KIND_BACKWARD)
        call.domain.take_unconsumed()
        call.domain.publish_backward(
            call.layer, call.micro_batch, call.bits.packed(), self.saved.plan_hash, self.saved.moves
        )
        agreement = call.domain.wait_plan(call.layer, call.counts)
        self.sent, self.seq = agreement.sent, agreement.seq
        with call.domain.failing_all(call.layer, self.saved.micro_batch, "backward"):
            sources = [self.grad_out, self.saved.rows, *self.saved.row_data]
            call.domain.post_rows(sources, self.weights, agreement.sent, call.counts)
            kept = kept_segments(call.counts, agreement.sent)
            kept_a, kept_b = kept[: self.saved.num_kept_a], kept[self.saved.num_kept_a :]
            self._kept(kept_a, self.saved.saved[0])
            core.await_rows()
            self._received(agreement)
            self._kept(kept_b, self.saved.saved[2])
            core.await_returns()
            if agreement.sent:
                targets: list[Tensor | None] = [self.grad_rows, *self.grad_row_data]
                call.domain.views.place_returns(
                    call.layer, KIND_BACKWARD, agreement.seq, agreement.sent, call.counts, targets
                )
            core.release_returns()
            core.finish()
        grads = call.weights.per_tensor(self.flat_grads)
        wanted = [grads[t] if t in self.tensors else None for t in range(len(grads))]
        _zero_untouched(wanted, kept, call.spec.num_local_experts)

    def _kept(self, segments: list[Segment], saved: Saved) -> None:
        if not segments:
            return
        call = self.call
        carry = call.compute.backward_rows(
            self.grad_out, self.saved.rows, self.saved.row_data, segments, self.weights, saved,
            grad_rows=self.grad_rows, grad_row_data=self.grad_row_data,
        )  # fmt: skip
        if self.tensors:
            call.compute.backward_weights(
                self.grad_out, self.saved.rows, self.saved.row_data, segments, saved, carry,
                grad_weights=call.weights.per_tensor(self.flat_grads),
            )  # fmt: skip

    def _received(self, agreement: Agreement) -> None:
        """dgrad of received rows, send it home; then their wgrad, send it home."""
        call, core = self.call, self.call.domain.core
        if not agreement.received:
            core.post_returns()
            core.post_grads([])
            return
        views = call.domain.views.received(
            call.layer, KIND_BACKWARD, agreement.seq, agreement.received
        )
        grad_out, rows, row_data = views.rows[0], views.rows[1], views.rows[2:]
        saved = self.saved.saved[1]
        wanted = [
            view if need else None
            for view, need in zip(views.outbox[1:], call.bits.row_data, strict=True)
        ]
        carry = call.compute.backward_rows(
            grad_out, rows, row_data, views.segments, views.weights, saved,
            grad_rows=views.outbox[0], grad_row_data=wanted,
        )  # fmt: skip
        core.release_weights()
        core.post_returns()
        if self.tensors:
            core.await_grad_outbox()
            grads = [g if t in self.tensors else None for t, g in enumerate(views.grad_outbox)]
            call.compute.backward_weights(
                grad_out, rows, row_data, views.segments, saved, carry, grad_weights=grads
            )
        core.release_rows()
        core.post_grads(list(self.tensors))

    def finish_weights(self) -> list[Tensor | None]:
        """The weight grads to return, complete or with the late ones announced to ``late``."""
        call = self.call
        if call.grad_sinks is not None:
            self._add_to_sinks()
        if self.sent and self.tensors:
            kept = {e for _, _, e in kept_segments(call.counts, self.sent)}
            late = LateGrads(
                seq=self.seq,
                layer=call.layer,
                micro_batch=self.saved.micro_batch,
                sent=self.sent,
                weights=call.weights,
                sinks=call.grad_sinks,
                tensors=self.tensors,
                placed=tuple(move.expert_idx not in kept for move in self.sent),
                grads=self.flat_grads,
            )
            if call.late is not None:
                if call.grad_sinks is not None and call.domain.adds_beside:
                    late.start(call.domain)
                call.late.pending = late
                call.domain.announce(call.late)
            else:
                late.add_to(call.domain, self.flat_grads)
        return self.flat_grads

    def _add_to_sinks(self) -> None:
        """Megatron's way: grads go into ``main_grad``, and autograd gets a dummy of zeros."""
        grads = self.call.weights.per_tensor(self.flat_grads)
        for t in self.tensors:
            for expert in range(self.call.spec.num_local_experts):
                self.call.grad_sinks[t][expert].add_(grads[t][expert])
        for grad in self.flat_grads:
            if grad is not None:
                grad.zero_()


def run_experts(
    call: ForwardCall, anchor: Tensor, rows: Tensor, row_data: Sequence[Tensor],
    flat_weights: Sequence[Tensor],
) -> Tensor:  # fmt: skip
    """Run one call through autograd; ``Balancer.run_experts`` has checked the arguments."""
    out: Tensor = _RunExperts.apply(anchor, call, rows, *row_data, *flat_weights)
    return out


# ------------------------------------------------------------------------- without any balancer


class _LocalExperts(torch.autograd.Function):
    """The same compute with no domain around it: what a model runs before feplb is turned on."""

    @staticmethod
    def forward(
        ctx: Any, compute: ExpertCompute, counts: list[int], layout: WeightLayout,
        num_row_data: int, grad_mode: bool, rows: Tensor, *rest: Tensor,
    ) -> Tensor:  # fmt: skip
        segments = kept_segments(counts, ())
        out = torch.empty_like(rows)
        row_data = tuple(d.detach() for d in rest[:num_row_data])
        views = layout.per_tensor([w.detach() for w in rest[num_row_data:]])
        with torch.autocast(rows.device.type, enabled=False):
            saved = compute.forward(
                rows.detach(), row_data, segments, views, out=out, save=grad_mode
            )
        ctx.save_for_backward(rows, *rest, *saved.tensors)
        ctx.num_saved = len(saved.tensors)
        ctx.call = (compute, segments, layout, num_row_data, saved.state)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Any, ...]:
        compute, segments, layout, num_row_data, state = ctx.call
        tensors = ctx.saved_tensors
        own = len(tensors) - ctx.num_saved
        rows, row_data = tensors[0], tensors[1 : 1 + num_row_data]
        flat, saved = tensors[1 + num_row_data : own], Saved(tuple(tensors[own:]), state)
        needs = ctx.needs_input_grad
        grad_rows = torch.empty_like(rows)
        grad_data = [torch.empty_like(d) if needs[6 + i] else None for i, d in enumerate(row_data)]
        grads = [
            torch.empty_like(w) if needs[6 + num_row_data + i] else None for i, w in enumerate(flat)
        ]
        views = [
            None if v is None or (isinstance(v, list) and v[0] is None) else v
            for v in layout.per_tensor(grads)
        ]
        grad_out = grad_out.contiguous()
        with torch.autocast(rows.device.type, enabled=False):
            carry = compute.backward_rows(
                grad_out, rows, row_data, segments, layout.per_tensor(flat), saved,
                grad_rows=grad_rows, grad_row_data=grad_data,
            )  # fmt: skip
            if any(v is not None for v in views):
                compute.backward_weights(
                    grad_out, rows, row_data, segments, saved, carry, grad_weights=views
                )
                _zero_untouched(views, segments, layout.num_local_experts)
        return (None, None, None, None, None, grad_rows, *grad_data, *grads)


def run_experts_locally(
    rows: Tensor,
    counts: Sequence[int],
    weights: Sequence[Tensor | Sequence[Tensor]],
    compute: ExpertCompute,
    row_data: Sequence[Tensor] = (),
) -> Tensor:
    """A layer's experts without any balancer, each on the rows it was dispatched.

    Args:
        rows: [N, H], sorted by local expert.
        counts: [E] host ints, rows per expert, adding up to N.
        weights: per tensor of an expert, stacked [E, *S] or E tensors [*S].
        compute: what an expert computes.
        row_data: side data of the rows, each [N, *D].
    Returns:
        [N, H], in the order of ``rows``.
    Raises:
        ValueError: counts do not add up to N.
    """
    if sum(counts) != rows.shape[0]:
        raise ValueError(f"counts add up to {sum(counts)}, expected the {rows.shape[0]} rows given")
    layout, flat = flatten_weights(weights, len(counts))
    out: Tensor = _LocalExperts.apply(
        compute, list(counts), layout, len(row_data), torch.is_grad_enabled(), rows,
        *row_data, *flat,
    )  # fmt: skip
    return out
