"""What bench/cost_check.py measures, and the constants that the model is told.

Legend: R = 2 ranks, E experts per rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cost_timeline import Gemms, Phases
from layer_arms import NONE, NUM_RANKS, Shape
from report import median

from feplb import BalancerConfig
from feplb.costs import LaneRates, predicted_costs
from feplb.scheduler import Move
from feplb.scheduler.cost_model import UnitCosts, ceiling, predict
from feplb.scheduler.workloads import Rows, lognormal_loads

CEILING = "ceiling"
STARTUP, FITTED = "startup", "fitted"
MODELS = (STARTUP, FITTED)
GEMMS = ("forward", "backward_rows", "backward_weights")


@dataclass(frozen=True, slots=True, kw_only=True)
class Routing:
    """One workload. spread: sigma of the experts' lognormal loads."""

    rows_per_expert: int
    spread: float
    imbalance: float
    seed: int

    def counts(self, shape: Shape) -> Rows:
        """[R, E] rows of each expert."""
        counts: Rows = lognormal_loads(
            NUM_RANKS, shape.experts, rows_per_expert=self.rows_per_expert, sigma=self.spread,
            imbalance=self.imbalance, seed=self.seed,
        )  # fmt: skip
        return counts


@dataclass(frozen=True, slots=True, kw_only=True)
class RankSample:
    """One arm once, on one rank.

    Args:
        ns: from the common start to the last weight grad added.
        lost_ns: of it, without waiting and without having its core.
        core_ns: CPU time of all its threads in forward and in backward.
        phases: of forward and backward.
        gemms: per function of the compute.
        moves: the plan that ran.
    """

    routing: Routing
    arm: str
    ns: int
    lost_ns: int
    core_ns: tuple[int, int]
    phases: tuple[Phases, Phases]
    gemms: dict[str, Gemms]
    moved_bytes: int
    copy_cpu_ns: int
    moves: tuple[Move, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RankResult:
    """What one rank has measured, and the costs its Balancers began with."""

    samples: list[RankSample]
    startup: UnitCosts
    lane_rates: LaneRates


@dataclass(frozen=True, slots=True)
class Sample:
    """One arm once, on all ranks."""

    of_ranks: tuple[RankSample, ...]

    @property
    def routing(self) -> Routing:
        return self.of_ranks[0].routing

    @property
    def arm(self) -> str:
        return self.of_ranks[0].arm

    @property
    def moves(self) -> tuple[Move, ...]:
        return self.of_ranks[0].moves

    @property
    def ms(self) -> float:
        """The slowest rank's."""
        return max(rank.ns for rank in self.of_ranks) / 1e6

    @property
    def core_ms(self) -> float:
        """CPU time of the rank that took most, forward plus backward."""
        return sum(max(rank.core_ns[at] for rank in self.of_ranks) for at in (0, 1)) / 1e6

    @property
    def lost_pct(self) -> float:
        """Of its time, what other work on the machine took from the rank that lost most."""
        return max(100 * rank.lost_ns / rank.ns for rank in self.of_ranks)


@dataclass(frozen=True, slots=True, kw_only=True)
class Constants:
    """What the model is told, and what of it was measured.

    Args:
        costs: by model.
        gflops: GEMM rate of the none arm in CPU time; gflops_of: of each function of the compute.
        lane_rates: as the Balancers measured it when they started.
        copy_thread_gbps: bytes per CPU time of the copy threads in the calls timed.
    """

    costs: dict[str, UnitCosts]
    gflops: float
    gflops_of: dict[str, float]
    lane_rates: LaneRates
    copy_thread_gbps: float


def join(results: Sequence[RankResult]) -> list[Sample]:
    """The samples of all ranks, which are in the same order on each."""
    return [Sample(of_ranks) for of_ranks in zip(*(r.samples for r in results), strict=True)]


def least_disturbed(samples: Sequence[Sample]) -> list[Sample]:
    """Of each routing and arm the half (at least one) that lost least, in the order measured."""
    by_arm: dict[tuple[Routing, str], list[Sample]] = {}
    for sample in samples:
        by_arm.setdefault((sample.routing, sample.arm), []).append(sample)
    kept = {
        id(sample)
        for mine in by_arm.values()
        for sample in sorted(mine, key=lambda sample: sample.lost_pct)[: (len(mine) + 1) // 2]
    }
    return [sample for sample in samples if id(sample) in kept]


def constants_of(
    results: Sequence[RankResult], samples: Sequence[Sample], shape: Shape
) -> Constants:
    """Start-up's costs, and those with the GEMM rate of the none arm instead."""
    spec, startup = shape.spec(), results[0].startup
    gemms = [rank.gemms for s in samples if s.arm == NONE for rank in s.of_ranks]
    rates = {
        name: median([gemm_gflops([of[name]], spec.flops_per_row, startup.gemm) for of in gemms])
        for name in GEMMS
    }
    whole = median([gemm_gflops([*of.values()], spec.flops_per_row, startup.gemm) for of in gemms])
    moving = [rank for sample in samples for rank in sample.of_ranks if rank.moved_bytes]
    lane_rates = results[0].lane_rates
    return Constants(
        costs={
            STARTUP: startup,
            FITTED: predicted_costs(BalancerConfig(gemm_gflops=whole), spec, lane_rates),
        },
        gflops=whole,
        gflops_of=rates,
        lane_rates=lane_rates,
        copy_thread_gbps=median([r.moved_bytes / r.copy_cpu_ns for r in moving]) if moving else 0.0,
    )


def gemm_gflops(gemms: Sequence[Gemms], flops_per_row: int, gemm_ps: int) -> float:
    """The rate, 10^9 operations per second, beside what each expert's GEMM costs whatever its rows.

    The latter never counts for more than three quarters of the time: tiny experts would leave none.
    """
    cpu_ns = sum(each.cpu_ns for each in gemms)
    beside = gemm_ps / 1000 * sum(each.experts for each in gemms)
    rows = sum(each.rows for each in gemms)
    return flops_per_row * rows / max(cpu_ns - beside, cpu_ns / 4)


def predicted_ms(sample: Sample, costs: UnitCosts, shape: Shape) -> float:
    """The layer's time under the plan that the sample ran."""
    counts = sample.routing.counts(shape)
    if sample.arm == CEILING:
        return ceiling(counts, costs) / 1e9
    return predict(counts, sample.moves, costs).total / 1e9
