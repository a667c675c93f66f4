"""What the stand-in for deep_ep is made of: its events, and rows that fly between ranks over gloo.

Used by deepep_stand_in.py only. A flight is one asynchronous all-to-all; its results are NaN, or
indices out of any range, until the event is waited for, as memory is that a kernel still has to
write. Every rank must take part in every flight, in the same order.
Shapes: T = tokens, K = top_k, R = ranks, E = num_experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from typing_extensions import Self

_GARBAGE = -(2**31)  # what an index is before it has arrived


def host_assert(condition: bool, text: str) -> None:
    """What the C++ part checks; like it, RuntimeError."""
    if not condition:
        raise RuntimeError(f"Assertion error (deep_ep stand-in): {text}")


class EventHandle:
    """An event of the current stream, or, with `arrive`, of what is still on its way."""

    def __init__(self, arrive: Callable[[], None] | None = None) -> None:
        self._arrive = arrive

    def current_stream_wait(self) -> None:
        arrive, self._arrive = self._arrive, None
        if arrive is not None:
            arrive()


class EventOverlap:
    """As deep_ep.EventOverlap; of a call that was not asynchronous it has no event to wait for."""

    def __init__(
        self, event: EventHandle | None = None, extra_tensors: tuple[Tensor, ...] | None = None
    ) -> None:
        self.event = event
        self.extra_tensors = extra_tensors
        self.hook_after_wait: Callable[[], None] | None = None

    def current_stream_wait(self, release_handle: bool = False) -> None:
        assert self.event is not None
        self.event.current_stream_wait()
        hook, self.hook_after_wait = self.hook_after_wait, None
        if hook is not None:
            hook()
        if release_handle:
            self.event = None

    def register_hook_after_wait(self, hook_after_wait: Callable[[], None]) -> None:
        assert self.hook_after_wait is None
        self.hook_after_wait = hook_after_wait

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.event is not None:
            self.current_stream_wait()


def finish(arrive: Callable[[], None], is_async: bool) -> EventOverlap:
    if is_async:
        return EventOverlap(EventHandle(arrive))
    arrive()
    return EventOverlap(None)


class Flight:
    """Rows [n, *] of several tensors, under way between all ranks since construction."""

    def __init__(
        self, group: Any, parts: Sequence[Tensor], send: Sequence[int], recv: Sequence[int]
    ) -> None:
        self._empty = [part[:0] for part in parts]
        self._sent = torch.cat([part.contiguous().view(torch.uint8) for part in parts], dim=1)
        self._received = self._sent.new_empty(sum(recv), self._sent.shape[1])
        self._work = dist.all_to_all_single(
            self._received, self._sent, list(recv), list(send), group=group, async_op=True
        )

    def unset(self, num_rows: int) -> list[Tensor]:
        """Tensors for num_rows of each part, holding what must not be read."""
        values = [float("nan") if p.is_floating_point() else _GARBAGE for p in self._empty]
        parts = zip(self._empty, values, strict=True)
        return [part.new_full((num_rows, part.shape[1]), value) for part, value in parts]

    def land(self) -> list[Tensor]:
        """Wait, then what has arrived."""
        self._work.wait()
        sizes = [part.shape[1] * part.element_size() for part in self._empty]
        parts = zip(self._received.split(sizes, dim=1), self._empty, strict=True)
        return [
            received.clone(memory_format=torch.contiguous_format).view(part.dtype)
            for received, part in parts
        ]


class Sender:
    """What both APIs do with rows. in_rank [T, R] bool: which rank gets which token."""

    dtypes: tuple[torch.dtype, ...]

    def __init__(self, group: Any) -> None:
        self.group = group
        self.rank, self.num_ranks = group.rank(), group.size()

    def check_rows(self, x: Tensor) -> None:
        filled = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
        assert not (torch.are_deterministic_algorithms_enabled() and filled)
        host_assert(x.dim() == 2 and x.is_contiguous(), "x.dim() == 2 and x.is_contiguous()")
        host_assert(x.shape[1] * x.element_size() % 16 == 0, "row bytes % sizeof(int4) == 0")
        host_assert(x.dtype in self.dtypes, f"x.scalar_type() is {x.dtype}")

    def ranks_of(self, topk_idx: Tensor, num_experts: int) -> Tensor:
        """[T, R] bool: which ranks have an expert of a token."""
        owner = topk_idx.div(num_experts // self.num_ranks, rounding_mode="floor")
        return (owner[:, :, None] == torch.arange(self.num_ranks)).any(1)

    def gather_counts(self, per_rank: Tensor, per_expert: Tensor) -> tuple[Tensor, list[int]]:
        """[R, R] tokens from rank to rank, and (token, choice) pairs per expert of this rank."""
        mine = torch.cat([per_rank, per_expert])
        rows = [torch.empty_like(mine) for _ in range(self.num_ranks)]
        dist.all_gather(rows, mine, group=self.group)
        both = torch.stack(rows)
        of_experts = both[:, self.num_ranks :].reshape(self.num_ranks, self.num_ranks, -1)
        return both[:, : self.num_ranks], of_experts[:, self.rank].sum(0).tolist()

    def fly_out(
        self, parts_of: Callable[[int, Tensor], list[Tensor]], in_rank: Tensor, recv: list[int]
    ) -> Flight:
        """Send every rank its parts_of(rank, its tokens)."""
        tokens = [in_rank[:, rank].nonzero().flatten() for rank in range(self.num_ranks)]
        columns = zip(*(parts_of(rank, idx) for rank, idx in enumerate(tokens)), strict=True)
        parts = [torch.cat(column) for column in columns]
        return Flight(self.group, parts, [len(idx) for idx in tokens], recv)

    def fly_home(self, parts: list[Tensor], in_rank: Tensor, recv: list[int]) -> Flight:
        """Send rows, ordered by (source rank, token), back to where they came from."""
        host_assert(len(parts[0]) == sum(recv), "x.size(0) == num_recv_tokens")
        host_assert(all(part.dtype == torch.float32 for part in parts[1:]), "topk_weights are fp32")
        return Flight(self.group, parts, recv, in_rank.sum(0).tolist())

    @staticmethod
    def add_up(flight: Flight, in_rank: Tensor, bias: Any, out: Tensor) -> Tensor | None:
        """Add what the ranks return, in fp32, rank by rank; the weights [T, R, K] are not added."""
        rows, *weights = flight.land()
        spread = weights[0].new_zeros(*in_rank.shape, weights[0].shape[1]) if weights else None
        total = torch.zeros(out.shape, dtype=torch.float32)
        for tensor in bias if isinstance(bias, tuple) else [bias]:
            total += 0 if tensor is None else tensor
        start = 0
        for rank in range(in_rank.shape[1]):
            tokens = in_rank[:, rank].nonzero().flatten()
            part = slice(start, start := start + len(tokens))
            total[tokens] += rows[part].float()
            if spread is not None:
                spread[tokens, rank] = weights[0][part]
        out.copy_(total)
        return spread


def localize(topk_idx: Tensor, rank: int, num_local: int) -> Tensor:
    local = topk_idx - rank * num_local
    return local.masked_fill((local < 0) | (local >= num_local), -1)


def count_experts(topk_idx: Tensor, num_experts: int) -> Tensor:
    valid = topk_idx[(topk_idx >= 0) & (topk_idx < num_experts)]
    return torch.bincount(valid, minlength=num_experts).int()


def align(counts: list[int], alignment: int) -> list[int]:
    return [-(-count // alignment) * alignment for count in counts]


def splits(sums: Tensor) -> list[int]:
    splits: list[int] = sums.diff(prepend=sums.new_zeros(1)).tolist()
    return splits
