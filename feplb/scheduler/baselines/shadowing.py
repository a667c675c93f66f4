"""FasterMoE's shadowing: the hottest experts go to every rank, and their tokens stay at home.

Source: FasterMoE (PPoPP '22; thu-pacman/FasterMoE de4d5ac, laekov/fastmoe ee3c561) and SmartMoE's
copy of it. Variant: the loads of the PPoPP prototype under the cost of
SmartMoE-AE. The policy that laekov/fastmoe ships sums the wrong axis and never shadows; that
is not taken over.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from feplb.scheduler.baselines.outcome import (
    BaselineInput,
    Outcome,
    Rows,
    at_home,
    checked_counts,
    even_parts,
    rerouted,
)


def fastermoe(counts: npt.ArrayLike, given: BaselineInput) -> Outcome:
    """Shadow the hottest experts, as many as make the layer fastest by the cost model.

    A shadowed expert's weights are copied to every rank, and every rank computes what its own
    tokens selected of it (given.by_source), so num_slots is not asked. Time of i shadows, forward
    and backward: 3 * row_us * max rows computed + 4 * row_wire_us * max rows received from others
    + i * 2 * expert_us, weights out and grads home. Decided in its favour: every i is tried, where
    the original stops at the first that does not help.

    Raises:
        ValueError: given.by_source has another shape than [num_ranks, num_experts], or does not
            sum to the counts.
    """
    rows = checked_counts(counts)
    num_ranks, num_local_experts = rows.shape
    by_source = _by_source(rows, given)
    hottest = np.argsort(-rows.ravel(), kind="stable")
    computed, received = _prefix_loads(rows, by_source, hottest)
    times = (
        3 * given.cost.row_us * computed.max(axis=1)
        + 4 * given.cost.row_wire_us * received.max(axis=1)
        + 2 * given.cost.expert_us * np.arange(rows.size + 1)
    )
    # The first of equals. A single rank has no one to shadow for.
    num_shadows = int(np.argmin(times)) if num_ranks > 1 else 0
    shadowed = hottest[:num_shadows]
    placed = at_home(rows)
    placed[shadowed] = by_source[:, shadowed].T
    hosted = np.zeros(placed.shape, dtype=np.bool_)
    hosted[shadowed] = True
    return rerouted("fastermoe", placed, num_local_experts, hosted=hosted)


def _by_source(counts: Rows, given: BaselineInput) -> Rows:
    """[num_ranks, num_experts] rows by the rank of their token."""
    if given.by_source is None:
        even: Rows = even_parts(counts.ravel(), len(counts)).T
        return even
    by_source = checked_counts(given.by_source, "by_source")
    expected = (len(counts), counts.size)
    if by_source.shape != expected:
        raise ValueError(f"by_source has shape {by_source.shape}, expected {expected}")
    wrong = np.flatnonzero(by_source.sum(axis=0) != counts.ravel())
    if len(wrong):
        expert = int(wrong[0])
        raise ValueError(
            f"by_source has {by_source[:, expert].sum()} rows of expert {expert}, expected "
            f"{counts.ravel()[expert]} as in counts"
        )
    return by_source


def _prefix_loads(counts: Rows, by_source: Rows, hottest: Rows) -> tuple[Rows, Rows]:
    """Rows computed, and received from others, with the i hottest shadowed: [1 + E, num_ranks]."""
    home = at_home(counts)
    remote = np.where(home > 0, home - by_source.T, 0)
    computed = np.concatenate([[home.sum(axis=0)], (by_source.T - home)[hottest]])
    received = np.concatenate([[remote.sum(axis=0)], -remote[hottest]])
    return computed.cumsum(axis=0), received.cumsum(axis=0)
