"""The EP dispatch over DeepEP, for custom models: V1 `Buffer` or V2 `ElasticBuffer`.

Called by MoELayer, on the thread that runs the model. DeepEP sends a token once to every rank that
has one of its experts, and gives the host the counts while the payload is still in flight:
`on_counts` gets them there, and the payload is awaited only before its rows are read. A combine
adds over ranks without weights, so each rank first weighs and adds the rows of a token it holds.
Shapes: T = tokens, k = top_k, H = hidden, E = num_experts, R = ep_size, N = tokens received (each
once), M = rows (one per received token and local expert).

The worked example of permute.py, on rank 0 (experts 0 and 1; -1 marks another rank's choice):
  received        a b c | d e, by source rank and token; weights come with them
  their choices   [[0, -1], [-1, 0], [1, -1], [-1, 0], [0, 1]]     counts = [4, 2], N = 5, M = 6
  rows            a b d e | c e, by local expert, then as received: as AllToAllDispatcher has them
      pair_of_row = [0, 3, 7, 8, 4, 9]   row_of_pair = [[0, <0], [<0, 1], [4, <0], [<0, 2], [3, 5]]
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakValueDictionary

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from .deepep_buffers import Arrival, Buffers, BufferV1, BufferV2, NoBuffer
from .permute import order_tokens

_APIS = ("auto", "v1", "v2")
_MAX_TOP_K = 32  # one lane of a warp per choice
_ROW_BYTES = 16  # rows are copied in units of this
_ROWS_AT_ONCE = 4096  # rows whose products are kept in fp32 at one time

# A buffer is its group's, not a layer's (hundreds of MB), and lives as long as its last dispatcher.
_BUFFERS: WeakValueDictionary[tuple[Any, ...], Buffers] = WeakValueDictionary()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DeepEPHandle:
    """What a combine must know of its dispatch. Valid for one combine per dispatch, on its rank.

    Attributes:
        counts: [E_local] rows received per local expert.
        topk_weights: [T, k] as given to dispatch.
        recv_weights: [N, k] fp32, those of the received tokens, zero where the choice is another
            rank's; carries the gradient back to topk_weights, which must be zero there too.
        pair_of_row: [M] int64. Row i is choice j of token n, with n * k + j = pair_of_row[i].
        row_of_pair: [N, k] int64, the inverse; negative where the choice is another rank's.
        wire: DeepEP's own handle.
    """

    counts: tuple[int, ...]
    topk_weights: Tensor
    recv_weights: Tensor
    pair_of_row: Tensor
    row_of_pair: Tensor
    wire: Any


class DeepEPDispatcher:
    """Dispatch and combine over one EP group by DeepEP. Holds no state of a call.

    All dispatchers of a group share one DeepEP buffer, made in the first dispatch (collective) and
    gone with the last dispatcher; a layer with wider rows makes a larger one in its place.

    Args:
        group: the EP group; None means that this rank holds all experts. A group of one rank, and
            None, use no DeepEP.
        api: "v1" (`Buffer`), "v2" (`ElasticBuffer`, in its deterministic mode), or "auto": V2 where
            num_max_tokens_per_rank is given and deep_ep has it, else V1.
        num_max_tokens_per_rank: most tokens that any rank ever dispatches, the same on every rank.
            V2 sizes its buffer by it; V1 needs none.
        check_choices: look for expert indices that are out of range or twice in one token, before
            each dispatch, for which the host waits for topk_idx. Without it they are undefined
            behaviour (V2 stops the device); False is for routers that cannot produce them.
    Raises:
        ValueError: this rank is not in the group; unknown api; V2 without num_max_tokens_per_rank;
            a group size that V1 has no kernels for.
        RuntimeError: deep_ep cannot be imported, or has not what is asked for.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None = None,
        *,
        api: str = "auto",
        num_max_tokens_per_rank: int | None = None,
        check_choices: bool = True,
    ) -> None:
        self.group = group
        self.ep_rank = 0 if group is None else dist.get_rank(group)
        self.ep_size = 1 if group is None else dist.get_world_size(group)
        if self.ep_rank < 0:
            raise ValueError(f"rank {dist.get_rank()} is not in the EP group it was given.")
        self.check_choices = check_choices
        self._buffers = _find_buffers(group, api, num_max_tokens_per_rank)

    def __deepcopy__(self, memo: dict[int, Any]) -> DeepEPDispatcher:
        return self  # a process group and its buffer are shared by all copies of a model

    def check_layer(self, hidden: int, dtype: torch.dtype, num_experts: int, top_k: int) -> None:
        """Refuse, with a sentence, a layer that DeepEP cannot carry.

        Raises:
            ValueError: num_experts is not a multiple of ep_size, top_k > 32, a dtype other than
                bfloat16, or a hidden size that the kernels do not take.
        """
        if num_experts < 1 or num_experts % self.ep_size:
            raise ValueError(
                f"num_experts is {num_experts}, expected a multiple of the EP group's "
                f"{self.ep_size} ranks."
            )
        if top_k > _MAX_TOP_K:
            raise ValueError(f"top_k is {top_k}, expected {_MAX_TOP_K} at most for DeepEP.")
        self._check_dtype("tokens", dtype)
        if hidden * dtype.itemsize % _ROW_BYTES:
            raise ValueError(
                f"a token of hidden={hidden} {dtype} has {hidden * dtype.itemsize} bytes, expected "
                f"a multiple of {_ROW_BYTES} for DeepEP."
            )
        self._buffers.check_hidden(hidden, dtype)

    def dispatch(
        self,
        tokens: Tensor,
        topk_idx: Tensor,
        num_experts: int,
        *,
        topk_weights: Tensor,
        on_counts: Callable[[list[int]], None] | None = None,
    ) -> tuple[Tensor, DeepEPHandle]:
        """Send every token to the ranks of its experts. Collective over the group.

        Args:
            tokens: [T, H] bfloat16; T may be zero and differ between ranks.
            topk_idx: [T, k] int64, global expert indices, no expert twice in a token; -1 means no
                choice (its weight is ignored and gets a zero gradient).
            num_experts: E, a multiple of ep_size.
            topk_weights: [T, k] fp32. DeepEP carries them with the tokens, as the experts' ranks
                weigh. Hand the same tensor to combine.
            on_counts: gets the rows per local expert once the host has them, while the payload is
                in flight.
        Returns:
            rows [M, H] sorted by (local expert, source rank, token), and the handle for combine.
            In grad mode the rows need a gradient on every rank: each rank must run backward
            through them if any rank does.
        Raises:
            ValueError: on this rank alone (peers then stop at DeepEP's own timeout) for tensors
                that do not fit, choices that are out of range or double, and a torch setting that
                DeepEP refuses.
        """
        self._check(tokens, topk_idx, topk_weights, num_experts)
        with torch.no_grad():
            arrival = self._buffers.dispatch(
                tokens.contiguous(), topk_idx.contiguous(), topk_weights.contiguous(), num_experts
            )
        if on_counts is not None:
            on_counts(list(arrival.counts))
        with torch.no_grad():
            arrival.wait()
            recv_weights = arrival.weights.masked_fill(arrival.topk_idx < 0, 0)
        pair_of_row, row_of_pair = _order_rows(arrival)
        anchor = tokens.new_empty(0).requires_grad_(torch.is_grad_enabled())
        rows, recv_weights = _Dispatch.apply(
            tokens, topk_weights, anchor, arrival.x, recv_weights,
            pair_of_row, row_of_pair, self._buffers, arrival.handle,
        )  # fmt: skip
        return rows, DeepEPHandle(
            counts=tuple(arrival.counts),
            topk_weights=topk_weights,
            recv_weights=recv_weights,
            pair_of_row=pair_of_row,
            row_of_pair=row_of_pair,
            wire=arrival.handle,
        )

    def combine(self, rows: Tensor, topk_weights: Tensor, handle: DeepEPHandle) -> Tensor:
        """Bring the experts' outputs home and add them per token. Collective over the group.

        Each rank adds the weighted rows of a token in the order of its choices, in fp32, and rounds
        once; DeepEP adds these over the ranks in fp32, and rounds once.

        Args:
            rows: [M, H] in the order dispatch gave them.
            topk_weights: the tensor dispatch was given.
            handle: of the dispatch that made the rows.
        Returns:
            tokens [T, H] in rows' dtype, zero for tokens without a choice. In grad mode they need a
            gradient, on every rank.
        Raises:
            ValueError: rows or topk_weights do not fit the handle.
        """
        _check_filling()
        if rows.dim() != 2 or rows.shape[0] != sum(handle.counts):
            expected = f"[{sum(handle.counts)}, hidden]"
            raise ValueError(f"rows are {list(rows.shape)}, expected {expected} as dispatched.")
        self._check_dtype("rows", rows.dtype)
        if topk_weights is not handle.topk_weights:
            raise ValueError(
                "topk_weights are not the tensor that dispatch was given, expected that one: "
                "DeepEP has sent it with the tokens."
            )
        tokens: Tensor = _Combine.apply(
            rows, handle.recv_weights,  # which need a gradient on every rank, as the rows did
            handle.pair_of_row, handle.row_of_pair, self._buffers, handle.wire,
        )  # fmt: skip
        return tokens

    def _check_dtype(self, what: str, dtype: torch.dtype) -> None:
        dtypes = self._buffers.dtypes
        if dtypes and dtype not in dtypes:
            names = " or ".join(str(known) for known in dtypes)
            raise ValueError(
                f"{what} are {dtype}, expected {names}: DeepEP's combine adds nothing else. Use "
                'that dtype for the layer, or dispatcher="all_to_all".'
            )

    def _check(
        self, tokens: Tensor, topk_idx: Tensor, topk_weights: Tensor, num_experts: int
    ) -> None:
        if topk_idx.dim() != 2 or topk_idx.shape[1] < 1 or topk_idx.dtype != torch.int64:
            seen = f"{list(topk_idx.shape)} {topk_idx.dtype}"
            raise ValueError(f"topk_idx is {seen}, expected [num_tokens, top_k] torch.int64.")
        if tokens.dim() != 2 or tokens.shape[0] != topk_idx.shape[0]:
            expected = f"[{topk_idx.shape[0]}, hidden]"
            raise ValueError(f"tokens are {list(tokens.shape)}, expected {expected} as topk_idx.")
        if topk_weights.shape != topk_idx.shape or topk_weights.dtype != torch.float32:
            seen = f"{list(topk_weights.shape)} {topk_weights.dtype}"
            expected = f"{list(topk_idx.shape)} torch.float32"
            raise ValueError(f"topk_weights are {seen}, expected {expected}.")
        self.check_layer(tokens.shape[1], tokens.dtype, num_experts, topk_idx.shape[1])
        self._buffers.check_tokens(tokens)
        _check_filling()
        if self.check_choices:
            _check_choices(topk_idx, num_experts)


def _find_buffers(group: dist.ProcessGroup | None, api: str, num_max_tokens: int | None) -> Buffers:
    """The group's buffer, shared with the dispatchers that ask for the same one."""
    if api not in _APIS:
        raise ValueError(f"api is {api!r}, expected one of {', '.join(_APIS)}.")
    if api == "v2" and num_max_tokens is None:
        raise ValueError(
            "num_max_tokens_per_rank is None, expected the most tokens that any rank dispatches: "
            "DeepEP V2 sizes its buffer by it."
        )
    if group is None or dist.get_world_size(group) == 1:
        return NoBuffer()
    deep_ep = _import_deep_ep()
    v1, v2 = getattr(deep_ep, "Buffer", None), getattr(deep_ep, "ElasticBuffer", None)
    wants_v2 = num_max_tokens is not None and (api == "v2" or (api == "auto" and v2 is not None))
    buffer_class = v2 if wants_v2 else v1
    if buffer_class is None:
        wanted = "ElasticBuffer (V2)" if wants_v2 else "Buffer (V1)"
        raise RuntimeError(f"deep_ep has no {wanted}. Choose the other api or another DeepEP.")
    key = group, buffer_class, num_max_tokens if wants_v2 else None
    buffers = _BUFFERS.get(key)
    if buffers is None:
        if num_max_tokens is not None and wants_v2:
            buffers = BufferV2(buffer_class, group, num_max_tokens)
        else:
            buffers = BufferV1(buffer_class, group)
        _BUFFERS[key] = buffers
    return buffers


def _import_deep_ep() -> Any:
    """From deep_ep itself: what deep_ep.utils holds differs between its versions."""
    try:
        import deep_ep
    except (ImportError, AssertionError, OSError) as error:  # it also checks NCCL and CUDA
        raise RuntimeError(
            f"deep_ep cannot be imported ({type(error).__name__}: {error}). Install DeepEP for "
            'this torch and CUDA, or use dispatcher="all_to_all".'
        ) from error
    return deep_ep


def _check_filling() -> None:
    deterministic = torch.are_deterministic_algorithms_enabled()
    if deterministic and torch.utils.deterministic.fill_uninitialized_memory:  # type: ignore[attr-defined]
        raise ValueError(
            "torch.use_deterministic_algorithms is on with fill_uninitialized_memory, which DeepEP "
            "refuses: the filling would race with its stream. Set "
            "torch.utils.deterministic.fill_uninitialized_memory = False."
        )


def _check_choices(topk_idx: Tensor, num_experts: int) -> None:
    outside = (topk_idx < -1) | (topk_idx >= num_experts)
    ordered = topk_idx.sort(dim=1).values
    double = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
    num_outside, num_double = torch.stack([outside.sum(), double.any(1).sum()]).tolist()
    if num_outside:
        raise ValueError(
            f"topk_idx has {num_outside} entries outside [-1, {num_experts}). Nothing was "
            "dispatched."
        )
    if num_double:
        raise ValueError(
            f"topk_idx has {num_double} tokens that choose an expert twice, expected distinct "
            "experts for DeepEP. Nothing was dispatched."
        )


def _order_rows(arrival: Arrival) -> tuple[Tensor, Tensor]:
    """Sort the local choices of the received tokens by expert; never waits for the device."""
    order = order_tokens(arrival.topk_idx.to(torch.int64), len(arrival.counts))
    num_foreign = arrival.topk_idx.numel() - sum(arrival.counts)  # these come first, as -1
    return order.pair_of_row[num_foreign:], order.row_of_pair - num_foreign


class _Dispatch(Function):
    """Received tokens -> rows; backward is DeepEP's combine, of the tokens and of their weights."""

    @staticmethod
    def forward(
        ctx: Any, tokens: Tensor, topk_weights: Tensor, anchor: Tensor,
        recv_x: Tensor, recv_weights: Tensor, pair_of_row: Tensor, row_of_pair: Tensor,
        buffers: Buffers, wire: Any,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        ctx.save_for_backward(row_of_pair)
        ctx.buffers, ctx.wire = buffers, wire
        return recv_x.index_select(0, _token_of_row(pair_of_row, row_of_pair)), recv_weights

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_rows: Tensor, grad_weights: Tensor) -> tuple[Tensor | None, ...]:
        (row_of_pair,) = ctx.saved_tensors
        grad_recv_x = _sum_choices(grad_rows, row_of_pair, None)
        # With the weights on every rank, wanted or not: the ranks must agree on what is sent.
        grad_tokens, grad_topk = ctx.buffers.combine(grad_recv_x, ctx.wire, grad_weights)
        wanted = zip(ctx.needs_input_grad, (grad_tokens, grad_topk), strict=False)
        return (*(grad if needed else None for needed, grad in wanted), *[None] * 7)


class _Combine(Function):
    """Rows -> weighted sums per received token -> DeepEP's combine; backward is its dispatch."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, recv_weights: Tensor,
        pair_of_row: Tensor, row_of_pair: Tensor, buffers: Buffers, wire: Any,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(rows, recv_weights, pair_of_row, row_of_pair)
        ctx.buffers, ctx.wire = buffers, wire
        tokens, _ = buffers.combine(_sum_choices(rows, row_of_pair, recv_weights), wire, None)
        return tokens

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, weights, pair_of_row, row_of_pair = ctx.saved_tensors
        grad_recv_x = ctx.buffers.dispatch_again(grad.contiguous(), ctx.wire)
        grad_of_row = grad_recv_x.index_select(0, _token_of_row(pair_of_row, row_of_pair))
        grad_rows = grad_weights = None
        if ctx.needs_input_grad[1]:
            dots = _dot_rows(rows, grad_of_row)
            grad_weights = weights.new_zeros(weights.numel()).scatter_(0, pair_of_row, dots)
            grad_weights = grad_weights.view_as(weights)
        if ctx.needs_input_grad[0]:
            weight_of_row = weights.reshape(-1).index_select(0, pair_of_row)[:, None]
            grad_rows = torch.empty_like(rows)
            torch.mul(grad_of_row, weight_of_row, out=grad_rows)
        return grad_rows, grad_weights, None, None, None, None


def _token_of_row(pair_of_row: Tensor, row_of_pair: Tensor) -> Tensor:
    return pair_of_row.div(row_of_pair.shape[1], rounding_mode="floor")


def _sum_choices(rows: Tensor, row_of_pair: Tensor, weights: Tensor | None) -> Tensor:
    """[N, H]: the rows of each token, times weights [N, k], first choice first, in fp32."""
    num_tokens, top_k = row_of_pair.shape
    wide = torch.promote_types(rows.dtype, torch.float32)
    total = rows.new_zeros(num_tokens, rows.shape[1], dtype=wide)
    for choice in range(top_k if len(rows) else 0):
        row = row_of_pair[:, choice]
        chosen = rows.index_select(0, row.clamp(min=0)).to(wide)
        if weights is not None:
            chosen *= weights[:, choice, None]
        total += chosen.masked_fill_(row[:, None] < 0, 0)
    return total.to(rows.dtype)


def _dot_rows(rows: Tensor, others: Tensor) -> Tensor:
    """[M] fp32: the product of each pair of rows, summed over H."""
    parts = zip(rows.split(_ROWS_AT_ONCE), others.split(_ROWS_AT_ONCE), strict=True)
    return torch.cat([(row * other.to(torch.float32)).sum(-1) for row, other in parts])
