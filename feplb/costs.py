"""What the cost model is told about a layer on this lane: rates measured or configured, as costs.

Every input is the same on all ranks of a domain (the rates are those of its slowest ranks), so all
ranks predict, and plan, alike.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .config import BalancerConfig, LayerSpec
from .scheduler.cost_model import UnitCosts, picoseconds

CPU_GFLOPS_PER_THREAD = 120.0  # fp32, AVX-512: see predicted_costs
_LEAST_GBPS = 0.1  # a canary of a few bytes measures latency, not rate
# Of the host lane: a plan's way to the copy threads, one copy, an expert's GEMM beside its weights.
_START_US, _COPY_US, _GEMM_US = 30.0, 5.0, 30.0


def gemm_gflops(config: BalancerConfig) -> float:
    """A rank's expert GEMM rate, 10^9 operations per second."""
    return config.gemm_gflops or CPU_GFLOPS_PER_THREAD * torch.get_num_threads()


@dataclass(frozen=True)
class LaneRates:
    """Rates of a lane by direction, 10^9 bytes per second, the same on every rank of a domain.

    Args:
        out_gbps: at which a source sends, whatever the number of its destinations.
        in_gbps: at which a destination takes in what all its sources send.
    """

    out_gbps: float
    in_gbps: float

    @property
    def inbound_permille(self) -> int:
        """As UnitCosts has it."""
        return round(1000 * self.out_gbps / self.in_gbps)


def lane_rates(config: BalancerConfig, measured: LaneRates) -> LaneRates:
    """The rates to plan with: the config's for both directions, where it has one."""
    if config.lane_gbps:
        return LaneRates(config.lane_gbps, config.lane_gbps)
    return LaneRates(max(measured.out_gbps, _LEAST_GBPS), max(measured.in_gbps, _LEAST_GBPS))


def predicted_costs(config: BalancerConfig, spec: LayerSpec, measured: LaneRates) -> UnitCosts:
    """Costs of one layer on the host lane.

    Returned rows and weight grads are read from the memory that the lane's copies go through, so
    all bytes move at the lane's rates. Nothing runs beside the adds at home: a rank's thread does
    both, so the late window is 0. A rank's copy thread takes its time from the rank's GEMMs.

    The constants are from bench/cost_check.py, fp32, hidden 512, width 1024, 16 experts on each of
    two ranks with a Xeon core (AVX-512) each. One GEMM of n rows, of forward, dgrad or wgrad, took
    0.5 to 0.9 ms + n x 26 us with both ranks busy: 120 * 10^9 operations per second beside the
    reading and packing of 6.3 MB of weights (experts of 0.1 MB: 15 to 45 us). Placing rows or grads
    with torch took twice as long as the lane's streaming copy. The copy threads' CPU time is what
    the lane's rate out says (10 to 11 GB/s, 12 to 13 at start-up), and a rank without a core to
    spare gives it to them while it computes.
    """

    rates = lane_rates(config, measured)
    rate = rates.out_gbps
    row = picoseconds(spec.flops_per_row, gemm_gflops(config))
    row_bytes = spec.row_bytes + sum(data.num_bytes for data in spec.row_data)
    weights = picoseconds(spec.expert_bytes, rate)
    return UnitCosts(
        row_forward=row,
        row_dgrad=row,
        row_wgrad=row,
        gemm=round(_GEMM_US * 1e6) + weights,
        row_push=picoseconds(row_bytes, rate),
        row_push_backward=picoseconds(spec.row_bytes + row_bytes, rate),
        weight_push=weights,
        row_return=picoseconds(spec.row_bytes, rate),
        row_return_backward=picoseconds(row_bytes, rate),
        grad_push=weights,
        row_place=2 * picoseconds(spec.row_bytes, rate),
        grad_add=2 * weights,
        start=round(_START_US * 1e6),
        copy=round(_COPY_US * 1e6),
        shares_core=1,
        inbound_permille=rates.inbound_permille,
    )
