"""From shares to whole selections: streams of random numbers, clipping, exact apportioning.

What the workloads (workloads.py, named_workloads.py) and the traces (traces.py) have in common.

Legend: weights and rows are over experts, [num_experts], unless said otherwise; selections are
counted, tokens x top_k. A token selects an expert at most once, so no expert gets more selections
than there are tokens, and no share of them is above 1 / top_k.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Rows = npt.NDArray[np.int64]
Weights = npt.NDArray[np.float64]


def random_stream(name: str, *keys: int) -> np.random.RandomState:
    """The stream of this name and these keys (0 or more), the same in every NumPy version."""
    entropy = [int.from_bytes(name.encode(), "little"), *keys]
    return np.random.RandomState(np.random.MT19937(np.random.SeedSequence(entropy)))


def clipped_shares(weights: Weights, most: float) -> Weights:
    """Rows of weights as shares that sum to 1, none above `most`; what is cut goes to the rest.

    Args:
        weights: [num_rows, num_experts].
    """
    shares: Weights = weights / weights.sum(axis=1, keepdims=True)
    while (shares > most * (1 + 1e-12)).any():
        clipped = shares >= most
        rest = np.where(clipped, 0.0, weights)
        left = 1.0 - most * clipped.sum(axis=1, keepdims=True)
        scale = left / np.maximum(rest.sum(axis=1, keepdims=True), np.finfo(np.float64).tiny)
        shares = np.where(clipped, most, rest * scale)
    return shares


def with_imbalance(loads: Weights, imbalance: float) -> Weights:
    """loads ** p with p >= 0 such that max / mean is `imbalance`; it grows with p from 1."""
    relative = loads / loads.max()
    low, high = 0.0, 1.0
    while (relative**high).mean() > 1 / imbalance and high < 1e6:
        low, high = high, 2 * high
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if (relative**middle).mean() > 1 / imbalance else (low, middle)
    powered: Weights = relative**low
    return powered


def apportion(weights: Weights | Rows, total: int) -> Rows:
    """total split in proportion to weights, largest remainders first, ties to the lowest index."""
    exact = weights * (total / weights.sum())
    rows: Rows = np.floor(exact).astype(np.int64)
    by_remainder = np.argsort(rows - exact, kind="stable")
    rows[by_remainder[: total - int(rows.sum())]] += 1
    return rows


def capped(rows: Rows, most: int) -> Rows:
    """rows, none above `most`; what is cut goes to the others in proportion to their room.

    Where nothing is above, these are the same rows. There must be room: sum <= most * size.
    """
    kept = np.minimum(rows, most)
    over = int((rows - kept).sum())
    return kept + apportion(most - kept, over) if over else kept


def spread(totals: Rows, num_ranks: int) -> Rows:
    """Totals over experts as equal parts of source ranks, [num_ranks, num_experts].

    Every rank gets the same sum, so num_ranks must divide the sum of the totals, and an expert's
    parts differ by at most one. Example: [3, 1] over 2 ranks is [[2, 0], [1, 1]].
    """
    parts = np.tile(totals // num_ranks, (num_ranks, 1))
    # Fewer than num_ranks rows are left of each expert: dealt in turn, no rank gets two of one.
    left = np.repeat(np.arange(totals.size), totals % num_ranks)
    np.add.at(parts, (np.arange(left.size) % num_ranks, left), 1)
    return parts
