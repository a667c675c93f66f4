"""Costs of a layer on GPUs, by hand, and the presets' names."""

from __future__ import annotations

import logging

import pytest
import torch

from feplb import BalancerConfig, LayerSpec
from feplb.config import TensorSpec
from feplb.costs import LaneRates, lane_rates, predicted_costs
from feplb.gpu_costs import gpu_costs, machine_of, rank_gflops
from feplb.scheduler.machines import GLM5, MACHINES, unit_costs

BF16 = torch.bfloat16
UNUSED = LaneRates(1.0, 2.0)


def glm5_layer(row_data: tuple[TensorSpec, ...] = (), max_rows: int = 32768) -> LayerSpec:
    return LayerSpec(16, 6144, BF16, ((2 * 2048, 6144), (6144, 2048)), row_data, max_rows)


def test_a_preset_is_found_by_the_drivers_name(caplog: pytest.LogCaptureFixture) -> None:
    assert machine_of("NVIDIA H200") is MACHINES["h200"]
    assert machine_of("NVIDIA H100 80GB HBM3") is MACHINES["h100"]
    assert not caplog.records
    with caplog.at_level(logging.WARNING, logger="feplb"):
        assert machine_of("NVIDIA A100-SXM4-80GB") is MACHINES["h100"]
    assert "no preset for NVIDIA A100" in caplog.text


def test_costs_of_glm5_are_those_the_simulation_uses() -> None:
    machine = MACHINES["h100"]
    layer = gpu_costs(BalancerConfig(lane_gbps=380), glm5_layer(), UNUSED, machine)
    model = unit_costs(machine, GLM5, rows_per_rank=32768)
    # Weight grads travel in the dtype of the weights here, in fp32 there.
    same = [
        "tile_rows", "row_forward", "weight_read", "row_push", "row_push_backward", "weight_push",
        "row_return", "row_return_backward", "row_place", "late_window", "start", "copy",
    ]  # fmt: skip
    assert [getattr(layer, name) for name in same] == [getattr(model, name) for name in same]
    # Rounded once each: half of fp32's.
    assert abs(2 * layer.grad_push - model.grad_push) <= 2
    assert abs(2 * layer.grad_add - model.grad_add) <= 2


def test_measured_and_configured_rates_go_in() -> None:
    machine = MACHINES["h100"]
    slow = gpu_costs(BalancerConfig(), glm5_layer(), LaneRates(190.0, 190.0), machine)
    fast = gpu_costs(BalancerConfig(), glm5_layer(), LaneRates(380.0, 152.0), machine)
    assert abs(slow.weight_push - 2 * fast.weight_push) <= 2
    assert slow.weight_read == fast.weight_read
    assert (slow.inbound_permille, fast.inbound_permille) == (1000, 2500)
    assert rank_gflops(BalancerConfig(), machine) == 453_000
    assert rank_gflops(BalancerConfig(gemm_gflops=7.0), machine) == 7.0


def test_side_data_is_pushed_and_its_grads_return() -> None:
    probs = (TensorSpec((4,), torch.float32),)  # 16 bytes a row, beside 12,288
    machine = MACHINES["h100"]
    config = BalancerConfig(lane_gbps=1.0)  # a picosecond for a thousandth of a byte
    plain = gpu_costs(config, glm5_layer(), UNUSED, machine)
    with_side = gpu_costs(config, glm5_layer(probs), UNUSED, machine)
    assert with_side.row_push - plain.row_push == 16_000
    assert with_side.row_push_backward - plain.row_push_backward == 16_000
    assert with_side.row_return == plain.row_return
    assert with_side.row_return_backward - plain.row_return_backward == 16_000


def test_a_configured_rate_holds_for_both_directions() -> None:
    assert lane_rates(BalancerConfig(lane_gbps=7.0), UNUSED) == LaneRates(7.0, 7.0)
    assert lane_rates(BalancerConfig(), UNUSED) == UNUSED
    assert lane_rates(BalancerConfig(), LaneRates(0.0, 0.0)) == LaneRates(0.1, 0.1)


def test_costs_on_the_cpu_have_both_rates() -> None:
    layer = LayerSpec(2, 8, torch.float32, ((16, 8), (8, 8)), (), 64)  # rows of 32 bytes
    costs = predicted_costs(BalancerConfig(), layer, LaneRates(out_gbps=4.0, in_gbps=16.0))
    assert (costs.row_push, costs.row_return, costs.inbound_permille) == (8000, 8000, 250)
