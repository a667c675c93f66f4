"""SwiGLU wherever the rows lie: models need not know on which device they will run."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .compute import ExpertCompute, GradWeights, Saved, Segment, SwiGLU, Weights
from .kernels.products import GroupedGemm
from .kernels.tiles import TileConfig

__all__ = ["DeviceSwiGLU"]


class DeviceSwiGLU(ExpertCompute):
    """TritonSwiGLU for rows on a GPU, SwiGLU for others and for dtypes the kernels do not take.

    The choice depends on device and dtype alone, so kept and received rows of a layer always get
    the same. Weights, row data and saved tensors are those of SwiGLU.

    Args:
        gemm, tiles: what computes the products on a GPU; see TritonSwiGLU. With a Balancer hand
            its ``tiles`` over, which all ranks have measured and agreed on.
    Raises:
        ValueError: both gemm and tiles are given.
    """

    def __init__(self, gemm: GroupedGemm | None = None, *, tiles: TileConfig | None = None) -> None:
        if gemm is not None and tiles is not None:
            raise ValueError("DeviceSwiGLU: gemm brings tiles of its own; give it or tiles.")
        self._gemm, self._tiles = gemm, tiles
        self._on_cpu = SwiGLU()
        self._on_gpu: ExpertCompute | None = None

    def choice(self, rows: Tensor) -> ExpertCompute:
        """What computes these rows. Imports Triton when first asked for a GPU."""
        if not rows.is_cuda or rows.dtype == torch.float64:
            return self._on_cpu
        if self._on_gpu is None:
            from .gpu_compute import TritonSwiGLU

            self._on_gpu = TritonSwiGLU(self._gemm, tiles=self._tiles)
        return self._on_gpu

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
        """See ExpertCompute."""
        compute = self.choice(rows)
        return compute.forward(rows, row_data, segments, weights, out=out, save=save)

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
        """See ExpertCompute."""
        return self.choice(rows).backward_rows(
            grad_out, rows, row_data, segments, weights, saved,
            grad_rows=grad_rows, grad_row_data=grad_row_data,
        )  # fmt: skip

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
        """See ExpertCompute."""
        self.choice(rows).backward_weights(
            grad_out, rows, row_data, segments, saved, carry, grad_weights=grad_weights
        )
