"""EPLB: experts replicated and packed by the load of an earlier micro-batch.

Source: deepseek-ai/EPLB d52c72d, eplb.py; the global policy (one group, one node).
"""

from __future__ import annotations

from types import ModuleType

import numpy as np
import numpy.typing as npt

from feplb.scheduler.baselines.outcome import (
    BaselineInput,
    Outcome,
    Rows,
    at_home,
    checked_counts,
    checked_previous,
    even_parts,
    rerouted,
)


def eplb_previous(counts: npt.ArrayLike, given: BaselineInput) -> Outcome:
    """EPLB's placement for the previous micro-batch, met by this one; 2 slots unless given.

    Renewed at every micro-batch, which is the most that history can give; its users renew it
    after thousands of steps. Without given.previous everything stays at home.

    Copies are all experts that lie away from their owner, as if none were kept from the
    placement before. They are made ahead.
    """
    rows = checked_counts(counts)
    previous = checked_previous(rows, given)
    return _eplb("eplb_previous", rows, previous, given)


def eplb_oracle(counts: npt.ArrayLike, given: BaselineInput) -> Outcome:
    """The placement for this very micro-batch, known before it came: what EPLB could give at most.

    As eplb_previous in all else.
    """
    rows = checked_counts(counts)
    return _eplb("eplb_oracle", rows, rows, given)


def _eplb(policy: str, counts: Rows, history: Rows | None, given: BaselineInput) -> Outcome:
    num_ranks, num_local_experts = counts.shape
    if history is None or not history.any() or num_ranks == 1:
        return rerouted(policy, at_home(counts), num_local_experts, copies_ahead=True)
    num_slots = 2 if given.num_slots is None else given.num_slots
    weights = history.ravel()
    experts, num_replicas = replicate(weights, num_ranks * num_slots)
    ranks = pack(weights[experts] / num_replicas[experts], num_ranks)
    ranks = keep_home(experts, ranks, num_ranks, num_local_experts)
    placed = np.zeros((counts.size, num_ranks), dtype=np.int64)
    hosted = np.zeros(placed.shape, dtype=np.bool_)
    hosted[experts, ranks] = True
    for expert, num_rows in enumerate(counts.ravel().tolist()):
        # Tokens go round the replicas, whatever their ranks carry.
        replicas = ranks[experts == expert]
        np.add.at(placed[expert], replicas, even_parts(num_rows, len(replicas)))
    return rerouted(policy, placed, num_local_experts, hosted=hosted, copies_ahead=True)


def replicate(weights: Rows, num_extra: int) -> tuple[Rows, Rows]:
    """One more replica, num_extra times, for the expert with most load per replica.

    Returns:
        experts [num_experts + num_extra], the expert of each replica; replicas [num_experts].
    """
    num_replicas = np.ones(len(weights), dtype=np.int64)
    experts = list(range(len(weights)))
    for _ in range(num_extra):
        expert = int(np.argmax(weights / num_replicas))
        num_replicas[expert] += 1
        experts.append(expert)
    return np.array(experts, dtype=np.int64), num_replicas


def pack(weights: npt.NDArray[np.float64], num_packs: int) -> Rows:
    """Each item, heaviest first, to the lightest pack that is not full: its pack, [num_items].

    All packs get as many items. Ties go to the lowest index.
    """
    sums = [0.0] * num_packs
    room = [len(weights) // num_packs] * num_packs
    packs = np.empty(len(weights), dtype=np.int64)
    for item in np.argsort(-weights, kind="stable").tolist():
        free = [index for index in range(num_packs) if room[index]]
        lightest = min(free, key=lambda index: (sums[index], index))
        packs[item] = lightest
        sums[lightest] += float(weights[item])
        room[lightest] -= 1
    return packs


def keep_home(experts: Rows, packs: Rows, num_ranks: int, num_local_experts: int) -> Rows:
    """The rank of each item: packs numbered so that most experts stay with their owner.

    EPLB leaves open which rank takes which pack; this changes no load and saves copies.
    """
    at = np.zeros((num_ranks * num_local_experts, num_ranks), dtype=np.bool_)
    at[experts, packs] = True
    stays = at.reshape(num_ranks, num_local_experts, num_ranks).sum(axis=1)  # [owner, pack]
    owners, of_owner = load_optimizer().linear_sum_assignment(stays, maximize=True)
    rank_of_pack = np.empty(num_ranks, dtype=np.int64)
    rank_of_pack[of_owner] = owners
    ranks: Rows = rank_of_pack[packs]
    return ranks


def load_optimizer() -> ModuleType:
    """scipy.optimize, or one RuntimeError that says how to get it."""
    try:
        from scipy import optimize
    except ImportError as error:
        raise RuntimeError(
            f"the EPLB and LPLB baselines need scipy: {error}. Install it: pip install scipy"
        ) from error
    return optimize  # type: ignore[no-any-return]
