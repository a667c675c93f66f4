"""Operands of one rank's experts, for benches of single kernels: every expert has as many rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from feplb.kernels.segment_tables import GradTable, RowTable, grad_table, row_table

# Milliseconds of each run of some work.
Times = Callable[[Callable[[], object]], list[float]]
Segments = list[tuple[int, int, int]]


@dataclass(frozen=True)
class Size:
    """hidden, width: of an expert. rows_per_expert: of products; num_tokens: of other kernels."""

    hidden: int = 6144
    width: int = 2048
    num_experts: int = 16
    rows_per_expert: tuple[int, ...] = (64, 128, 256, 512, 1024)
    num_tokens: int = 4096
    dtype: torch.dtype = torch.bfloat16
    device: str = "cuda"


@dataclass(frozen=True)
class Layer:
    """Operands of the products of one layer; every expert has the same number of rows."""

    rows: Tensor
    h: Tensor
    act: Tensor
    weights: list[list[Tensor]]
    grads: list[list[Tensor]]
    segments: Segments

    @staticmethod
    def draw(size: Size, rows_per_expert: int) -> Layer:
        generator = torch.Generator(size.device).manual_seed(0)

        def randn(*shape: int) -> Tensor:
            drawn = torch.randn(*shape, generator=generator, device=size.device)
            return drawn.to(size.dtype)

        shapes = (2 * size.width, size.hidden), (size.hidden, size.width)
        weights = [randn(size.num_experts, *shape) / shape[1] ** 0.5 for shape in shapes]
        total = size.num_experts * rows_per_expert
        return Layer(
            rows=randn(total, size.hidden),
            h=randn(total, 2 * size.width),
            act=randn(total, size.width),
            weights=[list(weight) for weight in weights],
            grads=[list(torch.empty_like(weight)) for weight in weights],
            segments=[
                (i * rows_per_expert, (i + 1) * rows_per_expert, i) for i in range(size.num_experts)
            ],
        )


def tables_of(layer: Layer, block_m: int) -> tuple[RowTable, GradTable]:
    device = layer.rows.device
    return (
        row_table(layer.segments, layer.weights, block_m, device),
        grad_table(layer.segments, layer.grads, device),
    )
