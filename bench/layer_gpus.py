"""What does balancing bring to one MoE layer over several GPUs? The real layer over the ce lane.

Started by bench/layer_time.py where there are two GPUs or more: one process each, GLM-5's experts
in bf16 (hidden 6144, width 2048, 128 experts, top-8, 4,096 tokens per rank), micro-batches of the
calibrated workload. First every arm is checked on every micro-batch (gpu_layer_check.py), then all
are timed in random order, round by round. A sample begins at an instant that all ranks share, on
idle GPUs, and ends when the slowest rank has its last weight grad; fwd is the part of it until the
slowest rank has its outputs, by events of its stream. Host work is in it, plan and launches too.

Arms: no_balancer; no_balancer_aa, the same again, for the noise; none and policies, a Balancer of
this policy; plan_ideal_NAME, that policy's plan with rows and weights in place (scope "experts");
ceiling, each rank's expert sizes scaled to the mean load.
recovered = (none - arm) / (none - ceiling), of the medians of each micro-batch, where that gain
exceeds what no_balancer and no_balancer_aa differ by.
"""

from __future__ import annotations

import gc
import random
import time
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from gpu_layer import EXPERTS, SCOPES, GpuArm, GpuLayer, MicroBatch, Size, routing_of
from gpu_layer_check import check
from gpu_ranks import num_ranks, over_ranks
from gpu_timing import gpu_facts
from layer_arms import AGAIN, CEILING, IDEAL, NO_BALANCER, NONE
from report import Report, Row, iqr, median

from feplb.scheduler import Plan, load_imbalance

POLICIES = ("greedy", "refine", "split", "auto")
PASSES = ("fwd", "fwd_bwd")
HEAD_START_NS = 2_000_000  # more than it takes to agree on a common start
FULL = Size()
QUICK = replace(FULL, steps=2, rounds=3)
# Where the GPUs have not the memory for GLM-5's micro-batch.
FEWER_TOKENS = (4096, 2048, 1024, 512)
BACKEND = "cpu:gloo,cuda:nccl"
TIMEOUT_S = {True: 110.0, False: 1200.0}  # of all ranks, quick or not


@dataclass(frozen=True)
class Sample:
    """One arm once. ms: since the common start, (at the end of forward, at the end)."""

    scope: str
    step: int
    arm: str
    ms: tuple[float, float]


@dataclass(frozen=True)
class Measured:
    """What one rank brings home. plans: of each policy, by micro-batch."""

    size: Size
    samples: list[Sample]
    plans: list[dict[str, Plan]]


# ---------------------------------------------------------------------------------------- one rank


class Stopwatch:
    """Instants of the current stream, or of the host where tensors live there."""

    def __init__(self, device: torch.device, start_ns: int) -> None:
        self._on_gpu = device.type == "cuda"
        self._marks: list[Any] = []
        self._late_ms = (time.perf_counter_ns() - start_ns) / 1e6
        self.mark()

    def mark(self) -> None:
        """Now, for the host; behind all work launched so far, for a GPU."""
        if self._on_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter_ns())

    def read(self) -> list[float]:
        """Milliseconds from the start to every later mark; waits for them."""
        first, *later = self._marks
        if self._on_gpu:
            later[-1].synchronize()
            return [self._late_ms + float(first.elapsed_time(mark)) for mark in later]
        return [self._late_ms + (mark - first) / 1e6 for mark in later]


def common_start() -> int:
    """Spin until an instant that is the same on all ranks; returns it. Collective."""
    start = torch.tensor([time.perf_counter_ns() + HEAD_START_NS])
    dist.all_reduce(start, dist.ReduceOp.MAX)
    at = int(start)
    while time.perf_counter_ns() < at:
        pass
    return at


def time_arm(arm: GpuArm, device: torch.device) -> tuple[float, float]:
    """One sample of this rank."""
    arm.before()
    for leaf in arm.leaves:
        leaf.grad = None
    if device.type == "cuda":
        torch.cuda.synchronize()
    watch = Stopwatch(device, common_start())
    out = arm.forward()
    watch.mark()
    out.backward(arm.grad_out)
    watch.mark()
    forward, both = watch.read()
    return forward, both


def fitting(size: Size, policies: Sequence[str]) -> Size:
    """The size, with as many tokens as every rank's GPU has memory for; collective.

    Raises:
        RuntimeError: not even the fewest fit.
    """
    ranks = dist.get_world_size()
    free = torch.tensor([2**62])
    if size.device == "cuda":
        free = torch.tensor([torch.cuda.mem_get_info()[0]])
    dist.all_reduce(free, dist.ReduceOp.MIN)
    for tokens in (size.tokens, *(fewer for fewer in FEWER_TOKENS if fewer < size.tokens)):
        smaller = replace(size, tokens=tokens)
        if smaller.bytes_needed(ranks, len(policies)) <= int(free):
            return smaller
    need = smaller.bytes_needed(ranks, len(policies))
    raise RuntimeError(
        f"a GPU has {int(free) / 2**30:.1f} GiB free, and {ranks} ranks of this layer take "
        f"{need / 2**30:.1f} GiB each, with {tokens} tokens. Nothing was timed."
    )


def measure(rank: int, size: Size, policies: Sequence[str]) -> Measured:
    """The body of one rank's process: check, then time, everything."""
    del rank  # it is the one of the default group
    size = fitting(size, policies)
    layer, order = GpuLayer(size, policies), random.Random(0)
    samples: list[Sample] = []
    plans: list[dict[str, Plan]] = []
    try:
        for step in range(size.steps):
            batch = MicroBatch(layer, step)
            plans.append(check(layer, batch))
            arms = {scope: batch.arms(scope) for scope in SCOPES}
            for policy, ideal in batch.ideals(plans[-1]).items():
                arms[EXPERTS][f"{IDEAL}_{policy}"] = ideal
            jobs = [(scope, name) for scope in SCOPES for name in arms[scope]]
            gc.collect()
            gc.disable()
            for _ in range(size.rounds):
                for scope, name in order.sample(jobs, len(jobs)):
                    ms = time_arm(arms[scope][name], layer.device)
                    samples.append(Sample(scope, step, name, ms))
                layer.end_step()
            gc.enable()
    finally:
        layer.close()
    return Measured(size, samples, plans)


# --------------------------------------------------------------------------------------- all ranks


def slowest(of_ranks: Sequence[Sequence[Sample]]) -> list[Sample]:
    """Sample by sample over the ranks, which all have them in one order."""
    return [
        replace(each[0], ms=(max(s.ms[0] for s in each), max(s.ms[1] for s in each)))
        for each in zip(*of_ranks, strict=True)
    ]


def table_rows(measured: Measured, ranks: int) -> list[Row]:
    """One row per scope, pass and arm; the samples are those of the slowest rank."""
    rows: list[Row] = []
    for scope in SCOPES:
        mine = [sample for sample in measured.samples if sample.scope == scope]
        for at in range(len(PASSES)):
            rows += _of_pass(mine, at, measured, ranks)
    return rows


def _of_pass(samples: Sequence[Sample], at: int, measured: Measured, ranks: int) -> Iterator[Row]:
    """The rows of all arms in one scope; at: which pass."""
    size = measured.size
    policies = tuple(measured.plans[0])
    ideals = {f"{IDEAL}_{policy}": policy for policy in policies}
    by_arm = {name: [s.ms[at] for s in samples if s.arm == name] for name in
              (NO_BALANCER, AGAIN, NONE, *policies, *ideals, CEILING)}  # fmt: skip
    steps = {name: _by_step(samples, name, at, size.steps) for name, ms in by_arm.items() if ms}
    gain = steps[NONE] - steps[CEILING]
    has_gain = median(gain) > median(np.abs(steps[NO_BALANCER] - steps[AGAIN]))

    def recovered(name: str, whole: npt.NDArray[np.float64]) -> float | None:
        if not has_gain or median(whole) <= 0:
            return None
        return median(100 * (steps[NONE] - steps[name]) / whole)

    for name in steps:
        ideal = f"{IDEAL}_{name}"
        of_ideal = recovered(name, steps[NONE] - steps[ideal]) if ideal in steps else None
        yield {
            "scope": samples[0].scope,
            "pass": PASSES[at],
            "arm": name,
            "samples": len(by_arm[name]),
            "ms_p50": median(by_arm[name]),
            "ms_iqr": iqr(by_arm[name]),
            "ratio": median(steps[name] / steps[NO_BALANCER]),
            "ceiling_recovered_pct": recovered(name, gain),
            "of_plan_ideal_pct": of_ideal,
            **_loads(name, ideals.get(name, name), measured, ranks),
        }


def _by_step(samples: Sequence[Sample], name: str, at: int, steps: int) -> npt.NDArray[np.float64]:
    """[steps] of an arm: the median over its rounds, ms."""
    mine = [sample for sample in samples if sample.arm == name]
    return np.asarray([median([s.ms[at] for s in mine if s.step == step]) for step in range(steps)])


def _loads(name: str, policy: str, measured: Measured, ranks: int) -> Mapping[str, float]:
    """Of the plans, medians over the micro-batches."""
    if name == CEILING:
        return {"max_mean": 1.0, "rows_moved_pct": 0.0, "moves": 0.0}
    max_mean, moved, moves = [], [], []
    for step, plans in enumerate(measured.plans):
        plan = plans.get(policy, Plan())
        counts = routing_of(measured.size, ranks, step).counts
        max_mean.append(load_imbalance(plan.loads_after(counts)))
        moved.append(100 * plan.num_rows_moved / counts.sum())
        moves.append(len(plan.moves))
    return {
        "max_mean": median(max_mean),
        "rows_moved_pct": median(moved),
        "moves": median(moves),
    }


def print_tables(report: Report, rows: Sequence[Row]) -> None:
    """Each scope and pass apart."""
    for scope, name in dict.fromkeys((row["scope"], row["pass"]) for row in rows):
        print(f"\nscope {scope}, {name}: of the slowest rank")
        mine = [row for row in rows if (row["scope"], row["pass"]) == (scope, name)]
        report.table(mine, list(mine[0])[2:])


def run(options: Namespace, report: Report) -> list[Row]:
    """Start a process per GPU; print and return the rows."""
    ranks, wanted = num_ranks(torch.cuda.device_count()), QUICK if options.quick else FULL
    timeout_s = TIMEOUT_S[options.quick]
    of_ranks: list[Measured] = over_ranks(
        measure, ranks, wanted, POLICIES, backend=BACKEND, timeout_s=timeout_s
    )
    size = of_ranks[0].size
    measured = replace(of_ranks[0], samples=slowest([each.samples for each in of_ranks]))
    report.header(
        **gpu_facts(), ranks=ranks, experts=size.num_experts, hidden=size.hidden, ffn=size.ffn,
        top_k=size.top_k, tokens=size.tokens, dtype=str(size.dtype), steps=size.steps,
        rounds=size.rounds, check="ok(bitwise where experts move whole)",
    )  # fmt: skip
    if size.tokens < wanted.tokens:
        print(f"too little memory for {wanted.tokens} tokens per rank: {size.tokens} instead")
    rows = table_rows(measured, ranks)
    print_tables(report, rows)
    return rows
