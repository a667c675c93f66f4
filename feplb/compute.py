"""What an expert computes, as functions of rows and weights that feplb may place anywhere.

two_phase.py calls these on the thread that runs forward or backward, once for the kept and once
for the received experts of a call. Helpers run weights that are not their parameters, out of arena
memory that is overwritten after the call; so nothing here keeps rows, weights or a view of them.
Every operation runs per segment, on layouts that depend only on the segment's shape: an expert
gives the same bits wherever it is computed.

N rows of one call, n rows of one segment, H hidden, F width inside the expert, S_t shape of the
t-th tensor of an expert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

__all__ = ["ExpertCompute", "Saved", "Segment", "SwiGLU", "Weights", "spans", "sum_into_weights"]

# (row start, row end, weight index). Example, 9 rows, 2 experts kept and rows 4..5 sent away:
#   [(0, 4, 0), (6, 9, 2)]   rows 0..3 run with weights[t][0], rows 6..8 with weights[t][2],
#   rows 4..5 are a hole: neither read nor written, and they cost nothing.
Segment = tuple[int, int, int]

# weights[t][weight_idx] is Tensor[*S_t]; a stacked Tensor[n, *S_t] serves as the inner sequence.
Weights = Sequence[Sequence[Tensor]]

GradWeights = Sequence[Sequence[Tensor] | None]

Part = TypeVar("Part")


@dataclass(frozen=True)
class Saved:
    """What forward leaves for backward.

    Args:
        tensors: go through save_for_backward, so checkpoint and offload hooks see them; backward
            may get those of a recompute. Never rows, row_data, weights, or views of them.
        state: holds no tensor data; stays on the context of the first forward.
    """

    tensors: tuple[Tensor, ...]
    state: object = None


class ExpertCompute(Protocol):
    """Forward, dgrad and wgrad of experts over segments of rows.

    Tensors passed in are read during the call only: ``rows``, ``row_data``, ``grad_out`` and
    ``weights`` may lie in shared memory that is overwritten after it.
    Thread/stream: runs on the caller's thread and current stream; waits for nothing.
    """

    def forward(
        self,
        rows: Tensor,
        row_data: Sequence[Tensor],
        segments: Sequence[Segment],
        weights: Weights,
        *,
        out: Tensor,
        save: bool,
    ) -> Saved:
        """Compute the output rows of every segment.

        Args:
            rows: [N, H] contiguous, any address that is a multiple of 16 bytes.
            row_data: per-row side data, each [N, ...].
            segments: what to compute; an empty segment computes nothing.
            weights: weights[t][weight_idx], contiguous [*S_t].
            out: [N, H]; ``out[start:end]`` is written for each segment, holes are not touched.
            save: False under no_grad.
        Returns:
            What backward needs; ``Saved(())`` where ``save`` is False.
        """
        ...

    def backward_rows(
        self,
        grad_out: Tensor,
        rows: Tensor,
        row_data: Sequence[Tensor],
        segments: Sequence[Segment],
        weights: Weights,
        saved: Saved,
        *,
        grad_rows: Tensor,
        grad_row_data: Sequence[Tensor | None],
    ) -> tuple[Tensor, ...]:
        """Compute the gradients of rows and row_data (dgrad).

        May be called again with the same ``saved`` (retain_graph).

        Args:
            grad_out: [N, H] contiguous, gradient of ``out``.
            rows, row_data, segments, weights: the values forward had, at any address.
            saved: ``tensors`` of this or of a recomputed forward, ``state`` of the first.
            grad_rows: [N, H]; ``grad_rows[start:end]`` is written, holes are not touched.
            grad_row_data: one per row_data entry, same shape; None = not wanted.
        Returns:
            The carry for ``backward_weights`` of the same call. It holds no view of weights.
        """
        ...

    def backward_weights(
        self,
        grad_out: Tensor,
        rows: Tensor,
        row_data: Sequence[Tensor],
        segments: Sequence[Segment],
        saved: Saved,
        carry: tuple[Tensor, ...],
        *,
        grad_weights: GradWeights,
    ) -> None:
        """Compute the gradients of the weights (wgrad), after the weights themselves are gone.

        Args:
            grad_out, rows, row_data, segments, saved: as ``backward_rows`` had them.
            carry: what ``backward_rows`` of this call returned.
            grad_weights: grad_weights[t][weight_idx] is overwritten for every weight index that a
                segment names: with the sum over its segments, in their order, or with zeros if
                all of them are empty. grad_weights[t] None = not wanted.
        """
        ...


def spans(segments: Sequence[Segment]) -> Iterator[tuple[slice, slice, int]]:
    """Of each segment with rows: its rows, its rows where holes are left out, its weight index."""
    at = 0
    for start, end, weight_idx in segments:
        if end > start:
            yield slice(start, end), slice(at, at + end - start), weight_idx
            at += end - start


def sum_into_weights(
    segments: Sequence[Segment],
    grad_weights: Sequence[Tensor],
    parts: Sequence[Part],
    write: Callable[[Part, Tensor], object],
) -> None:
    """Write parts[k], of the k-th segment with rows, to its weight index; sum where one recurs.

    The first part is placed, not added to zero: -0.0 stays -0.0.
    """
    written: set[int] = set()
    for part, (_, _, weight_idx) in zip(parts, spans(segments), strict=True):
        target = grad_weights[weight_idx]
        if weight_idx in written:
            more = torch.empty_like(target)
            write(part, more)
            target.add_(more)
        else:
            write(part, target)
            written.add(weight_idx)
    for weight_idx in {segment[2] for segment in segments} - written:
        grad_weights[weight_idx].zero_()


def _mm(a: Tensor, b: Tensor, out: Tensor) -> None:
    """Write a @ b to ``out`` with bits that do not depend on addresses (multiples of 16 bytes).

    One row goes through a fresh buffer, which is 64-byte aligned: MKL cuts the columns of a
    one-row a @ b among threads by the address of ``out``, and then sums in another order.
    Measured with torch 2.13, MKL 2024.2, AVX512, 1 to 8 threads, fp32, fp64 and bf16: no other
    case of the six products of SwiGLU depends on an address.
    ``out=`` also keeps autocast away.
    """
    if out.shape[0] == 1 or out.dtype != a.dtype:
        out.copy_(torch.mm(a, b, out=torch.empty(out.shape, dtype=a.dtype, device=a.device)))
    else:
        torch.mm(a, b, out=out)


# SwiGLU. Of each row x, with w1 = [w1g; w1u] and p = 1 where there are no probabilities:
#   h = [g | u] = x w1^T     s = silu(g)     a = s * u * p     y = a w2^T
# Given dy, with sig = sigmoid(g), silu'(g) = sig * (1 + g * (1 - sig)), by the chain rule:
#   dap = dy w2     dp = sum over F of dap * (s * u)     da = dap * p
#   dh = [da * u * silu'(g) | da * s]     dx = dh w1     dw1 = dh^T x     dw2 = dy^T a
# Saved is h alone: s and a cost two elementwise passes again, to keep them F more per row.
# g and u are halves of h, strided by 2F, so the vector loops run row by row over F.


class SwiGLU(ExpertCompute):
    """y = (silu(x @ w1g^T) * (x @ w1u^T) * p) @ w2^T, in fp32, bf16 or fp64.

    Weights of an expert: w1 [2F, H], the F gate rows first, then the F up rows; w2 [H, F].
    Row data: none, or one floating tensor [N] or [N, 1], the router probability p, multiplied
    onto the activation before w2 as Megatron does. It may have a wider dtype than the rows: the
    product is then computed in it and rounded to the dtype of the rows.
    ``saved.tensors`` is one tensor [rows in segments, 2F]. grad_weights may have another dtype
    than the rows: a product is then computed in that of the rows and converted.

    Raises:
        ValueError: shapes or dtypes of weights or row_data do not fit the rows.
        RuntimeError: ``saved`` does not belong to ``segments``.
    """

    @torch.no_grad()
    def forward(
        self,
        rows: Tensor,
        row_data: Sequence[Tensor],
        segments: Sequence[Segment],
        weights: Weights,
        *,
        out: Tensor,
        save: bool,
    ) -> Saved:
        """Compute the output rows of every segment; see ExpertCompute."""
        probs = swiglu_probabilities(rows, row_data)
        width, total, largest = swiglu_sizes(rows, segments, weights)
        h = rows.new_empty(total if save else largest, 2 * width)
        scratch = rows.new_empty(largest, width)
        for span, packed, weight_idx in spans(segments):
            n = span.stop - span.start
            h_e = h[packed] if save else h[:n]
            _mm(rows[span], weights[0][weight_idx].t(), h_e)
            act = torch.ops.aten.silu.out(h_e[:, :width], out=scratch[:n])
            act.mul_(h_e[:, width:])
            if probs is not None:
                act.mul_(probs[span])
            _mm(act, weights[1][weight_idx].t(), out[span])
        return Saved((h,)) if save else Saved(())

    @torch.no_grad()
    def backward_rows(
        self,
        grad_out: Tensor,
        rows: Tensor,
        row_data: Sequence[Tensor],
        segments: Sequence[Segment],
        weights: Weights,
        saved: Saved,
        *,
        grad_rows: Tensor,
        grad_row_data: Sequence[Tensor | None],
    ) -> tuple[Tensor, ...]:
        """Compute the gradients of rows and probabilities; the carry is dh, a per segment."""
        probs = swiglu_probabilities(rows, row_data)
        width, total, largest = swiglu_sizes(rows, segments, weights)
        h = saved.tensors[0]
        if h.shape != (total, 2 * width):
            raise RuntimeError(
                f"SwiGLU backward: saved activations are {tuple(h.shape)}, expected "
                f"{(total, 2 * width)} for these segments. They come from another forward."
            )
        carry: list[Tensor] = []
        scratch = rows.new_empty(2, largest, width)
        grad_probs = grad_row_data[0] if row_data else None
        for span, packed, weight_idx in spans(segments):
            n = span.stop - span.start
            da_s, dh, act = scratch[:, :n], h.new_empty(n, 2 * width), h.new_empty(n, width)
            _mm(grad_out[span], weights[1][weight_idx], da_s[0])
            probs_e = None if probs is None else probs[span]
            grad_probs_e = None if grad_probs is None else grad_probs[span]
            _backward_activation(h[packed], probs_e, da_s, act, dh, grad_probs_e)
            _mm(dh, weights[0][weight_idx], grad_rows[span])
            carry += [dh, act]
        return tuple(carry)

    @torch.no_grad()
    def backward_weights(
        self,
        grad_out: Tensor,
        rows: Tensor,
        row_data: Sequence[Tensor],
        segments: Sequence[Segment],
        saved: Saved,
        carry: tuple[Tensor, ...],
        *,
        grad_weights: GradWeights,
    ) -> None:
        """Write dw1 = dh^T x and dw2 = dy^T a; see ExpertCompute."""
        taken = [span for span, _, _ in spans(segments)]
        w1 = [(dh.t(), rows[span]) for dh, span in zip(carry[::2], taken, strict=True)]
        w2 = [(grad_out[span].t(), act) for act, span in zip(carry[1::2], taken, strict=True)]
        for targets, operands in zip(grad_weights, (w1, w2), strict=True):
            if targets is not None:
                sum_into_weights(segments, targets, operands, lambda ab, out: _mm(*ab, out))


def _backward_activation(
    h: Tensor,
    probs: Tensor | None,
    da_s: Tensor,
    act: Tensor,
    dh: Tensor,
    grad_probs: Tensor | None,
) -> None:
    """Fill act (= a), dh and grad_probs of one segment; da_s [2, n, F] holds dap, is scratch."""
    da, s = da_s
    gate, up = h.chunk(2, dim=1)
    grad_gate, grad_up = dh.chunk(2, dim=1)
    torch.ops.aten.silu.out(gate, out=s)
    torch.mul(s, up, out=act)
    if probs is not None:
        if grad_probs is not None:
            wide = torch.promote_types(act.dtype, probs.dtype)
            grad_probs.copy_((act.to(wide) * da).sum(dim=1).view(grad_probs.shape))
        act.mul_(probs)
        da.mul_(probs)
    torch.mul(da, s, out=grad_up)
    da.mul_(up)
    torch.ops.aten.silu_backward.grad_input(da, gate, grad_input=grad_gate)


def swiglu_probabilities(rows: Tensor, row_data: Sequence[Tensor]) -> Tensor | None:
    """The router probabilities as [N, 1], or None."""
    if not row_data:
        return None
    probs = row_data[0]
    n = rows.shape[0]
    fits = probs.is_floating_point() and probs.shape in ((n,), (n, 1))
    if len(row_data) > 1 or not fits:
        seen = ", ".join(f"{tuple(t.shape)} {t.dtype}" for t in row_data)
        raise ValueError(
            f"SwiGLU row_data: {seen}, expected nothing or one floating tensor "
            f"({n},) or ({n}, 1). Use as_compute() for other side data."
        )
    return probs.view(n, 1)


def swiglu_sizes(
    rows: Tensor, segments: Sequence[Segment], weights: Weights
) -> tuple[int, int, int]:
    """F (0 without rows), rows in all segments, rows of the largest; checks the weights named."""
    if len(weights) != 2:
        raise ValueError(f"SwiGLU weights: {len(weights)} tensors per expert, expected w1 and w2.")
    hidden, width, total, largest = rows.shape[1], 0, 0, 0
    for span, packed, weight_idx in spans(segments):
        w1, w2 = weights[0][weight_idx], weights[1][weight_idx]
        width = width or w2.shape[-1]
        total, largest = packed.stop, max(largest, span.stop - span.start)
        expected = ((2 * width, hidden), rows.dtype), ((hidden, width), rows.dtype)
        if ((w1.shape, w1.dtype), (w2.shape, w2.dtype)) != expected:
            raise ValueError(
                f"SwiGLU weights (weight index {weight_idx}): w1 {tuple(w1.shape)} {w1.dtype}, "
                f"w2 {tuple(w2.shape)} {w2.dtype}, expected [2F, H] = ({2 * width}, {hidden}) "
                f"and [H, F] = ({hidden}, {width}) in {rows.dtype}."
            )
    return width, total, largest
