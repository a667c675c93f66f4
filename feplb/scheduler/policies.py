"""make_plan: the door to the C++ planner, with the checks that name the wrong value.

Used by tests, benches, baselines and offline tools. In training the mover thread plans inside the
core and never comes through here. Needs the compiled core at the first call, not at import.
"""

from __future__ import annotations

from dataclasses import asdict
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from feplb.scheduler.cost_model import UnitCosts
from feplb.scheduler.plan import INT32_MAX, Move, Plan, PlanLimits

if TYPE_CHECKING:
    from feplb import _core

POLICIES = ("none", "greedy", "refine", "split", "auto")


def make_plan(
    policy: str, counts: npt.ArrayLike, limits: PlanLimits, *, costs: UnitCosts | None = None
) -> Plan:
    """Choose which dynamic experts leave their owner for this micro-batch.

    Deterministic: equal arguments give an equal plan on every rank, so no message is needed.

    Args:
        policy: one of POLICIES.
        counts: [num_ranks, num_local_experts] integers; rows that each rank owns per local expert.
        limits: which experts may move, and what the arena can hold.
        costs: what auto decides by; the others do not look at them.
    Returns:
        The plan; empty if nothing helps.
    Raises:
        ValueError: unknown policy; auto without costs; counts of another shape or type, negative
            or above int32; more dynamic experts than a rank has.
        RuntimeError: the compiled core is missing.
    """
    units = None if costs is None else asdict(costs)
    rows, plan_hash = load_core().make_plan(policy, as_int32(counts), core_limits(limits), units)
    moves = tuple(
        Move(expert_idx=expert, owner_rank=owner, dst_rank=dst, row_start=start, row_end=end)
        for expert, owner, dst, start, end in rows.tolist()
    )
    return Plan(moves=moves, hash=plan_hash)


def as_int32(counts: npt.ArrayLike) -> npt.NDArray[np.int32]:
    """counts as the core takes them; ValueError where that would change a value."""
    array = np.asarray(counts)
    if array.ndim != 2:
        raise ValueError(
            f"make_plan: counts has shape {array.shape}, expected [num_ranks, num_local_experts]"
        )
    if array.dtype.kind not in "iu":
        raise ValueError(f"make_plan: counts has dtype {array.dtype}, expected integers")
    wrong = np.argwhere((array < 0) | (array > INT32_MAX))
    if len(wrong):
        rank, expert = wrong[0].tolist()
        raise ValueError(
            f"make_plan: counts of rank {rank}, local expert {expert}: {array[rank, expert]}, "
            f"expected 0 to {INT32_MAX}"
        )
    return np.ascontiguousarray(array, dtype=np.int32)


def core_limits(limits: PlanLimits) -> _core.PlanLimits:
    """The core's own PlanLimits with these values."""
    made: _core.PlanLimits = load_core().PlanLimits(**asdict(limits))
    return made


def load_core() -> ModuleType:
    """feplb._core, or one RuntimeError that says how to build it."""
    try:
        from feplb import _core
    except ImportError as error:
        raise RuntimeError(
            f"feplb's compiled core cannot be loaded (feplb._core): {error}. "
            "Build it: pip install --no-build-isolation -e ."
        ) from error
    return _core
