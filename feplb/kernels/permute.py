"""Rows gathered, summed per token and spread back, in Triton. The contract: RowOperations.

Every result row is written by one program, and sums run in the order of the choices; so there are
no atomics, and the bits do not depend on the number of tokens.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["gather_rows", "spread_grads", "sum_choices"]

# 4 warps load 16 bytes per thread, twice, of 2048 bf16 columns.
_MAX_BLOCK = 2048
_NUM_WARPS = 4

# Without fusion a product is rounded before it is added, as torch does it.
_OPTIONS: dict[str, Any] = {"num_warps": _NUM_WARPS, "enable_fp_fusion": False}


def gather_rows(rows: Tensor, source: Tensor, repeats: int = 1) -> Tensor:
    """[len(source), *D]: row source[i] // repeats of rows [*, *D]."""
    rows, source = rows.contiguous(), source.contiguous()
    out = rows.new_empty(source.shape[0], *rows.shape[1:])
    if out.numel():
        width = out.numel() // out.shape[0]
        block = _block(width)
        with torch.cuda.device_of(rows):
            _gather[(out.shape[0], triton.cdiv(width, block))](
                rows, source, out, repeats=repeats, width=width, block=block, **_OPTIONS
            )
    return out


def sum_choices(rows: Tensor, row_of_pair: Tensor, weights: Tensor | None) -> Tensor:
    """[T, H] in the dtype of rows: of each token, its rows times weights [T, k].

    Adds the first choice first, in fp32 (fp64 for fp64 rows), and rounds once. A choice whose row
    is negative adds nothing.
    """
    rows, row_of_pair = rows.contiguous(), row_of_pair.contiguous()
    weights = None if weights is None else weights.contiguous()
    num_tokens, top_k = row_of_pair.shape
    out = rows.new_empty(num_tokens, rows.shape[1])
    if out.numel():
        block = _block(rows.shape[1])
        with torch.cuda.device_of(rows):
            _sum_choices[(num_tokens, triton.cdiv(rows.shape[1], block))](
                rows,
                row_of_pair,
                weights,
                out,
                top_k=top_k,
                width=rows.shape[1],
                block=block,
                sum_type=_sum_type(rows.dtype),
                **_OPTIONS,
            )
    return out


def spread_grads(
    grad: Tensor,
    rows: Tensor,
    weights: Tensor,
    row_of_pair: Tensor,
    *,
    rows_wanted: bool,
    weights_wanted: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of ``sum_choices``: of rows [N, H] and of weights [T, k].

    A choice whose row is negative has weight gradient 0.
    """
    grad, rows, weights = grad.contiguous(), rows.contiguous(), weights.contiguous()
    row_of_pair = row_of_pair.contiguous()
    grad_rows = torch.empty_like(rows) if rows_wanted else None
    grad_weights = torch.zeros_like(weights) if weights_wanted else None
    if rows.numel() and (rows_wanted or weights_wanted):
        with torch.cuda.device_of(rows):
            _spread_grads[(row_of_pair.numel(),)](
                grad,
                rows,
                weights,
                row_of_pair,
                grad_rows,
                grad_weights,
                top_k=row_of_pair.shape[1],
                width=rows.shape[1],
                block=_block(rows.shape[1]),
                sum_type=_sum_type(rows.dtype),
                **_OPTIONS,
            )
    return grad_rows, grad_weights


def _block(width: int) -> int:
    return min(_MAX_BLOCK, int(triton.next_power_of_2(width)))


def _sum_type(dtype: torch.dtype) -> Any:
    return tl.float64 if dtype == torch.float64 else tl.float32


@triton.jit(do_not_specialize_on_alignment=["source"])
def _gather(
    rows: tl.tensor,
    source: tl.tensor,
    out: tl.tensor,
    repeats: tl.constexpr,
    width: tl.constexpr,
    block: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * block + tl.arange(0, block)
    exists = column < width
    read = rows + tl.load(source + row) // repeats * width
    tl.store(out + row * width + column, tl.load(read + column, mask=exists), mask=exists)


@triton.jit(do_not_specialize_on_alignment=["row_of_pair", "weights"])
def _sum_choices(
    rows: tl.tensor,
    row_of_pair: tl.tensor,
    weights: tl.tensor,
    out: tl.tensor,
    top_k: tl.constexpr,
    width: tl.constexpr,
    block: tl.constexpr,
    sum_type: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * block + tl.arange(0, block)
    exists = column < width
    total = tl.zeros((block,), sum_type)
    for choice in tl.static_range(top_k):
        pair = token * top_k + choice
        row = tl.load(row_of_pair + pair)
        read = column < tl.where(row >= 0, width, 0)
        chosen = tl.load(rows + row * width + column, mask=read, other=0.0).to(sum_type)
        if weights is not None:
            chosen *= tl.load(weights + pair).to(sum_type)
        total += chosen
    tl.store(out + token * width + column, total.to(out.dtype.element_ty), mask=exists)


@triton.jit(do_not_specialize_on_alignment=["weights", "row_of_pair", "grad_weights"])
def _spread_grads(
    grad: tl.tensor,
    rows: tl.tensor,
    weights: tl.tensor,
    row_of_pair: tl.tensor,
    grad_rows: tl.tensor,
    grad_weights: tl.tensor,
    top_k: tl.constexpr,
    width: tl.constexpr,
    block: tl.constexpr,
    sum_type: tl.constexpr,
) -> None:
    """One choice of one token. The top_k programs that read a token's gradient run together."""
    pair = tl.program_id(0).to(tl.int64)
    row = tl.load(row_of_pair + pair)
    if row >= 0:
        grad_row = grad + pair // top_k * width
        weight = tl.load(weights + pair).to(sum_type)
        products = tl.zeros((block,), sum_type)
        for first in range(0, width, block):
            column = first + tl.arange(0, block)
            exists = column < width
            given = tl.load(grad_row + column, mask=exists, other=0.0).to(sum_type)
            if grad_weights is not None:
                mine = tl.load(rows + row * width + column, mask=exists, other=0.0)
                products += mine.to(sum_type) * given
            if grad_rows is not None:
                result = (given * weight).to(grad_rows.dtype.element_ty)
                tl.store(grad_rows + row * width + column, result, mask=exists)
        if grad_weights is not None:
            tl.store(grad_weights + pair, tl.sum(products).to(grad_weights.dtype.element_ty))
