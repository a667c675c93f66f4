"""What permute.py does to rows, on the CPU by torch and on a GPU by Triton; chosen here alone.

Shapes: T = tokens, k = top_k, N = T * k rows, H = hidden, D = further dimensions.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

__all__ = ["RowOperations", "TorchRowOperations", "row_operations"]


class RowOperations(Protocol):
    """Gathers, sums and spreads rows. Indices are int64, on the device of the rows.

    Thread/stream: runs on the caller's thread and current stream; waits for nothing.
    """

    def gather_rows(self, rows: Tensor, source: Tensor, repeats: int = 1) -> Tensor:
        """[len(source), *D]: row source[i] // repeats of rows [*, *D]."""
        ...

    def sum_choices(self, rows: Tensor, row_of_pair: Tensor, weights: Tensor | None) -> Tensor:
        """[T, H] in the dtype of rows: of each token, its rows times weights [T, k].

        Adds the first choice first, in fp32 (fp64 for fp64 rows), and rounds once.
        """
        ...

    def spread_grads(
        self,
        grad: Tensor,
        rows: Tensor,
        weights: Tensor,
        row_of_pair: Tensor,
        *,
        rows_wanted: bool,
        weights_wanted: bool,
    ) -> tuple[Tensor | None, Tensor | None]:
        """The gradients of ``sum_choices``, of rows [N, H] and of weights [T, k].

        A row's is its weight times its token's gradient [T, H]; a weight's is the dot product of
        its row and that gradient, summed in fp32 (fp64 for fp64 rows). None where not wanted.
        """
        ...


def row_operations(rows: Tensor) -> RowOperations:
    """Triton's kernels where the rows lie on a GPU, torch's operators elsewhere."""
    if rows.is_cuda:
        from feplb.kernels import permute

        return permute
    return TorchRowOperations()


class TorchRowOperations(RowOperations):
    """RowOperations by torch, on any device."""

    def gather_rows(self, rows: Tensor, source: Tensor, repeats: int = 1) -> Tensor:
        """See RowOperations."""
        if repeats != 1:
            source = source.div(repeats, rounding_mode="floor")
        return rows.index_select(0, source)

    def sum_choices(self, rows: Tensor, row_of_pair: Tensor, weights: Tensor | None) -> Tensor:
        """See RowOperations."""
        num_tokens, top_k = row_of_pair.shape
        total = rows.new_zeros(num_tokens, rows.shape[1], dtype=_sum_dtype(rows.dtype))
        for choice in range(top_k):
            chosen = rows.index_select(0, row_of_pair[:, choice])
            if weights is None:
                total += chosen
            else:
                total += chosen * weights[:, choice, None].to(total.dtype)
        return total.to(rows.dtype)

    def spread_grads(
        self,
        grad: Tensor,
        rows: Tensor,
        weights: Tensor,
        row_of_pair: Tensor,
        *,
        rows_wanted: bool,
        weights_wanted: bool,
    ) -> tuple[Tensor | None, Tensor | None]:
        """See RowOperations."""
        wide = grad.to(_sum_dtype(rows.dtype))
        grad_rows = torch.empty_like(rows) if rows_wanted else None
        dots = []
        for choice, row_of_choice in enumerate(row_of_pair.T):
            if grad_rows is not None:
                weighted = wide * weights[:, choice, None].to(wide.dtype)
                grad_rows.index_copy_(0, row_of_choice, weighted.to(rows.dtype))
            if weights_wanted:
                dots.append((rows.index_select(0, row_of_choice) * wide).sum(-1))
        grad_weights = torch.stack(dots, dim=1).to(weights.dtype) if weights_wanted else None
        return grad_rows, grad_weights


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
