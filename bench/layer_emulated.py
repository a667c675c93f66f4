"""Emulated: the time of one MoE layer's experts over an EP group of 8, on ONE GPU.

EMULATED, NOT MEASURED ON A NODE. What is real: the kernels (feplb's Triton experts, GLM-5, bf16) of
one rank after the other, in feplb's order (kept A, received, kept B, place; in backward dgrad and
wgrad of each), and a copy of as many bytes beside them on the same GPU, for the contention.
What is modelled: when rows, weights, returns and weight grads arrive (scheduler/cost_model.py, at
the rates of the GPU's preset); the compute stream waits for those times. Nothing travels.

    layer        the slowest rank; forward, and backward with late weight grads, whose arrival the
                 dispatch's backward hides, but not their adding
    ceiling      each rank's expert sizes scaled to the mean load, nothing copied
    recovered    (none - policy) / (none - ceiling), emulated too
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from emulation import Copies, rank_work, recovered_pct
from gemm_straggler import ARMS, CEILING, level_counts, plans_of
from gpu_timing import HEAD_START_CYCLES, gpu_facts, has_gpu, machine_of, main_of
from rank_runner import CallClock, RankBuffers, RankRunner, Size
from report import Report, Row, iqr, median

from feplb.compute import ExpertCompute
from feplb.scheduler.cost_model import UnitCosts
from feplb.scheduler.machines import ExpertShape, Machine, unit_costs
from feplb.scheduler.plan import Plan
from feplb.scheduler.shares import Rows
from feplb.scheduler.workloads import calibrated

BESIDE_BYTES = 256 << 20
MOST_PIECE = 8 << 20
# The tables of a call are made on the host before its first kernel is launched: about 2 ms.
HEAD_START = 4 * HEAD_START_CYCLES


QUICK = Size(steps=2)


class GpuClock:
    """By events on the current stream; waits are kernels that look at the GPU's clock."""

    def __init__(self, *, copies_beside: bool) -> None:
        from copy_ways import LaneCopy
        from spinning import TimedFlags

        self._flags = TimedFlags()
        self._events: list[Any] = []
        self._way: Any = LaneCopy("batch") if copies_beside else None
        self._ticket: Any = None
        if copies_beside:
            from copy_ways import Direction

            dst = torch.zeros(BESIDE_BYTES, dtype=torch.uint8, device="cuda")
            self._direction = Direction("beside", dst, torch.zeros_like(dst))

    def begin(self, arrives_ms: list[float]) -> None:
        """See CallClock."""
        torch.cuda.synchronize()
        self._flags.set(arrives_ms)
        self._events = []
        torch.cuda._sleep(HEAD_START)
        self._flags.mark()
        self.mark()

    def wait(self, flag: int) -> None:
        """See CallClock."""
        self._flags.wait(flag)

    def mark(self) -> None:
        """See CallClock."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._events.append(event)

    def copy_beside(self, num_bytes: int) -> None:
        """See CallClock."""
        if self._way is None or num_bytes == 0:
            return
        self._way.after_current_stream()
        self._ticket = self._way.submit(self._direction, beside_pieces(num_bytes))

    def read(self) -> list[float]:
        """See CallClock."""
        torch.cuda.synchronize()
        if self._ticket is not None:
            self._way.wait(self._ticket)
            self._ticket = None
        first = self._events[0]
        return [float(first.elapsed_time(event)) for event in self._events[1:]]


def beside_pieces(num_bytes: int) -> list[tuple[int, int]]:
    """Places in a buffer of BESIDE_BYTES whose copies are so many bytes."""
    pieces: list[tuple[int, int]] = []
    done = 0
    while done < num_bytes:
        size = min(MOST_PIECE, num_bytes - done)
        pieces.append((done % BESIDE_BYTES if size == MOST_PIECE else 0, size))
        done += size
    return pieces


@dataclass(frozen=True)
class LayerMs:
    """Emulated milliseconds of the slowest rank."""

    forward: float
    backward: float

    @property
    def both(self) -> float:
        return self.forward + self.backward


def emulate(
    runner: RankRunner, counts: Rows, plan: Plan, machine: Machine, costs: UnitCosts,
    expert: ExpertShape, repeats: int, add_ms: float,
) -> LayerMs:  # fmt: skip
    """One micro-batch under one plan.

    Of every rank first the time of its received rows is measured, which depends on level 1 alone;
    from those follows when returns are home, and the rank is run again with both.
    """
    works = [rank_work(plan, counts, rank, machine, expert) for rank in range(len(counts))]

    def medians(run: Callable[..., list[float]], arrives: list[list[float]]) -> list[list[float]]:
        """[rank][mark], each rank after the other."""
        found = []
        for work, arrives_ms in zip(works, arrives, strict=True):
            samples = [run(work, arrives_ms) for _ in range(repeats)]
            found.append([median(times) for times in zip(*samples, strict=True)])
        return found

    ends: list[float] = []
    for run, is_backward in ((runner.forward, False), (runner.backward, True)):
        copies = Copies(counts, plan, costs, backward=is_backward)
        pushed = copies.pushed()
        first = medians(run, [[at, 0.0] for at in pushed])
        home = copies.returned([marks[0] for marks in first])
        marks = medians(run, [list(pair) for pair in zip(pushed, home, strict=True)])
        of_ranks = [of_rank[-1] for of_rank in marks]
        if is_backward:
            of_ranks = copies.with_late_grads(of_ranks, [each[1] for each in marks], add_ms)
        ends.append(max(of_ranks))
    return LayerMs(*ends)


def measure(
    size: Size, compute: ExpertCompute, clock: CallClock, machine: Machine
) -> dict[str, list[LayerMs]]:
    """By arm, every micro-batch."""
    rows_per_rank = size.num_tokens * 8
    costs = unit_costs(machine, size.expert, rows_per_rank=rows_per_rank)
    every = [
        calibrated(
            size.ep, seed=size.seed, step=step, layer=step, num_experts=size.num_experts,
            num_tokens=size.num_tokens,
        )
        for step in range(size.steps)
    ]  # fmt: skip
    most = max(int(counts.sum(axis=1).max()) for counts in every)
    runner = RankRunner(compute, RankBuffers(size, most, most), clock)
    add_ms = median([runner.add_grads()[0] for _ in range(2 + size.repeats)][2:])
    found: dict[str, list[LayerMs]] = {}
    for counts in every:
        jobs = {label: (counts, plan) for label, plan in plans_of(counts, costs).items()}
        jobs[CEILING] = (level_counts(counts), Plan())
        for label, (of_arm, plan) in jobs.items():
            layer = emulate(runner, of_arm, plan, machine, costs, size.expert, size.repeats, add_ms)
            found.setdefault(label, []).append(layer)
    return found


def table_rows(found: dict[str, list[LayerMs]], beside: bool) -> list[Row]:
    """Means over the micro-batches; recovered is that of the means."""
    rows: list[Row] = []
    for label in found:
        row: dict[str, Any] = {"policy": label, "emulated": True, "copies_beside": beside}
        for part in ("forward", "backward", "both"):
            of_arm, none, ceiling = (
                [getattr(layer, part) for layer in found[name]] for name in (label, "none", CEILING)
            )
            means = [float(np.mean(samples)) for samples in (none, of_arm, ceiling)]
            row[f"emulated_{part}_ms"] = means[1]
            row[f"emulated_{part}_ms_iqr"] = iqr(of_arm)
            row[f"emulated_{part}_recovered_pct"] = recovered_pct(*means)
        rows.append(row)
    return rows


def check_compute(size: Size, compute: ExpertCompute) -> None:
    """A few rows of one expert against fp32, forward; the kernels have tests of their own.

    Raises:
        RuntimeError: further off than rounding explains.
    """
    buffers = RankBuffers(size, 256, 16)
    own, segments = buffers.own, [(0, 200, 0), (200, 256, 1)]
    compute.forward(own.rows, [], segments, own.weights, out=own.out, save=False)
    for start, end, idx in segments:
        w1, w2 = (own.weights[tensor][idx].float() for tensor in range(2))
        gate, up = (own.rows[start:end].float() @ w1.t()).chunk(2, dim=1)
        expected = (torch.nn.functional.silu(gate) * up) @ w2.t()
        off = float((own.out[start:end].float() - expected).abs().max() / expected.abs().max())
        if not off <= 8 * torch.finfo(size.dtype).eps:
            raise RuntimeError(f"expert {idx}: off by {off:.1e} of the largest. Nothing was timed.")


def run(options: Namespace, report: Report) -> list[Row]:
    from feplb.gpu_compute import TritonSwiGLU
    from feplb.kernels.grouped_gemm import TritonGemm
    from feplb.kernels.tiles import HOPPER

    size = QUICK if options.quick else Size()
    facts = gpu_facts()
    preset, machine = machine_of(str(facts["gpu"]))
    report.header(**facts, ranks=size.ep, steps=size.steps, repeats=size.repeats, seed=size.seed)
    print("EMULATED on one GPU, rank after rank; arrivals of copies are modelled")
    print(f"preset {preset}: {machine.source}")
    compute = TritonSwiGLU(TritonGemm(HOPPER))
    compute.warm_up(
        size.expert.hidden, size.expert.ffn_hidden, dtype=size.dtype,
        device=torch.device(size.device), grad_dtype=torch.float32,
    )  # fmt: skip
    check_compute(size, compute)
    rows: list[Row] = []
    for beside in (True,) if options.quick else (True, False):
        clock = GpuClock(copies_beside=beside)
        rows += table_rows(measure(size, compute, clock, machine), beside)
        torch.cuda.empty_cache()
        print(f"\ncopies beside the kernels: {'as many bytes, on this GPU' if beside else 'none'}")
        report.table(
            rows[-len(ARMS) - 1 :],
            ["policy", *(name for name in rows[-1] if name.startswith("emulated_"))],
        )
    return rows


def main(given: Sequence[str] | None = None) -> int:
    report = Report(bench="layer_emulated", lane="none")
    return main_of(__doc__, given, report, has_gpu=has_gpu(), run=run)


if __name__ == "__main__":
    sys.exit(main())
