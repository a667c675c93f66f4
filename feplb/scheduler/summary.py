"""What many samples of an arm come to: the one row that benches and `feplb simulate` print.

Means are over micro-batches. Shares are of sums, as time is: removed = 1 - mean left / mean before,
recovered = time saved / time between un-balanced and ceiling; the worst 5 % is the 5th percentile
of single micro-batches. Rows say nothing (None) where there is nothing to remove or to recover.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from feplb.scheduler.machines import ExpertShape
from feplb.scheduler.simulate import Sample

Value = str | int | float | None
MIB = 1 << 20

# What --json writes of each row, in this order.
JSON_COLUMNS = (
    *("workload", "ep", "policy", "copy_budget", "grain_rows"),
    *("straggler_before", "straggler_after", "removed_pct", "layer_ceiling_recovered_pct"),
    *("max_over_mean_p50", "max_over_mean_p99"),
    *("copies_per_rank", "copies_per_owner_max", "copied_mib_per_rank", "moved_rows_pct"),
    *("plan_us_p50", "gap_to_optimum_pct"),
)


def figures(samples: Sequence[Sample], ep_size: int, expert: ExpertShape) -> dict[str, Value]:
    """The figures of one arm.

    Of copies, copies_per_rank is a mean over ranks and micro-batches, copies_per_owner_max the most
    that any owner sent. copied_mib_per_rank are the weights of one forward; a backward copies them
    again and sends the grads home. moved_rows_pct are rows that another rank than the owner
    computes, gap_to_optimum_pct is the fullest rank's distance to the least possible, in percent
    of the mean rank load; means.
    """
    before = _mean([sample.max_before - sample.mean_load for sample in samples])
    after = _mean([sample.max_after - sample.mean_load for sample in samples])
    reached = [sample.max_over_mean for sample in samples]
    copies = _mean([sample.copies for sample in samples]) / ep_size
    rows = sum(sample.mean_load for sample in samples) * ep_size
    expert_mib = expert.num_parameters * expert.element_bytes / MIB
    return {
        "straggler_before": before,
        "straggler_after": after,
        "removed_pct": 100 * (1 - after / before) if before > 0 else None,
        **_time(samples),
        "max_over_mean_mean": _mean(reached),
        **{f"max_over_mean_p{p}": float(np.percentile(reached, p)) for p in (50, 95, 99)},
        "copies_per_rank": copies,
        "copies_per_owner_max": max(sample.copies_of_owner for sample in samples),
        "copied_mib_per_rank": copies * expert_mib,
        "moved_rows_pct": 100 * sum(s.moved_rows for s in samples) / rows if rows else 0.0,
        "rows_move_twice": int(not samples[0].reroutes),
        "gap_to_optimum_pct": _gap(samples),
    }


def _time(samples: Sequence[Sample]) -> dict[str, Value]:
    """Modelled: how much of the way to the ceiling, and the layer's milliseconds."""
    none, plan, ceiling = (
        sum(getattr(sample, name) for sample in samples)
        for name in ("none_ps", "plan_ps", "ceiling_ps")
    )
    single = [share for sample in samples if (share := sample.recovered) is not None]
    return {
        "layer_ceiling_recovered_pct": 100 * (none - plan) / (none - ceiling)
        if none > ceiling
        else None,
        "layer_ceiling_recovered_pct_worst5": 100 * float(np.percentile(single, 5))
        if single
        else None,
        "none_ms": none / len(samples) / 1e9,
        "layer_ms": plan / len(samples) / 1e9,
        "ceiling_ms": ceiling / len(samples) / 1e9,
        # The one engine of a hot owner is the limit where this nears 100.
        "engine_busy_pct": 100 * sum(sample.engine_ps for sample in samples) / plan
        if plan
        else 0.0,
        "slower_than_none": sum(sample.plan_ps > sample.none_ps for sample in samples),
    }


def _gap(samples: Sequence[Sample]) -> float | None:
    known = [
        100 * (sample.max_after - sample.best_load) / sample.mean_load
        for sample in samples
        if sample.best_load is not None and sample.mean_load
    ]
    return _mean(known) if known else None


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))
