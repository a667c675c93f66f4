"""SwiGLU between the two products of an expert, in Triton: one launch forward, one backward.

Of each row, with gate g, up u and probability p (1 where there is none), all in fp32:

    s = silu(g) = g * sig(g)     a = s * u * p
    given dap, the gradient of a:    dp = sum of dap * s * u    da = dap * p
    dg = da * u * sig(g) * (1 + g * (1 - sig(g)))    du = da * s

Results are rounded once. One program computes one row, so a row's bits depend on nothing else.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import segment_tables
from .segment_tables import RowTable

__all__ = ["swiglu_backward", "swiglu_forward"]

_SPREAD = tl.constexpr(segment_tables.SPREAD)
_PACKED = tl.constexpr(segment_tables.PACKED)
_NUM_ROWS = tl.constexpr(segment_tables.NUM_ROWS)

# 4 warps load 16 bytes per thread of 1024 bf16 columns.
_MAX_BLOCK = 1024
_NUM_WARPS = 4


def swiglu_forward(h: Tensor, probs: Tensor | None, act: Tensor, table: RowTable) -> None:
    """act = silu(gate) * up * probability.

    Args:
        h: packed [P, 2F], gate columns, then up columns.
        probs: spread [N], contiguous, any floating dtype; or None.
        act: packed [P, F], overwritten.
        table: the segments of both layouts.
    """
    _launch(_forward, h, probs, act, table=table)


def swiglu_backward(
    h: Tensor,
    probs: Tensor | None,
    act: Tensor,
    grad_h: Tensor,
    grad_probs: Tensor | None,
    table: RowTable,
) -> None:
    """The gradients of gate, up and probability, and the activation again.

    Args:
        h, probs, table: as ``swiglu_forward`` had them.
        act: packed [P, F], holds the gradient of the activation; overwritten with the activation.
        grad_h: packed [P, 2F], overwritten.
        grad_probs: spread [N], contiguous; holes are not touched. None = not wanted.
    """
    _launch(_backward, h, probs, act, grad_h, grad_probs, table=table)


def _launch(kernel: Any, h: Tensor, probs: Tensor | None, *rest: Any, table: RowTable) -> None:
    for side_data in (probs, rest[-1]):
        assert side_data is None or side_data.is_contiguous(), "rows of side data lie in one piece"
    num_tiles, columns = table.tiles.shape
    width = h.shape[1] // 2
    if num_tiles == 0 or width == 0:
        return
    with torch.cuda.device_of(h):
        kernel[(num_tiles * table.block_m,)](
            h,
            probs,
            *rest,
            table.tiles,
            columns=columns,
            rows_per_tile=table.block_m,
            width=width,
            block=min(_MAX_BLOCK, triton.next_power_of_2(width)),
            num_warps=_NUM_WARPS,
            enable_fp_fusion=True,
        )


@triton.jit(do_not_specialize_on_alignment=["probs"])
def _forward(
    h: tl.tensor,
    probs: tl.tensor,
    act: tl.tensor,
    tiles: tl.tensor,
    columns: tl.constexpr,
    rows_per_tile: tl.constexpr,
    width: tl.constexpr,
    block: tl.constexpr,
) -> None:
    program = tl.program_id(0)
    tile = tiles + (program // rows_per_tile) * columns
    row = program % rows_per_tile
    if row < tl.load(tile + _NUM_ROWS):
        packed = tl.load(tile + _PACKED) + row
        gate_row, act_row = h + packed * (2 * width), act + packed * width
        for first in range(0, width, block):
            column = first + tl.arange(0, block)
            exists = column < width
            gate = tl.load(gate_row + column, mask=exists, other=0.0).to(tl.float32)
            up = tl.load(gate_row + width + column, mask=exists, other=0.0).to(tl.float32)
            result = gate * tl.sigmoid(gate) * up
            if probs is not None:
                result *= tl.load(probs + tl.load(tile + _SPREAD) + row).to(tl.float32)
            tl.store(act_row + column, result.to(act.dtype.element_ty), mask=exists)


@triton.jit(do_not_specialize_on_alignment=["probs", "grad_probs"])
def _backward(
    h: tl.tensor,
    probs: tl.tensor,
    act: tl.tensor,
    grad_h: tl.tensor,
    grad_probs: tl.tensor,
    tiles: tl.tensor,
    columns: tl.constexpr,
    rows_per_tile: tl.constexpr,
    width: tl.constexpr,
    block: tl.constexpr,
) -> None:
    program = tl.program_id(0)
    tile = tiles + (program // rows_per_tile) * columns
    row = program % rows_per_tile
    if row < tl.load(tile + _NUM_ROWS):
        packed, spread = tl.load(tile + _PACKED) + row, tl.load(tile + _SPREAD) + row
        gate_row, act_row = h + packed * (2 * width), act + packed * width
        grad_row = grad_h + packed * (2 * width)
        products = tl.zeros((block,), tl.float32)
        for first in range(0, width, block):
            column = first + tl.arange(0, block)
            exists = column < width
            gate = tl.load(gate_row + column, mask=exists, other=0.0).to(tl.float32)
            up = tl.load(gate_row + width + column, mask=exists, other=0.0).to(tl.float32)
            grad = tl.load(act_row + column, mask=exists, other=0.0).to(tl.float32)
            sigmoid = tl.sigmoid(gate)
            silu = gate * sigmoid
            result = silu * up
            products += grad * result
            if probs is not None:
                prob = tl.load(probs + spread).to(tl.float32)
                result *= prob
                grad *= prob
            grad_gate = grad * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
            element = h.dtype.element_ty
            tl.store(act_row + column, result.to(element), mask=exists)
            tl.store(grad_row + column, grad_gate.to(element), mask=exists)
            tl.store(grad_row + width + column, (grad * silu).to(element), mask=exists)
        if grad_probs is not None:
            grad_prob = tl.sum(products).to(grad_probs.dtype.element_ty)
            tl.store(grad_probs + spread, grad_prob)
