"""SwiGLU over segments on a GPU: two grouped products and one elementwise kernel per direction.

The same contract, weights and saved tensors as compute.SwiGLU, but one launch covers all segments
of a call, and everything between the products is in fp32. Inside, rows are packed (without holes):
only the caller's tensors have them. N rows of one call, P of them in segments, H hidden, F width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .compute import (
    ExpertCompute,
    GradWeights,
    Saved,
    Segment,
    Weights,
    swiglu_probabilities,
    swiglu_sizes,
)
from .kernels.grouped_gemm import TritonGemm
from .kernels.products import GroupedGemm, Operand
from .kernels.segment_tables import grad_table, row_table
from .kernels.swiglu import swiglu_backward, swiglu_forward
from .kernels.tiles import TileConfig, default_tiles

__all__ = ["TritonSwiGLU"]


class TritonSwiGLU(ExpertCompute):
    """compute.SwiGLU for rows on one CUDA device, in bf16, fp16 or fp32 (without TF32).

    Weights, row data and saved tensors are those of compute.SwiGLU. It differs in rounding:
    between the products everything is fp32, probabilities of any dtype too, and rounded once;
    weight gradients are added in fp32 over all segments of an expert and rounded once to the
    dtype of grad_weights.
    A row's results have the same bits in any segment of any call, and a weight gradient depends
    on the rows of its segments alone, if ``gemm`` keeps that too (TritonGemm does).
    Tables of a call go to the device by an asynchronous copy on the current stream. A kernel is
    compiled and loaded at its first launch; see ``warm_up``.

    Args:
        gemm: computes the products. Default: TritonGemm with one tile configuration per dtype.
        tiles: that of 16-bit rows, the same on every rank: ``Balancer.tiles``. None: the default
            of the dtype, which all other rows get.
    Raises:
        ValueError: both gemm and tiles are given; shapes, dtypes or addresses of weights or
            row_data do not fit.
        RuntimeError: ``saved`` does not belong to ``segments``.
    """

    def __init__(self, gemm: GroupedGemm | None = None, *, tiles: TileConfig | None = None) -> None:
        if gemm is not None and tiles is not None:
            raise ValueError("TritonSwiGLU: gemm brings tiles of its own; give it or tiles.")
        self._gemm = gemm
        self._tiles = tiles

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
        gemm = self._gemm_for(rows)
        probs = _flat(swiglu_probabilities(rows, row_data))
        width, total, _ = swiglu_sizes(rows, segments, weights)
        h, act = rows.new_empty(total, 2 * width), rows.new_empty(total, width)
        table = row_table(segments, weights, gemm.block_m, rows.device)
        gemm.multiply_rows(Operand(rows), _packed(h), table, tensor=0, transposed=True)
        swiglu_forward(h, probs, act, table)
        gemm.multiply_rows(_packed(act), Operand(out), table, tensor=1, transposed=True)
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
        """Compute the gradients of rows and probabilities; the carry is dh and a, packed."""
        gemm = self._gemm_for(rows)
        probs = _flat(swiglu_probabilities(rows, row_data))
        width, total, _ = swiglu_sizes(rows, segments, weights)
        h = saved.tensors[0]
        if h.shape != (total, 2 * width):
            raise RuntimeError(
                f"SwiGLU backward: saved activations are {tuple(h.shape)}, expected "
                f"{(total, 2 * width)} for these segments. They come from another forward."
            )
        grad_h, act = torch.empty_like(h), rows.new_empty(total, width)
        table = row_table(segments, weights, gemm.block_m, rows.device)
        # Gives the gradient of act, which swiglu_backward replaces by act itself.
        gemm.multiply_rows(Operand(grad_out), _packed(act), table, tensor=1, transposed=False)
        grad_probs = None if probs is None else _flat(grad_row_data[0])
        swiglu_backward(h, probs, act, grad_h, grad_probs, table)
        gemm.multiply_rows(_packed(grad_h), Operand(grad_rows), table, tensor=0, transposed=False)
        return grad_h, act

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
        gemm = self._gemm_for(rows)
        grad_h, act = carry
        table = grad_table(segments, grad_weights, rows.device)
        operands = (_packed(grad_h), Operand(rows)), (Operand(grad_out), _packed(act))
        for tensor, (left, right) in enumerate(operands):
            if grad_weights[tensor] is not None:
                gemm.multiply_weights(left, right, table, tensor=tensor)

    def warm_up(
        self,
        hidden: int,
        width: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
        probs_dtype: torch.dtype | None = None,
        grad_dtype: torch.dtype | None = None,
    ) -> None:
        """Compile and load every kernel of one layer, by running it over one row.

        To load a kernel while a stream waits for another rank delays the launches behind it.
        Waits for the device.

        Args:
            hidden, width: H and F.
            dtype: of rows and weights.
            probs_dtype: of the probabilities; None = there are none.
            grad_dtype: of the weight gradients; None = that of the weights.
        """
        rows = torch.zeros(1, hidden, dtype=dtype, device=device)
        shapes = (2 * width, hidden), (hidden, width)
        weights = [[torch.zeros(shape, dtype=dtype, device=device)] for shape in shapes]
        grads = [[torch.empty_like(each[0], dtype=grad_dtype or dtype)] for each in weights]
        row_data = [] if probs_dtype is None else [torch.zeros(1, dtype=probs_dtype, device=device)]
        segments = [(0, 1, 0)]
        out = torch.empty_like(rows)
        saved = self.forward(rows, row_data, segments, weights, out=out, save=True)
        wanted: list[Sequence[Tensor | None]] = [[None] * len(row_data)]
        if row_data:
            wanted.append([torch.empty_like(data) for data in row_data])
        for grad_row_data in wanted:
            carry = self.backward_rows(
                rows, rows, row_data, segments, weights, saved,
                grad_rows=out, grad_row_data=grad_row_data,
            )  # fmt: skip
        self.backward_weights(rows, rows, row_data, segments, saved, carry, grad_weights=grads)
        if rows.is_cuda:
            torch.cuda.synchronize(device)

    def _gemm_for(self, rows: Tensor) -> GroupedGemm:
        if self._gemm is not None:
            return self._gemm
        agreed = self._tiles if rows.dtype.itemsize == 2 else None
        return TritonGemm(agreed or default_tiles(rows.dtype))


def _packed(rows: Tensor) -> Operand:
    return Operand(rows, packed=True)


def _flat(row_data: Tensor | None) -> Tensor | None:
    """[N] of the same memory."""
    return None if row_data is None else row_data.view(-1)
