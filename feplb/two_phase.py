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

Backward is the same with grad rows, then adds level 3: weight grads of received rows go home and are
added late, in the backward of ``prepare_weights`` (or here, where it was left out).

What backward needs goes through ``save_for_backward``, the plan too (a tensor): a non-reentrant
checkpoint recomputes inside the first read of ``saved_tensors`` and keeps the context's other
attributes from the first forward. So backward reads ``saved_tensors`` before it publishes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .compute import ExpertCompute, Saved, Segment

if TYPE_CHECKING:
    from .balancer import Balancer
    from .config import LayerSpec

KIND_FORWARD, KIND_BACKWARD, KIND_CHECK = 1, 2, 3
NO_MOVES = np.zeros((0, 5), dtype=np.int32)

# GradBits of csrc/count_board.h.
_GRAD_MODE, _NEEDS_KNOWN, _NEEDS_ROWS, _NEEDS_SIDE, _NEEDS_WEIGHT = 1, 2, 4, 3, 11


@dataclass(frozen=True)
class RoutedMove:
    """One move as this rank sees it.

    ``peer_rank`` is the helper of a sent move and the owner of a received one; ``arena_row`` is the
    first row in this rank's return half (sent) or rows half (received); ``slot`` is this rank's grad
    slot (sent) or weight slot (received).
    """

    expert_idx: int
    peer_rank: int
    row_start: int
    row_end: int
    arena_row: int
    slot: int

    @property
    def num_rows(self) -> int:
        """Rows of this move."""
        return self.row_end - self.row_start


@dataclass(frozen=True)
class Agreement:
    """What all ranks derived for one call: the plan, and this rank's part in it."""

    moves: np.ndarray  # [num_moves, 5] int32
    plan_hash: int
    sent: tuple[RoutedMove, ...]
    received: tuple[RoutedMove, ...]
    counts: np.ndarray  # [num_ranks * E] int32, empty in backward
    plan_us: float


@dataclass(frozen=True)
class WeightLayout:
    """How one call's weights, flattened for autograd, belong to tensors and experts.

    Per tensor of an expert the flat list holds either one stacked tensor [E, *S] or E tensors [*S].
    The layout holds no tensor, so that keeping it keeps no weight alive.
    """

    stacked: tuple[bool, ...]
    num_local_experts: int

    def per_tensor(self, flat: Sequence[Any]) -> list[Any]:
        """``flat`` -> per tensor t something indexable by expert (or the one entry if stacked)."""
        views: list[Any] = []
        at = 0
        for is_stacked in self.stacked:
            width = 1 if is_stacked else self.num_local_experts
            views.append(flat[at] if is_stacked else list(flat[at : at + width]))
            at += width
        return views

    def needs_grad(self, flat: Sequence[Tensor]) -> tuple[bool, ...]:
        """Per tensor of an expert: do its weights take gradients?"""
        views = self.per_tensor([w.requires_grad for w in flat])
        return tuple(v if isinstance(v, bool) else any(v) for v in views)


def flatten_weights(
    weights: Sequence[Tensor | Sequence[Tensor]], num_local_experts: int
) -> tuple[WeightLayout, tuple[Tensor, ...]]:
    """``weights``, per tensor stacked [E, *S] or E tensors [*S], as (layout, flat tensors)."""
    flat: list[Tensor] = []
    stacked: list[bool] = []
    for entry in weights:
        is_stacked = isinstance(entry, Tensor)
        stacked.append(is_stacked)
        flat.extend([entry] if is_stacked else entry)
    return WeightLayout(tuple(stacked), num_local_experts), tuple(flat)


@dataclass(frozen=True)
class CallBits:
    """Which inputs of a call need gradients; every rank must say the same."""

    grad_mode: bool
    rows: bool
    row_data: tuple[bool, ...]
    weights: tuple[bool, ...]

    def packed(self) -> int:
        """As the header carries it."""
        bits = _NEEDS_KNOWN | (_GRAD_MODE if self.grad_mode else 0)
        if not self.grad_mode:
            return bits
        bits |= _NEEDS_ROWS if self.rows else 0
        bits |= sum(1 << (_NEEDS_SIDE + i) for i, need in enumerate(self.row_data) if need)
        return bits | sum(1 << (_NEEDS_WEIGHT + i) for i, need in enumerate(self.weights) if need)


@dataclass
class LateGrads:
    """Weight grads of one backward call that are still on their way home.

    Lives between ``run_experts``'s backward, which fills it, and ``prepare_weights``'s backward,
    which empties it. If another backward call begins first, ``take`` copies the grads out of the
    arena, so that their slots can be used again.
    """

    seq: int
    layer: int
    sent: tuple[RoutedMove, ...]
    weights: WeightLayout
    sinks: Any
    tensors: tuple[int, ...]  # which tensors of an expert have grads
    placed: tuple[bool, ...]  # per sent move: the owner computed no row of the expert
    grads: list[Tensor | None]  # what run_experts's backward returned, flat
    private: list[dict[int, Tensor]] | None = None  # per sent move, once taken

    def take(self, balancer: Balancer) -> None:
        """Wait for the grads and copy them out of the arena. Blocks until the deadline."""
        if self.private is None:
            views = balancer.await_grads(self)
            self.private = [{t: view[t].clone() for t in self.tensors} for view in views]
            balancer.release_grads(self)

    def add_to(self, balancer: Balancer, grads: list[Tensor | None]) -> None:
        """Put every grad where it belongs: place it, or add it, in the plan's order."""
        views = self.private if self.private is not None else balancer.await_grads(self)
        targets = self.weights.per_tensor(grads)
        for move, place, view in zip(self.sent, self.placed, views, strict=True):
            for t in self.tensors:
                if self.sinks is not None:
                    self.sinks[t][move.expert_idx].add_(view[t])
                elif place and targets[t] is not None:
                    targets[t][move.expert_idx].copy_(view[t])
                elif targets[t] is not None:
                    targets[t][move.expert_idx].add_(view[t])
        if self.private is None:
            balancer.release_grads(self)


@dataclass
class LateNode:
    """The link between one ``prepare_weights`` and the one ``run_experts`` that uses its outputs."""

    used: bool = False
    pending: LateGrads | None = None


@dataclass
class ForwardCall:
    """Everything of one call that is not a tensor; kept by the context for backward."""

    balancer: Balancer
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


# ------------------------------------------------------------------------------------ segments


def first_rows(counts: Sequence[int]) -> list[int]:
    """Where each expert's rows begin: counts [3, 0, 2] -> [0, 3, 3]."""
    starts, end = [], 0
    for count in counts:
        starts.append(end)
        end += count
    return starts


def kept_segments(counts: Sequence[int], sent: Sequence[RoutedMove]) -> list[Segment]:
    """Row ranges this rank computes itself, by expert: what no sent move took.

    Example: counts [3, 4] with rows [0, 4) of expert 1 sent -> [(0, 3, 0)].
    """
    taken: dict[int, list[tuple[int, int]]] = {}
    for move in sent:
        taken.setdefault(move.expert_idx, []).append((move.row_start, move.row_end))
    segments: list[Segment] = []
    for expert, first in enumerate(first_rows(counts)):
        at = 0
        for start, end in sorted(taken.get(expert, [])):
            if start > at:
                segments.append((first + at, first + start, expert))
            at = end
        if counts[expert] > at:
            segments.append((first + at, first + counts[expert], expert))
    return segments


def split_kept(segments: list[Segment], rows_in_b: int) -> tuple[list[Segment], list[Segment]]:
    """Kept A and kept B: B is the shortest suffix of whole segments with at least rows_in_b rows."""
    at, rows = len(segments), 0
    while at > 0 and rows < rows_in_b:
        at -= 1
        rows += segments[at][1] - segments[at][0]
    return segments[:at], segments[at:]


# ------------------------------------------------------------------------- the plan as a tensor

_PLAN_HEAD = 7  # hash high, hash low, micro-batch, kept A segments, saved tensors of A, received, B


def _pack_plan(agreement: Agreement, micro_batch: int, num_kept_a: int, saved: list[Saved]) -> Tensor:
    """[head | moves, five each] int64. Saved by every rank in grad mode, so never empty."""
    head = [
        agreement.plan_hash >> 32,
        agreement.plan_hash & 0xFFFFFFFF,
        micro_batch,
        num_kept_a,
        *(len(part.tensors) for part in saved),
    ]
    return torch.tensor(head + agreement.moves.reshape(-1).tolist(), dtype=torch.int64)


@dataclass(frozen=True)
class _SavedCall:
    """What backward read back from ``saved_tensors``."""

    plan_hash: int
    micro_batch: int
    num_kept_a: int
    moves: np.ndarray
    rows: Tensor
    row_data: tuple[Tensor, ...]
    weights: tuple[Tensor, ...]
    saved: tuple[Saved, Saved, Saved]


def _unpack(call: ForwardCall, tensors: Sequence[Tensor]) -> _SavedCall:
    packed = tensors[0].tolist()
    at = 2 + len(call.spec.row_data)
    num_weights = len(tensors) - at - sum(packed[4:_PLAN_HEAD])
    parts, rest = [], tensors[at + num_weights :]
    for size, state in zip(packed[4:_PLAN_HEAD], call.states, strict=True):
        parts.append(Saved(tuple(rest[:size]), state))
        rest = rest[size:]
    return _SavedCall(
        plan_hash=packed[0] << 32 | packed[1],
        micro_batch=packed[2],
        num_kept_a=packed[3],
        moves=np.asarray(packed[_PLAN_HEAD:], dtype=np.int32).reshape(-1, 5),
        rows=tensors[1],
        row_data=tuple(tensors[2:at]),
        weights=tuple(tensors[at : at + num_weights]),
        saved=(parts[0], parts[1], parts[2]),
    )


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
        call, core = self.call, self.call.balancer.core
        if not call.begun:
            call.balancer.publish_forward(call)
        agreement = call.balancer.wait_plan(call.layer, call.counts)
        with call.balancer.failing_all(call.layer, call.micro_batch, "forward"):
            call.balancer.post_rows(
                [self.rows, *self.row_data], self.weights, agreement.sent, call.counts
            )
            kept = kept_segments(call.counts, agreement.sent)
            kept_a, kept_b = split_kept(kept, call.balancer.rows_in_kept_b(call.spec, agreement))
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
        return self.out, _pack_plan(agreement, call.micro_batch, len(kept_a), self.saved)

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
        views = self.call.balancer.received_views(self.call.layer, KIND_FORWARD, agreement.received)
        self.saved.append(
            self.call.compute.forward(
                views.rows[0], views.rows[1:], views.segments, views.weights,
                out=views.outbox[0], save=self.call.bits.grad_mode,
            )
        )  # fmt: skip

    def _place(self, agreement: Agreement) -> None:
        if agreement.sent:
            self.call.balancer.place_returns(
                self.call.layer, KIND_FORWARD, agreement.sent, self.call.counts, [self.out]
            )


class _RunExperts(torch.autograd.Function):
    """``run_experts`` for autograd: one node per call, joined by every rank in grad mode."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, call: ForwardCall, rows: Tensor, *rest: Tensor) -> Tensor:
        del anchor  # its only use is to make this node exist on every rank
        with call.balancer.own_precision():
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
        saved = _unpack(call, ctx.saved_tensors)
        with call.balancer.one_caller("backward"), call.balancer.own_precision():
            step = _BackwardPass(call, saved, grad_out.contiguous())
            step.run()
        return (None, None, step.grad_rows, *step.grad_row_data, *step.finish_weights())


# ------------------------------------------------------------------------------------- backward


class _BackwardPass:
    """One backward call on one rank."""

    def __init__(self, call: ForwardCall, saved: _SavedCall, grad_out: Tensor) -> None:
        self.call = call
        self.saved = saved
        self.grad_out = grad_out
        self.weights = call.weights.per_tensor(saved.weights)
        self.grad_rows: Tensor | None = torch.empty_like(saved.rows)
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
        call, core = self.call, self.call.balancer.core
        call.balancer.take_unconsumed()
        self.seq = call.balancer.publish_backward(call, self.saved.plan_hash, self.saved.moves)
        agreement = call.balancer.wait_plan(call.layer, call.counts)
        self.sent = agreement.sent
        with call.balancer.failing_all(call.layer, self.saved.micro_batch, "backward"):
            sources = [self.grad_out, self.saved.rows, *self.saved.row_data]
            call.balancer.post_rows(sources, self.weights, agreement.sent, call.counts)
            kept = kept_segments(call.counts, agreement.sent)
            kept_a, kept_b = kept[: self.saved.num_kept_a], kept[self.saved.num_kept_a :]
            self._kept(kept_a, self.saved.saved[0])
            core.await_rows()
            self._received(agreement)
            self._kept(kept_b, self.saved.saved[2])
            core.await_returns()
            if agreement.sent:
                targets = [self.grad_rows, *self.grad_row_data]
                call.balancer.place_returns(
                    call.layer, KIND_BACKWARD, agreement.sent, call.counts, targets
                )
            core.release_returns()
            core.finish()
        self._zero_untouched(kept)

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
        call, core = self.call, self.call.balancer.core
        if not agreement.received:
            core.post_returns()
            core.post_grads([])
            return
        views = call.balancer.received_views(call.layer, KIND_BACKWARD, agreement.received)
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

    def _zero_untouched(self, kept: list[Segment]) -> None:
        """Experts this rank computed no row of have zero grads, not garbage."""
        computed = {expert for _, _, expert in kept}
        grads = self.call.weights.per_tensor(self.flat_grads)
        for t in self.tensors:
            for expert in range(self.call.spec.num_local_experts):
                if expert not in computed:
                    grads[t][expert].zero_()

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
                sent=self.sent,
                weights=call.weights,
                sinks=call.grad_sinks,
                tensors=self.tensors,
                placed=tuple(move.expert_idx not in kept for move in self.sent),
                grads=self.flat_grads,
            )
            if call.late is not None:
                call.balancer.announce(call.late, late)
            else:
                late.add_to(call.balancer, self.flat_grads)
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


# ------------------------------------------------------------------------------ prepare_weights


class _PrepareWeights(torch.autograd.Function):
    """Identity whose backward adds the late weight grads of this layer."""

    @staticmethod
    def forward(ctx: Any, balancer: Balancer, late: LateNode, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.balancer = balancer
        ctx.late = late
        ctx.set_materialize_grads(False)
        return tuple(weight.view_as(weight) for weight in weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        late: LateNode = ctx.late
        pending, late.pending = late.pending, None
        if pending is None:
            return (None, None, *grads)
        results: list[Tensor | None] = []
        foreign = False
        for grad, own in zip(grads, pending.grads, strict=True):
            is_own = grad is not None and own is not None and grad.data_ptr() == own.data_ptr()
            foreign |= grad is not None and not is_own
            results.append(grad if is_own or grad is None else grad.clone())
        if foreign:  # the weights have other uses: what stands there is not zero, so add
            pending = dataclasses.replace(pending, placed=(False,) * len(pending.placed))
        pending.add_to(ctx.balancer, results)
        ctx.balancer.forget(late)
        return (None, None, *results)


def prepare_weights(balancer: Balancer, weights: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Identity on ``weights``, marked so that ``run_experts`` finds its late node."""
    late = LateNode()
    prepared: tuple[Tensor, ...] = _PrepareWeights.apply(balancer, late, *weights)
    if any(weight.requires_grad for weight in prepared):
        for weight in prepared:
            weight._feplb_late = late  # type: ignore[attr-defined]
    return prepared


def late_node_of(weights: Sequence[Tensor]) -> LateNode | None:
    """The late node these weights were prepared with, if no other call uses it."""
    late: LateNode | None = getattr(weights[0], "_feplb_late", None)
    if late is None or late.used:
        return None
    late.used = True
    return late


# ------------------------------------------------------------------------- without any balancer


class _LocalExperts(torch.autograd.Function):
    """The same compute with no domain around it: what a model runs before feplb is turned on."""

    @staticmethod
    def forward(
        ctx: Any, compute: ExpertCompute, counts: list[int], layout: WeightLayout, num_row_data: int,
        grad_mode: bool, rows: Tensor, *rest: Tensor,
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
            torch.zeros_like(w) if needs[6 + num_row_data + i] else None for i, w in enumerate(flat)
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
