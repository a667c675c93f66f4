"""What the cost model is told about a layer on this lane: rates measured or configured, as costs.

Every input is the same on all ranks of a domain (the rate is that of its slowest rank), so all
ranks predict, and plan, alike.
"""

from __future__ import annotations

import torch

from .config import BalancerConfig, LayerSpec
from .scheduler.cost_model import UnitCosts, picoseconds

CPU_GFLOPS_PER_THREAD = 50.0
_LEAST_GBPS = 0.1  # a canary of a few bytes measures latency, not rate
_START_US, _COPY_US = 30.0, 5.0  # of the host lane: a plan's way to the copy threads, one copy


def gemm_gflops(config: BalancerConfig) -> float:
    """A rank's expert GEMM rate, 10^9 operations per second."""
    return config.gemm_gflops or CPU_GFLOPS_PER_THREAD * torch.get_num_threads()


def lane_gbps(config: BalancerConfig, measured_gbps: float) -> float:
    """Rate of the lane, 10^9 bytes per second."""
    return config.lane_gbps or max(measured_gbps, _LEAST_GBPS)


def predicted_costs(config: BalancerConfig, spec: LayerSpec, measured_gbps: float) -> UnitCosts:
    """Costs of one layer on the host lane.

    Weights are read from, and returned rows and weight grads go through, the same memory as the
    lane's copies, so all bytes move at the lane's rate. Nothing runs beside the adds at home: a
    rank's thread does both, so the late window is 0.
    """

    rate = lane_gbps(config, measured_gbps)
    row = picoseconds(spec.flops_per_row, gemm_gflops(config))
    row_bytes = spec.row_bytes + sum(data.num_bytes for data in spec.row_data)
    weights = picoseconds(spec.expert_bytes, rate)
    return UnitCosts(
        row_forward=row,
        row_dgrad=row,
        row_wgrad=row,
        weight_read=weights // 2,  # read, not written
        row_push=picoseconds(row_bytes, rate),
        row_push_backward=picoseconds(spec.row_bytes + row_bytes, rate),
        weight_push=weights,
        row_return=picoseconds(spec.row_bytes, rate),
        row_return_backward=picoseconds(row_bytes, rate),
        grad_push=weights,
        row_place=picoseconds(spec.row_bytes, rate),
        grad_add=weights,
        start=round(_START_US * 1e6),
        copy=round(_COPY_US * 1e6),
    )
