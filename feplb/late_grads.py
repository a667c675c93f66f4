"""Weight grads that come home late: announced by run_experts, added by prepare_weights.

Awaiting them inside the layer's backward would leave a third to a half of backward's gain on the
table (modelled); deferred to the node that autograd runs after the dispatch's backward, they hide.
That order is never relied upon: a backward that finds an earlier call's grads unconsumed takes them
out of the arena first, and so do ``check()`` and ``close()``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from .call import RoutedMove, WeightLayout
from .domain_calls import DomainCalls


@dataclass
class LateGrads:
    """Weight grads of one backward call that are still on their way home.

    Lives between ``run_experts``'s backward, which fills it, and ``prepare_weights``'s backward,
    which empties it. If another backward call begins first, ``take`` copies the grads out of the
    arena, so that their slots can be used again.
    """

    seq: int
    layer: int
    micro_batch: int
    sent: tuple[RoutedMove, ...]
    weights: WeightLayout
    sinks: Any
    tensors: tuple[int, ...]  # which tensors of an expert have grads
    placed: tuple[bool, ...]  # per sent move: the owner computed no row of the expert
    grads: list[Tensor | None]  # what run_experts's backward returned, flat
    private: list[dict[int, Tensor]] | None = None  # per sent move, once taken
    started: bool = False  # their adds have been launched beside the compute stream

    def _await(self, domain: DomainCalls) -> list[dict[int, Tensor]]:
        return domain.await_grads(self.seq, self.layer, self.sent, self.tensors)

    def start(self, domain: DomainCalls) -> None:
        """Launch the adds beside the compute stream, into sinks that nobody else uses now.

        Into the grads themselves they could not go: autograd may add to those, for other uses of
        the weights, before ``prepare_weights``'s backward.
        """
        assert self.sinks is not None, "only sinks are this call's alone"
        with domain.beside():
            self.add_to(domain, self.grads)
        self.started = True

    def take(self, domain: DomainCalls) -> None:
        """Wait for the grads and copy them out of the arena. Blocks until the deadline."""
        if self.started:
            domain.join_beside()
        elif self.private is None:
            views = self._await(domain)
            self.private = [{t: view[t].clone() for t in self.tensors} for view in views]
            domain.release_grads(self.seq)

    def add_to(self, domain: DomainCalls, grads: list[Tensor | None]) -> None:
        """Put every grad where it belongs: place it, or add it, in the plan's order."""
        views = self.private if self.private is not None else self._await(domain)
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
            domain.release_grads(self.seq)


@dataclass
class LateNode:
    """The link between one ``prepare_weights`` and the ``run_experts`` that uses its outputs."""

    num_tensors: int
    used: bool = False
    pending: LateGrads | None = None

    def take(self, domain: DomainCalls) -> None:
        """Take grads that no backward has asked for yet out of the arena."""
        if self.pending is not None:
            self.pending.take(domain)


class _PrepareWeights(Function):
    """Identity whose backward adds the late weight grads of this layer."""

    @staticmethod
    def forward(
        ctx: Any, domain: DomainCalls, late: LateNode, *weights: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.domain = domain
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
        # Nobody would come back for these grads and release their slots: peers would wait for
        # those until the deadline.
        with ctx.domain.failing_all(pending.layer, pending.micro_batch, "backward"):
            results = _with_late(pending, ctx.domain, grads)
        ctx.domain.forget(late)
        return (None, None, *results)


def _with_late(
    pending: LateGrads, domain: DomainCalls, grads: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """What autograd brought for the prepared weights, and the late grads; blocks, see add_to."""
    if pending.started:
        domain.join_beside()
        return list(grads)
    results: list[Tensor | None] = []
    foreign = False
    for grad, own in zip(grads, pending.grads, strict=True):
        is_own = grad is not None and own is not None and grad.data_ptr() == own.data_ptr()
        foreign |= grad is not None and not is_own
        results.append(grad if is_own or grad is None else grad.clone())
    if foreign:  # the weights have other uses: what stands there is not zero, so add
        pending = dataclasses.replace(pending, placed=(False,) * len(pending.placed))
    pending.add_to(domain, results)
    return results


def prepare_weights(domain: DomainCalls, weights: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Identity on ``weights``, marked so that ``run_experts`` finds its late node."""
    late = LateNode(num_tensors=len(weights))
    prepared: tuple[Tensor, ...] = _PrepareWeights.apply(domain, late, *weights)
    if any(weight.requires_grad for weight in prepared):
        for weight in prepared:
            weight._feplb_late = late  # type: ignore[attr-defined]
    return prepared


def late_node_of(weights: Sequence[Tensor]) -> LateNode | None:
    """The late node these weights were prepared with, if no other call uses it."""
    late: LateNode | None = getattr(weights[0], "_feplb_late", None)
    if late is None or late.used or late.num_tensors != len(weights):
        return None
    if any(getattr(weight, "_feplb_late", None) is not late for weight in weights):
        return None  # prepared apart, or only some of them: wait for the grads in the layer
    late.used = True
    return late
