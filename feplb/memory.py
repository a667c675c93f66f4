"""What feplb reserves on each rank, and what it may use beside it: known before the run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

_MIB = 1 << 20


@dataclass(frozen=True)
class MemoryReport:
    """Shared memory of one rank, by part, in bytes.

    Args:
        parts: arena part -> bytes. Per layer, with C = max_rows, row = H x itemsize, side =
            bytes of a row's side data, expert = bytes of an expert's weights; all layers share the
            largest: rows 2 x C x (2 row + side); returns 2 x C x (row + side); outbox the same;
            weight slots and grad outbox num_slots x expert; grad slots num_grad_slots x expert.
        board_bytes: the count board, once per domain.
        recv_rows: C of the largest layer. Beside the arena, a helper keeps what the compute saves
            for at most that many received rows per call in flight (SwiGLU: 2 F x itemsize a row).
    """

    parts: dict[str, int]
    board_bytes: int
    recv_rows: int

    @property
    def arena_bytes(self) -> int:
        """Bytes of this rank's arena."""
        return sum(self.parts.values())

    def __str__(self) -> str:
        lines = [f"feplb reserves {self.arena_bytes / _MIB:.1f} MiB of shared memory per rank:"]
        lines += [f"  {name:<13} {size / _MIB:9.2f} MiB" for name, size in self.parts.items()]
        lines.append(f"  {'count board':<13} {self.board_bytes / _MIB:9.2f} MiB, once per domain")
        lines.append(
            f"  and at most {self.recv_rows} received rows' saved activations per call in flight"
        )
        return "\n".join(lines)


def memory_report(
    shapes: list[dict[str, Any]], num_slots: int, num_grad_slots: int, num_ranks: int
) -> MemoryReport:
    """The report for layers of these shapes (as the core takes them)."""
    from . import _core

    parts: dict[str, int] = _core.arena_parts(shapes, num_slots, num_grad_slots)
    return MemoryReport(
        parts=parts,
        board_bytes=_core.board_bytes(num_ranks, max(s["num_local_experts"] for s in shapes)),
        recv_rows=max(shape["max_rows"] for shape in shapes),
    )
