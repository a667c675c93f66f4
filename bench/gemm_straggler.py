"""How much of the GEMM straggler does each policy remove? The paper's figure, compute only.

GLM-5's experts (hidden 6144, width 2048, SwiGLU, bf16), 128 of them, on the calibrated workload.
The ranks of an EP group are run one after the other on one GPU: each computes the grouped GEMMs (up
and down projection, forward) of the rows that the plan gives it, kept and received; an expert that
a helper received is a segment with weights of its own. Nothing is copied between ranks.

    GEMM straggler   max - mean over the ranks of the time of their grouped GEMMs
    removed          1 - mean left / mean before, over the micro-batches
    ceiling          each rank's expert sizes scaled to the mean load: what it leaves is the noise
                     and the tiles of equal loads

The paper's own figures (arXiv 2604.19654, H100, cuBLAS on several streams) stand beside greedy's.
"""

from __future__ import annotations

import random
import sys
from argparse import Namespace
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from gpu_timing import (
    DeviceClock,
    Work,
    gpu_facts,
    has_gpu,
    machine_of,
    main_of,
    times_in_turn,
)
from layer_arms import pieces_under, scaled
from report import Report, Row, iqr, median
from torch import Tensor

from feplb.compute import Segment
from feplb.kernels.products import GroupedGemm, Operand
from feplb.kernels.segment_tables import row_table
from feplb.scheduler import Plan
from feplb.scheduler.cost_model import UnitCosts
from feplb.scheduler.machines import GLM5, unit_costs
from feplb.scheduler.microbatches import MicroBatch
from feplb.scheduler.shares import Rows
from feplb.scheduler.simulate import PAPER_DYNAMIC, PAPER_SLOTS, Arm, place
from feplb.scheduler.workloads import calibrated

CEILING = "ceiling"
ARMS = (
    Arm(policy="none"),
    Arm(policy="greedy", num_dynamic=PAPER_DYNAMIC),
    Arm(policy="refine", copies_per_rank=1),
    Arm(policy="split", grain_rows=128),
    Arm(policy="auto"),
)
# GEMM straggler of the paper, ms: before, and left by FEPLB.
PAPER_MS = {2: (0.316, 0.157), 4: (0.652, 0.247), 8: (1.110, 0.352)}


@dataclass(frozen=True)
class Size:
    """One layer, and how much of it is measured."""

    hidden: int = GLM5.hidden
    width: int = GLM5.ffn_hidden
    num_experts: int = 128
    num_tokens: int = 4096
    degrees: tuple[int, ...] = (2, 4, 8)
    steps: int = 10
    repeats: int = 5
    seed: int = 1000
    dtype: torch.dtype = torch.bfloat16
    device: str = "cuda"


QUICK = Size(steps=3, repeats=3)


def plans_of(counts: Rows, costs: UnitCosts) -> dict[str, Plan]:
    """By label, what each arm does with one micro-batch; every plan checked."""
    return {arm.label: place(arm, MicroBatch(counts=counts), costs).plan for arm in ARMS}


def segments_of(plan: Plan, counts: Rows, rank: int) -> list[Segment]:
    """What a rank computes, rows packed; an expert of another rank has a weight index from E on.

    Example, 2 experts per rank, counts [[5, 3], [1, 1]], rows 2 to 5 of expert 0 of rank 0 sent to
    rank 1: [(0, 2, 0), (2, 5, 1)] and [(0, 1, 0), (1, 2, 1), (2, 5, 2)].
    """
    segments: list[Segment] = []
    slots: dict[tuple[int, int], int] = {}
    num_local, end = counts.shape[1], 0
    for piece in pieces_under(plan, counts, rank):
        index = piece.expert
        if piece.owner != rank:
            index = num_local + slots.setdefault((piece.owner, piece.expert), len(slots))
        segments.append((end, end + piece.num_rows, index))
        end += piece.num_rows
    return segments


def level_counts(counts: Rows) -> Rows:
    """The ceiling's: each rank's expert sizes scaled to the mean rank load, rounded up."""
    mean = -(-int(counts.sum()) // len(counts))
    return np.stack([scaled(sizes, mean) for sizes in counts])


def all_segments(counts: Rows, costs: UnitCosts) -> dict[tuple[str, int], list[Segment]]:
    """By (arm, rank), what is computed there.

    Raises:
        RuntimeError: an arm computes another number of rows than there are.
    """
    found: dict[tuple[str, int], list[Segment]] = {}
    for label, plan in plans_of(counts, costs).items():
        of_ranks = [segments_of(plan, counts, rank) for rank in range(len(counts))]
        computed = sum(segments[-1][1] for segments in of_ranks if segments)
        if computed != counts.sum():
            raise RuntimeError(f"{label} computes {computed} rows, expected {counts.sum()}")
        found |= {(label, rank): segments for rank, segments in enumerate(of_ranks)}
    level = level_counts(counts)
    nothing = Plan()
    for rank in range(len(counts)):
        found[CEILING, rank] = segments_of(nothing, level, rank)
    return found


class Experts:
    """Weights and buffers that every rank of every arm is run with; values do not matter."""

    def __init__(self, size: Size, num_weights: int, most_rows: int, gemm: GroupedGemm) -> None:
        generator = torch.Generator(size.device).manual_seed(size.seed)

        def randn(*shape: int) -> Tensor:
            made = torch.empty(*shape, dtype=size.dtype, device=size.device)
            return made.normal_(generator=generator)

        shapes = (2 * size.width, size.hidden), (size.hidden, size.width)
        self.weights = [list(randn(num_weights, *shape).mul_(shape[1] ** -0.5)) for shape in shapes]
        self.rows = randn(most_rows, size.hidden)
        self.act = randn(most_rows, size.width)
        self.h = self.rows.new_empty(most_rows, 2 * size.width)
        self.out = torch.empty_like(self.rows)
        self.gemm = gemm

    def work(self, segments: Sequence[Segment]) -> Work:
        """Up and down projection of these segments; their table is made ahead."""
        table = row_table(segments, self.weights, self.gemm.block_m, self.rows.device)

        def run() -> None:
            for tensor, (source, out) in enumerate(((self.rows, self.h), (self.act, self.out))):
                self.gemm.multiply_rows(
                    Operand(source), Operand(out), table, tensor=tensor, transposed=True
                )

        return run

    def check(self, segments: Sequence[Segment]) -> None:
        """The first and the last segment of both products against fp32.

        Raises:
            RuntimeError: a result is further off than rounding explains.
        """
        self.work(segments)()
        for start, end, idx in (segments[0], segments[-1]):
            for tensor, (source, out) in enumerate(((self.rows, self.h), (self.act, self.out))):
                expected = source[start:end].float() @ self.weights[tensor][idx].float().t()
                off = float((out[start:end] - expected).abs().max() / expected.abs().max())
                if not off <= 2 * torch.finfo(source.dtype).eps:
                    raise RuntimeError(f"expert {idx}, product {tensor}: off by {off:.1e}")


def straggler(times: Sequence[float]) -> float:
    """max - mean."""
    return max(times) - sum(times) / len(times)


@dataclass(frozen=True)
class Measured:
    """One arm on one micro-batch: the median time of each rank, milliseconds."""

    arm: str
    rank_ms: tuple[float, ...]


def measure(
    size: Size, ep: int, gemm: GroupedGemm, once: Callable[[Work], float], costs: UnitCosts
) -> list[Measured]:
    """Every arm on every micro-batch of one EP degree; the first micro-batch is checked."""
    every: list[Rows] = [
        calibrated(
            ep, seed=size.seed, step=step, layer=step, num_experts=size.num_experts,
            num_tokens=size.num_tokens,
        )
        for step in range(size.steps)
    ]  # fmt: skip
    of_steps = [all_segments(counts, costs) for counts in every]
    most = max(segments[-1][1] for step in of_steps for segments in step.values())
    experts = Experts(size, size.num_experts // ep + PAPER_SLOTS, most, gemm)
    for segments in of_steps[0].values():
        experts.check(segments)
    order = random.Random(size.seed)

    def shuffled(names: list[tuple[str, int]]) -> Iterable[tuple[str, int]]:
        return order.sample(names, len(names))

    found: list[Measured] = []
    for step in of_steps:
        works = {name: experts.work(segments) for name, segments in step.items()}
        times = times_in_turn(once, works, size.repeats, rounds=shuffled)
        found += by_arm({name: median(samples) for name, samples in times.items()})
    return found


def by_arm(ms: Mapping[tuple[str, int], float]) -> list[Measured]:
    """Times by (arm, rank) as one Measured per arm."""
    arms = dict.fromkeys(arm for arm, _ in ms)
    return [Measured(arm, tuple(t for (name, _), t in ms.items() if name == arm)) for arm in arms]


def table_rows(ep: int, measured: Sequence[Measured]) -> list[Row]:
    """One row per arm; means over the micro-batches."""
    arms = dict.fromkeys(each.arm for each in measured)
    left = {arm: [straggler(m.rank_ms) for m in measured if m.arm == arm] for arm in arms}
    before = float(np.mean(left["none"]))
    rows: list[Row] = []
    for arm in arms:
        times = [m.rank_ms for m in measured if m.arm == arm]
        paper = PAPER_MS.get(ep) if arm == "greedy" else None
        rows.append(
            {
                "policy": arm,
                "ep": ep,
                "straggler_ms": float(np.mean(left[arm])),
                "straggler_ms_iqr": iqr(left[arm]),
                "removed_pct": 100 * (1 - float(np.mean(left[arm])) / before),
                "paper_before_ms": paper[0] if paper else None,
                "paper_left_ms": paper[1] if paper else None,
                "paper_removed_pct": 100 * (1 - paper[1] / paper[0]) if paper else None,
                "mean_rank_ms": float(np.mean(times)),
                "slowest_rank_ms": float(np.mean([max(each) for each in times])),
            }
        )
    return rows


def run(options: Namespace, report: Report) -> list[Row]:
    from feplb.kernels.grouped_gemm import TritonGemm
    from feplb.kernels.measure_tiles import measure_tiles
    from feplb.kernels.tiles import HOPPER

    size = QUICK if options.quick else Size()
    tiles = HOPPER
    if not options.quick:
        tiles = measure_tiles(
            size.hidden, size.width, dtype=size.dtype, device=torch.device(size.device)
        )[0].tiles
    facts = gpu_facts()
    preset, machine = machine_of(str(facts["gpu"]))
    report.header(**facts, steps=size.steps, repeats=size.repeats, seed=size.seed)
    print(f"{tiles}; auto decides by the rates of preset {preset}")
    print("compute only: the ranks of a group were run one after the other on one GPU")
    rows: list[Row] = []
    for ep in size.degrees:
        rows_per_rank = size.num_tokens * 8
        costs = unit_costs(machine, GLM5, rows_per_rank=rows_per_rank)
        clock = DeviceClock(flush=False)  # the rows are larger than any cache
        measured = measure(size, ep, TritonGemm(tiles), clock.once, costs)
        torch.cuda.empty_cache()
        print(f"\nEP {ep}; check: every arm computes every row, both products agree with fp32")
        rows += table_rows(ep, measured)
        report.table(rows[-len(ARMS) - 1 :])
    return rows


def main(given: Sequence[str] | None = None) -> int:
    report = Report(bench="gemm_straggler", lane="none")
    return main_of(__doc__, given, report, has_gpu=has_gpu(), run=run)


if __name__ == "__main__":
    sys.exit(main())
