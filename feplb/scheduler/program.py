"""Plans as mixed-integer programs: the columns, the rows, and what HiGHS makes of them.

The parts of optimum.py: what counting alone rules out, then the program of what is left.

Legend: rows [num_ranks, num_local_experts], what each rank owns; loads [num_ranks], in rows.
A column is one integer unknown: a copy of one expert on one helper (0 or 1), or how many grains
of rows go with that copy. The load of the fullest rank is the last unknown.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from feplb.scheduler.plan import Loads, Move, Plan, PlanLimits, plan_violations, rank_loads
from feplb.scheduler.policies import as_int32

if TYPE_CHECKING:
    from collections.abc import Callable

Integers = npt.NDArray[np.int64]


def split_floor(loads: npt.ArrayLike, grain_rows: int) -> int:
    """The least largest load when any multiple of grain_rows may go anywhere, in rows.

    It is the smallest T with sum(floor((T - load) / grain_rows)) >= 0: a rank above T sends that
    many grains, rounded up, and a rank below takes as many, rounded down.

    Args:
        loads: [num_ranks] rows.
    """
    rows = np.asarray(loads, dtype=np.int64)
    if not rows.size:
        return 0
    return _smallest(
        lambda target: int(((target - rows) // grain_rows).sum()) >= 0,
        -(-int(rows.sum()) // rows.size),
        int(rows.max()),
    )


def _smallest(is_enough: Callable[[int], bool], low: int, high: int) -> int:
    """The smallest value in [low, high] that is enough, if high is and more is never less."""
    while low < high:
        middle = (low + high) // 2
        if is_enough(middle):
            high = middle
        else:
            low = middle + 1
    return low


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """Counts and limits, as the programs need them; grain_rows 0: whole experts only."""

    rows: Integers
    loads: Loads
    limits: PlanLimits
    max_copies: int
    grain_rows: int

    @classmethod
    def of(cls, counts: npt.ArrayLike, limits: PlanLimits, grain_rows: int = 0) -> Problem:
        rows = as_int32(counts).astype(np.int64)
        return cls(
            rows=rows,
            loads=rank_loads(rows),
            limits=limits,
            max_copies=limits.max_copies or max(4, len(rows)),
            grain_rows=grain_rows,
        )

    @property
    def least_units(self) -> int:
        """Grains in the smallest part that may move."""
        return max(1, -(-self.limits.min_tokens // max(self.grain_rows, 1)))

    def max_load(self, plan: Plan) -> int:
        return int(plan.loads_after(self.rows).max(initial=0))

    def violations(self, plan: Plan) -> list[str]:
        """Why the plan is none of this problem's, each as a sentence."""
        found = plan_violations(plan, self.rows, self.limits)
        if len(plan.moves) > self.max_copies:
            found.append(f"{len(plan.moves)} copies, max_copies={self.max_copies}")
        for move in [] if found else plan.moves:
            is_whole = move.num_rows == self.rows[move.owner_rank, move.expert_idx]
            if not is_whole and (not self.grain_rows or move.num_rows % self.grain_rows):
                found.append(f"{move}: expected all rows, or a multiple of {self.grain_rows}")
        return found

    def checked(self, known: Plan | None) -> Plan:
        """The plan to be beaten: `known`, or none; ValueError where that is no valid plan."""
        found = self.violations(known) if known else []
        if found:
            raise ValueError(f"the known plan is not within the limits: {'; '.join(found)}")
        return known or Plan()

    def paired(self, target: int) -> Plan:
        """A split plan without a solver: the fullest rank sends grains to the emptiest, repeatedly.

        Each copy closes one of the two or empties an expert. The empty plan where limits forbid it.
        """
        grain = self.grain_rows
        room = (target - self.loads) // grain  # grains; below 0: to be sent
        left = np.where(self.sendable() > 0, self.rows // grain, 0)
        moves = []
        while room.min(initial=0) < 0 < room.max(initial=0):
            owner, helper = int(room.argmin()), int(room.argmax())
            expert = int(left[owner].argmax())
            units = int(min(-room[owner], room[helper], left[owner, expert]))
            if units == 0:
                break
            start = int(self.rows[owner, expert] // grain - left[owner, expert]) * grain
            moves.append(
                Move(
                    expert_idx=expert,
                    owner_rank=owner,
                    dst_rank=helper,
                    row_start=start,
                    row_end=start + units * grain,
                )
            )
            room[owner] += units
            room[helper] -= units
            left[owner, expert] -= units
        plan = Plan.from_moves(moves)
        return Plan() if self.violations(plan) else plan

    # ------------------------------------------------------------------ bounds without a solver

    def sendable(self) -> Integers:
        """rows, with 0 for the experts that cannot move [num_ranks, num_local_experts]."""
        rows: Integers = self.rows.copy()
        rows[:, : max(0, rows.shape[1] - self.limits.num_dynamic)] = 0
        rows[rows < self.limits.min_tokens] = 0
        if self.grain_rows:
            return rows
        most = min(self.limits.max_recv_rows, self.limits.max_return_rows)
        rows[rows > most] = 0
        return rows

    def stuck(self) -> Loads:
        """Rows that no plan takes off each rank, [num_ranks]."""
        experts = np.sort(self.sendable(), axis=1)[:, ::-1]
        most = min(self.limits.num_grad_slots, self.max_copies)
        sent = np.minimum(experts[:, :most].sum(axis=1), self.limits.max_return_rows)
        stuck: Loads = self.loads - sent
        return stuck

    def sends_needed(self, target: int) -> Loads | None:
        """Copies that each rank must at least send to come down to target rows; None: it cannot."""
        experts = np.sort(self.sendable(), axis=1)[:, ::-1]
        if not self.grain_rows:
            experts = np.sort(np.where(self.fits(experts, target), experts, 0), axis=1)[:, ::-1]
        excess = np.maximum(self.loads - target, 0)
        sums = np.cumsum(experts, axis=1)
        needed: Loads = (sums < excess[:, None]).sum(axis=1).astype(np.int64) + (excess > 0)
        most = min(self.limits.num_grad_slots, self.rows.shape[1], self.max_copies)
        if (needed > most).any() or (excess > self.limits.max_return_rows).any():
            return None
        return needed

    def fits(self, experts: Integers, target: int) -> npt.NDArray[np.bool_]:
        """Which whole experts [num_ranks, n] some other rank could take, and stay within target."""
        stuck = self.stuck()
        order = np.argsort(stuck, kind="stable")
        others = np.full(len(stuck), stuck[order[0]])
        others[order[0]] = stuck[order[1]] if len(stuck) > 1 else target + 1
        fitting: npt.NDArray[np.bool_] = experts + others[:, None] <= target
        return fitting

    def is_open(self, target: int) -> bool:
        """Whether counting alone leaves it possible that no rank has more than target rows."""
        needed = self.sends_needed(target)
        if needed is None or needed.sum() > self.max_copies:
            return False
        room = np.minimum(np.maximum(target - self.loads, 0), self.limits.max_recv_rows)
        return bool(room.sum() >= np.maximum(self.loads - target, 0).sum())

    def least_load(self, known: int) -> int:
        """Rows that the fullest rank of every plan has, at most known rows."""
        if not self.rows.size:
            return 0
        return _smallest(self.is_open, -(-int(self.loads.sum()) // len(self.loads)), known)

    def least_copies(self, target: int) -> float:
        """Copies that every plan with no more than target rows has; inf: there is none."""
        if self.loads.max(initial=0) <= target:
            return 0.0
        needed = self.sends_needed(target)
        return float(needed.sum()) if needed is not None and self.is_open(target) else math.inf


# ------------------------------------------------------------------------- columns, rows, solution


@dataclass(frozen=True, slots=True, kw_only=True)
class Aim:
    """What a program asks for: the least largest load from low to high rows, or, where these are
    equal, the fewest copies that reach it.
    """

    low: int
    high: int
    most_copies: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What the solver said.

    Args:
        plan: the best one found, judged in integers; None without one.
        bound: of the copies, or of the load above Aim.low; 0 where nothing was proven.
        is_infeasible: there is no such plan.
    """

    plan: Plan | None
    bound: int
    is_infeasible: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class _Columns:
    """The unknowns of a program, each [num_columns]; after them comes the load."""

    owner: Integers
    expert: Integers  # local to the owner
    helper: Integers
    carry: Integers  # rows per unit
    most: Integers  # units
    copies: Integers  # per unit: 1 for a copy, 0 for the grains of one
    copy_of: Integers  # the column of the copy; of a copy, its own

    @classmethod
    def of(cls, whole: Integers, parts: Integers, problem: Problem) -> _Columns:
        """Copies of whole experts, then copies of parts, then the grains of these.

        Args:
            whole, parts: [n, 3], (owner, expert, helper) of each copy.
        """
        owner, expert, helper = np.concatenate([whole, parts, parts]).T
        sizes = problem.rows[owner, expert]
        is_part = np.arange(owner.size) >= len(whole)
        is_grains = np.arange(owner.size) >= len(whole) + len(parts)
        grain = max(problem.grain_rows, 1)
        return cls(
            owner=owner,
            expert=expert,
            helper=helper,
            carry=np.where(is_grains, grain, np.where(is_part, 0, sizes)),
            most=np.where(is_grains, sizes // grain, 1),
            copies=1 - is_grains.astype(np.int64),
            copy_of=np.arange(owner.size) - len(parts) * is_grains,
        )


def _columns(problem: Problem, target: int) -> _Columns:
    """Every copy that may be part of a plan whose fullest rank has at most target rows."""
    sendable, grain = problem.sendable(), problem.grain_rows
    away = (sendable > 0)[:, :, None] & ~np.eye(len(sendable), dtype=np.bool_)[:, None, :]
    whole = away & (sendable[:, :, None] + problem.stuck() <= target)  # [owner, expert, helper]
    whole &= sendable[:, :, None] <= min(
        problem.limits.max_recv_rows, problem.limits.max_return_rows
    )
    if not grain:
        return _Columns.of(np.argwhere(whole), np.empty((0, 3), dtype=np.int64), problem)
    whole &= (sendable % grain > 0)[:, :, None]
    # A multiple of the grain can as well be taken from a larger expert of the same owner, so it
    # needs no more experts for them than it can send copies: the largest.
    most = min(problem.limits.num_grad_slots, problem.max_copies)
    rank = np.argsort(np.argsort(-sendable, axis=1, kind="stable"), axis=1, kind="stable")
    units = sendable // grain
    parts = away & ((rank < most) & (units >= problem.least_units))[:, :, None]
    return _Columns.of(np.argwhere(whole), np.argwhere(parts), problem)


def _constraints(problem: Problem, columns: _Columns, aim: Aim) -> list[Any]:
    """The program's rows, as scipy's LinearConstraints over the columns and, last, the load."""
    from scipy import sparse
    from scipy.optimize import LinearConstraint

    num_ranks, num_experts = problem.rows.shape
    limits, size = problem.limits, columns.owner.size

    def sums(index: Integers, values: Integers, num: int, last: int = 0) -> Any:
        body = sparse.csr_array((values, (index, np.arange(size))), shape=(num, size))
        return sparse.hstack([body, np.full((num, 1), last)], format="csr")

    def row(matrix: Any, low: npt.ArrayLike, high: npt.ArrayLike) -> Any:
        return LinearConstraint(matrix, low, high)

    total = int(problem.loads.sum())
    owner, helper, carry, copies = columns.owner, columns.helper, columns.carry, columns.copies
    came, went = sums(helper, carry, num_ranks), sums(owner, carry, num_ranks)
    load = sums(helper, carry, num_ranks, -1) - went
    needed = problem.sends_needed(aim.high)
    assert needed is not None, "a target that counting rules out needs no program"
    expert = owner * num_experts + columns.expert
    rows = [
        row(load, -np.inf, aim.low - problem.loads),
        row(came, 0, min(limits.max_recv_rows, total)),
        row(went, 0, min(limits.max_return_rows, total)),
        row(sums(expert, carry, problem.rows.size), 0, problem.rows.ravel()),
        row(sums(helper, copies, num_ranks), 0, limits.num_slots),
        row(sums(owner, copies, num_ranks), needed, limits.num_grad_slots),
        row(sums(0 * owner, copies, 1), 0, aim.most_copies),
    ]
    grains = np.flatnonzero(copies == 0)
    if grains.size:
        link = sparse.eye_array(size + 1, format="csr")
        units, chosen = link[grains], link[columns.copy_of[grains]]
        rows.append(row(units - chosen * columns.most[grains][:, None], -np.inf, 0))
        rows.append(row(units - chosen * problem.least_units, 0, np.inf))
    return rows


def num_columns(problem: Problem, target: int) -> int:
    """Unknowns of the program for plans with at most target rows on every rank, the load left out.

    More columns take longer, and much longer to prove anything with.
    """
    return int(_columns(problem, target).owner.size)


def solved(problem: Problem, aim: Aim, time_limit_s: float) -> Answer:
    """What HiGHS makes of one program.

    The load is counted from aim.low, and copies that aim.high rules out are left out.

    Raises:
        RuntimeError: scipy is missing, or HiGHS failed.
    """
    optimize = load_optimizer()
    columns = _columns(problem, aim.high)
    if not columns.owner.size:
        return Answer(plan=None, bound=0, is_infeasible=True)
    costs = np.zeros(columns.owner.size + 1)
    if aim.low < aim.high:
        costs[-1] = 1
    else:
        costs[:-1] = columns.copies
    result = optimize.milp(
        costs,
        integrality=np.ones(costs.size),
        bounds=optimize.Bounds(0, np.append(columns.most, aim.high - aim.low)),
        constraints=_constraints(problem, columns, aim),
        options={"time_limit": max(time_limit_s, 0.0), "mip_rel_gap": 0.0},
    )
    if result.status not in (0, 1, 2):
        raise RuntimeError(f"scipy's HiGHS failed: {result.message}")
    # The solver calls a unit whole and a row kept within 1e-6: what it says is judged in integers.
    plan = None
    if result.x is not None:
        plan = _plan(columns, np.rint(result.x[:-1]).astype(np.int64))
        is_better = problem.max_load(plan) <= aim.high and len(plan.moves) <= aim.most_copies
        plan = plan if is_better and not problem.violations(plan) else None
    bound = result.mip_dual_bound
    bound = math.ceil(bound - 1e-3) if bound is not None and math.isfinite(bound) else 0
    return Answer(plan=plan, bound=max(bound, 0), is_infeasible=result.status == 2)


def _plan(columns: _Columns, units: Integers) -> Plan:
    """The plan that a solution [num_columns] stands for; parts of an expert lie end to end."""
    sent = columns.carry * units
    ends: dict[tuple[int, int], int] = {}
    moves = []
    for index in np.flatnonzero(sent).tolist():
        owner, expert = int(columns.owner[index]), int(columns.expert[index])
        start = ends.get((owner, expert), 0)
        ends[owner, expert] = start + int(sent[index])
        moves.append(
            Move(
                expert_idx=expert,
                owner_rank=owner,
                dst_rank=int(columns.helper[index]),
                row_start=start,
                row_end=ends[owner, expert],
            )
        )
    return Plan.from_moves(moves)


def load_optimizer() -> ModuleType:
    """scipy.optimize, or one RuntimeError that says how to get it."""
    try:
        from scipy import optimize
    except ImportError as error:
        raise RuntimeError(
            f"the exact optimum needs scipy: {error}. Install it: pip install scipy"
        ) from error
    return optimize  # type: ignore[no-any-return]
