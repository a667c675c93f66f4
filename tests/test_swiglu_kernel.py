"""The fused SwiGLU against fp64 autograd, over segments with holes."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import (
    DTYPES,
    EXAMPLES,
    is_hole,
    num_rows_of,
    on_each_device,
    rounding,
    same_bits,
    segment_lists,
)
from properties import given, settings, st
from torch import Tensor
from torch.nn.functional import silu

from feplb.kernels.segment_tables import RowTable, parts_of, row_table
from feplb.kernels.swiglu import swiglu_backward, swiglu_forward

Segments = list[tuple[int, int, int]]
UNTOUCHED = 7.0


def table_of(segments: Segments, device: str) -> RowTable:
    return row_table(segments, [], 16, torch.device(device))


def draw(*shape: int, dtype: torch.dtype, device: str, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(device, dtype)


def packed_probs(probs: Tensor | None, segments: Segments, like: Tensor) -> Tensor:
    """[P, 1] fp64; ones where there are no probabilities."""
    if probs is None:
        return torch.ones(len(like), 1, dtype=torch.float64, device=like.device)
    parts = [probs[p.spread : p.spread + p.num_rows] for p in parts_of(segments)]
    return torch.cat([*parts, probs[:0]]).double()[:, None]


@on_each_device
@settings(max_examples=EXAMPLES, deadline=None)
@given(
    segments=segment_lists(most_rows=20),
    dtype=st.sampled_from(DTYPES),
    probs_dtype=st.sampled_from([None, torch.float32, torch.bfloat16, torch.float64]),
    width=st.sampled_from([8, 40, 1096]),
)
def test_results_are_those_of_fp64_rounded_once(
    device: str,
    segments: Segments,
    dtype: torch.dtype,
    probs_dtype: torch.dtype | None,
    width: int,
) -> None:
    num_rows, total = num_rows_of(segments), sum(end - start for start, end, _ in segments)
    holes = is_hole(segments, num_rows)
    probs = None
    if probs_dtype is not None:
        probs = draw(num_rows, dtype=probs_dtype, device=device, seed=2)
        probs[holes] = float("nan")
    h = draw(total, 2 * width, dtype=dtype, device=device)
    grad = draw(total, width, dtype=dtype, device=device, seed=1)
    act, grad_h = torch.full_like(grad, UNTOUCHED), torch.full_like(h, UNTOUCHED)
    table = table_of(segments, device)
    swiglu_forward(h, probs, act, table)
    again = grad.clone()
    grad_probs = None if probs is None else torch.full_like(probs, UNTOUCHED)
    swiglu_backward(h, probs, again, grad_h, grad_probs, table)
    assert same_bits(again, act)

    wide = h.double().requires_grad_()
    p = packed_probs(probs, segments, h).requires_grad_()
    expected = silu(wide[:, :width]) * wide[:, width:] * p
    wide_grad, p_grad = torch.autograd.grad(expected, [wide, p], grad.double())
    # About ten fp32 operations on values below 40 in size, then one rounding.
    assert_near(act, expected.detach(), 400 * 2**-23, rounding(dtype))
    assert_near(grad_h, wide_grad, 400 * 2**-23, rounding(dtype))
    if grad_probs is not None:
        assert bool((grad_probs[holes] == UNTOUCHED).all())
        seen = packed_probs(grad_probs, segments, h)
        assert_near(seen, p_grad, width * 400 * 2**-23, rounding(grad_probs.dtype))


def assert_near(seen: Tensor, expected: Tensor, absolute: float, relative: float) -> None:
    assert seen.shape == expected.shape
    off = (seen.double() - expected).abs()
    assert bool((off <= absolute + relative * expected.abs()).all())


def backward(
    h: Tensor, grad: Tensor, probs: Tensor, segments: Segments
) -> tuple[Tensor, Tensor, Tensor]:
    """Activation, gradient of h, gradient of probs."""
    act, grad_h, grad_probs = grad.clone(), torch.empty_like(h), torch.zeros_like(probs)
    swiglu_backward(h, probs, act, grad_h, grad_probs, table_of(segments, str(h.device)))
    return act, grad_h, grad_probs


@on_each_device
@pytest.mark.parametrize("dtype", DTYPES)
def test_same_row_in_other_company_has_the_same_bits(device: str, dtype: torch.dtype) -> None:
    h = draw(24, 2 * 40, dtype=dtype, device=device)
    grad = draw(24, 40, dtype=dtype, device=device, seed=1)
    probs = draw(30, dtype=torch.float32, device=device, seed=2)
    together = backward(h, grad, probs, [(1, 4, 0), (5, 25, 2), (25, 26, 1)])
    alone = backward(h[3:23].clone(), grad[3:23].clone(), probs.roll(4), [(9, 29, 0)])
    for seen, expected in zip(alone[:2], together[:2], strict=True):
        assert same_bits(seen, expected[3:23])
    assert same_bits(alone[2][9:29], together[2][5:25])


@on_each_device
def test_large_gates_give_no_nan(device: str) -> None:
    # silu(-200) is -0, silu(200) is 200, and the slopes there are 0 and 1.
    h = torch.tensor([[-200.0, 200.0, -1e30, 1e30, 1.0, 1.0, 1.0, 1.0]], device=device)
    act, grad_h = torch.ones(1, 4, device=device), torch.empty_like(h)
    swiglu_backward(h, None, act, grad_h, None, table_of([(0, 1, 0)], device))
    assert act.tolist() == [[0.0, 200.0, 0.0, torch.tensor(1e30).item()]]
    assert grad_h[0, :4].tolist() == [0.0, 1.0, 0.0, 1.0]
