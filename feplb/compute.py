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
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge, saved_tensors_hooks

__all__ = ["ExpertCompute", "Saved", "Segment", "SwiGLU", "Weights", "as_compute"]

# (row start, row end, weight index). Example, 9 rows, 2 experts kept and rows 4..5 sent away:
#   [(0, 4, 0), (6, 9, 2)]   rows 0..3 run with weights[t][0], rows 6..8 with weights[t][2],
#   rows 4..5 are a hole: neither read nor written, and they cost nothing.
Segment = tuple[int, int, int]

# weights[t][weight_idx] is Tensor[*S_t]; a stacked Tensor[n, *S_t] serves as the inner sequence.
Weights = Sequence[Sequence[Tensor]]

GradWeights = Sequence[Sequence[Tensor] | None]

Part = TypeVar("Part")

ExpertFunction = Callable[[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]], Tensor]


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


def _spans(segments: Sequence[Segment]) -> Iterator[tuple[slice, slice, int]]:
    """Of each segment with rows: its rows, its rows where holes are left out, its weight index."""
    at = 0
    for start, end, weight_idx in segments:
        if end > start:
            yield slice(start, end), slice(at, at + end - start), weight_idx
            at += end - start


def _sum_into_weights(
    segments: Sequence[Segment],
    grad_weights: Sequence[Tensor],
    parts: Sequence[Part],
    write: Callable[[Part, Tensor], object],
) -> None:
    """Write parts[k], of the k-th segment with rows, to its weight index; sum where one recurs.

    The first part is placed, not added to zero: -0.0 stays -0.0.
    """
    written: set[int] = set()
    for part, (_, _, weight_idx) in zip(parts, _spans(segments), strict=True):
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
        probs = _probs(rows, row_data)
        width, total, largest = _sizes(rows, segments, weights)
        h = rows.new_empty(total if save else largest, 2 * width)
        scratch = rows.new_empty(largest, width)
        for span, packed, weight_idx in _spans(segments):
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
        probs = _probs(rows, row_data)
        width, total, largest = _sizes(rows, segments, weights)
        h = saved.tensors[0]
        if h.shape != (total, 2 * width):
            raise RuntimeError(
                f"SwiGLU backward: saved activations are {tuple(h.shape)}, expected "
                f"{(total, 2 * width)} for these segments. They come from another forward."
            )
        carry: list[Tensor] = []
        scratch = rows.new_empty(2, largest, width)
        grad_probs = grad_row_data[0] if row_data else None
        for span, packed, weight_idx in _spans(segments):
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
        spans = [span for span, _, _ in _spans(segments)]
        w1 = [(dh.t(), rows[span]) for dh, span in zip(carry[::2], spans, strict=True)]
        w2 = [(grad_out[span].t(), act) for act, span in zip(carry[1::2], spans, strict=True)]
        for targets, operands in zip(grad_weights, (w1, w2), strict=True):
            if targets is not None:
                _sum_into_weights(segments, targets, operands, lambda ab, out: _mm(*ab, out))


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


def _probs(rows: Tensor, row_data: Sequence[Tensor]) -> Tensor | None:
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


def _sizes(rows: Tensor, segments: Sequence[Segment], weights: Weights) -> tuple[int, int, int]:
    """F (0 without rows), rows in all segments, rows of the largest; checks the weights named."""
    if len(weights) != 2:
        raise ValueError(f"SwiGLU weights: {len(weights)} tensors per expert, expected w1 and w2.")
    hidden, width, total, largest = rows.shape[1], 0, 0, 0
    for span, packed, weight_idx in _spans(segments):
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


def as_compute(fn: ExpertFunction) -> ExpertCompute:
    """Turn an ordinary autograd function of one expert into an ExpertCompute.

    Where the graph of fn would keep an input, or a view of one, only a description is kept, and
    backward reads what it is given then; every other saved tensor goes into ``Saved.tensors``.

    Args:
        fn: ``fn(rows_e [n, H], row_data_e, weights_e) -> out_e [n, H]``, called once per segment
            with rows, under the caller's autocast; all floating inputs get gradients. Inputs are
            overwritten before backward: fn must not keep them in a closure, in ``ctx`` attributes
            of a custom Function (its save_for_backward is fine), or in a checkpoint inside fn.
            Dropout works, but its bits are not those of ``policy="none"``: where experts move,
            random numbers are drawn in another order.
    Returns:
        An ExpertCompute without state of its own, for any number of layers.
    Raises:
        ValueError: (forward, names the segment) out_e has another shape or dtype than ``out``, or
            fn changed in place an input or an intermediate that its own backward needs.
        RuntimeError: (backward_rows) segments, saved tensors or inputs have other shapes, dtypes
            or strides than in the first forward.
    """
    return _FunctionCompute(fn)


class _View(NamedTuple):
    """A saved tensor that is a view of input ``leaf_idx``: everything but its data."""

    leaf_idx: int
    offset_bytes: int
    size: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype


class _SavedByGraph:
    """Stands between the graphs of one forward and the tensors they save: the hooks.

    The graphs own this object. It holds tensors only while forward or backward runs.
    """

    def __init__(self) -> None:
        self.leaves: list[Tensor] = []  # inputs of all segments with rows, in their order
        self.tensors: list[Tensor] = []
        self.versions: list[int] = []  # of tensors, when they were saved
        self.first_leaf = 0  # of the segment now in forward

    def bind(self, leaves: list[Tensor], tensors: Sequence[Tensor]) -> None:
        self.leaves, self.tensors = leaves, list(tensors)

    def pack(self, tensor: Tensor) -> _View | int:
        # One arena is one storage, so equal storage alone does not tell which input it is.
        storage, (start, end) = tensor.untyped_storage().data_ptr(), _byte_range(tensor)
        for i, leaf in enumerate(self.leaves[self.first_leaf :], start=self.first_leaf):
            leaf_start, leaf_end = _byte_range(leaf)
            is_inside = leaf_start <= start and end <= leaf_end
            if is_inside and leaf.untyped_storage().data_ptr() == storage:
                offset = start - leaf_start
                return _View(i, offset, tensor.size(), tensor.stride(), tensor.dtype)
        self.tensors.append(tensor.detach() if tensor.numel() else torch.empty_like(tensor))
        self.versions.append(self.tensors[-1]._version)
        return len(self.tensors) - 1

    def unpack(self, key: _View | int) -> Tensor:
        if isinstance(key, int):
            return self.tensors[key]
        leaf = self.leaves[key.leaf_idx]
        view = torch.empty(0, dtype=key.dtype, device=leaf.device)
        offset_bytes = leaf.storage_offset() * leaf.element_size() + key.offset_bytes
        offset = offset_bytes // view.element_size()
        return view.set_(leaf.untyped_storage(), offset, key.size, key.stride)


class _Enter(torch.autograd.Function):
    """Lets the inputs of fn enter its graph without being its leaves.

    The AccumulateGrad node of a leaf owns the leaf, and so the arena or the rows of the whole
    micro-batch until backward. Here the graph ends in this node, which owns an empty anchor, and
    backward asks for the gradients at this node's outputs.
    """

    @staticmethod
    def forward(ctx: object, anchor: Tensor, inputs: list[Tensor]) -> tuple[Tensor, ...]:
        return tuple(_alias(tensor) for tensor in inputs)

    @staticmethod
    def backward(ctx: object, *grads: Tensor) -> tuple[None, None]:
        return None, None


class _Graphs(NamedTuple):
    """``Saved.state``: the graphs of one forward, without data."""

    by_graph: _SavedByGraph
    layout: list[tuple[str, object]]  # what backward must find again
    outputs: list[GradientEdge | None]  # per segment with rows; None: depends on no floating input
    inputs: list[GradientEdge | None]  # per segment with rows: rows, row_data, weights


_NEEDED = "an intermediate that its own backward needs"


class _FunctionCompute(ExpertCompute):
    def __init__(self, fn: ExpertFunction) -> None:
        self._fn = fn

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
        graphs = _Graphs(_SavedByGraph(), [], [], [])
        leaves = _leaves(rows, row_data, segments, weights)
        for k, (inputs, (span, _, weight_idx)) in enumerate(
            zip(leaves, _spans(segments), strict=True)
        ):
            where = (
                f"as_compute(fn) (segment {k}, rows {span.start} to {span.stop - 1}, "
                f"weight index {weight_idx})"
            )
            if save:
                self._record(graphs, inputs, len(row_data), out[span], where)
            else:
                self._run([_alias(t) for t in inputs], len(row_data), out[span], where)
        if not save:
            return Saved(())
        saved = Saved(tuple(graphs.by_graph.tensors), graphs)
        graphs.layout.extend(_layout(segments, saved.tensors, leaves))
        graphs.by_graph.bind([], ())
        return saved

    def _record(
        self, graphs: _Graphs, inputs: list[Tensor], num_row_data: int, out: Tensor, where: str
    ) -> None:
        """Run fn on one segment under autograd, and add its graph to ``graphs``."""
        by_graph = graphs.by_graph
        first_saved = len(by_graph.tensors)
        with torch.enable_grad(), saved_tensors_hooks(by_graph.pack, by_graph.unpack):
            entered = _Enter.apply(torch.empty(0, requires_grad=True), inputs)
            graphs.inputs.extend(_edge(t) for t in entered)
            by_graph.first_leaf = len(by_graph.leaves)
            by_graph.leaves.extend(entered)
            graphs.outputs.append(self._run(entered, num_row_data, out, where))
        # Autograd makes this check itself only where no hooks are set.
        saved, versions = by_graph.tensors[first_saved:], by_graph.versions[first_saved:]
        _check_unchanged(saved, versions, where, _NEEDED)

    def _run(
        self, inputs: Sequence[Tensor], num_row_data: int, out: Tensor, where: str
    ) -> GradientEdge | None:
        """Run fn on one segment, check what it did, copy its result; where its gradient enters."""
        versions = _versions(inputs)
        first_weight = 1 + num_row_data
        result = self._fn(inputs[0], tuple(inputs[1:first_weight]), tuple(inputs[first_weight:]))
        _check_unchanged(inputs, versions, where, "an input")
        seen = (
            f"{tuple(result.shape)} {result.dtype}"
            if isinstance(result, Tensor)
            else type(result).__name__
        )
        expected = f"{tuple(out.shape)} {out.dtype}"
        if seen != expected:
            raise ValueError(f"{where}: fn returned {seen}, expected {expected}.")
        out.copy_(result.detach())
        return _edge(result)

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
        graphs = saved.state
        assert isinstance(graphs, _Graphs), "saved is not from as_compute"
        leaves = _leaves(rows, row_data, segments, weights)
        for seen, expected in zip(
            _layout(segments, saved.tensors, leaves), graphs.layout, strict=True
        ):
            if seen != expected:
                raise RuntimeError(
                    f"as_compute(fn) backward: {seen[0]} {seen[1]}, expected {expected[1]} as in "
                    "the first forward. fn or the routing changed when forward was recomputed; "
                    "make both deterministic."
                )
        flat = [leaf for inputs in leaves for leaf in inputs]
        grads = iter(_gradients(graphs, flat, saved, [grad_out[s] for s, _, _ in _spans(segments)]))
        carry: list[Tensor] = []
        for span, _, _ in _spans(segments):
            for target in (grad_rows, *grad_row_data):
                grad = next(grads)
                if target is not None:
                    target[span].copy_(grad)
            carry.extend(next(grads) for _ in weights)
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
        for t, targets in enumerate(grad_weights):
            if targets is not None:
                parts = carry[t :: len(grad_weights)]
                _sum_into_weights(segments, targets, parts, lambda grad, out: out.copy_(grad))


def _gradients(
    graphs: _Graphs, leaves: list[Tensor], saved: Saved, grad_outs: list[Tensor]
) -> list[Tensor]:
    """Per leaf its gradient, zero where fn did not use it; all segments in one engine run."""
    roots = [(edge, g) for edge, g in zip(graphs.outputs, grad_outs, strict=True) if edge]
    edges = [edge for edge in graphs.inputs if edge]
    found: Iterator[Tensor | None] = iter(())
    graphs.by_graph.bind(leaves, saved.tensors)
    try:
        if roots and edges:
            found = iter(
                torch.autograd.grad(
                    [edge for edge, _ in roots],
                    edges,
                    [g for _, g in roots],
                    retain_graph=True,
                    allow_unused=True,
                )
            )
    finally:
        graphs.by_graph.bind([], ())
    grads = [next(found, None) if edge else None for edge in graphs.inputs]
    return [
        leaf.new_zeros(()) if grad is None else grad
        for leaf, grad in zip(leaves, grads, strict=True)
    ]


def _leaves(
    rows: Tensor, row_data: Sequence[Tensor], segments: Sequence[Segment], weights: Weights
) -> list[list[Tensor]]:
    """Per segment with rows, the inputs of fn in a row: rows, row_data, weights."""
    return [
        [rows[span], *(data[span] for data in row_data), *(w[weight_idx] for w in weights)]
        for span, _, weight_idx in _spans(segments)
    ]


def _alias(tensor: Tensor) -> Tensor:
    """The same memory with a history and version counter of its own."""
    alias = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    size, stride = tensor.size(), tensor.stride()
    return alias.set_(tensor.untyped_storage(), tensor.storage_offset(), size, stride)


def _edge(tensor: Tensor) -> GradientEdge | None:
    """Where a gradient of ``tensor`` enters the graph: owns the node, not the data."""
    return get_gradient_edge(tensor) if tensor.requires_grad else None


def _versions(tensors: Sequence[Tensor]) -> list[int]:
    return [0 if tensor.is_inference() else tensor._version for tensor in tensors]


def _check_unchanged(tensors: Sequence[Tensor], versions: list[int], where: str, what: str) -> None:
    if _versions(tensors) != versions:
        raise ValueError(
            f"{where}: fn changed {what} in place. Use the out-of-place operation there."
        )


def _layout(
    segments: Sequence[Segment], saved: Sequence[Tensor], leaves: list[list[Tensor]]
) -> list[tuple[str, object]]:
    """What the graphs of a forward take for granted. The stride of a dimension of 1 is free."""
    inputs = [t for segment_inputs in leaves for t in segment_inputs]
    strides = [[s for n, s in zip(t.shape, t.stride(), strict=True) if n > 1] for t in inputs]
    return [
        ("segments are", list(segments)),
        ("number of saved tensors is", len(saved)),
        ("saved shapes and dtypes are", [(tuple(t.shape), t.dtype) for t in saved]),
        ("input shapes and dtypes are", [(tuple(t.shape), t.dtype) for t in inputs]),
        ("input strides are", strides),
    ]


def _byte_range(tensor: Tensor) -> tuple[int, int]:
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    start = tensor.data_ptr()
    return start, start + (last + 1) * tensor.element_size() if tensor.numel() else start
