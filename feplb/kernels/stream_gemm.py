"""The products over segments by torch.mm, one call per segment, on a few CUDA streams in turn.

The library (cuBLAS) chooses a kernel by the number of rows, so the bits of a row may depend on how
many rows its segment has: whole experts can move without a change of bits, parts of one cannot.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from .products import GroupedGemm, Operand
from .segment_tables import GradTable, Part, RowTable

__all__ = ["StreamGemm"]


class StreamGemm(GroupedGemm):
    """torch.mm per segment: on CUDA spread over side streams, on the CPU one after the other.

    The side streams of a device are made at its first product.

    Args:
        num_streams: side streams per device.
        block_m: rows per tile of the tables for other kernels; no product uses it.
    Raises:
        ValueError: num_streams or block_m is not positive.
    """

    def __init__(self, num_streams: int = 3, block_m: int = 128) -> None:
        if num_streams < 1 or block_m < 1:
            raise ValueError(
                f"num_streams is {num_streams} and block_m {block_m}, expected 1 or more."
            )
        self.num_streams = num_streams
        self.block_m = block_m
        self._streams: dict[torch.device, list[torch.cuda.Stream]] = {}

    def multiply_rows(
        self, source: Operand, out: Operand, table: RowTable, *, tensor: int, transposed: bool
    ) -> None:
        """See GroupedGemm."""

        def multiply(part: Part) -> None:
            weight = table.weights[tensor][part.weight_idx]
            _place(source.of(part), weight.t() if transposed else weight, out.of(part))

        with self._side_by_side(source.rows) as run:
            for part in table.parts:
                run(partial(multiply, part))

    def multiply_weights(
        self, left: Operand, right: Operand, table: GradTable, *, tensor: int
    ) -> None:
        """See GroupedGemm. Sums of several parts are rounded after each."""
        targets = table.grad_weights[tensor]
        assert targets is not None, "the caller asked for a gradient that is not wanted"

        def add_up(parts: tuple[Part, ...], target: Tensor) -> None:
            if not parts:
                target.zero_()
            for i, part in enumerate(parts):
                terms = left.of(part).t(), right.of(part)
                if i == 0:
                    _place(*terms, target)
                else:
                    target.add_(torch.mm(*terms))

        with self._side_by_side(left.rows) as run:
            for weight_idx, parts in table.members:
                run(partial(add_up, parts, targets[weight_idx]))

    @contextmanager
    def _side_by_side(self, rows: Tensor) -> Iterator[Callable[[Callable[[], None]], None]]:
        """Gives a function that runs its argument on the next stream; joins them in the end."""
        if not rows.is_cuda:
            yield lambda work: work()
            return
        streams = self._streams_of(rows.device)
        current = torch.cuda.current_stream(rows.device)
        used = 0

        def run(work: Callable[[], None]) -> None:
            nonlocal used
            stream = streams[used % len(streams)]
            if used < len(streams):
                stream.wait_stream(current)
            used += 1
            with torch.cuda.stream(stream):
                work()

        try:
            yield run
        finally:
            for stream in streams[:used]:
                current.wait_stream(stream)

    def _streams_of(self, device: torch.device) -> list[torch.cuda.Stream]:
        if device not in self._streams:
            self._streams[device] = [torch.cuda.Stream(device) for _ in range(self.num_streams)]
        return self._streams[device]


def _place(a: Tensor, b: Tensor, out: Tensor) -> None:
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    else:
        out.copy_(torch.mm(a, b))
