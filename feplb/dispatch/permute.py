"""Orders rows by expert, and brings the experts' outputs back to their tokens.

Used on both ends of the EP dispatch: before it, tokens become rows sorted by global expert; after
it, what arrived from all ranks is grouped by local expert. Every index has its inverse, so forward
and backward only gather; nothing is added by atomics, and sums run in a fixed order. Rows on a GPU
go through Triton kernels, others through torch (row_operations.py).
Shapes: T = tokens, k = top_k, N = T * k rows, H = hidden, E = num_experts.

Worked example, 2 ranks x 2 experts, top_k = 2 (rank 0 owns experts 0 and 1, rank 1 owns 2 and 3):
  rank 0, tokens a b c:  topk_idx = [[0, 2], [3, 0], [1, 2]]
      pairs (token, choice)   0:(a,0) 1:(a,2) 2:(b,3) 3:(b,0) 4:(c,1) 5:(c,2)
      rows by expert          0: a b   1: c   2: a c   3: b
      pair_of_row = [0, 3, 4, 1, 5, 2]   row_of_pair = [[0, 3], [5, 1], [2, 4]]
      expert_counts = [2, 1, 2, 1]
  rank 1, tokens d e:    topk_idx = [[2, 0], [0, 1]]
      rows by expert          0: d e   1: e   2: d     expert_counts = [2, 1, 1, 0]
  rank 0 receives a b | c from rank 0 and d e | e from rank 1, counts [[2, 1], [2, 1]], and groups
  them by local expert: a b d e | c e, source = [0, 1, 3, 4, 2, 5], inverse = [0, 1, 4, 2, 3, 5].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from .row_operations import row_operations


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TokenOrder:
    """Where the rows of a rank's tokens lie. On the tokens' device; holds no gradient.

    Attributes:
        pair_of_row: [N] int64. Row i is choice j of token t, with t * k + j = pair_of_row[i].
        row_of_pair: [T, k] int64, the inverse: the row of choice j of token t.
        expert_counts: [E] int64, rows per expert.
    """

    pair_of_row: Tensor
    row_of_pair: Tensor
    expert_counts: Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RowOrder:
    """A reordering of rows: row i of the result is row source[i]; inverse undoes it. Both [N]."""

    source: Tensor
    inverse: Tensor

    def reversed(self) -> RowOrder:
        """The reordering that undoes this one."""
        return RowOrder(source=self.inverse, inverse=self.source)


def order_tokens(topk_idx: Tensor, num_experts: int) -> TokenOrder:
    """Sort the choices by expert, within an expert by token.

    Args:
        topk_idx: [T, k] int64. Entries outside [0, E) get rows too, but are in no count, so
            expert_counts.sum() < N tells them (this function never waits for the device).
        num_experts: E.
    Raises:
        ValueError: topk_idx is not two-dimensional int64, or top_k is zero.
    """
    if topk_idx.dim() != 2 or topk_idx.shape[1] < 1 or topk_idx.dtype != torch.int64:
        seen = f"{list(topk_idx.shape)} {topk_idx.dtype}"
        raise ValueError(f"topk_idx is {seen}, expected [num_tokens, top_k] torch.int64.")
    experts, pair_of_row = torch.sort(topk_idx.reshape(-1), stable=True)
    bounds = torch.arange(num_experts + 1, device=topk_idx.device)
    return TokenOrder(
        pair_of_row=pair_of_row,
        row_of_pair=_invert(pair_of_row).view(topk_idx.shape),
        expert_counts=torch.searchsorted(experts, bounds).diff(),
    )


def group_by_expert(recv_counts: Tensor, num_rows: int) -> RowOrder:
    """Order received rows (source rank, expert, token) by (expert, source rank, token).

    Args:
        recv_counts: [num_ranks, E_local] int64, rows received per source rank and local expert.
        num_rows: their sum, known to the host (so that the device is not waited for).
    """
    num_ranks, num_local_experts = recv_counts.shape
    experts = torch.arange(num_local_experts, device=recv_counts.device).repeat(num_ranks)
    expert_of_row = experts.repeat_interleave(recv_counts.reshape(-1), output_size=num_rows)
    source = torch.argsort(expert_of_row, stable=True)
    return RowOrder(source=source, inverse=_invert(source))


def permute(tokens: Tensor, order: TokenOrder) -> Tensor:
    """tokens [T, H] -> rows [N, H], a copy of each token for each of its experts, by expert.

    Backward adds the k row gradients of a token in the order of its choices, in fp32 (fp64 for
    fp64 rows), and rounds once.
    """
    if tokens.dim() != 2 or tokens.shape[0] != order.row_of_pair.shape[0]:
        expected = f"[{order.row_of_pair.shape[0]}, hidden]"
        raise ValueError(f"tokens are {list(tokens.shape)}, expected {expected} as in topk_idx.")
    rows: Tensor = _Permute.apply(tokens, order.pair_of_row, order.row_of_pair)
    return rows


def unpermute(rows: Tensor, topk_weights: Tensor, order: TokenOrder) -> Tensor:
    """rows [N, H] -> tokens [T, H]: y[t] = sum over j of topk_weights[t, j] * its row.

    Adds in the order of the choices, in fp32 (fp64 for fp64 rows), and rounds once to rows' dtype.
    Gradients flow to the rows and to topk_weights.
    """
    if topk_weights.shape != order.row_of_pair.shape:
        seen, expected = list(topk_weights.shape), list(order.row_of_pair.shape)
        raise ValueError(f"topk_weights are {seen}, expected {expected} as topk_idx.")
    if rows.dim() != 2 or rows.shape[0] != order.pair_of_row.shape[0]:
        expected_rows = f"[{order.pair_of_row.shape[0]}, hidden]"
        raise ValueError(f"rows are {list(rows.shape)}, expected {expected_rows}.")
    tokens: Tensor = _Unpermute.apply(rows, topk_weights, order.row_of_pair)
    return tokens


def reorder(rows: Tensor, order: RowOrder) -> Tensor:
    """rows [N, H] in another order, each exactly once."""
    reordered: Tensor = _Reorder.apply(rows, order.source, order.inverse)
    return reordered


def _invert(permutation: Tensor) -> Tensor:
    positions = torch.arange(permutation.numel(), device=permutation.device)
    return torch.empty_like(permutation).scatter_(0, permutation, positions)


class _Permute(Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, pair_of_row: Tensor, row_of_pair: Tensor) -> Tensor:
        ctx.save_for_backward(row_of_pair)
        return row_operations(tokens).gather_rows(tokens, pair_of_row, row_of_pair.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_rows: Tensor) -> tuple[Tensor, None, None]:
        (row_of_pair,) = ctx.saved_tensors
        summed = row_operations(grad_rows).sum_choices(grad_rows, row_of_pair, None)
        return summed, None, None


class _Unpermute(Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, topk_weights: Tensor, row_of_pair: Tensor) -> Tensor:
        ctx.save_for_backward(rows, topk_weights, row_of_pair)
        return row_operations(rows).sum_choices(rows, row_of_pair, topk_weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        rows, weights, row_of_pair = ctx.saved_tensors
        rows_wanted, weights_wanted, _ = ctx.needs_input_grad
        grad_rows, grad_weights = row_operations(rows).spread_grads(
            grad,
            rows,
            weights,
            row_of_pair,
            rows_wanted=rows_wanted,
            weights_wanted=weights_wanted,
        )
        return grad_rows, grad_weights, None


class _Reorder(Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, source: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return row_operations(rows).gather_rows(rows, source)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return row_operations(grad).gather_rows(grad, inverse), None, None
