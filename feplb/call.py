"""One call in numbers: who computes which rows, what needs gradients, and the plan as a tensor.

Between the balancer, which knows the domain, and two_phase.py, which knows the order of work. Pure
data; waits for nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .compute import Saved, Segment
from .scheduler.plan import whole_expert_floor

KIND_FORWARD, KIND_BACKWARD, KIND_CHECK = 1, 2, 3
NO_MOVES = np.zeros((0, 5), dtype=np.int32)

# GradBits of csrc/count_board.h.
_GRAD_MODE, _NEEDS_KNOWN, _NEEDS_ROWS, _NEEDS_SIDE, _NEEDS_WEIGHT = 1, 2, 4, 3, 11


@dataclass(frozen=True)
class RoutedMove:
    """One move as this rank sees it.

    ``peer_rank`` is the helper of a sent move and the owner of a received one; ``arena_row`` is
    the first row in this rank's return half (sent) or rows half (received); ``slot`` is this
    rank's grad slot (sent) or weight slot (received).
    """

    expert_idx: int
    peer_rank: int
    row_start: int
    row_end: int
    arena_row: int
    slot: int

    @property
    def num_rows(self) -> int:
        """Rows of this move."""
        return self.row_end - self.row_start


@dataclass(frozen=True)
class Agreement:
    """What all ranks derived for one call: the plan, and this rank's part in it."""

    seq: int
    moves: np.ndarray  # [num_moves, 5] int32
    plan_hash: int
    sent: tuple[RoutedMove, ...]
    received: tuple[RoutedMove, ...]
    counts: np.ndarray  # [num_ranks * E] int32, empty in backward
    plan_us: float


@dataclass(frozen=True)
class CallRecord:
    """What one forward call of a layer decided, for reports.

    Args:
        counts: [num_ranks, E] rows per rank and expert.
        moves: [num_moves, 5] expert_idx, owner_rank, dst_rank, row_start, row_end.
        plan_us: time the plan took in the mover, microseconds.
    """

    counts: np.ndarray
    moves: np.ndarray
    plan_us: float

    @property
    def num_rows_moved(self) -> int:
        """Rows that another rank than their owner computed."""
        return int((self.moves[:, 4] - self.moves[:, 3]).sum())

    @property
    def whole_expert_floor(self) -> float:
        """The max / mean below which no plan of whole experts can get; far above 1, use split."""
        return whole_expert_floor(self.counts)

    @property
    def loads_before(self) -> np.ndarray:
        """Rows of each rank as routed, [num_ranks]."""
        loads: np.ndarray = self.counts.sum(axis=1, dtype=np.int64)
        return loads

    @property
    def loads_after(self) -> np.ndarray:
        """Rows that each rank computed, [num_ranks]."""
        loads, num_rows = self.loads_before, self.moves[:, 4] - self.moves[:, 3]
        np.subtract.at(loads, self.moves[:, 1], num_rows)
        np.add.at(loads, self.moves[:, 2], num_rows)
        return loads


@dataclass(frozen=True)
class WeightLayout:
    """How one call's weights, flattened for autograd, belong to tensors and experts.

    Per tensor of an expert the flat list holds either one stacked tensor [E, *S] or E tensors [*S].
    The layout holds no tensor, so that keeping it keeps no weight alive.
    """

    stacked: tuple[bool, ...]
    num_local_experts: int

    def per_tensor(self, flat: Sequence[Any]) -> list[Any]:
        """``flat`` -> per tensor t something indexable by expert (or the one entry if stacked)."""
        views: list[Any] = []
        at = 0
        for is_stacked in self.stacked:
            width = 1 if is_stacked else self.num_local_experts
            views.append(flat[at] if is_stacked else list(flat[at : at + width]))
            at += width
        return views

    def needs_grad(self, flat: Sequence[Tensor]) -> tuple[bool, ...]:
        """Per tensor of an expert: do its weights take gradients?"""
        views = self.per_tensor([w.requires_grad for w in flat])
        return tuple(v if isinstance(v, bool) else any(v) for v in views)


def flatten_weights(
    weights: Sequence[Tensor | Sequence[Tensor]], num_local_experts: int
) -> tuple[WeightLayout, tuple[Tensor, ...]]:
    """``weights``, per tensor stacked [E, *S] or E tensors [*S], as (layout, flat tensors)."""
    if not isinstance(weights, Sequence):
        raise ValueError(f"weights are {type(weights).__name__}, expected one entry per tensor")
    flat: list[Tensor] = []
    stacked: list[bool] = []
    for entry in weights:
        stacked.append(isinstance(entry, Tensor))
        flat.extend([entry] if isinstance(entry, Tensor) else entry)
    return WeightLayout(tuple(stacked), num_local_experts), tuple(flat)


@dataclass(frozen=True)
class CallBits:
    """Which inputs of a call need gradients; every rank must say the same."""

    grad_mode: bool
    rows: bool
    row_data: tuple[bool, ...]
    weights: tuple[bool, ...]

    def packed(self) -> int:
        """As the header carries it."""
        bits = _NEEDS_KNOWN | (_GRAD_MODE if self.grad_mode else 0)
        if not self.grad_mode:
            return bits
        bits |= _NEEDS_ROWS if self.rows else 0
        bits |= sum(1 << (_NEEDS_SIDE + i) for i, need in enumerate(self.row_data) if need)
        return bits | sum(1 << (_NEEDS_WEIGHT + i) for i, need in enumerate(self.weights) if need)


# ------------------------------------------------------------------------------------ segments


def first_rows(counts: Sequence[int]) -> list[int]:
    """Where each expert's rows begin: counts [3, 0, 2] -> [0, 3, 3]."""
    starts, end = [], 0
    for count in counts:
        starts.append(end)
        end += count
    return starts


def kept_segments(counts: Sequence[int], sent: Sequence[RoutedMove]) -> list[Segment]:
    """Row ranges this rank computes itself, by expert: what no sent move took.

    Example: counts [3, 4] with rows [0, 4) of expert 1 sent -> [(0, 3, 0)].
    """
    taken: dict[int, list[tuple[int, int]]] = {}
    for move in sent:
        taken.setdefault(move.expert_idx, []).append((move.row_start, move.row_end))
    segments: list[Segment] = []
    first = 0
    for expert, count in enumerate(counts):
        at = 0
        if expert in taken:
            for start, end in sorted(taken[expert]):
                if start > at:
                    segments.append((first + at, first + start, expert))
                at = end
        if count > at:
            segments.append((first + at, first + count, expert))
        first += count
    return segments


def rows_on_the_way_back(rank: int, moves: np.ndarray) -> tuple[int, int]:
    """Rows whose way back the kept B of ``rank`` should cover, [num_moves, 5] moves of all ranks.

    Returns (out, in). In: what comes back to it, and what others send to the same owners, who take
    in no faster than their own link. (Covering only one's own leaves a twentieth of forward's gain
    where an owner has several helpers, modelled: scheduler/cost_model.py.) Out: what it sends back,
    and what one of its helpers does, who sends all it has got in a row.

    Example: 6 rows of rank 0 go to rank 1 and 2 to rank 2 -> (6, 8), (6, 8) and (2, 8).
    """
    owner, helper, num_rows = moves[:, 1], moves[:, 2], moves[:, 4] - moves[:, 3]

    def sent_by(r: int) -> int:
        return int(num_rows[owner == r].sum())

    def got_by(r: int) -> int:
        return int(num_rows[helper == r].sum())

    owners, helpers = set(owner[helper == rank].tolist()), set(helper[owner == rank].tolist())
    own = sent_by(rank)
    rows_out = max([got_by(rank), *(min(got_by(r), own) for r in helpers)])
    return rows_out, max([own, *(sent_by(r) for r in owners)])


def split_kept(segments: list[Segment], rows_in_b: int) -> tuple[list[Segment], list[Segment]]:
    """Kept A and kept B: B is the shortest suffix of whole segments of >= rows_in_b rows."""
    at, rows = len(segments), 0
    while at > 0 and rows < rows_in_b:
        at -= 1
        rows += segments[at][1] - segments[at][0]
    return segments[:at], segments[at:]


# ------------------------------------------------------------------------- the plan as a tensor

_PLAN_HEAD = 7  # hash high, hash low, micro-batch, kept A segments, saved tensors of A, received, B


def pack_plan(
    agreement: Agreement, micro_batch: int, num_kept_a: int, saved: list[Saved]
) -> Tensor:
    """[head | moves, five each] int64. Saved by every rank in grad mode, so never empty."""
    head = [
        agreement.plan_hash >> 32,
        agreement.plan_hash & 0xFFFFFFFF,
        micro_batch,
        num_kept_a,
        *(len(part.tensors) for part in saved),
    ]
    return torch.tensor(head + agreement.moves.reshape(-1).tolist(), dtype=torch.int64)


@dataclass(frozen=True)
class SavedCall:
    """What backward read back from ``saved_tensors``."""

    plan_hash: int
    micro_batch: int
    num_kept_a: int
    moves: np.ndarray
    rows: Tensor
    row_data: tuple[Tensor, ...]
    weights: tuple[Tensor, ...]
    saved: tuple[Saved, Saved, Saved]


def unpack_call(tensors: Sequence[Tensor], states: Sequence[Any], num_row_data: int) -> SavedCall:
    """Undo ``save_for_backward(packed plan, rows, *row_data, *weights, *saved tensors)``."""
    packed = tensors[0].tolist()
    at = 2 + num_row_data
    num_weights = len(tensors) - at - sum(packed[4:_PLAN_HEAD])
    parts, rest = [], tensors[at + num_weights :]
    for size, state in zip(packed[4:_PLAN_HEAD], states, strict=True):
        parts.append(Saved(tuple(rest[:size]), state))
        rest = rest[size:]
    return SavedCall(
        plan_hash=packed[0] << 32 | packed[1],
        micro_batch=packed[2],
        num_kept_a=packed[3],
        moves=np.asarray(packed[_PLAN_HEAD:], dtype=np.int32).reshape(-1, 5),
        rows=tensors[1],
        row_data=tuple(tensors[2:at]),
        weights=tuple(tensors[at : at + num_weights]),
        saved=(parts[0], parts[1], parts[2]),
    )
