"""Named synthetic routings: counts from (name, seed, step) alone, for tests and benches.

One place for both, so that a bench cannot measure another workload than the one tested. Drawn with
RandomState, whose streams NumPy keeps frozen, so a name means the same counts in every version.

Legend: by_source [num_source_ranks, num_experts], selections that the tokens of each rank make;
counts [ep_size, num_local_experts], the same summed over source ranks, by owner. Rank r owns the
experts [r * num_local_experts, (r + 1) * num_local_experts).
"""

from __future__ import annotations

import numpy as np

from feplb.scheduler.shares import (
    Rows,
    apportion,
    clipped_shares,
    random_stream,
    with_imbalance,
)

__all__ = ["Rows", "calibrated", "calibrated_by_source", "lognormal_loads"]

# Spread of an expert's log-weight: what a layer keeps from step to step, and what the tokens of
# each rank add afresh. Fitted to the mean token stragglers before balancing of arXiv 2604.19654,
# 2278 / 4649 / 6666 at EP 2 / 4 / 8: these give 2290 / 4490 / 6840 over 60,000 layers. (0.3 and
# 1.0, an earlier fit to few layers, give 2200 / 4340 / 6730 in the long run, 7 % short at EP 4.)
LAYER_SPREAD = 0.28
SOURCE_SPREAD = 1.05


def calibrated(
    ep_size: int,
    *,
    seed: int,
    step: int,
    layer: int = 0,
    num_experts: int = 128,
    num_tokens: int = 4096,
    top_k: int = 8,
) -> Rows:
    """Counts [ep_size, num_local_experts] of the routing that the paper's loads were fitted with.

    Args:
        ep_size: ranks; must divide num_experts.
        seed, step, layer: alone decide the counts, together with the sizes below.
        num_tokens: tokens per source rank, each with top_k selections.
    Raises:
        ValueError: ep_size does not divide num_experts, or top_k exceeds num_experts.
    """
    by_source = calibrated_by_source(
        ep_size,
        seed=seed,
        step=step,
        layer=layer,
        num_experts=num_experts,
        num_tokens=num_tokens,
        top_k=top_k,
    )
    counts: Rows = by_source.sum(axis=0).reshape(ep_size, -1)
    return counts


def calibrated_by_source(
    ep_size: int,
    *,
    seed: int,
    step: int,
    layer: int = 0,
    num_experts: int = 128,
    num_tokens: int = 4096,
    top_k: int = 8,
) -> Rows:
    """As calibrated(), by source rank and not yet summed: [ep_size, num_experts].

    The weight of expert e for the tokens of rank r is exp(LAYER_SPREAD * b_e + SOURCE_SPREAD *
    s_re), both normal, b fixed per layer, s fresh per step. No expert gets more than one of a
    token's top_k selections, so shares are clipped at 1 / top_k; counts are multinomial.
    """
    if ep_size < 1 or num_experts % ep_size:
        raise ValueError(f"calibrated: ep_size={ep_size}, expected a divisor of {num_experts}")
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"calibrated: top_k={top_k}, expected 1 to num_experts={num_experts}")
    bias = random_stream("calibrated layer", seed, layer).standard_normal(num_experts)
    stream = random_stream("calibrated step", seed, layer, step)
    fresh = stream.standard_normal((ep_size, num_experts))
    shares = clipped_shares(np.exp(LAYER_SPREAD * bias + SOURCE_SPREAD * fresh), 1 / top_k)
    return np.stack([stream.multinomial(num_tokens * top_k, of_rank) for of_rank in shares])


def lognormal_loads(
    num_ranks: int,
    num_local_experts: int,
    *,
    rows_per_expert: int,
    sigma: float,
    imbalance: float,
    seed: int,
) -> Rows:
    """Counts [num_ranks, num_local_experts] with a wanted max / mean of the rank loads.

    Expert loads are lognormal(sigma); rank loads are brought to the wanted imbalance by raising
    them to a common power, which keeps their order; the total is exactly num_ranks *
    num_local_experts * rows_per_expert. Everything comes from the arguments alone.

    Raises:
        ValueError: imbalance outside [1, num_ranks).
    """
    if not 1 <= imbalance < max(num_ranks, 1 + 1e-9):
        raise ValueError(
            f"lognormal_loads: imbalance={imbalance}, expected 1 or more, below {num_ranks} ranks"
        )
    stream = random_stream("lognormal", seed, num_ranks, num_local_experts)
    weights = np.exp(sigma * stream.standard_normal((num_ranks, num_local_experts)))
    total = num_ranks * num_local_experts * rows_per_expert
    loads = apportion(with_imbalance(weights.sum(axis=1), imbalance), total)
    return np.stack([apportion(*pair) for pair in zip(weights, loads.tolist(), strict=True)])
