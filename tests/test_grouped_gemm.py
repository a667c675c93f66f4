"""The products over segments: tables by hand, results against fp64, and the bits of a row."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kernel_cases import (
    DTYPES,
    EXAMPLES,
    MOST_ROWS,
    SHAPES,
    is_hole,
    num_rows_of,
    on_each_device,
    rounding,
    same_bits,
    segment_lists,
    subnormal_step,
    tiles_for,
)
from properties import given, settings, st
from torch import Tensor

from feplb.kernels import segment_tables
from feplb.kernels.grouped_gemm import TritonGemm
from feplb.kernels.products import GroupedGemm, Operand
from feplb.kernels.segment_tables import grad_table, row_table
from feplb.kernels.stream_gemm import StreamGemm
from feplb.kernels.tiles import INTERPRETER, TileConfig

Segments = list[tuple[int, int, int]]
UNTOUCHED = 7.0
ways = pytest.mark.parametrize("way", ["triton", "streams"])


def gemm_of(way: str, dtype: torch.dtype) -> GroupedGemm:
    tiles = tiles_for(dtype)
    return TritonGemm(tiles) if way == "triton" else StreamGemm(2, tiles.block_m)


def draw(*shape: int, dtype: torch.dtype, device: str, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(device, dtype)


def multiply_rows(
    gemm: GroupedGemm, rows: Tensor, segments: Segments, weights: list[Tensor], *, transposed: bool
) -> Tensor:
    """[N, width], UNTOUCHED where no segment is. weights[w] is the weight of index w."""
    width = weights[0].shape[0 if transposed else 1]
    out = rows.new_full((len(rows), width), UNTOUCHED)
    table = row_table(segments, [weights], gemm.block_m, rows.device)
    gemm.multiply_rows(Operand(rows), Operand(out), table, tensor=0, transposed=transposed)
    return out


# ---- tables


def test_tiles_of_the_documented_example() -> None:
    weights = torch.zeros(3, 4, 4)
    table = row_table([(0, 6, 0), (9, 11, 2)], [weights], 4, torch.device("cpu"))
    addresses = [weights[i].data_ptr() for i in (0, 0, 2)]
    assert table.parts == ((0, 0, 6, 0), (9, 6, 2, 2))
    #          spread  packed  rows  band first  band size
    assert table.tiles.tolist() == [
        [0, 0, 4, 0, 2, addresses[0]],
        [4, 4, 2, 0, 2, addresses[1]],
        [9, 6, 2, 2, 1, addresses[2]],
    ]


def test_a_band_never_leaves_its_segment_and_is_at_most_eight_tiles() -> None:
    weights = torch.zeros(2, 4, 4)
    table = row_table([(0, 1, 1), (1, 39, 0)], [weights], 4, torch.device("cpu"))
    first = table.tiles[:, segment_tables.BAND_FIRST].tolist()
    size = table.tiles[:, segment_tables.BAND_SIZE].tolist()
    assert first == [0] + [1] * 8 + [9] * 2
    assert size == [1] + [8] * 8 + [2] * 2


def test_rows_are_grouped_by_weight_for_its_gradient() -> None:
    segments = [(4, 6, 1), (0, 0, 2), (6, 7, 0), (9, 12, 1)]
    grads = torch.zeros(3, 4, 4)
    table = grad_table(segments, [grads, None], torch.device("cpu"))
    # first part, number of parts, address of each tensor's target; 0 = not wanted
    assert table.targets.tolist() == [
        [0, 2, grads[1].data_ptr(), 0],
        [2, 0, grads[2].data_ptr(), 0],
        [2, 1, grads[0].data_ptr(), 0],
    ]
    assert table.parts.tolist() == [[4, 0, 2, 0], [9, 3, 3, 0], [6, 2, 1, 0]]


# ---- rows


@on_each_device
@ways
@pytest.mark.parametrize("transposed", [False, True])
@settings(max_examples=EXAMPLES, deadline=None)
@given(
    segments=segment_lists(),
    dtype=st.sampled_from(DTYPES),
    shape=st.sampled_from(SHAPES),
)
def test_rows_times_weight_and_holes_untouched(
    device: str,
    way: str,
    transposed: bool,
    segments: Segments,
    dtype: torch.dtype,
    shape: tuple[int, int],
) -> None:
    inner, width = shape
    num_rows = num_rows_of(segments)
    rows = draw(num_rows, inner, dtype=dtype, device=device)
    holes = is_hole(segments, num_rows)
    rows[holes] = float("nan")
    of_weight = (width, inner) if transposed else (inner, width)
    weights = [draw(*of_weight, dtype=dtype, device=device, seed=i + 1) for i in range(3)]
    out = multiply_rows(gemm_of(way, dtype), rows, segments, weights, transposed=transposed)
    assert bool((out[holes] == UNTOUCHED).all())
    for start, end, idx in segments:
        x, w = rows[start:end].double(), weights[idx].double()
        w = w.t() if transposed else w
        # K additions in fp32, then one rounding.
        bound = inner * 2**-23 * (x.abs() @ w.abs()) + rounding(dtype) * (x @ w).abs()
        bound += subnormal_step(dtype)
        assert bool(((out[start:end].double() - x @ w).abs() <= bound).all())


@on_each_device
@ways
def test_packed_rows_go_to_their_places_and_back(device: str, way: str) -> None:
    dtype, segments = torch.float32, [(3, 20, 1), (20, 20, 0), (25, 26, 0)]
    gemm, identity = gemm_of(way, dtype), torch.eye(8, device=device)
    rows = draw(30, 8, dtype=dtype, device=device)
    packed, back = rows.new_full((18, 8), UNTOUCHED), rows.new_full((30, 8), UNTOUCHED)
    table = row_table(segments, [[identity, identity]], gemm.block_m, rows.device)
    gemm.multiply_rows(
        Operand(rows), Operand(packed, packed=True), table, tensor=0, transposed=False
    )
    gemm.multiply_rows(
        Operand(packed, packed=True), Operand(back), table, tensor=0, transposed=True
    )
    assert torch.equal(packed, torch.cat([rows[3:20], rows[25:26]]))
    expected = rows.masked_fill(is_hole(segments, 30).to(device)[:, None], UNTOUCHED)
    assert torch.equal(back, expected)


@on_each_device
@settings(max_examples=EXAMPLES, deadline=None)
@given(segments=segment_lists(), dtype=st.sampled_from(DTYPES), shift=st.integers(0, 20))
def test_same_row_in_other_company_has_the_same_bits(
    device: str, segments: Segments, dtype: torch.dtype, shift: int
) -> None:
    gemm = gemm_of("triton", dtype)
    rows = draw(num_rows_of(segments), 40, dtype=dtype, device=device)
    stacked = draw(3, 72, 40, dtype=dtype, device=device, seed=1)
    together = multiply_rows(gemm, rows, segments, list(stacked), transposed=True)
    for start, end, idx in segments:
        elsewhere = torch.cat([draw(shift, 40, dtype=dtype, device=device), rows[start:end]])
        alone = multiply_rows(
            gemm, elsewhere, [(shift, shift + end - start, 0)], [stacked[idx].clone()],
            transposed=True,
        )  # fmt: skip
        assert same_bits(alone[shift:], together[start:end])


@on_each_device
@settings(max_examples=EXAMPLES, deadline=None)
@given(num_rows=st.integers(2, 2 * MOST_ROWS), cut=st.floats(0, 1), dtype=st.sampled_from(DTYPES))
def test_a_segment_cut_in_two_has_the_same_bits(
    device: str, num_rows: int, cut: float, dtype: torch.dtype
) -> None:
    at = round(cut * num_rows)
    rows = draw(num_rows, 40, dtype=dtype, device=device)
    weights = [draw(72, 40, dtype=dtype, device=device, seed=1)]
    gemm = gemm_of("triton", dtype)
    whole = multiply_rows(gemm, rows, [(0, num_rows, 0)], weights, transposed=True)
    halves = [(0, at, 0), (at, num_rows, 0)]
    assert same_bits(multiply_rows(gemm, rows, halves, weights, transposed=True), whole)


# ---- weight gradients


@on_each_device
@ways
@settings(max_examples=EXAMPLES, deadline=None)
@given(
    segments=segment_lists(),
    dtype=st.sampled_from(DTYPES),
    wide=st.booleans(),
    shape=st.sampled_from(SHAPES),
)
def test_weight_gradients_are_sums_over_the_segments(
    device: str,
    way: str,
    segments: Segments,
    dtype: torch.dtype,
    wide: bool,
    shape: tuple[int, int],
) -> None:
    height, width = shape
    num_rows = num_rows_of(segments)
    grad = draw(num_rows, height, dtype=dtype, device=device)
    rows = draw(num_rows, width, dtype=dtype, device=device, seed=1)
    for tensor in (grad, rows):
        tensor[is_hole(segments, num_rows)] = float("nan")
    target_dtype = torch.float32 if wide else dtype
    targets = torch.full((3, height, width), UNTOUCHED, dtype=target_dtype, device=device)
    gemm, table = gemm_of(way, dtype), grad_table(segments, [targets], rows.device)
    gemm.multiply_weights(Operand(grad), Operand(rows), table, tensor=0)
    for idx in range(3):
        parts = [(s, e) for s, e, weight_idx in segments if weight_idx == idx]
        if not parts:
            assert bool((targets[idx] == UNTOUCHED).all())
            continue
        y = torch.cat([grad[s:e] for s, e in parts]).double()
        x = torch.cat([rows[s:e] for s, e in parts]).double()
        bound = (len(x) + 1) * 2**-23 * (y.abs().t() @ x.abs()) + subnormal_step(target_dtype)
        if way == "triton":
            bound += rounding(target_dtype) * (y.t() @ x).abs()
        else:  # rounds each part to the dtype of the rows, and their sums
            bound += 2 * len(parts) * rounding(dtype) * (y.abs().t() @ x.abs())
        assert bool(((targets[idx].double() - y.t() @ x).abs() <= bound).all())


@on_each_device
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_weight_gradient_has_the_same_bits_wherever_its_rows_lie(
    device: str, dtype: torch.dtype
) -> None:
    gemm = gemm_of("triton", dtype)
    grad = draw(61, 40, dtype=dtype, device=device)
    rows = draw(61, 72, dtype=dtype, device=device, seed=1)
    together = torch.empty(3, 40, 72, dtype=dtype, device=device)
    table = grad_table([(1, 4, 0), (5, 39, 2), (39, 60, 1)], [together], rows.device)
    gemm.multiply_weights(Operand(grad), Operand(rows), table, tensor=0)
    alone = torch.empty(40, 72, dtype=dtype, device=device)
    table = grad_table([(0, 34, 0)], [[alone]], rows.device)
    gemm.multiply_weights(Operand(grad[5:39].clone()), Operand(rows[5:39].clone()), table, tensor=0)
    assert same_bits(alone, together[2])


def test_nothing_past_the_end_of_a_tensor_is_read() -> None:
    script = Path(__file__).with_name("kernel_guard_pages.py")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    result = subprocess.run(
        [sys.executable, str(script)],
        check=False, env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr


# ---- refusals


def test_rows_that_are_no_multiple_of_16_bytes_are_refused() -> None:
    rows, weights = torch.zeros(2, 6), torch.zeros(1, 8, 6)
    with pytest.raises(ValueError, match=r"rows of 6 torch.float32, expected a multiple of 16"):
        multiply_rows(TritonGemm(INTERPRETER), rows, [(0, 2, 0)], list(weights), transposed=True)


def test_weights_that_are_not_contiguous_are_refused() -> None:
    rows, weight = torch.zeros(2, 8), torch.zeros(8, 8).t()
    with pytest.raises(ValueError, match=r"weights\[0\].*expected contiguous"):
        multiply_rows(TritonGemm(INTERPRETER), rows, [(0, 2, 0)], [weight], transposed=True)


def test_rows_at_an_odd_address_are_refused() -> None:
    rows, weights = torch.zeros(17)[1:].view(2, 8), [torch.zeros(8, 8)]
    with pytest.raises(ValueError, match=r"expected contiguous ones at a multiple of 16 bytes"):
        multiply_rows(TritonGemm(INTERPRETER), rows, [(0, 2, 0)], weights, transposed=True)


def test_fp64_is_refused() -> None:
    rows, weights = torch.zeros(2, 8).double(), [torch.zeros(8, 8).double()]
    with pytest.raises(ValueError, match=r"torch.float64, expected one of torch.float32"):
        multiply_rows(TritonGemm(INTERPRETER), rows, [(0, 2, 0)], weights, transposed=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_m": 48}, "block_m is 48"),
        ({"block_k": 8}, "block_k is 8"),
        ({"num_warps": 3}, "num_warps is 3"),
        ({"num_stages": 0}, "num_stages is 0"),
    ],
)
def test_tiles_that_cannot_be_are_refused(change: dict[str, int], message: str) -> None:
    fields = {"block_m": 16, "block_n": 16, "block_k": 16, "num_warps": 4, "num_stages": 1}
    with pytest.raises(ValueError, match=message):
        TileConfig(**{**fields, **change})


def test_no_streams_are_refused() -> None:
    with pytest.raises(ValueError, match="num_streams is 0"):
        StreamGemm(0)
