"""What bench/layer_time.py makes of its samples: rows, tables and the promised figures.

Percentages are per seed, of medians over its rounds; shown is the median over seeds. ratio is to
no_balancer, so that of no_balancer_aa is the noise.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from layer_arms import AGAIN, CEILING, NO_BALANCER, NONE, Shape, Unit, ideal_of, plan_of
from report import Report, Row, iqr, median

from feplb.scheduler import load_imbalance

PASSES = ("fwd", "fwd_bwd")
IMBALANCES = (1.0, 1.25, 1.5, 1.75)
SCOPES = ("experts", "layer")
FOCUS = 1.5  # the imbalance with a promise: more rounds
OF_IDEAL_TARGET, OVERHEAD_TARGET = 88.0, 2.0
COLUMNS = (
    *("imbalance", "arm", "pass", "scope", "rows_per_expert", "samples", "ms_p50", "ms_iqr"),
    *("max_mean", "ratio", "ratio_iqr", "ceiling_recovered_pct", "plan_ideal_pct"),
    *("of_plan_ideal_pct", "moved_mb", "copy_cpu_ms"),
)
PAIRED_COLUMNS = (
    *("imbalance", "arm", "pass", "scope", "rows_per_expert", "samples", "ms_p50", "ms_iqr"),
    *("paired_pct", "paired_pct_low", "paired_pct_high"),
    *("paired_us", "paired_us_low", "paired_us_high"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """How much is measured; the same on both ranks."""

    shape: Shape
    policies: tuple[str, ...]
    rows_per_expert: tuple[int, ...]
    seeds: int
    focus_rounds: int
    paired_rows: int
    paired_rounds: int
    empty_rounds: int

    def units(self) -> Iterator[tuple[Unit, int]]:
        """Every unit with its rounds; seeds outermost, so that drift meets all alike."""
        for seed in range(self.seeds):
            for rows in self.rows_per_expert:
                for imbalance in IMBALANCES:
                    for scope in SCOPES:
                        unit = Unit(
                            rows_per_expert=rows, imbalance=imbalance, seed=seed, scope=scope
                        )
                        in_focus = scope == "experts" and imbalance == FOCUS
                        yield unit, self.focus_rounds if in_focus else 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One arm once: of one rank, or of both. Pairs are (at the end of forward, at the end)."""

    unit: Unit
    arm: str
    ns: tuple[int, int]  # since the common start
    moved_bytes: tuple[int, int]
    copy_cpu_ns: tuple[int, int]
    core_share: float  # CPU time of the process / its wall time

    def with_other_rank(self, other: Sample) -> Sample:
        """The sample of both ranks: the slower one's times, the sum of what was moved."""
        slower = max(self, other, key=lambda sample: sample.ns[1])
        moved, cpu = (
            (mine[0] + theirs[0], mine[1] + theirs[1])
            for mine, theirs in (
                (self.moved_bytes, other.moved_bytes),
                (self.copy_cpu_ns, other.copy_cpu_ns),
            )
        )
        forward = max(self.ns[0], other.ns[0])
        return replace(slower, ns=(forward, slower.ns[1]), moved_bytes=moved, copy_cpu_ns=cpu)


# ---------------------------------------------------------------------------------- statistics


def table_rows(samples: Sequence[Sample], schedule: Schedule) -> list[Row]:
    """One row per configuration, over all its seeds, in the order of COLUMNS."""
    rows: list[Row] = []
    for rows_per_expert in schedule.rows_per_expert:
        for scope in SCOPES:
            for imbalance in IMBALANCES:
                key = rows_per_expert, scope, imbalance
                mine = [
                    s for s in samples
                    if (s.unit.rows_per_expert, s.unit.scope, s.unit.imbalance) == key
                ]  # fmt: skip
                for at in range(len(PASSES)):
                    rows += _configuration(mine, at, schedule)
    return rows


def _configuration(samples: Sequence[Sample], at: int, schedule: Schedule) -> Iterator[Row]:
    """The rows of all arms of one unit's configuration; at: which pass."""
    unit, policies = samples[0].unit, schedule.policies
    ideals = {ideal_of(policy, policies): policy for policy in policies}
    by_seed = {arm: _medians(samples, arm, at, schedule.seeds)
               for arm in (NO_BALANCER, AGAIN, NONE, *policies, *ideals, CEILING)}  # fmt: skip
    gain = by_seed[NONE] - by_seed[CEILING]

    def percent(arm: str, whole: npt.NDArray[np.float64]) -> float | None:
        if unit.imbalance == 1.0:  # no gain to have a share of
            return None
        return median(100 * (by_seed[NONE] - by_seed[arm]) / whole)

    for arm, medians in by_seed.items():
        mine = [sample for sample in samples if sample.arm == arm]
        ms = [sample.ns[at] / 1e6 for sample in mine]
        ideal = ideal_of(arm, policies) if arm in policies else arm if arm in ideals else None
        ratio = medians / by_seed[NO_BALANCER]
        yield {
            "imbalance": unit.imbalance,
            "arm": arm,
            "pass": PASSES[at],
            "scope": unit.scope,
            "rows_per_expert": unit.rows_per_expert,
            "samples": len(mine),
            "ms_p50": median(ms),
            "ms_iqr": iqr(ms),
            "max_mean": _max_mean(arm, unit, schedule),
            "ratio": median(ratio),
            "ratio_iqr": iqr(ratio),
            "ceiling_recovered_pct": percent(arm, gain),
            "plan_ideal_pct": percent(ideal, gain) if ideal else None,
            "of_plan_ideal_pct": (
                percent(arm, by_seed[NONE] - by_seed[ideal]) if arm in policies and ideal else None
            ),
            "moved_mb": median([sample.moved_bytes[at] / 1e6 for sample in mine]),
            "copy_cpu_ms": median([sample.copy_cpu_ns[at] / 1e6 for sample in mine]),
        }


def _medians(samples: Sequence[Sample], arm: str, at: int, seeds: int) -> npt.NDArray[np.float64]:
    """[seeds] of an arm: the median over the rounds of each seed, in ns."""
    mine = [sample for sample in samples if sample.arm == arm]
    by_seed = [[s.ns[at] for s in mine if s.unit.seed == seed] for seed in range(seeds)]
    return np.asarray([median(of_seed) for of_seed in by_seed])


def _max_mean(arm: str, unit: Unit, schedule: Schedule) -> float:
    """max / mean of the rows that the ranks compute in this arm, median over seeds."""
    shape, policies = schedule.shape, schedule.policies
    planned = {name: p for p in policies for name in (p, ideal_of(p, policies))}
    found = []
    for seed in range(schedule.seeds):
        of_seed = replace(unit, seed=seed)
        if arm == CEILING:
            loads = of_seed.level_counts(shape).sum(axis=1)
        else:
            counts = of_seed.counts(shape)
            loads = plan_of(planned.get(arm, NONE), counts, shape).loads_after(counts)
        found.append(load_imbalance(loads))
    return median(found)


def paired_rows(samples: Sequence[Sample]) -> list[Row]:
    """Each arm against no_balancer of the same round: what a call costs where nothing moves."""
    rows: list[Row] = []
    for scope in ("experts_paired", "empty_paired"):
        mine = [sample for sample in samples if sample.unit.scope == scope]
        for at, pass_name in enumerate(PASSES):
            ns: dict[str, list[int]] = {}
            for sample in mine:
                ns.setdefault(sample.arm, []).append(sample.ns[at])
            base = np.asarray(ns[NO_BALANCER])
            for arm in sorted(ns, key=lambda arm: (arm != NO_BALANCER, arm != AGAIN)):
                seen = np.asarray(ns[arm])
                percents, us = 100 * (seen / base - 1), (seen - base) / 1000
                rows.append(
                    {
                        "imbalance": 1.0,
                        "arm": arm,
                        "pass": pass_name,
                        "scope": scope,
                        "rows_per_expert": mine[0].unit.rows_per_expert,
                        "samples": len(seen),
                        "ms_p50": median(seen / 1e6),
                        "ms_iqr": iqr(seen / 1e6),
                        **_interval("paired_pct", percents),
                        **_interval("paired_us", us),
                    }
                )
    return rows


def _interval(name: str, values: npt.NDArray[np.float64]) -> dict[str, float]:
    """Median and its 95 % interval from order statistics (binomial, normal approximation)."""
    ordered, half = np.sort(values), 0.98 * len(values) ** 0.5
    low = max(0, int(len(values) / 2 - half))
    return {
        name: median(values),
        f"{name}_low": float(ordered[low]),
        f"{name}_high": float(ordered[len(values) - 1 - low]),
    }


# ---------------------------------------------------------------------------------- the report


def print_tables(report: Report, rows: Sequence[Row], paired: Sequence[Row]) -> None:
    """Rows of each size and scope apart, then the calls that move nothing."""
    for key in dict.fromkeys((row["rows_per_expert"], row["scope"]) for row in rows):
        print(f"\n{key[0]} rows per expert, scope {key[1]}")
        mine = [
            {"configuration": f"{row['imbalance']:.2f} {row['arm']} {row['pass']}", **row}
            for row in rows
            if (row["rows_per_expert"], row["scope"]) == key
        ]
        report.table(mine, ("configuration", *COLUMNS[5:]))
    print("\nnothing moves (max / mean 1.0): paired with no_balancer of the same round")
    mine = [
        {"configuration": f"{row['scope']} {row['arm']} {row['pass']}", **row} for row in paired
    ]
    report.table(mine, ("configuration", *PAIRED_COLUMNS[5:]))


def print_findings(rows: Sequence[Row], paired: Sequence[Row], schedule: Schedule) -> None:
    """The promised figures, each with the numbers it is made of."""
    most = max(schedule.rows_per_expert)
    wanted = (most, "experts", PASSES[1])
    at = {
        (row["arm"], row["imbalance"]): row
        for row in rows
        if (row["rows_per_expert"], row["scope"], row["pass"]) == wanted
    }
    print(f"\nexperts, forward and backward, {most} rows per expert, max / mean {FOCUS}:")
    none, ceiling = at[NONE, FOCUS]["ms_p50"], at[CEILING, FOCUS]["ms_p50"]
    for policy in schedule.policies:
        row = at[policy, FOCUS]
        print(
            f"  {policy} takes {row['ms_p50']:.1f} ms between none {none:.1f} and ceiling "
            f"{ceiling:.1f}: recovers {row['ceiling_recovered_pct']:.1f} %, its plan's ideal "
            f"{row['plan_ideal_pct']:.1f} %, so {row['of_plan_ideal_pct']:.1f} % of its ideal "
            f"(promised: {OF_IDEAL_TARGET:.0f}; median over {schedule.seeds} seeds)"
        )
    print("nothing moves, forward and backward, against no_balancer [95 % interval of the median]:")
    for row in paired:
        if row["pass"] == PASSES[1] and row["arm"] != NO_BALANCER:
            low, high = row["paired_pct_low"], row["paired_pct_high"]
            us_low, us_high = row["paired_us_low"], row["paired_us_high"]
            is_empty = row["scope"] == "empty_paired"
            share = f"{row['paired_pct']:+.2f} % [{low:+.2f}, {high:+.2f}], "
            print(
                f"  {'empty compute' if is_empty else 'experts':13} {row['arm']:14} "
                f"{'' if is_empty else share}"
                f"{row['paired_us']:+.0f} us [{us_low:+.0f}, {us_high:+.0f}]"
            )
    print(f"  promised: experts at most {OVERHEAD_TARGET:.0f} %")
