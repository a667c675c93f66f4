"""One rank's calls on one device, in feplb's order; for bench/layer_emulated.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from emulation import RankWork
from torch import Tensor

from feplb.compute import ExpertCompute, Saved, Segment
from feplb.scheduler.machines import GLM5, ExpertShape
from feplb.scheduler.simulate import PAPER_SLOTS

LEVEL_1, LEVEL_2 = 0, 1  # flags of one call


@dataclass(frozen=True)
class Size:
    """expert: of the layer; num_experts: over all ranks."""

    expert: ExpertShape = GLM5
    num_experts: int = 128
    num_tokens: int = 4096
    ep: int = 8
    steps: int = 5
    repeats: int = 3
    seed: int = 2000
    dtype: torch.dtype = torch.bfloat16
    device: str = "cuda"


class CallClock(Protocol):
    """Times one call of one rank, from begin() on; and holds it up until copies would be there."""

    def begin(self, arrives_ms: list[float]) -> None:
        """arrives_ms: when each flag is released."""
        ...

    def wait(self, flag: int) -> None: ...

    def mark(self) -> None:
        """A point whose time is wanted."""
        ...

    def copy_beside(self, num_bytes: int) -> None:
        """From here on as many bytes travel beside the kernels, if the bench wants it."""
        ...

    def read(self) -> list[float]:
        """Milliseconds of all marks since begin(); waits."""
        ...


class RankBuffers:
    """Everything that one rank's calls read and write; values do not matter, only sizes."""

    def __init__(self, size: Size, most_rows: int, most_received: int) -> None:
        expert = size.expert
        generator = torch.Generator(size.device).manual_seed(size.seed)

        def randn(*shape: int) -> Tensor:
            made = torch.empty(*shape, dtype=size.dtype, device=size.device)
            return made.normal_(generator=generator)

        shapes = (2 * expert.ffn_hidden, expert.hidden), (expert.hidden, expert.ffn_hidden)
        local = size.num_experts // size.ep

        def weights(count: int) -> list[list[Tensor]]:
            return [list(randn(count, *shape).mul_(shape[1] ** -0.5)) for shape in shapes]

        def grads(count: int) -> list[list[Tensor]]:
            return [list(torch.zeros(count, *s, device=size.device)) for s in shapes]

        self.own = _Rows(randn, most_rows, expert.hidden, weights(local), grads(local))
        self.others = _Rows(
            randn, max(1, most_received), expert.hidden, weights(PAPER_SLOTS), grads(PAPER_SLOTS)
        )
        self.returns = torch.empty_like(self.own.rows)


class _Rows:
    """rows, their outputs, the gradients of both, and the weights they meet."""

    def __init__(
        self, randn: Callable[..., Tensor], count: int, hidden: int,
        weights: list[list[Tensor]], grad_weights: list[list[Tensor]],
    ) -> None:  # fmt: skip
        self.rows, self.grad_out = randn(count, hidden), randn(count, hidden)
        self.out, self.grad_rows = torch.empty_like(self.rows), torch.empty_like(self.rows)
        self.weights, self.grad_weights = weights, grad_weights


class RankRunner:
    """Runs one rank's call in feplb's order."""

    def __init__(self, compute: ExpertCompute, buffers: RankBuffers, clock: CallClock) -> None:
        self._compute, self._buffers, self._clock = compute, buffers, clock

    def forward(self, work: RankWork, arrives_ms: list[float]) -> list[float]:
        """[received computed, all done], milliseconds."""
        clock, own, others = self._clock, self._buffers.own, self._buffers.others
        clock.begin(arrives_ms)
        clock.copy_beside(work.pushed_bytes)
        self._forward(own, work.kept_a, save=True)
        clock.wait(LEVEL_1)
        self._forward(others, work.received, save=True)
        clock.mark()
        clock.copy_beside(work.returned_bytes)
        self._forward(own, work.kept_b, save=True)
        clock.wait(LEVEL_2)
        self._place(work, own.out)
        clock.mark()
        return clock.read()

    def backward(self, work: RankWork, arrives_ms: list[float]) -> list[float]:
        """[received rows' grads computed, their weight grads too, all done], milliseconds."""
        clock, own, others = self._clock, self._buffers.own, self._buffers.others
        parts = ((own, work.kept_a), (others, work.received), (own, work.kept_b))
        saved = [self._forward(rows, segments, save=True) for rows, segments in parts]
        clock.begin(arrives_ms)
        clock.copy_beside(work.pushed_backward_bytes)
        self._backward_weights(
            own, work.kept_a, saved[0], self._backward_rows(own, work.kept_a, saved[0])
        )
        clock.wait(LEVEL_1)
        carry = self._backward_rows(others, work.received, saved[1])
        clock.mark()
        clock.copy_beside(work.returned_bytes)
        self._backward_weights(others, work.received, saved[1], carry)
        clock.mark()
        clock.copy_beside(work.grad_bytes)
        self._backward_weights(
            own, work.kept_b, saved[2], self._backward_rows(own, work.kept_b, saved[2])
        )
        clock.wait(LEVEL_2)
        self._place(work, own.grad_rows)
        clock.mark()
        return clock.read()

    def add_grads(self) -> list[float]:
        """[the weight grads of one expert added at home], milliseconds."""
        own, others = self._buffers.own.grad_weights, self._buffers.others.grad_weights
        self._clock.begin([0.0, 0.0])
        for tensor in range(len(own)):
            own[tensor][0].add_(others[tensor][0])
        self._clock.mark()
        return self._clock.read()

    def _forward(self, rows: _Rows, segments: Sequence[Segment], *, save: bool) -> Saved:
        if not segments:
            return Saved(())
        return self._compute.forward(rows.rows, [], segments, rows.weights, out=rows.out, save=save)

    def _backward_rows(self, rows: _Rows, segments: Sequence[Segment], saved: Saved) -> Any:
        if not segments:
            return ()
        return self._compute.backward_rows(
            rows.grad_out, rows.rows, [], segments, rows.weights, saved,
            grad_rows=rows.grad_rows, grad_row_data=[],
        )  # fmt: skip

    def _backward_weights(
        self, rows: _Rows, segments: Sequence[Segment], saved: Saved, carry: Any
    ) -> None:
        if segments:
            self._compute.backward_weights(
                rows.grad_out, rows.rows, [], segments, saved, carry,
                grad_weights=rows.grad_weights,
            )  # fmt: skip

    def _place(self, work: RankWork, target: Tensor) -> None:
        came = 0
        for start, end in work.returned:
            target[start:end].copy_(self._buffers.returns[came : came + end - start])
            came += end - start
