"""Emulated: the time of one MoE layer's experts over an EP group of 8, on ONE GPU.

EMULATED, NOT MEASURED ON A NODE. What is real: the kernels (feplb's Triton experts, GLM-5, bf16) of
one rank after the other, in feplb's order (kept A, received, kept B, place; in backward dgrad and
wgrad of each), and a copy of as many bytes beside them on the same GPU, for the contention.
What is modelled: when rows, weights, returns and weight grads arrive (scheduler/cost_model.py, at
the rates of the GPU's preset); the compute stream waits for those times. Nothing travels.

    layer        the slowest rank; forward, and backward with weight grads added late
    ceiling      each rank's expert sizes scaled to the mean load, nothing copied
    recovered    (none - policy) / (none - ceiling), emulated too
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from emulation import Copies, RankWork, rank_work, recovered_pct
from gemm_straggler import ARMS, CEILING, level_counts, plans_of
from gpu_timing import HEAD_START_CYCLES, gpu_facts, has_gpu, machine_of, nothing_measured
from report import Report, Row, arguments, iqr, median
from torch import Tensor

from feplb.compute import ExpertCompute, Saved, Segment
from feplb.scheduler.cost_model import UnitCosts
from feplb.scheduler.machines import GLM5, ExpertShape, Machine, unit_costs
from feplb.scheduler.plan import Plan
from feplb.scheduler.shares import Rows
from feplb.scheduler.simulate import PAPER_SLOTS
from feplb.scheduler.workloads import calibrated

EP = 8
BESIDE_BYTES = 256 << 20
MOST_PIECE = 8 << 20
LEVEL_1, LEVEL_2 = 0, 1  # flags of one call
# The tables of a call are made on the host before its first kernel is launched: about 2 ms.
HEAD_START = 4 * HEAD_START_CYCLES


@dataclass(frozen=True)
class Size:
    """expert: of the layer; num_experts: over all ranks."""

    expert: ExpertShape = GLM5
    num_experts: int = 128
    num_tokens: int = 4096
    ep: int = EP
    steps: int = 5
    repeats: int = 3
    seed: int = 2000
    dtype: torch.dtype = torch.bfloat16
    device: str = "cuda"


QUICK = Size(steps=2)


class CallClock(Protocol):
    """Times one call of one rank, from begin() on; and holds it up until copies would be there."""

    def begin(self, arrives_ms: list[float]) -> None:
        """arrives_ms: when each flag is released."""
        ...

    def wait(self, flag: int) -> None: ...

    def mark(self) -> None:
        """A point whose time is wanted."""
        ...

    def copy_beside(self, num_bytes: int) -> None:
        """From here on as many bytes travel beside the kernels, if the bench wants it."""
        ...

    def read(self) -> list[float]:
        """Milliseconds of all marks since begin(); waits."""
        ...


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


class RankBuffers:
    """Everything that one rank's calls read and write; values do not matter, only sizes."""

    def __init__(self, size: Size, most_rows: int, most_received: int) -> None:
        expert = size.expert
        generator = torch.Generator(size.device).manual_seed(size.seed)

        def randn(*shape: int) -> Tensor:
            made = torch.empty(*shape, dtype=size.dtype, device=size.device)
            return made.normal_(generator=generator)

        shapes = (2 * expert.ffn_hidden, expert.hidden), (expert.hidden, expert.ffn_hidden)
        local = size.num_experts // size.ep

        def weights(count: int) -> list[list[Tensor]]:
            return [list(randn(count, *shape).mul_(shape[1] ** -0.5)) for shape in shapes]

        def grads(count: int) -> list[list[Tensor]]:
            return [list(torch.zeros(count, *s, device=size.device)) for s in shapes]

        self.own = _Rows(randn, most_rows, expert.hidden, weights(local), grads(local))
        self.others = _Rows(
            randn, max(1, most_received), expert.hidden, weights(PAPER_SLOTS), grads(PAPER_SLOTS)
        )
        self.returns = torch.empty_like(self.own.rows)


class _Rows:
    """rows, their outputs, the gradients of both, and the weights they meet."""

    def __init__(
        self, randn: Callable[..., Tensor], count: int, hidden: int,
        weights: list[list[Tensor]], grad_weights: list[list[Tensor]],
    ) -> None:  # fmt: skip
        self.rows, self.grad_out = randn(count, hidden), randn(count, hidden)
        self.out, self.grad_rows = torch.empty_like(self.rows), torch.empty_like(self.rows)
        self.weights, self.grad_weights = weights, grad_weights


class RankRunner:
    """Runs one rank's call in feplb's order."""

    def __init__(self, compute: ExpertCompute, buffers: RankBuffers, clock: CallClock) -> None:
        self._compute, self._buffers, self._clock = compute, buffers, clock

    def forward(self, work: RankWork, arrives_ms: list[float]) -> list[float]:
        """[received computed, all done], milliseconds."""
        clock, own, others = self._clock, self._buffers.own, self._buffers.others
        clock.begin(arrives_ms)
        clock.copy_beside(work.pushed_bytes)
        self._forward(own, work.kept_a, save=True)
        clock.wait(LEVEL_1)
        self._forward(others, work.received, save=True)
        clock.mark()
        clock.copy_beside(work.returned_bytes)
        self._forward(own, work.kept_b, save=True)
        clock.wait(LEVEL_2)
        self._place(work, own.out)
        clock.mark()
        return clock.read()

    def backward(self, work: RankWork, arrives_ms: list[float]) -> list[float]:
        """[received rows' grads computed, their weight grads too, all done], milliseconds."""
        clock, own, others = self._clock, self._buffers.own, self._buffers.others
        parts = ((own, work.kept_a), (others, work.received), (own, work.kept_b))
        saved = [self._forward(rows, segments, save=True) for rows, segments in parts]
        clock.begin(arrives_ms)
        clock.copy_beside(work.pushed_backward_bytes)
        self._backward_weights(
            own, work.kept_a, saved[0], self._backward_rows(own, work.kept_a, saved[0])
        )
        clock.wait(LEVEL_1)
        carry = self._backward_rows(others, work.received, saved[1])
        clock.mark()
        clock.copy_beside(work.returned_bytes)
        self._backward_weights(others, work.received, saved[1], carry)
        clock.mark()
        clock.copy_beside(work.grad_bytes)
        self._backward_weights(
            own, work.kept_b, saved[2], self._backward_rows(own, work.kept_b, saved[2])
        )
        clock.wait(LEVEL_2)
        self._place(work, own.grad_rows)
        clock.mark()
        return clock.read()

    def add_grads(self) -> list[float]:
        """[the weight grads of one expert added at home], milliseconds."""
        own, others = self._buffers.own.grad_weights, self._buffers.others.grad_weights
        self._clock.begin([0.0, 0.0])
        for tensor in range(len(own)):
            own[tensor][0].add_(others[tensor][0])
        self._clock.mark()
        return self._clock.read()

    def _forward(self, rows: _Rows, segments: Sequence[Segment], *, save: bool) -> Saved:
        if not segments:
            return Saved(())
        return self._compute.forward(rows.rows, [], segments, rows.weights, out=rows.out, save=save)

    def _backward_rows(self, rows: _Rows, segments: Sequence[Segment], saved: Saved) -> Any:
        if not segments:
            return ()
        return self._compute.backward_rows(
            rows.grad_out, rows.rows, [], segments, rows.weights, saved,
            grad_rows=rows.grad_rows, grad_row_data=[],
        )  # fmt: skip

    def _backward_weights(
        self, rows: _Rows, segments: Sequence[Segment], saved: Saved, carry: Any
    ) -> None:
        if segments:
            self._compute.backward_weights(
                rows.grad_out, rows.rows, [], segments, saved, carry,
                grad_weights=rows.grad_weights,
            )  # fmt: skip

    def _place(self, work: RankWork, target: Tensor) -> None:
        came = 0
        for start, end in work.returned:
            target[start:end].copy_(self._buffers.returns[came : came + end - start])
            came += end - start


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
    options = arguments(str(__doc__).splitlines()[0]).parse_args(given)
    report = Report(bench="layer_emulated", lane="none")
    if not has_gpu():
        return nothing_measured(report, options)
    report.write(options.json, run(options, report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
