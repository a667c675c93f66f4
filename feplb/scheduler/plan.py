"""A plan as Python sees it, what it does to the loads, and whether it is a valid one.

Plans are made by the C++ core (csrc/plan.h, reached through policies.make_plan); here are the
frozen values and the checks that every policy's plans must pass. Pure integers, no torch.

Legend: counts [num_ranks, num_local_experts], rows that each rank owns for each local expert;
loads [num_ranks], rows that each rank computes.

Worked example, 2 ranks x 2 experts, counts = [[10, 6], [2, 0]], loads 16 | 2:
Move(expert_idx=0, owner_rank=0, dst_rank=1, row_start=0, row_end=10) leaves loads 6 | 12.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise

import numpy as np
import numpy.typing as npt

INT32_MAX = 2**31 - 1
INT64_MAX = 2**63 - 1

Loads = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """Rows [row_start, row_end) of one expert are computed by dst_rank, not by owner_rank.

    expert_idx is local to the owner; rows are counted within this expert on its owner.
    """

    expert_idx: int
    owner_rank: int
    dst_rank: int
    row_start: int
    row_end: int

    @property
    def num_rows(self) -> int:
        return self.row_end - self.row_start

    def __str__(self) -> str:
        return (
            f"rows {self.row_start} to {self.row_end} of expert {self.expert_idx} of rank "
            f"{self.owner_rank} to rank {self.dst_rank}"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanLimits:
    """What the arena can hold, and which experts may move; the same on every rank.

    Args:
        num_dynamic: the last num_dynamic local experts of each rank may move (paper: dyn).
        num_slots: received experts a helper can hold (paper: max_num_dyn).
        num_grad_slots: moves an owner can take weight grads back from.
        max_recv_rows: rows a helper can take in.
        max_return_rows: rows an owner can get back.
        min_tokens: fewest rows worth a move (paper: tau); an empty expert never moves.
        max_copies: most weight copies of a plan, over all ranks (refine, split); 0: at least four,
            one per rank in refine, two in split.
        target_ppm: max / mean to be reached, in millionths, with as few copies as that takes
            (refine, split); below 1,000,000: the least there is.
        grain_rows: split sends multiples of this, or all rows that an expert has.
        search_steps: most steps of refine's search; 0: what takes about 20 us for 8 ranks x 128
            experts. 400 take about 70 us and leave a fifth less.
    Raises:
        ValueError: a value is negative, too large for the core, or not an integer.
    """

    num_dynamic: int
    num_slots: int
    num_grad_slots: int
    max_recv_rows: int
    max_return_rows: int
    min_tokens: int = 1
    max_copies: int = 0
    target_ppm: int = 0
    grain_rows: int = 128
    search_steps: int = 0

    def __post_init__(self) -> None:
        for field in fields(self):
            most = INT64_MAX if field.name.endswith("_rows") else INT32_MAX
            value = getattr(self, field.name)
            if not isinstance(value, int | np.integer) or not 0 <= value <= most:
                raise ValueError(
                    f"PlanLimits.{field.name}: {value!r}, expected an integer from 0 to {most}"
                )


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """All moves of one call, ordered by (owner_rank, expert_idx, row_start), and their hash."""

    moves: tuple[Move, ...] = ()
    hash: int = 0

    @classmethod
    def from_moves(cls, moves: Iterable[Move]) -> Plan:
        """The plan with these moves, ordered and hashed as the core would."""
        ordered = tuple(sorted(moves, key=_order_key))
        return cls(moves=ordered, hash=hash_moves(ordered))

    def as_array(self) -> npt.NDArray[np.int32]:
        """[num_moves, 5]: expert_idx, owner_rank, dst_rank, row_start, row_end."""
        return np.array([_integers(move) for move in self.moves], dtype=np.int32).reshape(-1, 5)

    @property
    def num_rows_moved(self) -> int:
        return sum(move.num_rows for move in self.moves)

    def loads_before(self, counts: npt.ArrayLike) -> Loads:
        """Rows of each rank without the plan, [num_ranks]."""
        return rank_loads(counts)

    def loads_after(self, counts: npt.ArrayLike) -> Loads:
        """Rows that each rank computes under the plan, [num_ranks]."""
        loads = rank_loads(counts)
        for move in self.moves:
            loads[move.owner_rank] -= move.num_rows
            loads[move.dst_rank] += move.num_rows
        return loads

    def imbalance_before(self, counts: npt.ArrayLike) -> float:
        return load_imbalance(self.loads_before(counts))

    def imbalance_after(self, counts: npt.ArrayLike) -> float:
        return load_imbalance(self.loads_after(counts))


def rank_loads(counts: npt.ArrayLike) -> Loads:
    """Rows of each rank when every expert stays on its owner, [num_ranks]."""
    loads: Loads = np.asarray(counts).sum(axis=1, dtype=np.int64)
    return loads


def load_imbalance(loads: npt.ArrayLike) -> float:
    """max / mean of the loads; 1.0 where there are none."""
    rows = np.asarray(loads, dtype=np.int64)
    return float(rows.max() * rows.size / rows.sum()) if rows.sum() > 0 else 1.0


def token_straggler(loads: npt.ArrayLike) -> float:
    """max - mean of the loads, in rows; 0.0 where there are none."""
    rows = np.asarray(loads, dtype=np.int64)
    return float(rows.max() - rows.mean()) if rows.size else 0.0


def whole_expert_floor(counts: npt.ArrayLike) -> float:
    """The load_imbalance below which no plan of whole experts can get.

    It is max(1, rows of the hottest expert / mean rank load): one rank must compute that expert.
    """
    loads = rank_loads(counts)
    if loads.sum() == 0:
        return 1.0
    return max(1.0, float(np.asarray(counts).max() * loads.size / loads.sum()))


def hash_moves(moves: Iterable[Move]) -> int:
    """The hash that csrc/plan.cpp gives these moves: 64-bit FNV-1a over five integers each."""
    return hash_integers([integer for move in moves for integer in _integers(move)])


def hash_integers(integers: Sequence[int]) -> int:
    """hash_moves of moves laid out flat; 0 for none."""
    value = 14695981039346656037
    for integer in integers:
        value = ((value ^ (integer & 0xFFFFFFFF)) * 1099511628211) & 0xFFFFFFFFFFFFFFFF
    return (value or 1) if integers else 0


def plan_violations(plan: Plan, counts: npt.ArrayLike, limits: PlanLimits) -> list[str]:
    """Every invariant of design.md section 7 that the plan breaks, each as a sentence with values.

    Args:
        plan: from any policy.
        counts: [num_ranks, num_local_experts], as handed to the policy.
        limits: as handed to the policy.
    Returns:
        An empty list for a valid plan. Sums are only judged when every single move is in range.
    """
    rows = np.asarray(counts, dtype=np.int64)
    found = [text for move in plan.moves for text in _move_violations(move, rows, limits)]
    if not found:
        found += _overlaps(plan)
        found += _capacity_violations(plan, limits)
        found += _load_violations(plan, rows)
    if tuple(sorted(plan.moves, key=_order_key)) != plan.moves:
        found.append("the moves are not ordered by (owner_rank, expert_idx, row_start)")
    if plan.hash != hash_moves(plan.moves):
        found.append(f"the hash is {plan.hash}, expected {hash_moves(plan.moves)} for these moves")
    return found


def _integers(move: Move) -> tuple[int, int, int, int, int]:
    return move.expert_idx, move.owner_rank, move.dst_rank, move.row_start, move.row_end


def _order_key(move: Move) -> tuple[int, int, int]:
    return move.owner_rank, move.expert_idx, move.row_start


def _move_violations(move: Move, rows: Loads, limits: PlanLimits) -> Iterator[str]:
    num_ranks, num_local_experts = rows.shape
    for name, rank in (("owner_rank", move.owner_rank), ("dst_rank", move.dst_rank)):
        if not 0 <= rank < num_ranks:
            yield f"{move}: {name} {rank}, expected 0 to {num_ranks - 1}"
            return
    if not 0 <= move.expert_idx < num_local_experts:
        yield f"{move}: expert_idx {move.expert_idx}, expected 0 to {num_local_experts - 1}"
        return
    if move.owner_rank == move.dst_rank:
        yield f"{move}: the helper is the owner"
    first_dynamic = num_local_experts - limits.num_dynamic
    if move.expert_idx < first_dynamic:
        yield f"{move}: a static expert moves, expected expert_idx >= {first_dynamic}"
    num_rows = rows[move.owner_rank, move.expert_idx]
    if not 0 <= move.row_start < move.row_end <= num_rows:
        yield f"{move}: expected 0 <= row_start < row_end <= {num_rows}, the rows of the expert"
    if move.num_rows < limits.min_tokens:
        yield f"{move}: {move.num_rows} rows move, expected at least min_tokens={limits.min_tokens}"


def _overlaps(plan: Plan) -> Iterator[str]:
    ordered = sorted(plan.moves, key=_order_key)
    for first, second in pairwise(ordered):
        same = _order_key(first)[:2] == _order_key(second)[:2]
        if same and second.row_start < first.row_end:
            yield f"{second}: rows below {first.row_end} already move to rank {first.dst_rank}"


def _capacity_violations(plan: Plan, limits: PlanLimits) -> Iterator[str]:
    recv_experts: defaultdict[int, set[tuple[int, int]]] = defaultdict(set)
    recv_rows: defaultdict[int, int] = defaultdict(int)
    return_rows: defaultdict[int, int] = defaultdict(int)
    num_sent: defaultdict[int, int] = defaultdict(int)
    for move in plan.moves:
        recv_experts[move.dst_rank].add((move.owner_rank, move.expert_idx))
        recv_rows[move.dst_rank] += move.num_rows
        return_rows[move.owner_rank] += move.num_rows
        num_sent[move.owner_rank] += 1
    for rank, experts in recv_experts.items():
        if len(experts) > limits.num_slots:
            yield f"rank {rank} receives {len(experts)} experts, num_slots={limits.num_slots}"
    for what, seen, name, most in (
        ("receives {} rows", recv_rows, "max_recv_rows", limits.max_recv_rows),
        ("gets back {} rows", return_rows, "max_return_rows", limits.max_return_rows),
        ("gets grads of {} moves", num_sent, "num_grad_slots", limits.num_grad_slots),
    ):
        for rank, value in seen.items():
            if value > most:
                yield f"rank {rank} {what.format(value)}, {name}={most}"


def _load_violations(plan: Plan, rows: Loads) -> Iterator[str]:
    before, after = plan.loads_before(rows), plan.loads_after(rows)
    if before.sum() != after.sum():
        yield f"{after.sum()} rows are computed, expected {before.sum()}"
    if plan.moves and after.max() > before.max():
        yield f"the fullest rank computes {after.max()} rows, {before.max()} without the plan"
