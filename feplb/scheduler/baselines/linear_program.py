"""LPLB: experts with one fixed replica each, and a linear program that shares out their rows.

Source: deepseek-ai/LPLB, README and topologies as in shizhengLi/deepseek-lplb-learning 9db27ad
(lplb/planner.py, tests/utils.py). Variant: the exact optimum of its linear program
by HiGHS, an upper bound for the five interior-point steps that it takes.

Legend: links [num_links, num_ranks]; links[d, r] is the rank whose d-th busiest expert has its
replica on rank r.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from feplb.scheduler.baselines.history import keep_home, load_optimizer, pack
from feplb.scheduler.baselines.outcome import (
    BaselineInput,
    Outcome,
    Rows,
    at_home,
    checked_counts,
    checked_previous,
    rerouted,
)


def lplb(counts: npt.ArrayLike, given: BaselineInput, *, reorder: bool = True) -> Outcome:
    """Experts placed by EPLB's packing of the previous counts; rows shared by an exact LP.

    Each rank's busiest experts by history have one replica, on the rank that the topology says:
    2 per rank unless num_slots says otherwise (and no more than a rank has experts). Cube for 8
    ranks and hypercube for 16, as published, else the most square torus. A ring, the torus of a
    prime number of ranks, gets links of num_ranks // 2 as the second kind, for the second kind of
    a torus would lead nowhere.

    Decided in its favour: the placement is renewed at every micro-batch, packs are numbered so
    that fewest experts leave their owner, and of all whole numbers of rows with the least max load
    those are taken that move fewest rows. Without given.previous everything stays at home. Copies
    are counted as in EPLB, and made ahead.

    Args:
        reorder: place experts by history. False: they stay with their owners, and only replicas
            are copied (the original's `with_reorder`).
    """
    rows = checked_counts(counts)
    num_ranks, num_local_experts = rows.shape
    previous = checked_previous(rows, given)
    if previous is None or not previous.any() or num_ranks == 1:
        return rerouted("lplb", at_home(rows), num_local_experts, copies_ahead=True)
    experts = np.arange(rows.size)
    ranks = experts // num_local_experts
    if reorder:
        packs = pack(previous.ravel().astype(np.float64), num_ranks)
        ranks = keep_home(experts, packs, num_ranks, num_local_experts)
    num_slots = 2 if given.num_slots is None else given.num_slots
    copied, helpers = _replicas(previous.ravel(), ranks, num_ranks, num_slots)
    parts = best_parts(rows.ravel(), ranks, copied, helpers, num_ranks)
    placed = np.zeros((rows.size, num_ranks), dtype=np.int64)
    placed[experts, ranks] = rows.ravel()
    placed[copied, ranks[copied]] -= parts
    placed[copied, helpers] += parts
    hosted = np.zeros(placed.shape, dtype=np.bool_)
    hosted[experts, ranks] = True
    hosted[copied, helpers] = True
    return rerouted("lplb", placed, num_local_experts, hosted=hosted, copies_ahead=True)


def topology(num_ranks: int) -> Rows:
    """links [2, num_ranks] of cube, hypercube or torus; each row is a permutation."""
    ranks = np.arange(num_ranks)
    in_fours = ranks // 4 * 4 + (ranks + 3) % 4
    if num_ranks == 8:
        return np.stack([in_fours, np.where(ranks < 4, 4 + (ranks + 2) % 4, ranks - 4)])
    if num_ranks == 16:
        return np.stack([in_fours, (ranks - 4) % 16])
    height = max(n for n in range(1, math.isqrt(num_ranks) + 1) if num_ranks % n == 0)
    width = num_ranks // height
    if height == 1:
        return np.stack([(ranks + 1) % num_ranks, (ranks + max(1, num_ranks // 2)) % num_ranks])
    row, column = np.divmod(ranks, width)
    return np.stack([(row + 1) % height * width + column, row * width + (column + 1) % width])


def best_parts(rows: Rows, ranks: Rows, copied: Rows, helpers: Rows, num_ranks: int) -> Rows:
    """Rows of each copied expert that its replica computes, [len(copied)]: the least max load.

    Minimise z over parts y, 0 <= y <= rows of the expert, where every rank's load is at most z.
    Each y leaves one rank and enters another: a network, whose corners are whole numbers once z
    is one. So z is rounded up and the program solved again, for the fewest rows moved.

    Args:
        rows: [num_experts].
        ranks: [num_experts], where each expert lies.
        copied, helpers: experts with a replica, and its rank.
    """
    if not len(copied):
        return np.zeros(0, dtype=np.int64)
    loads = np.bincount(ranks, weights=rows, minlength=num_ranks)
    flow = np.zeros((num_ranks, len(copied)))
    links = np.arange(len(copied))
    flow[ranks[copied], links] -= 1
    flow[helpers, links] += 1
    linprog = load_optimizer().linprog
    bounds = [(0, int(most)) for most in rows[copied]]
    least = linprog(
        np.append(np.zeros(len(copied)), 1.0),
        A_ub=np.column_stack([flow, -np.ones(num_ranks)]),
        b_ub=-loads,
        bounds=[*bounds, (0, None)],
        method="highs-ds",
    )
    # At a corner z is a mean over some ranks: not nearer than 1 / num_ranks to the next integer.
    most_rows = math.ceil(least.fun - 0.5 / num_ranks)
    whole = linprog(
        np.ones(len(copied)), A_ub=flow, b_ub=most_rows - loads, bounds=bounds, method="highs-ds"
    )
    parts: Rows = np.rint(whole.x).astype(np.int64)
    return parts


def _replicas(history: Rows, ranks: Rows, num_ranks: int, num_slots: int) -> tuple[Rows, Rows]:
    """Experts that have a replica, and the rank of it."""
    links = topology(num_ranks)
    num_copied = min(num_slots, len(history) // num_ranks)
    copied, helpers = [], []
    for rank in range(num_ranks):
        here = np.flatnonzero(ranks == rank)
        busiest = here[np.argsort(-history[here], kind="stable")][:num_copied]
        for place, expert in enumerate(busiest.tolist()):
            copied.append(expert)
            helpers.append(int(np.flatnonzero(links[place % len(links)] == rank)[0]))
    return np.array(copied, dtype=np.int64), np.array(helpers, dtype=np.int64)
