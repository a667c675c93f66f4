"""Does balancing an MoE layer pay on the wall clock?

With two GPUs or more: the real layer over the ce lane, as layer_gpus.py says. With one: nothing is
measured here, bench/layer_emulated.py emulates. Without: the host lane, two ranks, one core and one
thread each, as follows; --lane host asks for it where there are GPUs.

Each rank is a process pinned to its own core before torch or a Balancer starts a thread, so mover,
copier and watchdog share that core (checked at the end). All arms are checked first (layer_check),
then timed, those of a unit in random order within each round. A sample begins at an instant both
ranks spin for, and ends when the slowest rank has added its last weight grad; fwd is the part of it
until the slowest rank has its outputs, with grad mode on. Whoever is done sleeps until the other
is, so that its copies are not slowed. Grads are None before each sample. malloc keeps freed memory,
as an allocator of tensors does; else every arm pays a third of its time for page faults.

Arms: no_balancer; no_balancer_aa, the same again, for the noise; none and policies, a Balancer of
this policy; plan_ideal, the policy's loads with rows and weights in place; ceiling, each rank's
expert sizes scaled to the mean load. In scope "experts" nothing but a Balancer makes the ranks wait
for each other, which is to its disadvantage.  recovered = (none - arm) / (none - ceiling)
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import random
import sys
import tempfile
import time
import traceback
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist
from gpu_timing import nothing_measured
from layer_arms import AGAIN, NO_BALANCER, NONE, NUM_RANKS, Arm, RankLayer, Shape, Unit, plan_of
from layer_check import check_arms
from layer_figures import (
    COLUMNS,
    PAIRED_COLUMNS,
    Sample,
    Schedule,
    paired_rows,
    print_findings,
    print_tables,
    table_rows,
)
from report import Report, Row, arguments, median, percentile

from feplb.scheduler import POLICIES

Measure = Callable[[int, Any, bool], Any]
HEAD_START_NS = 100_000  # from the last rank's arrival to the common start
DEADLINE_NS = 120 * 10**9
ONE_GPU = (
    "One GPU here: nothing was measured. The real layer takes two GPUs or more; "
    "bench/layer_emulated.py\nemulates it on one, and bench/layer_time.py --lane host runs it on "
    "the CPU."
)
# One thread per rank, and no page faults once warm: freed memory goes back to no one.
RANK_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**40),
}
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
    moved = sum(stats[f"{what}_bytes"] for what in ("rows", "weights", "returns", "grads"))
    return moved, stats["copy_thread_cpu_ns"]


def measure(schedule: Schedule, rank: int, words: Any, show_progress: bool) -> list[Sample]:
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
        gc.collect()
        gc.disable()
        gc.freeze()  # collecting between units then looks at their own objects only
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
    rank: int, measure: Measure, words: Any, folder: str, progress: bool, results: Connection
) -> None:
    """The body of a rank's process, which is pinned already."""
    try:
        torch.set_num_threads(1)
        store = dist.FileStore(f"{folder}/store", NUM_RANKS)  # type: ignore[attr-defined]
        dist.init_process_group("gloo", store=store, rank=rank, world_size=NUM_RANKS)
        samples = measure(rank, words, progress and rank == 0)
        dist.destroy_process_group()
        results.send(samples)
    except BaseException:
        results.send(f"rank {rank}:\n{traceback.format_exc()}")
        raise


def run_ranks(measure: Measure, progress: bool) -> list[Any]:
    """Start one process per core; what `measure` returned on each rank. SystemExit if one fails.

    Args:
        measure: called with rank, shared words for a Clock, and whether to show progress; can be
            pickled.
    """
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < NUM_RANKS:
        raise SystemExit(f"{NUM_RANKS} ranks need a core each, this machine has {len(cores)}")
    context = multiprocessing.get_context("spawn")
    words = context.RawArray(ctypes.c_int64, 8 * 5)
    os.environ.update(RANK_ENVIRONMENT)
    pipes, processes = [], []
    with tempfile.TemporaryDirectory(prefix="feplb-ranks-") as folder:
        try:
            for rank in range(NUM_RANKS):
                here, there = context.Pipe(duplex=False)
                args = (rank, measure, words, folder, progress, there)
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
    return of_ranks


def _collect(pipes: Sequence[Connection]) -> list[Any]:
    found: dict[int, Any] = {}
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


def on_host(options: Namespace, report: Report) -> list[Row]:
    """Two ranks over the host lane; prints and returns the rows."""
    schedule = replace(QUICK if options.quick else FULL, policies=tuple(options.policies))
    shape = schedule.shape
    of_ranks = run_ranks(partial(measure, schedule), progress=not options.quick)
    samples = [mine.with_other_rank(other) for mine, other in zip(*of_ranks, strict=True)]
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
    return [{**names, **row} for row in (*rows, *paired)]


def main(given: Sequence[str] | None = None) -> int:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument(
        "--policies", nargs="+", default=["greedy"],
        choices=[policy for policy in POLICIES if policy not in (NONE, "split")],
        help="of the host lane; plan_ideal is the first one's (split has other bits than none)",
    )  # fmt: skip
    parser.add_argument(
        "--lane", choices=("host", "ce"), help="left out: ce where there is a GPU, else host"
    )
    options = parser.parse_args(given)
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    lane = options.lane or ("ce" if gpus else "host")
    report = Report(bench="layer_time", lane=lane)
    if lane == "host":
        rows = on_host(options, report)
    elif gpus == 0:
        return nothing_measured(report, options)
    elif gpus == 1:
        report.header(gpus=gpus)
        print(ONE_GPU)
        rows = []
    else:
        import layer_gpus

        rows = layer_gpus.run(options, report)
    report.write(options.json, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
