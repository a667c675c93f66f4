"""Does balancing an MoE layer pay on the wall clock? Two ranks, one core and one thread each.

Each rank is a process pinned to its own core before torch or a Balancer starts a thread, so mover,
copier and watchdog share that core (checked at the end). All arms of a unit are checked, then timed
in random order within each round. A sample begins at an instant both ranks spin for, and ends when
the slowest rank has added its last weight grad; its forward ends when the slowest rank has its
outputs. Waiting for the other rank after that sleeps, so that its copies are not slowed. Grads are
None before each sample. malloc keeps freed memory, as the allocator of a training job does.

Arms: no_balancer; no_balancer_aa, the same again, for the noise; none and policies, a Balancer of
this policy; plan_ideal, the policy's loads with rows and weights in place; ceiling, each rank's
expert sizes scaled to the mean load. Percentages are per seed, of medians over its rounds; shown is
the median over seeds.  recovered = (none - arm) / (none - ceiling).
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import random
import tempfile
import time
import traceback
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from layer_arms import (
    AGAIN,
    CEILING,
    NO_BALANCER,
    NONE,
    NUM_RANKS,
    Arm,
    RankLayer,
    Shape,
    Unit,
    check_arms,
    ideal_of,
    plan_of,
)
from report import Report, Row, arguments, iqr, median, percentile

from feplb.scheduler import POLICIES, load_imbalance

PASSES = ("fwd", "fwd_bwd")
IMBALANCES = (1.0, 1.25, 1.5, 1.75)
SCOPES = ("experts", "layer")
FOCUS = 1.5  # the imbalance with a promise: more rounds
OF_IDEAL_TARGET, OVERHEAD_TARGET = 88.0, 2.0
HEAD_START_NS = 100_000  # from the last rank's arrival to the common start
DEADLINE_NS = 120 * 10**9
# One thread per rank, and no page faults once warm: freed memory goes back to no one.
RANK_ENVIRONMENT = {
    **{f"{name}_NUM_THREADS": "1" for name in ("OMP", "MKL", "OPENBLAS")},
    **{"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)},
}
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


FULL = Schedule(
    shape=Shape(hidden=512, ffn=1024),
    policies=("greedy",),
    rows_per_expert=(256, 64),
    seeds=10,
    focus_rounds=3,
    paired_rows=32,
    paired_rounds=300,
    empty_rounds=1000,
)
QUICK = replace(
    FULL,
    shape=Shape(hidden=64, ffn=128),
    rows_per_expert=(64, 16),
    seeds=1,
    focus_rounds=2,
    paired_rows=4,
    paired_rounds=20,
    empty_rounds=20,
)


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


# ----------------------------------------------------------------------------------- one rank


class Clock:
    """A start that both ranks share to the instant, in words of shared memory."""

    def __init__(self, rank: int, words: Any) -> None:
        self._words, self._round = words, 0
        self._arrived, self._other_arrived = 8 * rank, 8 * (1 - rank)
        self._ended, self._other_ended = 8 * (2 + rank), 8 * (3 - rank)
        self._start_word, self._leads, self._last_start = 32, rank == 0, 0

    def start(self) -> int:
        """Spin until both ranks are here and the common start has come; returns it."""
        self._round += 1
        words, now = self._words, time.perf_counter_ns
        words[self._arrived] = self._round
        deadline = now() + DEADLINE_NS
        while words[self._other_arrived] < self._round:
            self._raise_after(deadline)
        if self._leads:
            words[self._start_word] = now() + HEAD_START_NS
        while words[self._start_word] == self._last_start:
            self._raise_after(deadline)
        self._last_start = int(words[self._start_word])
        while now() < self._last_start:
            pass
        return self._last_start

    def finish(self) -> None:
        """Sleep until the other rank has ended its sample too: its copier may need this core."""
        self._words[self._ended] = self._round
        deadline = time.perf_counter_ns() + DEADLINE_NS
        while self._words[self._other_ended] < self._round:
            time.sleep(2e-4)
            self._raise_after(deadline)

    def _raise_after(self, deadline: int) -> None:
        if time.perf_counter_ns() > deadline:
            raise TimeoutError(f"the other rank did not come to sample {self._round}")


def time_arm(unit: Unit, name: str, arm: Arm, clock: Clock) -> Sample:
    """One sample of this rank."""
    for leaf in arm.leaves:
        leaf.grad = None
    before = _lane(arm)
    start, cpu = clock.start(), time.process_time_ns()
    out = arm.forward()
    forward_end, forward_lane = time.perf_counter_ns(), _lane(arm)
    out.backward(arm.grad_out)
    end, cpu = time.perf_counter_ns(), time.process_time_ns() - cpu
    clock.finish()
    del out
    for leaf in arm.leaves:
        leaf.grad = None
    moved, copying = (
        (middle - first, last - first)
        for first, middle, last in zip(before, forward_lane, _lane(arm), strict=True)
    )
    return Sample(
        unit=unit,
        arm=name,
        ns=(forward_end - start, end - start),
        moved_bytes=moved,
        copy_cpu_ns=copying,
        core_share=cpu / (end - start),
    )


def _lane(arm: Arm) -> tuple[int, int]:
    """Bytes this rank has pushed, CPU time of its copy thread; a few microseconds."""
    if arm.balancer is None:
        return 0, 0
    stats = arm.balancer.lane_stats()
    moved = stats["rows_bytes"] + stats["weights_bytes"] + stats["returns_bytes"]
    return moved, stats["copy_thread_cpu_ns"]


def measure(rank: int, schedule: Schedule, words: Any, show_progress: bool) -> list[Sample]:
    """Check, then time, everything; one rank's samples in the order both ranks share."""
    layer, clock = RankLayer(rank, schedule.shape, schedule.policies), Clock(rank, words)
    order, samples = random.Random(0), []
    ticks = _Progress(schedule, show_progress)
    units = list(schedule.units())

    def rounds(unit: Unit, arms: Mapping[str, Arm], num_rounds: int) -> None:
        for _ in range(num_rounds):
            for name in order.sample(sorted(arms), len(arms)):
                samples.append(time_arm(unit, name, arms[name], clock))
                ticks.tick()
        layer.end_step()
        gc.collect()

    try:
        for unit, _ in units:
            if unit.seed == 0:
                check_arms(layer, unit)
                ticks.tick()
        gc.disable()
        for unit, num_rounds in units:
            rounds(unit, layer.arms(unit), num_rounds)
        paired, arms = paired_arms(layer, schedule)
        rounds(paired, arms, schedule.paired_rounds)
        empty = replace(paired, rows_per_expert=1, scope="empty_paired")
        rounds(empty, layer.empty_arms(), schedule.empty_rounds)
        check_pinned()
    finally:
        ticks.close()
        layer.close()
    return samples


def paired_arms(layer: RankLayer, schedule: Schedule) -> tuple[Unit, dict[str, Arm]]:
    """The unit without imbalance on which balancers find nothing to do, and its arms."""
    unit = Unit(rows_per_expert=schedule.paired_rows, imbalance=1.0, seed=0)
    check_arms(layer, unit)
    counts = unit.counts(layer.shape)
    if busy := [p for p in schedule.policies if plan_of(p, counts, layer.shape).moves]:
        raise RuntimeError(f"{busy} move something at {unit}, expected empty plans")
    arms = layer.arms(unit)
    names = (NO_BALANCER, AGAIN, NONE, *schedule.policies)
    return replace(unit, scope="experts_paired"), {name: arms[name] for name in names}


def check_pinned() -> None:
    """Every thread of this process may run on its one core only."""
    mine = os.sched_getaffinity(0)
    for task in os.listdir("/proc/self/task"):
        if len(mine) != 1 or os.sched_getaffinity(int(task)) != mine:
            raise RuntimeError(f"thread {task} may leave core {mine}")


class _Progress:
    """A bar on stderr, moved between samples; tqdm's own thread is off."""

    def __init__(self, schedule: Schedule, shown: bool) -> None:
        self._bar: Any = None
        if shown:
            from tqdm import tqdm

            arms = 5 + 2 * len(schedule.policies) - 1
            checks = sum(unit.seed == 0 for unit, _ in schedule.units())
            total = checks + arms * sum(rounds for _, rounds in schedule.units())
            few = 3 + len(schedule.policies)
            total += few * (schedule.paired_rounds + schedule.empty_rounds)
            tqdm.monitor_interval = 0
            self._bar = tqdm(total=total, unit="sample", mininterval=1.0)

    def tick(self) -> None:
        if self._bar is not None:
            self._bar.update()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


# ---------------------------------------------------------------------------------- both ranks


def run_rank(
    rank: int, schedule: Schedule, words: Any, folder: str, progress: bool, results: Connection
) -> None:
    """The body of a rank's process, which is pinned already."""
    try:
        torch.set_num_threads(1)
        store = dist.FileStore(f"{folder}/store", NUM_RANKS)  # type: ignore[attr-defined]
        dist.init_process_group("gloo", store=store, rank=rank, world_size=NUM_RANKS)
        samples = measure(rank, schedule, words, progress and rank == 0)
        dist.destroy_process_group()
        results.send(samples)
    except BaseException:
        results.send(f"rank {rank}:\n{traceback.format_exc()}")
        raise


def run_ranks(schedule: Schedule, progress: bool) -> list[Sample]:
    """Start one process per core, and join their samples; SystemExit if a rank fails."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < NUM_RANKS:
        raise SystemExit(f"layer_time needs {NUM_RANKS} cores of its own, this machine has 1")
    context = multiprocessing.get_context("spawn")
    words = context.RawArray(ctypes.c_int64, 8 * 5)
    os.environ.update(RANK_ENVIRONMENT)
    pipes, processes = [], []
    with tempfile.TemporaryDirectory(prefix="feplb-layer-time-") as folder:
        try:
            for rank in range(NUM_RANKS):
                here, there = context.Pipe(duplex=False)
                args = (rank, schedule, words, folder, progress, there)
                process = context.Process(target=run_rank, args=args, daemon=True)
                os.sched_setaffinity(0, {cores[rank]})  # inherited from its first instruction
                process.start()
                there.close()
                pipes.append(here)
                processes.append(process)
            os.sched_setaffinity(0, cores)
            of_ranks = _collect(pipes)
            for process in processes:
                process.join()
        finally:
            for process in processes:
                process.kill()
    return [mine.with_other_rank(other) for mine, other in zip(*of_ranks, strict=True)]


def _collect(pipes: Sequence[Connection]) -> list[list[Sample]]:
    found: dict[int, list[Sample]] = {}
    while len(found) < len(pipes):
        for ready in wait([pipe for i, pipe in enumerate(pipes) if i not in found]):
            rank = next(i for i, pipe in enumerate(pipes) if pipe is ready)
            try:
                answer = pipes[rank].recv()
            except EOFError:
                answer = f"rank {rank} died without a word"
            if isinstance(answer, str):
                raise SystemExit(answer)
            found[rank] = answer
    return [found[rank] for rank in range(len(pipes))]


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
        return None if unit.imbalance == 1.0 else median(100 * (by_seed[NONE] - by_seed[arm]) / whole)

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


def _medians(
    samples: Sequence[Sample], arm: str, at: int, seeds: int
) -> npt.NDArray[np.float64]:
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
    shared = ("scope", "rows_per_expert")
    for key in dict.fromkeys((row["rows_per_expert"], row["scope"]) for row in rows):
        print(f"\n{key[0]} rows per expert, scope {key[1]}")
        mine = [row for row in rows if (row["rows_per_expert"], row["scope"]) == key]
        report.table(mine, [name for name in COLUMNS if name not in shared])
    print("\nnothing moves (max / mean 1.0): paired with no_balancer of the same round")
    report.table(paired, [name for name in PAIRED_COLUMNS if name != "imbalance"])


def print_findings(rows: Sequence[Row], paired: Sequence[Row], schedule: Schedule) -> None:
    """The promised figures, each with the numbers it is made of."""
    most = max(schedule.rows_per_expert)
    at = {(r["arm"], r["imbalance"]): r for r in rows
          if (r["rows_per_expert"], r["scope"], r["pass"]) == (most, "experts", PASSES[1])}  # fmt: skip
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
            share = f"{row['paired_pct']:+.2f} % [{low:+.2f}, {high:+.2f}], "
            is_empty = row["scope"] == "empty_paired"
            print(
                f"  {'empty compute' if is_empty else 'experts':13} {row['arm']:14} "
                f"{'' if is_empty else share}{row['paired_us']:+.0f} us [{us_low:+.0f}, {us_high:+.0f}]"
            )
    print(f"  promised: experts at most {OVERHEAD_TARGET:.0f} %")


def main(options: Namespace) -> None:
    schedule = replace(QUICK if options.quick else FULL, policies=tuple(options.policies))
    shape = schedule.shape
    samples = run_ranks(schedule, progress=not options.quick)
    report = Report(bench="layer_time", lane="host")
    report.header(
        ranks=NUM_RANKS, threads=1, experts_per_rank=shape.experts, hidden=shape.hidden,
        ffn=shape.ffn, dtype="fp32", seeds=schedule.seeds, check="ok(bitwise)",
    )  # fmt: skip
    alone = [s.core_share for s in samples
             if s.arm in (NO_BALANCER, AGAIN) and s.unit.scope == "experts"]  # fmt: skip
    print(
        f"share of its core that the slowest rank had, no_balancer: median {median(alone):.3f}, "
        f"1 in 20 below {percentile(alone, 5):.3f} (1.0 on a quiet machine)"
    )
    rows, paired = table_rows(samples, schedule), paired_rows(samples)
    print_tables(report, rows, paired)
    print_findings(rows, paired, schedule)
    names = dict.fromkeys(COLUMNS + PAIRED_COLUMNS)
    report.write(options.json, [{**names, **row} for row in (*rows, *paired)])


if __name__ == "__main__":
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument(
        "--policies", nargs="+", default=["greedy"], choices=[p for p in POLICIES if p != NONE],
        help="what to compare; plan_ideal is the first one's",
    )  # fmt: skip
    main(parser.parse_args())
