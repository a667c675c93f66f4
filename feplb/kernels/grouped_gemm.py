"""Grouped GEMM over segments with holes, one launch per product, in Triton.

Weights and targets are named by address, because those of one call lie in parameters (stacked or
one per expert) and in an arena. Each program adds its dot products in fp32, in steps of block_k
from the start of the segment, and rounds once. What a program computes does not depend on which
other programs run: the same row has the same bits in any company and at any place.

Every size is a constant of the compiled kernel and numbers of rows are read from tables, so
nothing is compiled again when the counts change.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from . import segment_tables
from .products import GroupedGemm, Operand
from .segment_tables import ALIGNMENT, GradTable, RowTable
from .tiles import HOPPER, TileConfig

__all__ = ["TritonGemm"]

_NUM_ROWS = tl.constexpr(segment_tables.NUM_ROWS)
_BAND_FIRST = tl.constexpr(segment_tables.BAND_FIRST)
_BAND_SIZE = tl.constexpr(segment_tables.BAND_SIZE)
_FIRST_PART = tl.constexpr(segment_tables.FIRST_PART)
_NUM_PARTS = tl.constexpr(segment_tables.NUM_PARTS)
_BAND = tl.constexpr(segment_tables.BAND)
_ALIGNMENT = tl.constexpr(ALIGNMENT)

_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


class TritonGemm(GroupedGemm):
    """Triton kernels with one tile configuration; the first product of a shape compiles it.

    Rows and weights: fp32 (without TF32), bf16 or fp16, every row a multiple of 16 bytes.
    Outside the CPU's interpreter everything lies on one CUDA device.

    Raises:
        ValueError: a dtype or a width that the kernels do not take.
    """

    def __init__(self, tiles: TileConfig = HOPPER) -> None:
        self.tiles = tiles
        self.block_m = tiles.block_m

    def multiply_rows(
        self, source: Operand, out: Operand, table: RowTable, *, tensor: int, transposed: bool
    ) -> None:
        """See GroupedGemm."""
        assert table.block_m == self.block_m, "the table was made for another tile"
        _check(source, out)
        inner, width = source.rows.shape[1], out.rows.shape[1]
        num_tiles, columns = table.tiles.shape
        if num_tiles == 0 or width == 0:
            return
        with torch.cuda.device_of(source.rows):
            _multiply_rows[(num_tiles * triton.cdiv(width, self.tiles.block_n),)](
                source.rows,
                out.rows,
                table.tiles,
                columns=columns,
                source_column=_row_column(source),
                out_column=_row_column(out),
                weight_column=segment_tables.WEIGHTS + tensor,
                inner=inner,
                width=width,
                inner_stride=1 if transposed else width,
                width_stride=inner if transposed else 1,
                **self._options(source),
            )

    def multiply_weights(
        self, left: Operand, right: Operand, table: GradTable, *, tensor: int
    ) -> None:
        """See GroupedGemm. All parts of a target are added before it is rounded."""
        targets = table.grad_weights[tensor]
        assert targets is not None, "the caller asked for a gradient that is not wanted"
        _check(left, right)
        num_targets, columns = table.targets.shape
        if num_targets == 0:
            return
        target = targets[table.members[0][0]]
        height, width = target.shape
        fits = (height, width) == (left.rows.shape[1], right.rows.shape[1])
        assert fits or not len(table.parts), "targets are as wide as the operands"
        tiles = triton.cdiv(height, self.tiles.block_m) * triton.cdiv(width, self.tiles.block_n)
        with torch.cuda.device_of(left.rows):
            _multiply_weights[(num_targets * tiles,)](
                left.rows,
                right.rows,
                table.targets,
                table.parts,
                target_columns=columns,
                part_columns=segment_tables.PART_COLUMNS,
                left_column=_row_column(left),
                right_column=_row_column(right),
                target_column=segment_tables.TARGETS + tensor,
                target_type=_type(target.dtype),
                height=height,
                width=width,
                **self._options(left),
            )

    def _options(self, operand: Operand) -> dict[str, Any]:
        return {
            "block_m": self.tiles.block_m,
            "block_n": self.tiles.block_n,
            "block_k": self.tiles.block_k,
            "dot_type": _dot_type(operand.rows.dtype),
            "precision": "ieee",
            "num_warps": self.tiles.num_warps,
            "num_stages": self.tiles.num_stages,
            "enable_fp_fusion": True,
        }


def _row_column(operand: Operand) -> int:
    return segment_tables.PACKED if operand.packed else segment_tables.SPREAD


def _type(dtype: torch.dtype) -> Any:
    if dtype not in _TYPES:
        raise ValueError(f"grouped GEMM: {dtype}, expected one of {', '.join(map(str, _TYPES))}.")
    return _TYPES[dtype]


def _dot_type(dtype: torch.dtype) -> Any:
    """What tl.dot multiplies. The interpreter's tl.dot reads bf16 as integers, so it gets fp32."""
    return (
        tl.float32 if triton.knobs.runtime.interpret and dtype == torch.bfloat16 else _type(dtype)
    )


def _check(*operands: Operand) -> None:
    for rows, _ in operands:
        _type(rows.dtype)
        if not rows.is_contiguous() or rows.data_ptr() % ALIGNMENT:
            raise ValueError(
                f"grouped GEMM: rows {tuple(rows.shape)} with strides {rows.stride()} at address "
                f"{rows.data_ptr():#x}, expected contiguous ones at a multiple of {ALIGNMENT} "
                f"bytes."
            )
        if rows.shape[1] * rows.element_size() % ALIGNMENT:
            raise ValueError(
                f"grouped GEMM: rows of {rows.shape[1]} {rows.dtype}, expected a multiple of "
                f"{ALIGNMENT} bytes."
            )


@triton.jit
def _multiply_rows(
    source: tl.tensor,
    out: tl.tensor,
    tiles: tl.tensor,
    columns: tl.constexpr,
    source_column: tl.constexpr,
    out_column: tl.constexpr,
    weight_column: tl.constexpr,
    inner: tl.constexpr,
    width: tl.constexpr,
    inner_stride: tl.constexpr,
    width_stride: tl.constexpr,
    block_m: tl.constexpr,
    block_n: tl.constexpr,
    block_k: tl.constexpr,
    dot_type: tl.constexpr,
    precision: tl.constexpr,
) -> None:
    """One tile of rows times block_n columns of its weight.

    Programs of a band (tiles of rows of one segment) follow each other column by column, so that
    a column of the weight is read from memory once for all of them.
    """
    num_columns: tl.constexpr = (width + block_n - 1) // block_n
    program = tl.program_id(0)
    near = tiles + (program // num_columns) * columns
    band_first = tl.load(near + _BAND_FIRST).to(tl.int32)
    band_size = tl.load(near + _BAND_SIZE).to(tl.int32)
    in_band = program - band_first * num_columns
    tile = tiles + (band_first + in_band % band_size) * columns
    first_column = in_band // band_size * block_n
    num_rows = tl.load(tile + _NUM_ROWS).to(tl.int32)

    row, column, term = tl.arange(0, block_m), tl.arange(0, block_n), tl.arange(0, block_k)
    # Past the last row the first is read again: its results are not stored.
    read_row = tl.where(row < num_rows, row, 0)
    rows = source + tl.load(tile + source_column) * inner
    rows = rows + read_row[:, None] * inner + term[None, :]
    weight = tl.load(tile + weight_column).to(tl.pointer_type(source.dtype.element_ty))
    weight = tl.multiple_of(weight, _ALIGNMENT) + first_column.to(tl.int64) * width_stride
    weight = weight + term[:, None] * inner_stride + column[None, :] * width_stride
    has_column = first_column + column < width

    total = tl.zeros((block_m, block_n), tl.float32)
    for step in range((inner + block_k - 1) // block_k):
        if inner % block_k == 0:
            x = tl.load(rows)
            if width % block_n == 0:
                w = tl.load(weight)
            else:
                w = tl.load(weight, mask=has_column[None, :], other=0.0)
        else:
            has_term = step * block_k + term < inner
            x = tl.load(rows, mask=has_term[None, :], other=0.0)
            w = tl.load(weight, mask=has_term[:, None] & has_column[None, :], other=0.0)
        total = tl.dot(x.to(dot_type), w.to(dot_type), total, input_precision=precision)
        rows += block_k
        weight += block_k * inner_stride

    results = out + tl.load(tile + out_column) * width + first_column
    results = results + row[:, None] * width + column[None, :]
    stored = (row < num_rows)[:, None] & has_column[None, :]
    tl.store(results, total.to(out.dtype.element_ty), mask=stored)


@triton.jit
def _multiply_weights(
    left: tl.tensor,
    right: tl.tensor,
    targets: tl.tensor,
    parts: tl.tensor,
    target_columns: tl.constexpr,
    part_columns: tl.constexpr,
    left_column: tl.constexpr,
    right_column: tl.constexpr,
    target_column: tl.constexpr,
    target_type: tl.constexpr,
    height: tl.constexpr,
    width: tl.constexpr,
    block_m: tl.constexpr,
    block_n: tl.constexpr,
    block_k: tl.constexpr,
    dot_type: tl.constexpr,
    precision: tl.constexpr,
) -> None:
    """One block of one target: the products of its parts' rows, part after part."""
    blocks_down: tl.constexpr = (height + block_m - 1) // block_m
    blocks_across: tl.constexpr = (width + block_n - 1) // block_n
    program = tl.program_id(0)
    target = targets + (program // (blocks_down * blocks_across)) * target_columns
    block = program % (blocks_down * blocks_across)
    band_first = block // (_BAND * blocks_across) * _BAND
    band_size = tl.minimum(blocks_down - band_first, _BAND)
    in_band = block - band_first * blocks_across
    first_row = (band_first + in_band % band_size) * block_m
    first_column = in_band // band_size * block_n

    row, column, term = tl.arange(0, block_m), tl.arange(0, block_n), tl.arange(0, block_k)
    has_row, has_column = first_row + row < height, first_column + column < width
    total = tl.zeros((block_m, block_n), tl.float32)
    first_part = tl.load(target + _FIRST_PART)
    for i in range(tl.load(target + _NUM_PARTS).to(tl.int32)):
        part = parts + (first_part + i) * part_columns
        num_rows = tl.load(part + _NUM_ROWS).to(tl.int32)
        y = left + tl.load(part + left_column) * height + first_row
        y = y + row[:, None] + term[None, :] * height
        x = right + tl.load(part + right_column) * width + first_column
        x = x + term[:, None] * width + column[None, :]
        for step in range((num_rows + block_k - 1) // block_k):
            has_term = step * block_k + term < num_rows
            if height % block_m == 0:
                y_block = tl.load(y, mask=has_term[None, :], other=0.0)
            else:
                y_block = tl.load(y, mask=has_term[None, :] & has_row[:, None], other=0.0)
            if width % block_n == 0:
                x_block = tl.load(x, mask=has_term[:, None], other=0.0)
            else:
                x_block = tl.load(x, mask=has_term[:, None] & has_column[None, :], other=0.0)
            y_block, x_block = y_block.to(dot_type), x_block.to(dot_type)
            total = tl.dot(y_block, x_block, total, input_precision=precision)
            y += block_k * height
            x += block_k * width

    results = tl.load(target + target_column).to(tl.pointer_type(target_type))
    results = tl.multiple_of(results, _ALIGNMENT) + first_row.to(tl.int64) * width + first_column
    results = results + row[:, None] * width + column[None, :]
    tl.store(results, total.to(target_type), mask=has_row[:, None] & has_column[None, :])
