"""permute, unpermute and the grouping of received rows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from feplb.dispatch.permute import (
    TokenOrder,
    group_by_expert,
    order_tokens,
    permute,
    reorder,
    unpermute,
)

EXAMPLE = torch.tensor([[0, 2], [3, 0], [1, 2]])  # the docstring's rank 0: tokens a b c, 4 experts
A, B, C = [1.0, 10.0], [2.0, 20.0], [3.0, 30.0]


@st.composite
def choices(draw: st.DrawFn) -> tuple[Tensor, int]:
    """topk_idx [T, k] with repeated experts allowed, and num_experts."""
    num_experts = draw(st.integers(1, 6))
    num_tokens, top_k = draw(st.integers(0, 12)), draw(st.integers(1, 4))
    expert = st.integers(0, num_experts - 1)
    flat = draw(st.lists(expert, min_size=num_tokens * top_k, max_size=num_tokens * top_k))
    return torch.tensor(flat, dtype=torch.int64).view(num_tokens, top_k), num_experts


def dense_unpermute(rows: Tensor, weights: Tensor, order: TokenOrder) -> Tensor:
    return (rows[order.row_of_pair] * weights[..., None]).sum(1)


def test_order_of_the_worked_example() -> None:
    order = order_tokens(EXAMPLE, 4)
    assert order.pair_of_row.tolist() == [0, 3, 4, 1, 5, 2]
    assert order.row_of_pair.tolist() == [[0, 3], [5, 1], [2, 4]]
    assert order.expert_counts.tolist() == [2, 1, 2, 1]


def test_permute_copies_each_token_to_its_experts() -> None:
    rows = permute(torch.tensor([A, B, C]), order_tokens(EXAMPLE, 4))
    assert rows.tolist() == [A, B, C, A, C, B]


def test_unpermute_adds_the_weighted_rows_of_a_token() -> None:
    # Row of expert e holds e + 1.   a: 0.5*1 + 0.25*3   b: 1*4 + 0*1   c: 2*2 + 1*3
    rows = torch.tensor([[1.0], [1.0], [2.0], [3.0], [3.0], [4.0]])
    weights = torch.tensor([[0.5, 0.25], [1.0, 0.0], [2.0, 1.0]])
    assert unpermute(rows, weights, order_tokens(EXAMPLE, 4)).tolist() == [[1.25], [4.0], [7.0]]


def test_received_rows_of_the_worked_example_are_grouped_by_expert() -> None:
    order = group_by_expert(torch.tensor([[2, 1], [2, 1]]), 6)
    assert order.source.tolist() == [0, 1, 3, 4, 2, 5]
    assert order.inverse.tolist() == [0, 1, 4, 2, 3, 5]


@given(choices())
@settings(deadline=None)
def test_rows_are_sorted_by_expert_then_token_and_are_the_tokens(case: tuple[Tensor, int]) -> None:
    topk_idx, num_experts = case
    order = order_tokens(topk_idx, num_experts)
    pairs = [(expert, p) for p, expert in enumerate(topk_idx.reshape(-1).tolist())]
    assert order.pair_of_row.tolist() == [p for _, p in sorted(pairs)]
    tokens = torch.arange(len(topk_idx), dtype=torch.float32)[:, None].expand(-1, 3)
    expected = [p // topk_idx.shape[1] for _, p in sorted(pairs)]
    assert permute(tokens, order)[:, 0].tolist() == expected
    bincount = torch.bincount(topk_idx.reshape(-1), minlength=num_experts)
    assert torch.equal(order.expert_counts, bincount)


@given(choices())
@settings(deadline=None)
def test_round_trip_gives_every_token_top_k_times(case: tuple[Tensor, int]) -> None:
    topk_idx, num_experts = case
    order = order_tokens(topk_idx, num_experts)
    # Integers, so the sums are exact and equality is the right comparison.
    tokens = torch.randint(-99, 99, (len(topk_idx), 4)).float()
    there_and_back = unpermute(permute(tokens, order), torch.ones(topk_idx.shape), order)
    assert torch.equal(there_and_back, tokens * topk_idx.shape[1])


@given(st.lists(st.lists(st.integers(0, 4), min_size=3, max_size=3), min_size=1, max_size=4))
@settings(deadline=None)
def test_grouping_sorts_by_expert_then_source_rank(counts: list[list[int]]) -> None:
    received = [
        (expert, rank, i)
        for rank, row in enumerate(counts)
        for expert, count in enumerate(row)
        for i in range(count)
    ]
    order = group_by_expert(torch.tensor(counts), len(received))
    assert [received[i] for i in order.source.tolist()] == sorted(received)
    rows = torch.arange(len(received)).float()[:, None]
    assert torch.equal(reorder(reorder(rows, order), order.reversed()), rows)


@pytest.mark.parametrize("num_tokens", [0, 5])
def test_gradients_in_fp64(num_tokens: int) -> None:
    torch.manual_seed(1)
    topk_idx = torch.randint(0, 4, (num_tokens, 3))
    order = order_tokens(topk_idx, 4)
    tokens = torch.randn(num_tokens, 2, dtype=torch.float64, requires_grad=True)
    rows = torch.randn(num_tokens * 3, 2, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(num_tokens, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: permute(x, order), (tokens,))
    assert torch.autograd.gradcheck(lambda r, w: unpermute(r, w, order), (rows, weights))
    by_expert = group_by_expert(order.expert_counts.view(2, 2), num_tokens * 3)
    assert torch.autograd.gradcheck(lambda r: reorder(r, by_expert), (rows,))


def test_bf16_is_added_in_fp32_and_rounded_once() -> None:
    torch.manual_seed(2)
    topk_idx = torch.randint(0, 8, (64, 6))
    order = order_tokens(topk_idx, 8)
    rows = torch.randn(384, 16).bfloat16().requires_grad_()
    weights = torch.rand(64, 6)
    total = torch.zeros(64, 16)
    for j in range(6):
        total += rows.detach()[order.row_of_pair[:, j]].float() * weights[:, j, None]
    assert torch.equal(unpermute(rows, weights, order), total.bfloat16())

    tokens = torch.randn(64, 16).bfloat16().requires_grad_()
    permute(tokens, order).backward(rows.detach())
    summed = torch.zeros(64, 16)
    for j in range(6):
        summed += rows.detach()[order.row_of_pair[:, j]].float()
    assert tokens.grad is not None
    assert torch.equal(tokens.grad, summed.bfloat16())


def test_backward_of_unpermute_in_bf16_rounds_once() -> None:
    torch.manual_seed(3)
    order = order_tokens(torch.randint(0, 8, (32, 4)), 8)
    rows = torch.randn(128, 16).bfloat16().requires_grad_()
    weights = torch.rand(32, 4, requires_grad=True)
    grad = torch.randn(32, 16).bfloat16()
    unpermute(rows, weights, order).backward(grad)
    wide_rows = rows.detach().float().requires_grad_()
    wide_weights = weights.detach().requires_grad_()
    dense_unpermute(wide_rows, wide_weights, order).backward(grad.float())
    assert wide_rows.grad is not None
    assert rows.grad is not None
    assert torch.equal(rows.grad, wide_rows.grad.bfloat16())
    torch.testing.assert_close(weights.grad, wide_weights.grad)


def test_experts_out_of_range_are_in_no_count() -> None:
    order = order_tokens(torch.tensor([[0, 4], [-1, 3]]), 4)
    assert order.expert_counts.tolist() == [1, 0, 0, 1]


@pytest.mark.parametrize(
    "topk_idx", [torch.zeros(3, dtype=torch.int64), torch.zeros(3, 2), torch.zeros(3, 0).long()]
)
def test_topk_idx_of_another_form_is_refused(topk_idx: Tensor) -> None:
    with pytest.raises(ValueError, match=r"expected \[num_tokens, top_k\] torch.int64"):
        order_tokens(topk_idx, 4)


def test_tensors_that_do_not_fit_the_order_are_refused() -> None:
    order = order_tokens(EXAMPLE, 4)
    with pytest.raises(ValueError, match=r"tokens are \[4, 2\], expected \[3, hidden\]"):
        permute(torch.zeros(4, 2), order)
    with pytest.raises(ValueError, match=r"rows are \[5, 2\], expected \[6, hidden\]"):
        unpermute(torch.zeros(5, 2), torch.zeros(3, 2), order)
    with pytest.raises(ValueError, match=r"topk_weights are \[3, 1\], expected \[3, 2\]"):
        unpermute(torch.zeros(6, 2), torch.zeros(3, 1), order)
