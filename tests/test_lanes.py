"""Which lane is chosen, and which GPUs may form a domain."""

from __future__ import annotations

import os
from unittest import mock

import pytest
from nvml_stand_in import UUIDS, Nvml

from feplb import BalancerConfig
from feplb.config import read_environment
from feplb.lanes import gpu_of, lane_name
from feplb.links import check_nvlink
from feplb.observe.nvlink import read_topology


@pytest.mark.parametrize(
    ("configured", "variable", "has_gpu", "expected"),
    [
        ("auto", None, False, "host"),
        ("auto", None, True, "ce"),
        ("auto", "host", True, "host"),
        ("auto", "ce", False, "ce"),
        ("auto", "auto", True, "ce"),
        ("host", "ce", True, "host"),  # the config speaks first
        ("ce", "host", False, "ce"),
    ],
)
def test_lane_is_the_configs_then_the_variables_then_the_machines(
    configured: str, variable: str | None, has_gpu: bool, expected: str
) -> None:
    variables = {} if variable is None else {"FEPLB_LANE": variable}
    with (
        mock.patch.dict(os.environ, variables),
        mock.patch("torch.cuda.is_available", return_value=has_gpu),
    ):
        assert lane_name(BalancerConfig(lane=configured), read_environment()) == expected


def test_gpu_is_named_only_where_rows_live_on_it() -> None:
    environment = read_environment()
    with (
        mock.patch("torch.cuda.is_available", return_value=True),
        mock.patch("torch.cuda.get_device_name", return_value="NVIDIA H200"),
    ):
        assert gpu_of(BalancerConfig(), environment) == "NVIDIA H200"
        assert gpu_of(BalancerConfig(lane="host"), environment) == ""
    assert gpu_of(BalancerConfig(lane="ce"), environment) == ""  # the stand-in: no GPU


def test_gpus_on_switches_form_a_domain() -> None:
    topology = read_topology(nvml=Nvml(num_gpus=8))
    check_nvlink(UUIDS[:8], range(8), topology=topology)


def test_ranks_on_one_gpu_ask_nobody() -> None:
    check_nvlink([UUIDS[0]] * 4, range(4))


def test_a_gpu_behind_pcie_is_refused_by_its_ranks() -> None:
    topology = read_topology(nvml=Nvml(num_gpus=4, links={3: []}))
    with pytest.raises(RuntimeError) as error:
        check_nvlink(UUIDS[:4], [8, 9, 10, 11], topology=topology)
    text = str(error.value)
    assert f"ranks 8 ({UUIDS[0]}) and 11 ({UUIDS[3]}) are not known to be joined" in text
    assert "GPU 3 has no active NVLink: PCIe only" in text
    assert all(advice in text for advice in ("FEPLB_DOMAIN", "lane='host'"))
    check_nvlink(UUIDS[:3], [8, 9, 10], topology=topology)  # the others may


def test_a_gpu_in_mig_mode_is_refused_with_what_to_choose() -> None:
    topology = read_topology(nvml=Nvml(num_gpus=2, mig={1}))
    with pytest.raises(RuntimeError, match=r"GPU 1 is in MIG mode.*use whole GPUs"):
        check_nvlink(UUIDS[:2], [0, 1], topology=topology)


def test_a_machine_without_nvml_is_refused_with_the_reason() -> None:
    with pytest.raises(RuntimeError, match="NVML") as error:
        check_nvlink(UUIDS[:2], [0, 1])
    assert "install nvidia-ml-py" in str(error.value)
