"""The EP dispatch over torch.distributed: tokens to the ranks of their experts, outputs back.

Called by MoELayer, on the thread that runs the model. A dispatch exchanges the counts first and
hands them to `on_counts` before any payload moves, so that planning hides behind the payload.
Both directions are one uneven all-to-all (gloo or NCCL), differentiable; the backward of each is
the all-to-all the other way. Every rank takes part in every collective, with zero rows too.
Shapes: T = tokens, k = top_k, H = hidden, E = num_experts, R = ep_size. Expert e lives on EP rank
e // E_local. The row order of a worked example is drawn in permute.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from .permute import (
    RowOrder,
    TokenOrder,
    group_by_expert,
    order_tokens,
    permute,
    reorder,
    unpermute,
)

# What a rank tells its peers beside its counts: does it record a graph, do its tokens need grads?
_NO_GRAPH, _GRAPH, _GRAPH_TO_TOKENS = 0, 1, 2


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DispatchHandle:
    """What a combine must know of its dispatch. Valid for one combine per dispatch, on its rank.

    Attributes:
        counts: [E_local] rows received per local expert.
        token_order: tokens <-> rows sorted by global expert, which is the sending order.
        row_order: rows as received (source rank, expert) -> by (expert, source rank); None in a
            group of one rank, where the two are the same.
        send_splits: [R] rows sent to each EP rank.
        recv_splits: [R] rows received from each EP rank.
    """

    counts: tuple[int, ...]
    token_order: TokenOrder
    row_order: RowOrder | None
    send_splits: tuple[int, ...]
    recv_splits: tuple[int, ...]


class AllToAllDispatcher:
    """Dispatch and combine over one EP group. Holds no state of a call.

    Args:
        group: the EP group; None means that this rank holds all experts. A group of one rank, and
            None, use no collective.
    Raises:
        ValueError: this rank is not in the group.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.ep_rank = 0 if group is None else dist.get_rank(group)
        self.ep_size = 1 if group is None else dist.get_world_size(group)
        if self.ep_rank < 0:
            raise ValueError(f"rank {dist.get_rank()} is not in the EP group it was given.")

    def __deepcopy__(self, memo: dict[int, Any]) -> AllToAllDispatcher:
        return self  # a process group is shared by all copies of a model

    def dispatch(
        self,
        tokens: Tensor,
        topk_idx: Tensor,
        num_experts: int,
        *,
        on_counts: Callable[[list[int]], None] | None = None,
    ) -> tuple[Tensor, DispatchHandle]:
        """Send every token to the ranks of its experts. Collective over the group.

        Args:
            tokens: [T, H]; T may be zero and differ between ranks.
            topk_idx: [T, k] int64, global expert indices.
            num_experts: E, a multiple of ep_size.
            on_counts: gets the rows per local expert once the host has them, before the payload.
        Returns:
            rows [N, H] sorted by (local expert, source rank, token), and the handle for combine.
            If the tokens of any rank need a gradient, the rows need one on every rank.
        Raises:
            ValueError: on every rank if any rank's topk_idx leaves [0, E), or if only some ranks
                record a graph; on this rank alone for shapes that do not fit.
        """
        self._check(tokens, topk_idx, num_experts)
        order = order_tokens(topk_idx, num_experts)
        sent, received = self._exchange_counts(order, tokens)
        counts = [sum(column) for column in zip(*received.counts, strict=True)]
        if on_counts is not None:
            on_counts(counts)
        rows, row_order = permute(tokens, order), None
        rows = self._send(rows, sent.splits, received.splits, needs_grad=received.tokens_need_grad)
        if self.ep_size > 1:
            row_order = group_by_expert(received.on_device, sum(counts))
            rows = reorder(rows, row_order)
        return rows, DispatchHandle(
            counts=tuple(counts),
            token_order=order,
            row_order=row_order,
            send_splits=sent.splits,
            recv_splits=received.splits,
        )

    def combine(self, rows: Tensor, topk_weights: Tensor, handle: DispatchHandle) -> Tensor:
        """Bring the experts' outputs home and add them per token. Collective over the group.

        Args:
            rows: [N, H] in the order dispatch gave them.
            topk_weights: [T, k] of this rank's tokens.
            handle: of the dispatch that made the rows.
        Returns:
            tokens [T, H] in rows' dtype. Where a graph is recorded it needs a gradient, on every
            rank: each rank must run backward through it if any rank does.
        Raises:
            ValueError: rows or topk_weights do not fit the handle.
        """
        if rows.dim() != 2 or rows.shape[0] != sum(handle.counts):
            expected = f"[{sum(handle.counts)}, hidden]"
            raise ValueError(f"rows are {list(rows.shape)}, expected {expected} as dispatched.")
        if handle.row_order is not None:
            rows = reorder(rows, handle.row_order.reversed())
        rows = self._send(
            rows, handle.recv_splits, handle.send_splits, needs_grad=torch.is_grad_enabled()
        )
        return unpermute(rows, topk_weights, handle.token_order)

    def _check(self, tokens: Tensor, topk_idx: Tensor, num_experts: int) -> None:
        if num_experts < 1 or num_experts % self.ep_size:
            raise ValueError(
                f"num_experts is {num_experts}, expected a multiple of the EP group's "
                f"{self.ep_size} ranks."
            )
        if tokens.dim() != 2 or tokens.shape[0] != topk_idx.shape[0]:
            expected = f"[{topk_idx.shape[0]}, hidden]"
            raise ValueError(f"tokens are {list(tokens.shape)}, expected {expected} as topk_idx.")

    def _exchange_counts(self, order: TokenOrder, tokens: Tensor) -> tuple[_Header, _Header]:
        """Exchange [R, E_local + 2] integers: the counts, invalid choices, and the grad state."""
        counts = order.expert_counts.view(self.ep_size, -1)
        num_invalid = order.pair_of_row.numel() - counts.sum()
        grad_state = _NO_GRAPH
        if torch.is_grad_enabled():
            grad_state = _GRAPH_TO_TOKENS if tokens.requires_grad else _GRAPH
        remarks = torch.stack([num_invalid, torch.full_like(num_invalid, grad_state)])
        sent = torch.cat([counts, remarks.expand(self.ep_size, 2)], dim=1)
        received = torch.empty_like(sent)
        if self.ep_size > 1:
            dist.all_to_all_single(received, sent, group=self.group)
        else:
            received = sent
        on_host: list[list[list[int]]] = torch.stack([sent, received]).tolist()
        headers = _Header(sent, on_host[0]), _Header(received, on_host[1])
        headers[1].check(order.expert_counts.numel())
        return headers

    def _send(
        self,
        rows: Tensor,
        send_splits: Sequence[int],
        recv_splits: Sequence[int],
        *,
        needs_grad: bool,
    ) -> Tensor:
        if self.ep_size == 1:
            return rows
        # Keeps the node, and so this rank's part of the backward all-to-all, where none of its
        # own tensors needs a gradient but another rank's do.
        anchor = rows.new_empty(0).requires_grad_(needs_grad)
        sent: Tensor = _AllToAll.apply(
            rows, anchor, list(send_splits), list(recv_splits), self.group
        )
        return sent


class _Header:
    """The counts of one direction and the ranks' remarks, [R, E_local + 2] on device and host."""

    def __init__(self, on_device: Tensor, on_host: list[list[int]]) -> None:
        self.on_device = on_device[:, :-2]
        self.counts = [row[:-2] for row in on_host]
        self.splits = tuple(sum(row) for row in self.counts)
        self._num_invalid = [row[-2] for row in on_host]
        self._grad_states = [row[-1] for row in on_host]

    @property
    def tokens_need_grad(self) -> bool:
        return _GRAPH_TO_TOKENS in self._grad_states

    def check(self, num_experts: int) -> None:
        for rank, num_invalid in enumerate(self._num_invalid):
            if num_invalid:
                raise ValueError(
                    f"topk_idx of EP rank {rank} has {num_invalid} entries outside [0, "
                    f"{num_experts}). Nothing was dispatched."
                )
        if _NO_GRAPH in self._grad_states and max(self._grad_states) > _NO_GRAPH:
            modes = [state != _NO_GRAPH for state in self._grad_states]
            raise ValueError(
                f"grad mode differs between the EP ranks ({modes} by rank). Nothing was "
                "dispatched. Run all ranks of the group with or without gradients."
            )


class _AllToAll(Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        anchor: Tensor,
        send_splits: list[int],
        recv_splits: list[int],
        group: dist.ProcessGroup,
    ) -> Tensor:
        ctx.splits = send_splits, recv_splits
        ctx.group = group
        return _all_to_all(rows, send_splits, recv_splits, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, None, None]:
        send_splits, recv_splits = ctx.splits
        grad_rows = _all_to_all(grad, recv_splits, send_splits, ctx.group)
        return grad_rows if ctx.needs_input_grad[0] else None, None, None, None, None


def _all_to_all(
    rows: Tensor, send_splits: list[int], recv_splits: list[int], group: dist.ProcessGroup
) -> Tensor:
    received = rows.new_empty(sum(recv_splits), rows.shape[1])
    dist.all_to_all_single(received, rows.contiguous(), recv_splits, send_splits, group=group)
    return received
