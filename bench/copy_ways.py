"""Copies that the benches of a GPU time: between which memories, and who submits them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from feplb import _core

CONTROL = "a kernel (control)"
END_S = 10.0  # longest until a copy has arrived

Pieces = Sequence[tuple[int, int]]  # (offset, bytes), the same in source and destination


@dataclass(frozen=True)
class Direction:
    """Where from and where to; must_be_engine: what feplb promises of it."""

    name: str
    dst: Tensor
    src: Tensor
    must_be_engine: bool = True


def directions(num_bytes: int) -> list[Direction]:
    """Those that this machine has, each over buffers of its own."""

    def made(device: str) -> Tensor:
        if device == "host":
            return torch.ones(num_bytes, dtype=torch.uint8, pin_memory=True)
        return torch.zeros(num_bytes, dtype=torch.uint8, device=device)

    found = [
        Direction("H2D", made("cuda:0"), made("host")),
        Direction("D2H", made("host"), made("cuda:0")),
        Direction("D2D, one GPU", made("cuda:0"), made("cuda:0"), must_be_engine=False),
    ]
    if torch.cuda.device_count() > 1 and torch.cuda.can_device_access_peer(0, 1):
        peer = Direction("peer", made("cuda:1"), made("cuda:0"))
        peer.dst.copy_(peer.src)  # lets PyTorch map the peer's memory
        found.append(peer)
    torch.cuda.synchronize()
    return found


class CopyWay(Protocol):
    """Who submits.

    Attributes:
        name: for tables.
    """

    name: str

    def submit(self, direction: Direction, pieces: Pieces | None = None) -> Any:
        """Copy these pieces, or everything; does not wait. A ticket."""
        ...

    def wait(self, ticket: Any) -> int:
        """Spin until they have arrived; time.monotonic_ns() when that was seen."""
        ...

    def done(self, ticket: Any) -> bool:
        """Have they arrived?"""
        ...


def everything(direction: Direction) -> Pieces:
    return [(0, direction.src.nbytes)]


class LaneCopy:
    """As the ce lane submits them: its driver calls, on a stream of its making."""

    def __init__(self, copy_call: str, ordinal: int = 0) -> None:
        self._stream = _core.CopyStream(ordinal=ordinal, copy_call=copy_call)
        self.name = f"feplb, {self._stream.calls}"

    def after_current_stream(self) -> None:
        """What is submitted next starts when PyTorch's current stream has come this far."""
        self._stream.after(torch.cuda.current_stream().cuda_stream)

    def submit(self, direction: Direction, pieces: Pieces | None = None) -> int:
        """See CopyWay."""
        dst, src = direction.dst.data_ptr(), direction.src.data_ptr()
        chosen = everything(direction) if pieces is None else pieces
        return self._stream.copy([(dst + at, src + at, size) for at, size in chosen])

    def wait(self, ticket: int) -> int:
        """See CopyWay."""
        return self._stream.wait(ticket, END_S)

    def done(self, ticket: int) -> bool:
        """See CopyWay."""
        return self._stream.done(ticket)


class TorchCopy:
    """torch's copy_ on a stream of its own; or, as a control, a kernel that reads and writes."""

    def __init__(self, *, by_kernel: bool = False) -> None:
        self._stream = torch.cuda.Stream()
        self._by_kernel = by_kernel
        self.name = CONTROL if by_kernel else "torch copy_"

    def submit(self, direction: Direction, pieces: Pieces | None = None) -> Any:
        """See CopyWay."""
        with torch.cuda.stream(self._stream):
            for at, size in everything(direction) if pieces is None else pieces:
                dst, src = direction.dst[at : at + size], direction.src[at : at + size]
                if self._by_kernel:
                    torch.add(src, 0, out=dst)
                else:
                    dst.copy_(src, non_blocking=True)
            done = torch.cuda.Event()
            done.record()
        return done

    def wait(self, ticket: Any) -> int:
        """See CopyWay."""
        deadline = time.monotonic() + END_S
        while not ticket.query():
            if time.monotonic() > deadline:
                raise RuntimeError(f"{self.name} has not arrived within {END_S:g} s")
        return time.monotonic_ns()

    def done(self, ticket: Any) -> bool:
        """See CopyWay."""
        return bool(ticket.query())
