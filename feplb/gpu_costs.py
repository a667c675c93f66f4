"""What the cost model is told about a layer on GPUs: presets by name, and the lane's rates.

The copies' rates are measured at start-up; those of GEMMs and memory come from
scheduler/machines.py unless the config names one. Every input is the same on all ranks of a domain.
"""

from __future__ import annotations

import logging

from .config import BalancerConfig, LayerSpec
from .costs import LaneRates, gemm_gflops, lane_rates, predicted_costs
from .scheduler.cost_model import UnitCosts, picoseconds
from .scheduler.machines import MACHINES, Machine, preset_of

logger = logging.getLogger(__name__)

_UNKNOWN_IS = "h100"


def machine_of(gpu_name: str) -> Machine:
    """The preset for a GPU as the driver names it; h100 where there is none, with a warning."""
    name = preset_of(gpu_name)
    if name is not None:
        return MACHINES[name]
    logger.warning(
        "no preset for %s: its rates are taken to be those of an %s. Set gemm_gflops in the "
        "BalancerConfig.",
        gpu_name, _UNKNOWN_IS,
    )  # fmt: skip
    return MACHINES[_UNKNOWN_IS]


def rank_gflops(config: BalancerConfig, machine: Machine | None) -> float:
    """A rank's expert GEMM rate, 10^9 operations per second; machine None: on its CPU threads."""
    if machine is None:
        return gemm_gflops(config)
    return config.gemm_gflops or machine.gemm_tflops * 1e3


def layer_costs(
    config: BalancerConfig, spec: LayerSpec, measured: LaneRates, machine: Machine | None
) -> UnitCosts:
    """Costs of one layer where its rows live; machine None: on the CPU."""
    if machine is None:
        return predicted_costs(config, spec, measured)
    return gpu_costs(config, spec, measured, machine)


def gpu_costs(
    config: BalancerConfig, spec: LayerSpec, measured: LaneRates, machine: Machine
) -> UnitCosts:
    """Costs of one layer on the ce lane.

    The window in which weight grads come home is the backward of the dispatch; a rank is taken to
    dispatch ``max_rows`` rows.
    """
    rates = lane_rates(config, measured)
    rate = rates.out_gbps
    row = picoseconds(spec.flops_per_row, rank_gflops(config, machine))
    row_bytes = spec.row_bytes + sum(data.num_bytes for data in spec.row_data)
    push = picoseconds(spec.expert_bytes, rate)
    return UnitCosts(
        tile_rows=machine.tile_rows,
        row_forward=row,
        row_dgrad=row,
        row_wgrad=row,
        weight_read=picoseconds(spec.expert_bytes, machine.hbm_gbps),
        row_push=picoseconds(row_bytes, rate),
        row_push_backward=picoseconds(spec.row_bytes + row_bytes, rate),
        weight_push=push,
        row_return=picoseconds(spec.row_bytes, rate),
        row_return_backward=picoseconds(row_bytes, rate),
        grad_push=push,
        row_place=picoseconds(2 * spec.row_bytes, machine.hbm_gbps),
        grad_add=picoseconds(3 * spec.expert_bytes, machine.hbm_gbps),
        late_window=picoseconds(spec.max_rows * spec.row_bytes, machine.dispatch_gbps),
        start=round(machine.start_us * 1e6),
        copy=round(machine.copy_us * 1e6),
        inbound_permille=rates.inbound_permille,
    )
