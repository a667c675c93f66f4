"""as_compute: an ordinary autograd function as an ExpertCompute.

The function's graph is built once, in forward; what it saved goes through save_for_backward, and
what it took as input is found again in the rows and weights that backward re-pushed. Nothing here
keeps rows, weights or a view of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge, saved_tensors_hooks

from .compute import ExpertCompute, GradWeights, Saved, Segment, Weights, spans, sum_into_weights

__all__ = ["as_compute"]

ExpertFunction = Callable[[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]], Tensor]


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
            zip(leaves, spans(segments), strict=True)
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
        grads = iter(_gradients(graphs, flat, saved, [grad_out[s] for s, _, _ in spans(segments)]))
        carry: list[Tensor] = []
        for span, _, _ in spans(segments):
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
                sum_into_weights(segments, targets, parts, lambda grad, out: out.copy_(grad))


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
        for span, _, weight_idx in spans(segments)
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
