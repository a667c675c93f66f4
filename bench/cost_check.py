"""Is the cost model right about the host lane? Real layers, timed phase by phase, beside it.

Two ranks, a process and a core each, run the experts of a layer forward and backward as
bench/layer_time.py does (scope "experts"), in arms interleaved round by round; results are checked
against those of none first. Each rank's timeline is measured (cost_timeline). The cost model then
predicts the same calls, the slowest rank's and phase by phase, with two sets of constants:

    startup   as a Balancer chooses them when it starts, on this machine
    fitted    the same, but the GEMM rate that the none arm took CPU time for; no other arm is
              looked at

measured is the median over rounds of what the slowest rank took. Other work on the machine takes
the ranks' cores away: of each arm's samples of a routing the half is kept that lost least (time in
which a rank neither waited nor had its core); what the kept ones lost is printed. core is CPU time,
which other work hardly changes: of the rank that took most, in forward plus in backward, so what
the layer would take if no rank ever waited and nobody else used the cores.

An error is predicted / measured - 1. recovered = (none - arm) / (none - ceiling), where ceiling is
a measured arm too: each rank's expert sizes scaled to the mean load. Of each routing, the plan that
the model ranks first is compared with the one measured fastest: regret is what the former took
longer, in % of the latter.
"""

from __future__ import annotations

import gc
import random
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from cost_figures import COLUMNS, arm_rows, choice_rows, phase_rows
from cost_report import print_lost, print_report
from cost_samples import (
    CEILING,
    RankResult,
    RankSample,
    Routing,
    constants_of,
    join,
    least_disturbed,
)
from cost_timeline import (
    Recorder,
    TimedCompute,
    TimedCore,
    gemms_of,
    phases_of,
    waiting_ns,
)
from layer_arms import NONE, NUM_RANKS, Shape, run_balanced, scaled
from layer_time import Clock, run_ranks
from report import Report, arguments
from torch import Tensor

from feplb import Balancer, BalancerConfig
from feplb.compute import SwiGLU
from feplb.costs import predicted_costs
from feplb.scheduler import POLICIES, Move
from feplb.scheduler.workloads import Rows

IMBALANCES = (1.0, 1.25, 1.5, 1.75, 1.95)  # 2.0 would leave a rank nothing
SPREADS = (0.3, 1.0)  # sigma of the experts' lognormal loads: alike, and with hot ones


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """How much is measured; the same on both ranks."""

    shape: Shape
    policies: tuple[str, ...]
    rows_per_expert: tuple[int, ...] = (256, 64)
    imbalances: tuple[float, ...] = IMBALANCES
    spreads: tuple[float, ...] = SPREADS
    seeds: int = 2
    rounds: int = 6

    def routings(self) -> Iterator[Routing]:
        """Seeds outermost, so that drift meets all alike."""
        for seed in range(self.seeds):
            for rows in self.rows_per_expert:
                for spread in self.spreads:
                    for imbalance in self.imbalances:
                        yield Routing(
                            rows_per_expert=rows, spread=spread, imbalance=imbalance, seed=seed
                        )


FULL = Schedule(shape=Shape(hidden=512, ffn=1024), policies=POLICIES)
QUICK = replace(
    FULL, shape=Shape(hidden=64, ffn=128), rows_per_expert=(16,), imbalances=(1.0, 1.5), seeds=1,
    rounds=2,
)  # fmt: skip


class TimedLayer:
    """One rank's weights, rows and Balancers, whose cores and compute are timed."""

    def __init__(self, rank: int, schedule: Schedule) -> None:
        self.rank, self.shape = rank, schedule.shape
        pool = torch.Generator().manual_seed(rank)
        experts, rows = self.shape.experts, NUM_RANKS * self.shape.limits().max_recv_rows
        self.weights = [
            (0.05 * torch.randn(experts, *sizes, generator=pool)).requires_grad_()
            for sizes in self.shape.weight_shapes()
        ]
        self.rows = torch.randn(rows, self.shape.hidden, generator=pool)
        self.grads = torch.randn(rows, self.shape.hidden, generator=pool)
        self.recorder = Recorder()
        self.compute = TimedCompute(SwiGLU(), self.recorder)
        self._open = ExitStack()
        self.balancers = {policy: self._balancer(policy) for policy in schedule.policies}

    def _balancer(self, policy: str) -> Balancer:
        made = Balancer(BalancerConfig(policy=policy), dist.group.WORLD, [self.shape.spec()])
        balancer = self._open.enter_context(made)
        balancer.domain.core = TimedCore(balancer.domain.core, self.recorder)
        return balancer

    def close(self) -> None:
        self._open.close()

    def end_step(self) -> None:
        """Raise what went wrong on any rank; collective."""
        for balancer in self.balancers.values():
            balancer.check()

    def run(
        self, arm: str, counts: Rows, clock: Clock | None
    ) -> tuple[int, int, tuple[int, int], list[Tensor]]:
        """This rank's experts: start, end, CPU ns of forward and backward, output and grads."""
        sizes = counts[self.rank].tolist()
        rows = self.rows[: sum(sizes)].detach().requires_grad_()
        for weight in self.weights:
            weight.grad = None
        self.recorder.steps.clear()
        balancer = self.balancers[NONE if arm == CEILING else arm]
        start = clock.start() if clock else 0
        cpu = [time.process_time_ns()]
        out = run_balanced(balancer, rows, sizes, self.weights, self.compute)
        cpu.append(time.process_time_ns())
        out.backward(self.grads[: sum(sizes)])
        end = time.perf_counter_ns()
        cpu.append(time.process_time_ns())
        if clock:
            clock.finish()
        grads = [tensor.grad for tensor in (rows, *self.weights) if tensor.grad is not None]
        return start, end, (cpu[1] - cpu[0], cpu[2] - cpu[1]), [out.detach(), *grads]

    def check(self, routing: Routing, policies: tuple[str, ...]) -> None:
        """Every policy computes what none computes; RuntimeError if not."""
        counts = routing.counts(self.shape)
        *_, expected = self.run(NONE, counts, None)
        for policy in policies:
            *_, seen = self.run(policy, counts, None)
            for mine, truth in zip(seen, expected, strict=True):
                # A split expert's sums are grouped differently: fp32 rounding of up to 4096 terms.
                whole = policy not in ("split", "auto")
                atol = 0.0 if whole else 1e-4 * float(truth.abs().max())
                if not torch.allclose(mine, truth, rtol=0, atol=atol):
                    raise RuntimeError(f"{routing}: {policy} computes something else than none")

    def sample(self, arm: str, routing: Routing, clock: Clock) -> RankSample:
        """One arm once, timed."""
        counts = routing.counts(self.shape)
        if arm == CEILING:
            mean = self.shape.experts * routing.rows_per_expert
            counts = np.stack([scaled(of_rank, mean) for of_rank in counts])
        balancer = self.balancers[NONE if arm == CEILING else arm]
        before = balancer.lane_stats()
        start, end, cpu, _ = self.run(arm, counts, clock)
        after, call = balancer.lane_stats(), balancer.last_call(0)
        if call is None:
            raise RuntimeError(f"{routing}: {arm} left no record of its call")
        forward, backward = phases_of(self.recorder.steps, start, end)
        moved = [name for name in after if name.endswith("_bytes")]
        return RankSample(
            routing=routing,
            arm=arm,
            ns=end - start,
            lost_ns=max(0, end - start - waiting_ns(self.recorder.steps) - sum(cpu)),
            core_ns=cpu,
            phases=(forward, backward),
            gemms=gemms_of(self.recorder.steps),
            moved_bytes=sum(after[name] - before[name] for name in moved),
            copy_cpu_ns=after["copy_thread_cpu_ns"] - before["copy_thread_cpu_ns"],
            moves=tuple(_move(move) for move in call.moves.tolist()),
        )


def _move(numbers: list[int]) -> Move:
    expert, owner, helper, first, last = numbers
    return Move(expert_idx=expert, owner_rank=owner, dst_rank=helper, row_start=first, row_end=last)


def measure(schedule: Schedule, rank: int, words: Any, show_progress: bool) -> RankResult:
    """Check, then time, everything; the samples are in the order both ranks share."""
    layer, clock = TimedLayer(rank, schedule), Clock(rank, words)
    order, samples = random.Random(0), []
    gc.disable()
    try:
        rates = layer.balancers["auto"].domain.lane_rates
        startup = predicted_costs(BalancerConfig(), schedule.shape.spec(), rates)
        for routing in schedule.routings():
            if routing.seed == 0:
                layer.check(routing, schedule.policies)
            arms = [*schedule.policies, CEILING]
            for _ in range(schedule.rounds):
                for arm in order.sample(arms, len(arms)):
                    samples.append(layer.sample(arm, routing, clock))
            layer.end_step()
            gc.collect()
            if show_progress and rank == 0:
                print(f"measured {routing}", flush=True)
    finally:
        layer.close()
    return RankResult(samples=samples, startup=startup, lane_rates=rates)


def main(options: Namespace) -> None:
    schedule = replace(QUICK if options.quick else FULL)
    schedule = replace(
        schedule,
        rounds=options.rounds or schedule.rounds,
        seeds=options.seeds or schedule.seeds,
        rows_per_expert=tuple(options.rows_per_expert or schedule.rows_per_expert),
        imbalances=tuple(options.imbalances or schedule.imbalances),
    )
    results: list[RankResult] = run_ranks(partial(measure, schedule), progress=not options.quick)
    shape, everything = schedule.shape, join(results)
    samples = least_disturbed(everything)
    report = Report(bench="cost_check", lane="host")
    report.header(
        ranks=NUM_RANKS, threads=1, experts_per_rank=shape.experts, hidden=shape.hidden,
        ffn=shape.ffn, dtype="fp32", seeds=schedule.seeds, rounds=schedule.rounds,
        check="ok",
    )  # fmt: skip
    constants = constants_of(results, samples, shape)
    arms = arm_rows(samples, constants, shape)
    phases = phase_rows(samples, constants, shape)
    choices = choice_rows(samples, constants, shape)
    print_lost(everything, samples)
    print_report(report, constants, arms, phases, choices)
    report.write(options.json, [{**dict.fromkeys(COLUMNS), **r} for r in arms + phases + choices])
    if options.plot is not None:
        from cost_plot import plot_scatter

        plot_scatter(options.plot, arms)
        print(f"picture: {options.plot}")


def parser() -> ArgumentParser:
    """The options."""
    made = arguments(__doc__.splitlines()[0])
    made.add_argument("--plot", type=Path, metavar="FILE", help="predicted against measured, PNG")
    made.add_argument("--rounds", type=int, help="of each routing (default: 6)")
    made.add_argument("--rows-per-expert", type=int, nargs="+", help="mean (default: 256 64)")
    made.add_argument("--imbalances", type=float, nargs="+", help="max / mean, 1 to below 2")
    made.add_argument("--seeds", type=int, help="of each configuration (default: 2)")
    return made


if __name__ == "__main__":
    main(parser().parse_args())
