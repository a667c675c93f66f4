"""What DeepEPDispatcher needs of DeepEP, the same for `Buffer` (V1) and `ElasticBuffer` (V2).

The only file that knows the two APIs apart. Called by deepep.py on the thread that runs the model;
DeepEP works on a stream of its own. No call here names a previous event: DeepEP's stream then waits
for all that the current stream has been given so far, and memory is safe without more care. Only
the dispatch of a forward is asynchronous: the current stream waits in `Arrival.wait`.
Shapes: T = tokens, k = top_k, H = hidden, E = num_experts, R = ep_size, N = tokens received.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

# A stand-in without a GPU may name more in class attributes of these names.
_DTYPES = (torch.bfloat16,)
_DEVICE_TYPES = ("cuda",)

_V1_ROW_BYTES = 32  # SM90: two TMA stores per row, each of whole 16 bytes ...
_V1_MOST_ROW_BYTES = 16352  # ... and 8 KiB at most, with its barrier
_V2_HIDDEN = 256  # combine: 32 lanes of 16 bytes of bfloat16


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Arrival:
    """What a dispatch gives: the counts at once, the tensors after `wait`.

    Attributes:
        counts: [E_local] (token, choice) pairs received per local expert, on the host.
        x: [N, H] tokens by (source rank, token), each once.
        topk_idx: [N, k] local expert indices, -1 for other ranks' choices.
        weights: [N, k] fp32; at other ranks' choices V1 has zeros, V2 whatever was sent.
        handle: DeepEP's own, for combine and dispatch_again; stays valid.
        wait: makes the current stream wait for the tensors. Call it once.
    """

    counts: list[int]
    x: Tensor
    topk_idx: Tensor
    weights: Tensor
    handle: Any
    wait: Callable[[], None]


class Buffers(Protocol):
    """The DeepEP buffer of one EP group, made by the first dispatch. All calls are collective."""

    dtypes: tuple[torch.dtype, ...]  # of the tokens; empty means any

    def check_hidden(self, hidden: int, dtype: torch.dtype) -> None:
        """Raise ValueError for rows that the kernels do not take."""

    def check_tokens(self, tokens: Tensor) -> None:
        """Raise ValueError for tokens [T, H] that the buffer cannot take."""

    def dispatch(
        self, tokens: Tensor, topk_idx: Tensor, topk_weights: Tensor, num_experts: int
    ) -> Arrival:
        """Send contiguous tokens [T, H] with choices [T, k] and weights; asynchronous."""

    def dispatch_again(self, x: Tensor, handle: Any) -> Tensor:
        """Send x [T, H] the way of an earlier dispatch -> [N, H]; the backward of combine."""

    def combine(
        self, x: Tensor, handle: Any, topk_weights: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Add x [N, H] over ranks, per token -> [T, H]; and [N, k] fp32 -> [T, k] beside it."""


class NoBuffer:
    """A group of one rank: what is sent has arrived. Any dtype, any device."""

    dtypes: tuple[torch.dtype, ...] = ()

    def check_hidden(self, hidden: int, dtype: torch.dtype) -> None: ...

    def check_tokens(self, tokens: Tensor) -> None: ...

    def dispatch(
        self, tokens: Tensor, topk_idx: Tensor, topk_weights: Tensor, num_experts: int
    ) -> Arrival:
        counts = torch.bincount(topk_idx.flatten() + 1, minlength=num_experts + 1)[1:].tolist()
        return Arrival(
            counts=counts,
            x=tokens,
            topk_idx=topk_idx,
            weights=topk_weights,
            handle=None,
            wait=lambda: None,
        )

    def dispatch_again(self, x: Tensor, handle: Any) -> Tensor:
        return x

    def combine(
        self, x: Tensor, handle: Any, topk_weights: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        return x, topk_weights


class _DeepEP:
    """What both APIs have: a class of deep_ep, a group, and one buffer of it, once needed."""

    def __init__(self, buffer_class: Any, group: dist.ProcessGroup) -> None:
        self.dtypes: tuple[torch.dtype, ...] = getattr(buffer_class, "dtypes", _DTYPES)
        self._device_types: tuple[str, ...] = getattr(buffer_class, "device_types", _DEVICE_TYPES)
        self._class = buffer_class
        self._group = group
        self._num_ranks = dist.get_world_size(group)
        self._buffer: Any = None

    def check_tokens(self, tokens: Tensor) -> None:
        if tokens.device.type not in self._device_types:
            expected = " or ".join(self._device_types)
            raise ValueError(f"tokens are on {tokens.device}, expected {expected} for DeepEP.")


class BufferV1(_DeepEP):
    """DeepEP V1, `deep_ep.Buffer`: a buffer sized by the width of a row."""

    def __init__(self, buffer_class: Any, group: dist.ProcessGroup) -> None:
        super().__init__(buffer_class, group)
        self._hidden_bytes = 0
        try:
            buffer_class.get_dispatch_config(self._num_ranks)
        except AssertionError as error:
            raise ValueError(
                f"the EP group has {self._num_ranks} ranks, for which DeepEP V1 has no kernels: "
                "expected 2, 4, 8 or a listed multiple of 8. Use another EP size, or "
                'dispatcher="all_to_all".'
            ) from error

    def check_hidden(self, hidden: int, dtype: torch.dtype) -> None:
        num_bytes = hidden * dtype.itemsize
        fits = num_bytes % _V1_ROW_BYTES == 0 and num_bytes <= _V1_MOST_ROW_BYTES
        if self._class.is_sm90_compiled() and not fits:
            raise ValueError(
                f"a token of hidden={hidden} {dtype} has {num_bytes} bytes, expected a multiple of "
                f"{_V1_ROW_BYTES} and {_V1_MOST_ROW_BYTES} at most for DeepEP V1 built for SM90."
            )

    def dispatch(
        self, tokens: Tensor, topk_idx: Tensor, topk_weights: Tensor, num_experts: int
    ) -> Arrival:
        buffer = self._reserve(tokens)
        per_rank, per_rdma_rank, per_expert, is_token_in_rank, _ = buffer.get_dispatch_layout(
            topk_idx, num_experts, async_finish=True
        )
        x, recv_idx, recv_weights, counts, handle, event = buffer.dispatch(
            tokens,
            num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=per_rdma_rank,
            is_token_in_rank=is_token_in_rank,
            num_tokens_per_expert=per_expert,
            topk_idx=topk_idx,
            topk_weights=topk_weights,
            async_finish=True,
        )
        return Arrival(
            counts=list(counts),
            x=x,
            topk_idx=recv_idx,
            weights=recv_weights,
            handle=handle,
            wait=event.current_stream_wait,
        )

    def dispatch_again(self, x: Tensor, handle: Any) -> Tensor:
        received: Tensor = self._reserve(x).dispatch(x, handle=handle)[0]
        return received

    def combine(
        self, x: Tensor, handle: Any, topk_weights: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        combined, weights, _ = self._reserve(x).combine(x, handle, topk_weights=topk_weights)
        return combined, weights

    def _reserve(self, x: Tensor) -> Any:
        """The buffer, anew where rows are wider than ever before: on all ranks in the same call."""
        hidden_bytes = x.shape[1] * max(x.element_size(), 2)
        if hidden_bytes > self._hidden_bytes:
            self._buffer = None  # freed before the larger one is reserved
            configs = (
                self._class.get_dispatch_config(self._num_ranks),
                self._class.get_combine_config(self._num_ranks),
            )
            sizes = (hidden_bytes, self._num_ranks)
            self._buffer = self._class(
                self._group,
                max(config.get_nvl_buffer_size_hint(*sizes) for config in configs),
                max(config.get_rdma_buffer_size_hint(*sizes) for config in configs),
            )
            self._hidden_bytes = hidden_bytes
        return self._buffer


class BufferV2(_DeepEP):
    """DeepEP V2, `deep_ep.ElasticBuffer`: a buffer sized by tokens, width and choices.

    Deterministic: V2's rows of one source rank arrive in any order otherwise, so that a recomputed
    forward would not match the first, nor a run the next.
    """

    def __init__(
        self, buffer_class: Any, group: dist.ProcessGroup, num_max_tokens_per_rank: int
    ) -> None:
        super().__init__(buffer_class, group)
        self._num_max_tokens = num_max_tokens_per_rank
        self._sizes = 0, 0  # hidden and top_k that the buffer is made for

    def check_hidden(self, hidden: int, dtype: torch.dtype) -> None:
        if hidden % _V2_HIDDEN:
            raise ValueError(
                f"hidden is {hidden}, expected a multiple of {_V2_HIDDEN} for DeepEP V2's combine."
            )

    def check_tokens(self, tokens: Tensor) -> None:
        super().check_tokens(tokens)
        if tokens.shape[0] > self._num_max_tokens:
            raise ValueError(
                f"{tokens.shape[0]} tokens are dispatched, expected "
                f"num_max_tokens_per_rank={self._num_max_tokens} at most. Raise it on every rank."
            )

    def dispatch(
        self, tokens: Tensor, topk_idx: Tensor, topk_weights: Tensor, num_experts: int
    ) -> Arrival:
        x, recv_idx, recv_weights, handle, event = self._reserve(
            tokens.shape[1], topk_idx.shape[1]
        ).dispatch(
            tokens,
            topk_idx=topk_idx,
            topk_weights=topk_weights,
            num_experts=num_experts,
            async_with_compute_stream=True,
        )
        return Arrival(
            counts=list(handle.num_recv_tokens_per_expert_list),
            x=x,
            topk_idx=recv_idx,
            weights=recv_weights,
            handle=handle,
            wait=event.current_stream_wait,
        )

    def dispatch_again(self, x: Tensor, handle: Any) -> Tensor:
        # num_experts and num_sms are not taken from the handle where DeepEP sizes its launch.
        received: Tensor = self._buffer.dispatch(
            x, handle=handle, num_experts=handle.num_experts, num_sms=handle.num_sms
        )[0]
        return received

    def combine(
        self, x: Tensor, handle: Any, topk_weights: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        combined, weights, _ = self._buffer.combine(x, handle, topk_weights=topk_weights)
        return combined, weights

    def _reserve(self, hidden: int, top_k: int) -> Any:
        """The buffer, anew where it is too small: on all ranks in the same call."""
        sizes = max(hidden, self._sizes[0]), max(top_k, self._sizes[1])
        if sizes != self._sizes:
            self._buffer = None  # freed before the larger one is reserved
            num_bytes = self._class.get_buffer_size_hint(self._group, self._num_max_tokens, *sizes)
            self._buffer = self._class(
                self._group,
                num_bytes=num_bytes,
                num_max_tokens_per_rank=self._num_max_tokens,
                deterministic=True,
            )
            self._sizes = sizes
        return self._buffer
