"""What every baseline is given and what it answers, whatever its way of balancing.

Legend: counts [num_ranks, num_local_experts], rows that each rank owns for each local expert;
experts are numbered expert = owner_rank * num_local_experts + expert_idx, so rows [num_experts] is
counts.ravel(); placed [num_experts, num_ranks], rows of an expert that each rank computes.

Worked example, 2 ranks x 2 experts, counts = [[10, 6], [2, 0]]: rows = [10, 6, 2, 0]. Of expert 0,
3 rows stay and 7 go to rank 1: placed = [[3, 7], [6, 0], [0, 2], [0, 0]], loads 9 | 9. As a plan:
Move(expert_idx=0, owner_rank=0, dst_rank=1, row_start=3, row_end=10), and as the one copy it
needs: WeightCopy(owner_rank=0, expert_idx=0, dst_rank=1).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from feplb.scheduler.plan import Move, Plan

Rows = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]


class WeightCopy(NamedTuple):
    """The weights of one expert, copied from its owner to another rank."""

    owner_rank: int
    expert_idx: int  # local to the owner
    dst_rank: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerCost:
    """Microseconds by which a policy with a cost model decides; GLM-5's experts where not given.

    Args:
        row_us: forward of one row through one expert: 6 * 6144 * 2048 flop at 400 TFLOP/s.
        row_wire_us: one row sent once: 6144 values of 2 bytes at 200 GB/s.
        expert_us: one expert's weights sent once: 72 MiB at 380 GB/s, a copy engine's rate.
    """

    row_us: float = 0.1887
    row_wire_us: float = 0.0614
    expert_us: float = 198.7


@dataclass(frozen=True, slots=True, kw_only=True)
class BaselineInput:
    """What some baselines want beside the counts; each reads only what its rules use.

    Args:
        previous: [num_ranks, num_local_experts], counts of the micro-batch before (or a sum of
            several: proportions matter). None at the first one: policies that live on history
            then leave everything at home.
        by_source: [num_ranks, num_experts], selections that the tokens of each rank make; sums to
            the counts. None: as if every rank sent the same share of each expert's rows.
        num_slots: copies of experts a rank can hold. None: as each policy ships.
        cost: of the layer, for policies that weigh copies against rows.
    """

    previous: npt.ArrayLike | None = None
    by_source: npt.ArrayLike | None = None
    num_slots: int | None = None
    cost: LayerCost = LayerCost()

    def __post_init__(self) -> None:
        if self.num_slots is not None and self.num_slots < 0:
            raise ValueError(f"BaselineInput.num_slots: {self.num_slots}, expected at least 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a policy does with one micro-batch.

    Args:
        policy: its name.
        plan: the rows that other ranks than the owner compute. It says how many rows of an expert
            go where; policies that choose them by source rank choose among equals.
        copies: weight copies made for this, in order, those that got no row included.
        reroutes: rows go straight from their source rank to where they are computed, so none
            moves twice. False: they move after the dispatch to the owner, as in feplb.
        copies_ahead: the weights were placed before this micro-batch was known, so the copies are
            not on its critical path.
        is_ideal: a yardstick that nothing can realise; its rows need no copies.
    """

    policy: str
    plan: Plan
    copies: tuple[WeightCopy, ...] = ()
    reroutes: bool
    copies_ahead: bool = False
    is_ideal: bool = False

    @property
    def num_copies(self) -> int:
        return len(self.copies)

    @property
    def num_rows_moved(self) -> int:
        """Rows computed by another rank than the owner."""
        return self.plan.num_rows_moved

    @property
    def max_slots(self) -> int:
        """Copies that the rank with most of them holds."""
        return max(Counter(copy.dst_rank for copy in self.copies).values(), default=0)

    def loads_after(self, counts: npt.ArrayLike) -> Rows:
        """Rows that each rank computes, [num_ranks]."""
        return self.plan.loads_after(counts)

    def imbalance_after(self, counts: npt.ArrayLike) -> float:
        """max / mean of the loads; 1.0 where there are none."""
        return self.plan.imbalance_after(counts)


Baseline = Callable[[npt.ArrayLike, BaselineInput], Outcome]


def checked_counts(counts: npt.ArrayLike, name: str = "counts") -> Rows:
    """counts as int64; ValueError where they are not [num_ranks, num_local_experts] of rows."""
    array = np.asarray(counts)
    if array.ndim != 2 or array.size == 0:
        raise ValueError(
            f"{name} has shape {array.shape}, expected [num_ranks, num_local_experts], at least one"
            " of each"
        )
    if array.dtype.kind not in "iu":
        raise ValueError(f"{name} has dtype {array.dtype}, expected integers")
    if array.min() < 0:
        raise ValueError(f"{name} has {array.min()} rows somewhere, expected at least 0")
    return array.astype(np.int64)


def checked_previous(counts: Rows, given: BaselineInput) -> Rows | None:
    """The counts of the micro-batch before; ValueError where they are of another layer."""
    if given.previous is None:
        return None
    previous = checked_counts(given.previous, "previous")
    if previous.shape != counts.shape:
        raise ValueError(f"previous has shape {previous.shape}, expected {counts.shape} as counts")
    return previous


def even_parts(rows: npt.ArrayLike, num_parts: int) -> Rows:
    """rows [...] split into parts [..., num_parts] that differ by one at most, largest first."""
    whole, rest = np.divmod(np.asarray(rows, dtype=np.int64)[..., None], num_parts)
    parts: Rows = whole + (np.arange(num_parts) < rest)
    return parts


def at_home(counts: Rows) -> Rows:
    """placed with every row on its owner."""
    num_ranks, num_local_experts = counts.shape
    placed = np.zeros((counts.size, num_ranks), dtype=np.int64)
    experts = np.arange(counts.size)
    placed[experts, experts // num_local_experts] = counts.ravel()
    return placed


def plan_of(placed: Rows, num_local_experts: int) -> Plan:
    """placed as a plan: the owner keeps an expert's first rows, then the ranks in their order."""
    owners = np.arange(len(placed)) // num_local_experts
    away = placed.copy()
    away[np.arange(len(placed)), owners] = 0
    starts = placed.sum(axis=1) - away.sum(axis=1)
    moves = []
    for expert, dst in np.argwhere(away > 0).tolist():
        start, num_rows = int(starts[expert]), int(away[expert, dst])
        moves.append(
            Move(
                expert_idx=expert % num_local_experts,
                owner_rank=int(owners[expert]),
                dst_rank=dst,
                row_start=start,
                row_end=start + num_rows,
            )
        )
        starts[expert] += num_rows
    return Plan.from_moves(moves)


def copies_of(hosted: Mask, num_local_experts: int) -> tuple[WeightCopy, ...]:
    """The copies behind hosted [num_experts, num_ranks]; the owner's own weights are none."""
    return tuple(
        WeightCopy(expert // num_local_experts, expert % num_local_experts, rank)
        for expert, rank in np.argwhere(hosted).tolist()
        if expert // num_local_experts != rank
    )


def rerouted(
    policy: str,
    placed: Rows,
    num_local_experts: int,
    *,
    hosted: Mask | None = None,
    copies_ahead: bool = False,
) -> Outcome:
    """The Outcome of a policy that sends rows straight to where they are computed.

    Args:
        placed: [num_experts, num_ranks] rows.
        hosted: [num_experts, num_ranks], where weights lie; None: where rows of the expert go.
    """
    return Outcome(
        policy=policy,
        plan=plan_of(placed, num_local_experts),
        copies=copies_of(placed > 0 if hosted is None else hosted, num_local_experts),
        reroutes=True,
        copies_ahead=copies_ahead,
    )


def outcome_violations(outcome: Outcome, counts: npt.ArrayLike) -> list[str]:
    """What is wrong with an outcome's copies, each as a sentence; plan_violations judges its rows.

    Returns:
        An empty list where every copy is one, comes once and in order, and every move has one.
    """
    num_ranks, num_local_experts = checked_counts(counts).shape
    found = list(_copy_violations(outcome, num_ranks, num_local_experts))
    if tuple(sorted(set(outcome.copies))) != outcome.copies:
        found.append("the copies are not in order, or one comes twice")
    copied = set(outcome.copies)
    for move in outcome.plan.moves:
        needed = WeightCopy(move.owner_rank, move.expert_idx, move.dst_rank)
        if needed not in copied and not outcome.is_ideal:
            found.append(f"{move}: no copy of the expert's weights goes there")
    return found


def _copy_violations(outcome: Outcome, num_ranks: int, num_local_experts: int) -> Iterator[str]:
    for copy in outcome.copies:
        if not (0 <= copy.owner_rank < num_ranks and 0 <= copy.dst_rank < num_ranks):
            yield f"{copy}: ranks are 0 to {num_ranks - 1}"
        if not 0 <= copy.expert_idx < num_local_experts:
            yield f"{copy}: local experts are 0 to {num_local_experts - 1}"
        if copy.owner_rank == copy.dst_rank:
            yield f"{copy}: the owner has the weights"
