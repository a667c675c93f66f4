"""What demo.py says about its runs: figures per MoE layer, and whether each claim held.

Loads are rows per rank of one call, [steps][layers][ranks]; max/mean is a call's fullest rank over
its mean. Only forward calls are counted; backward follows the same plan.
"""

from __future__ import annotations

import os
import platform
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from train_moe_lm import DEADLINE_S, RunRecord

LEAST_MOVED = 0.05  # share of rows, over the run
SLOWEST_NOTICE_S = 2.0
WIDTH = 100
_MIB = 2**20

Array = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Death:
    """What one survivor said of the death of a rank, and how long after it."""

    survivor: int
    seconds: float
    error: str


@dataclass(frozen=True)
class Check:
    """A claim of the demo, and whether it held."""

    holds: bool
    text: str


@dataclass(frozen=True, kw_only=True)
class Balance:
    """One MoE layer over all calls of a run; imbalances are max/mean, the mean over the calls.

    Args:
        floor: what no plan of whole experts can get below: the hottest expert over the mean load.
        moved: share of rows that another rank than their owner computed.
        moves: per call.
        plan_us: of the plan on rank 0, median and 99th percentile.
    """

    before: float
    after: float
    floor: float
    moved: float
    moves: float
    plan_us: tuple[float, float]


def balances(record: RunRecord) -> list[Balance]:
    """One per MoE layer."""
    before, after = np.asarray(record.loads_before), np.asarray(record.loads_after)
    hottest, rows_moved = np.asarray(record.hottest_expert), np.asarray(record.rows_moved)
    return [
        Balance(
            before=float(imbalance(before[:, layer]).mean()),
            after=float(imbalance(after[:, layer]).mean()),
            floor=float(np.maximum(1.0, hottest[:, layer] / before[:, layer].mean(axis=1)).mean()),
            moved=float(rows_moved[:, layer].sum() / before[:, layer].sum()),
            moves=float(np.asarray(record.num_moves)[:, layer].mean()),
            plan_us=_median_and_p99(np.asarray(record.plan_us)[:, layer]),
        )
        for layer in range(before.shape[1])
    ]


def imbalance(loads: npt.NDArray[np.int64]) -> Array:
    """max/mean of each call: [..., ranks] -> [...]."""
    worst: Array = loads.max(axis=-1) / loads.mean(axis=-1)
    return worst


def moved_share(record: RunRecord) -> float:
    """Rows that another rank than their owner computed, over all rows of the run."""
    return float(np.sum(record.rows_moved) / np.sum(record.loads_before))


def _median_and_p99(values: Array) -> tuple[float, float]:
    return float(np.median(values)), float(np.percentile(values, 99))


def judge(
    none: RunRecord, greedy: RunRecord, deaths: Sequence[Death], *, killed_rank: int
) -> list[Check]:
    """Everything the demo claims about its runs."""
    layers = balances(greedy)
    moved = moved_share(greedy)
    slowest = max(death.seconds for death in deaths)
    return [
        Check(
            none.parameters_sha256 == greedy.parameters_sha256 and none.loss == greedy.loss,
            "policy none and greedy: same loss in every step, same bits in all parameters",
        ),
        Check(
            all(layer.after < layer.before for layer in layers),
            "max/mean is lower with greedy in every MoE layer",
        ),
        Check(
            moved >= LEAST_MOVED,
            f"{moved:.1%} of the rows were computed by another rank than their owner, "
            f"expected {LEAST_MOVED:.0%} or more",
        ),
        Check(
            all(f"peer rank {killed_rank} " in death.error for death in deaths)
            and slowest < SLOWEST_NOTICE_S,
            f"every survivor named rank {killed_rank}, the last after {slowest * 1e3:.0f} ms "
            f"(deadline {DEADLINE_S:.0f} s)",
        ),
    ]


def describe(
    none: RunRecord, greedy: RunRecord, deaths: Sequence[Death], *, killed_rank: int
) -> str:
    """The figures, in one screen."""
    heading, *memory = greedy.memory.splitlines()
    parts = [
        f"{heading}\n{_wrapped(', '.join(' '.join(line.split()) for line in memory))}",
        _training(none, greedy),
        _layers(greedy),
        _death(deaths, killed_rank),
    ]
    return "\n\n".join(parts)


def _training(none: RunRecord, greedy: RunRecord) -> str:
    lines = [
        "policy  loss, nats per byte: first -> last   steps     time   SHA-256 of all parameters"
    ]
    lines += [
        f"{run.policy:<9} {run.loss[0]:20.6f} -> {run.loss[-1]:.6f} {len(run.loss):5d} "
        f"{run.seconds:6.1f} s   {run.parameters_sha256[:32]}..."
        for run in (none, greedy)
    ]
    num_ranks, num_cores = len(greedy.loads_before[0][0]), _num_cores()
    why = "this is no benchmark"
    if num_cores < num_ranks:
        why = f"{num_ranks} ranks share {num_cores} cores, so moved rows find no idle ones"
    return "\n".join([*lines, f"No gain in time is claimed: {why}."])


def _layers(greedy: RunRecord) -> str:
    lines = [
        "MoE     max/mean of the ranks' rows   whole-expert     rows    moves per      plan us",
        "layer         before -> after            floor        moved  forward call    p50    p99",
    ]
    lines += [
        f"{layer:<5} {b.before:14.3f} -> {b.after:.3f} {b.floor:16.3f} {b.moved:12.1%} "
        f"{b.moves:11.1f} {b.plan_us[0]:9.1f} {b.plan_us[1]:6.1f}"
        for layer, b in enumerate(balances(greedy))
    ]
    lane = greedy.lane
    mib = {kind: lane[f"{kind}_bytes"] / _MIB for kind in ("rows", "weights", "returns")}
    lines.append(
        f"{lane['copies']} copies, forward and backward: {mib['rows']:.0f} MiB of rows, "
        f"{mib['weights']:.0f} MiB of weights, {mib['returns']:.0f} MiB of results"
    )
    return "\n".join(lines)


def _death(deaths: Sequence[Death], killed_rank: int) -> str:
    ranks = ", ".join(str(death.survivor) for death in deaths)
    times = ", ".join(f"{death.seconds * 1e3:.0f}" for death in deaths)
    first = min(deaths, key=lambda death: death.seconds)
    return (
        f"Rank {killed_rank} was killed inside its experts; ranks {ranks} named it after {times} "
        f"ms:\n{_wrapped(first.error)}"
    )


def _wrapped(text: str) -> str:
    return textwrap.fill(text, WIDTH, initial_indent="  ", subsequent_indent="  ")


def machine() -> str:
    """Cores, Python and system, in a few words."""
    return f"{_num_cores()} cores, {platform.system()}, Python {platform.python_version()}"


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
