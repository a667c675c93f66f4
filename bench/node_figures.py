"""What bench/node_layer.py makes of its samples: where the ranks run, rows, and tables.

No time is claimed where a machine has fewer cores than ranks.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from layer_arms import CEILING, NONE
from report import Report, Row, iqr, median

from feplb import Balancer
from feplb.scheduler import load_imbalance
from feplb.scheduler.workloads import Rows

LANE = "host lane, CPU: shows that it runs, not how fast a GPU is"
TIMES = {
    "ms_p50": "forward + backward, ms, median",
    "ms_iqr": "its interquartile range, ms",
    "ratio": "ratio to none",
    "recovered_pct": "recovered of what the ceiling gains, %",
}
LOADS = {"max_mean": "max / mean of the ranks' rows", "rows_moved_pct": "rows moved, %"}
OF_DOMAIN = ("domain", "ranks", "max_mean_before", "max_mean_after", "rows_moved_pct")
COLUMNS = (
    *("scope", "arm", "domain", "ranks", "cores", "samples", "same_bits_as_none"),
    *(*TIMES, *LOADS, "max_mean_before", "max_mean_after"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where one rank runs."""

    kernel: str  # one per machine, shared by its containers
    cores: tuple[int, ...]
    domain: tuple[int, ...]  # global ranks

    @classmethod
    def of(cls, balancer: Balancer) -> Place:
        """This rank's, in the domain that the Balancer has found."""
        boot_id = Path("/proc/sys/kernel/random/boot_id")
        kernel = boot_id.read_text().strip() if boot_id.exists() else platform.node()
        cores = tuple(sorted(os.sched_getaffinity(0)))
        return cls(kernel=kernel, cores=cores, domain=balancer.global_ranks)


@dataclass(frozen=True, slots=True, kw_only=True)
class Loads:
    """What the policy's plan of one routing means for one rank, in rows."""

    before: int
    after: int
    moved: int  # away from this rank


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What all ranks have found.

    Args:
        places: of each rank.
        loads: [rank][routing], under the policy.
        ns: of the slowest rank, by arm and round.
    """

    policy: str
    places: Sequence[Place]
    loads: Sequence[Sequence[Loads]]
    ns: Mapping[str, Sequence[int]]

    def crowded(self) -> list[tuple[int, int]]:
        """(ranks, cores) of each machine that has fewer cores than ranks."""
        found = []
        for kernel in dict.fromkeys(place.kernel for place in self.places):
            here = [place for place in self.places if place.kernel == kernel]
            cores = {core for place in here for core in place.cores}
            if len(here) > len(cores):
                found.append((len(here), len(cores)))
        return found

    def rows_of(self, name: str) -> Rows:
        """[rank, routing] of one field of the loads."""
        return np.array([[getattr(each, name) for each in of_rank] for of_rank in self.loads])

    def num_cores(self) -> int:
        """Of all machines together, as far as the ranks may use them."""
        return len({(place.kernel, core) for place in self.places for core in place.cores})


def max_mean(rows: Rows) -> float:
    """max / mean over the ranks, median over the routings; rows are [rank, routing]."""
    return median([load_imbalance(loads) for loads in rows.T])


def report_rows(measured: Measured) -> list[Row]:
    """One row per arm, then one per domain, in the order of COLUMNS."""
    names = dict.fromkeys(COLUMNS)
    return [{**names, **row} for row in (*_of_arms(measured), *_of_domains(measured))]


def _of_arms(measured: Measured) -> list[Row]:
    policy = measured.policy
    before, after, moved = (measured.rows_of(name) for name in ("before", "after", "moved"))
    loads = {NONE: max_mean(before), policy: max_mean(after), CEILING: 1.0}
    is_timed = not measured.crowded()
    rows: list[Row] = []
    for arm in (NONE, policy, CEILING):
        row = {
            "scope": "arm",
            "arm": arm,
            "ranks": len(measured.places),
            "cores": measured.num_cores(),
            "samples": len(measured.ns[arm]) if is_timed else 0,
            "same_bits_as_none": True if arm == policy else None,  # else check() has raised
            "max_mean": loads[arm],
            "rows_moved_pct": 100 * moved.sum() / before.sum() if arm == policy else 0.0,
        }
        rows.append({**row, **(_times(measured, arm) if is_timed else {})})
    return rows


def _times(measured: Measured, arm: str) -> Row:
    ms = {name: np.asarray(ns) / 1e6 for name, ns in measured.ns.items()}
    base, best, mine = (median(ms[name]) for name in (NONE, CEILING, arm))
    # A share of a gain that the noise exceeds would be noise.
    has_gain = arm == measured.policy and base - best > max(map(iqr, ms.values()))
    return {
        "ms_p50": mine,
        "ms_iqr": iqr(ms[arm]),
        "ratio": mine / base,
        "recovered_pct": 100 * (base - mine) / (base - best) if has_gain else None,
    }


def _of_domains(measured: Measured) -> list[Row]:
    before, after, moved = (measured.rows_of(name) for name in ("before", "after", "moved"))
    rows: list[Row] = []
    for domain in dict.fromkeys(place.domain for place in measured.places):
        ranks = list(domain)
        row = {
            "scope": "domain",
            "arm": measured.policy,
            "domain": ",".join(map(str, domain)),
            "ranks": len(domain),
            "max_mean_before": max_mean(before[ranks]),
            "max_mean_after": max_mean(after[ranks]),
            "rows_moved_pct": 100 * moved[ranks].sum() / before[ranks].sum(),
        }
        rows.append(row)
    return rows


def print_tables(report: Report, measured: Measured, rows: Sequence[Row]) -> None:
    """The arms side by side, then the domains; both narrower than 80 columns."""
    print(LANE)
    crowds, policy = measured.crowded(), measured.policy
    for ranks, cores in crowds:
        print(f"no times: {ranks} ranks share {cores} cores, so their times would mean nothing")
    of_arm = {row["arm"]: row for row in rows if row["scope"] == "arm"}
    arms = {f"baseline_{NONE}": NONE, f"feplb_{policy}": policy, "ceiling_even": CEILING}
    shown = LOADS if crowds else {**TIMES, **LOADS}
    lines = [
        {"": text, **{heading: of_arm[arm][name] for heading, arm in arms.items()}}
        for name, text in shown.items()
    ]
    report.table(lines)
    if not crowds and of_arm[policy]["recovered_pct"] is None:
        print("\nThe times spread wider than what the ceiling gains: no share of it is told.")
    report.table([row for row in rows if row["scope"] == "domain"], OF_DOMAIN)
