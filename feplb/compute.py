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
from functools import partial
from typing import Protocol, cast

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
        self, rows: Tensor, row_data: Sequence[Tensor], segments: Sequence[Segment],
        weights: Weights, *, out: Tensor, save: bool,
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
        self, grad_out: Tensor, rows: Tensor, row_data: Sequence[Tensor],
        segments: Sequence[Segment], weights: Weights, saved: Saved, *, grad_rows: Tensor,
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
        self, grad_out: Tensor, rows: Tensor, row_data: Sequence[Tensor],
        segments: Sequence[Segment], saved: Saved, carry: tuple[Tensor, ...], *,
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
    write: Callable[[int, Tensor], None],
) -> None:
    """Let ``write(k, target)`` fill in the k-th segment with rows, and sum where an index recurs.

    The first contribution is placed, not added to zero: -0.0 stays -0.0.
    """
    written: set[int] = set()
    k = 0
    for start, end, weight_idx in segments:
        target = grad_weights[weight_idx]
        if end == start:
            if weight_idx not in written:
                target.zero_()
            continue
        if weight_idx in written:
            part = torch.empty_like(target)
            write(k, part)
            target.add_(part)
        else:
            write(k, target)
            written.add(weight_idx)
        k += 1


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


# SwiGLU. Of each row x, with w1 = [w1g; w1u], p = 1 where there are no probabilities:
#   h = [g | u] = x w1^T     s = silu(g)     a = s * u * p     y = a w2^T
# Given dy:
#   da = dy w2               da/du = s p     da/dg = silu'(g) u p     da/dp = s u
#   dh = [dg | du] = p * [silu'(g) * (u * da) | s * da]
#   dp = sum over F of s * (u * da)
#   dx = dh w1     dw1 = dh^T x     dw2 = dy^T a
# Saved is h alone: s and a cost two elementwise passes, to keep them F more numbers per row.
# g and u are the halves of h, strided by 2F, so the vector loops run row by row over F and a
# row's activation does not depend on where it lies in the segment either (one thread).


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
        self, rows: Tensor, row_data: Sequence[Tensor], segments: Sequence[Segment],
        weights: Weights, *, out: Tensor, save: bool,
    ) -> Saved:
        """Compute the output rows of every segment; see ExpertCompute."""
        probs = _probs(rows, row_data)
        width = _width(rows, segments, weights)
        total, largest = _extent(segments)
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
        self, grad_out: Tensor, rows: Tensor, row_data: Sequence[Tensor],
        segments: Sequence[Segment], weights: Weights, saved: Saved, *, grad_rows: Tensor,
        grad_row_data: Sequence[Tensor | None],
    ) -> tuple[Tensor, ...]:
        """Compute the gradients of rows and probabilities; the carry is (dh, a)."""
        probs = _probs(rows, row_data)
        width = _width(rows, segments, weights)
        total, largest = _extent(segments)
        h = saved.tensors[0]
        if h.shape != (total, 2 * width):
            raise RuntimeError(
                f"SwiGLU backward: saved activations are {tuple(h.shape)}, expected "
                f"{(total, 2 * width)} for these segments. They come from another forward."
            )
        dh, act = torch.empty_like(h), rows.new_empty(total, width)
        scratch = rows.new_empty(largest, width)
        for span, packed, weight_idx in _spans(segments):
            da = scratch[: span.stop - span.start]
            _mm(grad_out[span], weights[1][weight_idx], da)
            probs_e = None if probs is None else probs[span]
            grad_probs = grad_row_data[0] if row_data else None
            grad_probs_e = None if grad_probs is None else grad_probs[span]
            _backward_activation(h[packed], da, probs_e, dh[packed], act[packed], grad_probs_e)
            _mm(dh[packed], weights[0][weight_idx], grad_rows[span])
        return dh, act

    @torch.no_grad()
    def backward_weights(
        self, grad_out: Tensor, rows: Tensor, row_data: Sequence[Tensor],
        segments: Sequence[Segment], saved: Saved, carry: tuple[Tensor, ...], *,
        grad_weights: GradWeights,
    ) -> None:
        """Write dw1 = dh^T x and dw2 = dy^T a; see ExpertCompute."""
        dh, act = carry
        spans = list(_spans(segments))

        def write_w1(k: int, target: Tensor) -> None:
            span, packed, _ = spans[k]
            _mm(dh[packed].t(), rows[span], target)

        def write_w2(k: int, target: Tensor) -> None:
            span, packed, _ = spans[k]
            _mm(grad_out[span].t(), act[packed], target)

        for targets, write in zip(grad_weights, (write_w1, write_w2), strict=True):
            if targets is not None:
                _sum_into_weights(segments, targets, write)


def _backward_activation(
    h: Tensor, da: Tensor, probs: Tensor | None, dh: Tensor, act: Tensor, grad_probs: Tensor | None
) -> None:
    """Fill dh [n, 2F], act [n, F] (= a) and grad_probs of one segment; overwrites da."""
    width = da.shape[1]
    gate, up = h[:, :width], h[:, width:]
    torch.ops.aten.silu.out(gate, out=act)
    torch.mul(da, act, out=dh[:, width:])
    da.mul_(up)
    torch.ops.aten.silu_backward.grad_input(da, gate, grad_input=dh[:, :width])
    if probs is not None:
        if grad_probs is not None:
            wide = torch.promote_types(act.dtype, probs.dtype)
            grad_probs.copy_((act.to(wide) * da).sum(dim=1).view(grad_probs.shape))
        dh.mul_(probs)
        act.mul_(up).mul_(probs)
    else:
        act.mul_(up)


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


def _width(rows: Tensor, segments: Sequence[Segment], weights: Weights) -> int:
    """F, after checking the weights that the segments name; 0 where no segment has rows."""
    if len(weights) != 2:
        raise ValueError(f"SwiGLU weights: {len(weights)} tensors per expert, expected w1 and w2.")
    hidden, width = rows.shape[1], 0
    for _, _, weight_idx in _spans(segments):
        w1, w2 = weights[0][weight_idx], weights[1][weight_idx]
        width = width or w2.shape[-1]
        if w1.shape != (2 * width, hidden) or w2.shape != (hidden, width):
            raise ValueError(
                f"SwiGLU weights (weight index {weight_idx}): w1 {tuple(w1.shape)}, w2 "
                f"{tuple(w2.shape)}, expected [2F, H] = ({2 * width}, {hidden}) and [H, F] = "
                f"({hidden}, {width})."
            )
        if w1.dtype != rows.dtype or w2.dtype != rows.dtype:
            raise ValueError(
                f"SwiGLU weights (weight index {weight_idx}): w1 {w1.dtype}, w2 {w2.dtype}, "
                f"expected {rows.dtype} as the rows."
            )
    return width


def _extent(segments: Sequence[Segment]) -> tuple[int, int]:
    """Rows in all segments, and in the largest one."""
    sizes = [end - start for start, end, _ in segments]
    return sum(sizes), max(sizes, default=0)


def as_compute(fn: ExpertFunction) -> ExpertCompute:
    """Turn an ordinary autograd function of one expert into an ExpertCompute.

    Forward runs ``fn`` under autograd with saved-tensor hooks. Where its graph would keep one of
    fn's inputs, or a view of it, only a description is kept, and backward reads what it was given
    again; every other saved tensor goes into ``Saved.tensors``.

    Args:
        fn: ``fn(rows_e [n, H], row_data_e, weights_e) -> out_e [n, H]``, the inputs of one segment
            as contiguous tensors, in the dtype of ``out``. Called once per segment with n > 0. All
            floating inputs get gradients. It must reach its inputs through autograd operations
            only: what a closure, a checkpoint inside fn, or the ``ctx`` attributes of a custom
            Function (``save_for_backward`` is fine) keep of them is overwritten before backward.
            Random numbers are drawn in another order where experts move, so with dropout the
            bits of ``policy="none"`` are not kept, and without ``preserve_rng_state`` a recompute
            draws other ones.
    Returns:
        An ExpertCompute without state of its own, for any number of layers.
    Raises (from forward, the message names the segment):
        ValueError: out_e is not a tensor of the shape and dtype of its part of ``out``; fn changed
            an input in place, or an intermediate that its own backward needs.
    Raises (from backward_rows):
        RuntimeError: ``saved.tensors`` of a recompute are not those the graph expects, segments
            differ from forward's, or an input has another shape, dtype or stride than in forward.
    """
    return _FunctionCompute(fn)


@dataclass(frozen=True, slots=True)
class _View:
    """A saved tensor that is a view of input ``leaf_idx``, without its data."""

    leaf_idx: int
    offset_bytes: int
    size: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype


class _SavedByGraph:
    """Stands between the graphs of one forward and the tensors they saved.

    The graphs own this object. It holds tensors only while forward or backward runs.
    """

    def __init__(self) -> None:
        self.leaves: list[Tensor] = []  # inputs of all segments with rows, in their order
        self.tensors: list[Tensor] = []
        self._first_leaf = 0
        self._versions: list[tuple[Tensor, int]] = []

    def open_segment(self, leaves: Sequence[Tensor]) -> None:
        self._first_leaf = len(self.leaves)
        self.leaves.extend(leaves)
        self._versions = []

    def close_segment(self, where: str) -> None:
        """Check that no saved tensor was changed: with hooks set, autograd does not."""
        if any(tensor._version != version for tensor, version in self._versions):
            raise ValueError(
                f"{where}: fn changed in place an intermediate that its own backward needs. "
                "Use the out-of-place operation."
            )

    def pack(self, tensor: Tensor) -> _View | int:
        view = self._as_view(tensor)
        if view is not None:
            return view
        kept = tensor.detach() if tensor.numel() else torch.empty_like(tensor)
        self._versions.append((kept, kept._version))
        self.tensors.append(kept)
        return len(self.tensors) - 1

    def unpack(self, key: _View | int) -> Tensor:
        if isinstance(key, int):
            return self.tensors[key]
        leaf = self.leaves[key.leaf_idx]
        view = torch.empty(0, dtype=key.dtype, device=leaf.device)
        offset_bytes = leaf.storage_offset() * leaf.element_size() + key.offset_bytes
        offset = offset_bytes // view.element_size()
        return view.set_(leaf.untyped_storage(), offset, key.size, key.stride)

    def bind(self, leaves: list[Tensor], tensors: Sequence[Tensor]) -> None:
        self.leaves, self.tensors, self._versions = leaves, list(tensors), []

    def _as_view(self, tensor: Tensor) -> _View | None:
        # One arena is one storage, so equal storage alone does not tell which input it is.
        for i, leaf in enumerate(self.leaves[self._first_leaf :], start=self._first_leaf):
            if tensor.untyped_storage().data_ptr() == leaf.untyped_storage().data_ptr():
                (start, end), (view_start, view_end) = _byte_range(leaf), _byte_range(tensor)
                if start <= view_start and view_end <= end:
                    offset = view_start - start
                    return _View(i, offset, tensor.size(), tensor.stride(), tensor.dtype)
        return None


class _Enter(torch.autograd.Function):
    """Lets the inputs of fn enter its graph without being its leaves.

    The AccumulateGrad node of a leaf owns the leaf, and so the arena or all rows of the micro-batch
    until backward. Here the graph ends in this node, which owns the empty ``anchor`` only, and
    backward asks for the gradients at this node's edges.
    """

    @staticmethod
    def forward(ctx: object, anchor: Tensor, inputs: list[Tensor]) -> tuple[Tensor, ...]:
        return tuple(_alias(tensor) for tensor in inputs)

    @staticmethod
    def backward(ctx: object, *grads: Tensor) -> tuple[None, None]:
        return None, None


@dataclass(frozen=True, slots=True, kw_only=True)
class _FunctionState:
    """The graphs of one forward, without data. Lists run over segments with rows."""

    segments: tuple[Segment, ...]
    by_graph: _SavedByGraph
    outputs: list[GradientEdge | None]  # None: fn's result depends on no floating input
    inputs: list[GradientEdge | None]  # per segment: rows, row_data, weights
    input_layouts: list[tuple[object, ...]]
    tensor_layouts: list[tuple[object, ...]]

    def check(self, segments: Sequence[Segment], leaves: list[Tensor], saved: Saved) -> None:
        if tuple(segments) != self.segments:
            raise RuntimeError(
                f"as_compute(fn) backward: segments {list(segments)}, expected forward's "
                f"{list(self.segments)}. A recompute made another plan; use a deterministic router."
            )
        seen = [(t.size(), t.dtype) for t in saved.tensors]
        if seen != self.tensor_layouts:
            raise RuntimeError(
                f"as_compute(fn) backward: a forward saved {len(seen)} tensors, expected the "
                f"{len(self.tensor_layouts)} of the first forward, in their shapes and dtypes. "
                "fn did something else when it was recomputed; make it deterministic."
            )
        for leaf, layout in zip(leaves, self.input_layouts, strict=True):
            if _layout(leaf) != layout:
                raise RuntimeError(
                    f"as_compute(fn) backward: an input has (size, dtype, stride) "
                    f"{_layout(leaf)}, expected {layout} as in forward."
                )


class _FunctionCompute(ExpertCompute):
    def __init__(self, fn: ExpertFunction) -> None:
        self._fn = fn

    @torch.no_grad()
    def forward(
        self, rows: Tensor, row_data: Sequence[Tensor], segments: Sequence[Segment],
        weights: Weights, *, out: Tensor, save: bool,
    ) -> Saved:
        by_graph = _SavedByGraph()
        outputs: list[GradientEdge | None] = []
        inputs: list[GradientEdge | None] = []
        layouts: list[tuple[object, ...]] = []
        anchor = torch.empty(0, requires_grad=True)
        for k, (span, _, weight_idx) in enumerate(_spans(segments)):
            where = f"as_compute(fn) (segment {k}, rows {span.start} to {span.stop - 1}, "
            where += f"weight index {weight_idx})"
            given = _inputs(rows, row_data, weights, span, weight_idx)
            if not save:
                self._run([_alias(t) for t in given], len(row_data), out[span], where)
                continue
            with torch.enable_grad(), saved_tensors_hooks(by_graph.pack, by_graph.unpack):
                entered = _Enter.apply(anchor, given)
                inputs += [_edge(t) for t in entered]
                by_graph.open_segment(entered)
                outputs.append(self._run(entered, len(row_data), out[span], where))
                by_graph.close_segment(where)
            layouts += [_layout(t) for t in given]
        if not save:
            return Saved(())
        tensors = tuple(by_graph.tensors)
        by_graph.bind([], ())
        state = _FunctionState(
            segments=tuple(segments), by_graph=by_graph, outputs=outputs, inputs=inputs,
            input_layouts=layouts, tensor_layouts=[(t.size(), t.dtype) for t in tensors],
        )
        return Saved(tensors, state)

    def _run(
        self, inputs: Sequence[Tensor], num_row_data: int, out: Tensor, where: str
    ) -> GradientEdge | None:
        """Run fn on one segment, check what it did, and copy its result to ``out``."""
        tracked = not torch.is_inference_mode_enabled()
        versions = [t._version for t in inputs] if tracked else []
        row_data, weights = inputs[1 : 1 + num_row_data], inputs[1 + num_row_data :]
        result = self._fn(inputs[0], tuple(row_data), tuple(weights))
        for i, version in enumerate(versions):
            if inputs[i]._version != version:
                name = ["rows", *["row_data"] * len(row_data), *["weights"] * len(weights)][i]
                raise ValueError(
                    f"{where}: fn changed its {name} in place. Use the out-of-place operation."
                )
        if not isinstance(result, Tensor):
            raise ValueError(f"{where}: fn returned {type(result).__name__}, expected a Tensor.")
        if result.shape != out.shape or result.dtype != out.dtype:
            raise ValueError(
                f"{where}: fn returned {tuple(result.shape)} {result.dtype}, expected "
                f"{tuple(out.shape)} {out.dtype}."
            )
        out.copy_(result.detach())
        return _edge(result)

    @torch.no_grad()
    def backward_rows(
        self, grad_out: Tensor, rows: Tensor, row_data: Sequence[Tensor],
        segments: Sequence[Segment], weights: Weights, saved: Saved, *, grad_rows: Tensor,
        grad_row_data: Sequence[Tensor | None],
    ) -> tuple[Tensor, ...]:
        spans = list(_spans(segments))
        leaves = [
            t for span, _, idx in spans for t in _inputs(rows, row_data, weights, span, idx)
        ]
        assert isinstance(saved.state, _FunctionState), "saved is not from this compute"
        saved.state.check(segments, leaves, saved)
        grads = iter(_gradients(saved, leaves, [grad_out[span] for span, _, _ in spans]))
        carry = []
        for span, _, _ in spans:
            for target in (grad_rows, *grad_row_data):
                grad = next(grads)
                if target is not None:
                    target[span].copy_(torch.zeros(()) if grad is None else grad)
            for _ in weights:
                grad = next(grads)
                carry.append(torch.zeros(()) if grad is None else grad)
        return tuple(carry)

    @torch.no_grad()
    def backward_weights(
        self, grad_out: Tensor, rows: Tensor, row_data: Sequence[Tensor],
        segments: Sequence[Segment], saved: Saved, carry: tuple[Tensor, ...], *,
        grad_weights: GradWeights,
    ) -> None:
        for t, targets in enumerate(grad_weights):
            if targets is not None:
                _sum_into_weights(segments, targets, partial(_copy, carry[t :: len(grad_weights)]))


def _gradients(
    saved: Saved, leaves: list[Tensor], grad_outs: list[Tensor]
) -> list[Tensor | None]:
    """Per leaf its gradient, None where fn did not use it; all segments in one engine run."""
    state = cast(_FunctionState, saved.state)
    roots = [(edge, g) for edge, g in zip(state.outputs, grad_outs, strict=True) if edge]
    edges = [edge for edge in state.inputs if edge]
    if not roots or not edges:
        return [None] * len(leaves)
    state.by_graph.bind(leaves, saved.tensors)
    try:
        found = iter(
            torch.autograd.grad(
                [edge for edge, _ in roots], edges, [g for _, g in roots],
                retain_graph=True, allow_unused=True,
            )
        )
    finally:
        state.by_graph.bind([], ())
    return [next(found) if edge else None for edge in state.inputs]


def _copy(grads: tuple[Tensor, ...], k: int, target: Tensor) -> None:
    target.copy_(grads[k])


def _inputs(
    rows: Tensor, row_data: Sequence[Tensor], weights: Weights, span: slice, weight_idx: int
) -> list[Tensor]:
    return [rows[span], *(data[span] for data in row_data), *(w[weight_idx] for w in weights)]


def _alias(tensor: Tensor) -> Tensor:
    """The same memory with a version counter and history of its own."""
    alias = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return alias.set_(
        tensor.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride()
    )


def _edge(tensor: Tensor) -> GradientEdge | None:
    """Where a gradient of ``tensor`` enters the graph; owns the node, not the data."""
    return get_gradient_edge(tensor) if tensor.requires_grad else None


def _layout(tensor: Tensor) -> tuple[object, ...]:
    stride = tuple(s if n > 1 else 0 for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.size(), tensor.dtype, stride


def _byte_range(tensor: Tensor) -> tuple[int, int]:
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    start = tensor.data_ptr()
    return start, start + (last + 1) * tensor.element_size() if tensor.numel() else start
