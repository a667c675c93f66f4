"""Topology through NVML, against a stand-in that records every call and can refuse any of them."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from nvml_stand_in import (
    GPU_LOST,
    NO_PERMISSION,
    NOT_SUPPORTED,
    UNINITIALIZED,
    UUIDS,
    FabricInfo,
    Nvml,
)

from feplb.observe import nvlink
from feplb.observe.nvlink import Fabric, Topology, read_topology


def why_not(nvml: Nvml) -> str:
    topology = read_topology(nvml=nvml)
    assert not topology.pairs[0].joined
    return topology.pairs[0].why_not


def test_eight_gpus_on_switches_are_all_joined() -> None:
    topology = read_topology(nvml=Nvml(num_gpus=8))
    assert (topology.driver, topology.cuda) == ("570.86.10", (12, 8))
    assert [gpu.uuid for gpu in topology.gpus] == [gpu.asked for gpu in topology.gpus] == UUIDS
    assert len(topology.pairs) == 28
    assert {pair.by for pair in topology.pairs} == {"switch"}
    assert topology.refused == ()


def test_what_is_known_of_a_gpu() -> None:
    gpu = read_topology(nvml=Nvml(num_gpus=1)).gpus[0]
    assert (gpu.name, gpu.bus_id) == ("NVIDIA H100 80GB HBM3", "0000:00:00.0")
    assert (gpu.memory_bytes, gpu.compute_capability, gpu.mig) == (80 << 30, (9, 0), False)
    assert (gpu.peers, gpu.switch_links) == ((), 4)
    assert gpu.fabric == Fabric(state="not supported", cluster="0" * 32, clique=0)


def test_direct_links_join_only_their_two_ends() -> None:
    # 0 = 1   2 = 3: two bridges, as on PCIe cards
    nvml = Nvml(num_gpus=4, links={0: [1, 1], 1: [0, 0], 2: [3], 3: [2, None]})
    topology = read_topology(nvml=nvml)
    pairs = {(p.first, p.second): p for p in topology.pairs}
    assert topology.are_joined(UUIDS[3], UUIDS[2])
    assert not topology.are_joined(UUIDS[1], UUIDS[2])
    assert {two for two, pair in pairs.items() if pair.joined} == {(0, 1), (2, 3)}
    assert pairs[0, 1].by == "link"
    assert pairs[1, 2].why_not == "their active NVLinks lead elsewhere"


def test_gpus_by_uuid_or_bus_id_in_the_callers_order() -> None:
    asked = [UUIDS[3], UUIDS[1].removeprefix("GPU-"), "0000:02:00.0"]
    topology = read_topology(asked, nvml=Nvml(num_gpus=4))
    assert [gpu.uuid for gpu in topology.gpus] == [UUIDS[3], UUIDS[1], UUIDS[2]]
    assert topology.are_joined(asked[0], asked[2])
    with pytest.raises(ValueError, match="'GPU-9' was not asked for"):
        topology.are_joined(asked[0], "GPU-9")


def test_two_names_of_one_gpu_are_joined() -> None:
    nvml = Nvml(links={1: []})
    assert read_topology([UUIDS[1], "0000:01:00.0"], nvml=nvml).are_joined(UUIDS[1], "0000:01:00.0")


def test_a_name_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="GPU 'cuda', expected a UUID or a PCI bus id"):
        read_topology(["cuda"], nvml=Nvml())


PARTED = [
    (Nvml(p2p={(0, 1): 5}), "NVML says no NVLink peer-to-peer (status 5): PCIe only"),
    (Nvml(links={1: []}), "GPU 1 has no active NVLink: PCIe only"),
    (Nvml(links={0: [None, None]}), "GPU 0 has no active NVLink: PCIe only"),
    (Nvml(links={0: [1]}), "their active NVLinks lead elsewhere"),
    (Nvml(mig={1}), "GPU 1 is in MIG mode"),
    (Nvml(fabric={0: (0, 0, 2, 0)}), "the NVLink fabric of GPU 0 is in progress"),
    (Nvml(fabric={1: (0, 0, 1, 0)}), "the NVLink fabric of GPU 1 is not started"),
    (Nvml(fabric={1: (0, 0, 3, 9)}), "the NVLink fabric of GPU 1 is failed"),
    (Nvml(fabric={0: (7, 1, 3, 0), 1: (7, 2, 3, 0)}), "they are in different NVLink cliques"),
    (Nvml(fabric={0: (7, 1, 3, 0), 1: (8, 1, 3, 0)}), "they are in different NVLink cliques"),
]


@pytest.mark.parametrize(("nvml", "sentence"), PARTED, ids=[words for _, words in PARTED])
def test_what_parts_two_gpus(nvml: Nvml, sentence: str) -> None:
    assert why_not(nvml) == sentence


def test_one_clique_joins() -> None:
    same = (7, 1, 3, 0)
    assert read_topology(nvml=Nvml(fabric={0: same, 1: same})).pairs[0].joined


# What parts GPU 0 and 1 where NVML refuses a call; "": the call does not decide that.
CALLS = {
    "nvmlSystemGetDriverVersion": "",
    "nvmlSystemGetCudaDriverVersion": "",
    "nvmlDeviceGetName": "",
    "nvmlDeviceGetMemoryInfo": "",
    "nvmlDeviceGetCudaComputeCapability": "",
    "nvmlDeviceGetGpuFabricInfoV": "",
    "nvmlDeviceGetPciInfo": "",  # only direct links need it
    "nvmlDeviceGetUUID": "",
    "nvmlDeviceGetHandleByIndex": "nvmlDeviceGetHandleByIndex (GPU 0): error",
    "nvmlDeviceGetMigMode": "NVML does not say whether GPU 0 is in MIG mode",
    "nvmlDeviceGetNvLinkState": "NVML does not say where the NVLinks of GPU 0 lead",
    "nvmlDeviceGetNvLinkRemoteDeviceType": "NVML does not say where the NVLinks of GPU 0 lead",
    "nvmlDeviceGetP2PStatus": "NVML does not say (nvmlDeviceGetP2PStatus (GPU 0, GPU 1): error",
}


@pytest.mark.parametrize("error", [NO_PERMISSION, UNINITIALIZED, GPU_LOST])
@pytest.mark.parametrize("call", CALLS)
def test_a_refused_call_never_joins(call: str, error: int) -> None:
    nvml = Nvml(refuse={call: error})
    topology = read_topology(nvml=nvml)
    assert any(f"{call}" in line and f"error {error}" in line for line in topology.refused)
    assert topology.pairs[0].joined == (CALLS[call] == "")
    assert topology.pairs[0].why_not.startswith(CALLS[call])
    assert topology.pairs[0].joined == (topology.pairs[0].why_not == "")
    assert nvml.calls[-1] == "nvmlShutdown"


@pytest.mark.parametrize("call", CALLS)
def test_not_supported_is_an_answer_for_mig_links_and_fabric_only(call: str) -> None:
    topology = read_topology(nvml=Nvml(refuse={call: NOT_SUPPORTED}))
    is_answer = call in (
        "nvmlDeviceGetMigMode",
        "nvmlDeviceGetNvLinkState",
        "nvmlDeviceGetGpuFabricInfoV",
    )
    assert (topology.refused == ()) == is_answer
    joined = CALLS[call] == "" or call == "nvmlDeviceGetMigMode"
    assert topology.pairs[0].joined == joined


def test_a_lost_gpu_leaves_the_others_joined() -> None:
    nvml = Nvml(num_gpus=3, refuse={"nvmlDeviceGetHandleByIndex": lambda g: GPU_LOST * (g == 1)})
    topology = read_topology(nvml=nvml)
    assert [pair.joined for pair in topology.pairs] == [False, True, False]
    assert topology.gpus[1].problem == "nvmlDeviceGetHandleByIndex (GPU 1): error 15"


def test_direct_links_need_both_bus_ids() -> None:
    refuse: dict[str, Any] = {"nvmlDeviceGetNvLinkRemotePciInfo": lambda gpu, link: GPU_LOST * gpu}
    assert why_not(Nvml(links={0: [1], 1: [0]}, refuse=refuse)) == (
        "NVML does not say where the NVLinks of GPU 1 lead"
    )


def test_mig_instances_are_joined_to_none() -> None:
    topology = read_topology(["MIG-1", UUIDS[0]], nvml=Nvml())
    assert topology.gpus[0].mig
    assert topology.pairs[0].why_not == "GPU 0 is in MIG mode"
    assert not topology.are_joined("MIG-1", UUIDS[0])


def test_nvml_that_does_not_start() -> None:
    topology = read_topology(UUIDS[:2], nvml=Nvml(refuse={"nvmlInit": UNINITIALIZED}))
    assert topology.problem == "NVML does not start (error 1)"
    assert not topology.are_joined(*UUIDS[:2])


def test_an_old_package_without_a_function_is_unknown() -> None:
    nvml = SimpleNamespace(**{
        name: getattr(Nvml, name) for name in dir(Nvml) if name.startswith(("NVML", "c_"))
    })  # fmt: skip
    nvml.nvmlInit = nvml.nvmlShutdown = lambda: None
    topology = read_topology(["GPU-0"], nvml=nvml)
    assert topology.gpus[0].problem.endswith("this nvidia-ml-py does not have it")
    assert topology.cuda is None


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    topology = read_topology(UUIDS[:2])
    assert topology.problem.startswith("nvidia-ml-py cannot be loaded")
    assert not topology.pairs[0].joined


def test_on_this_machine() -> None:
    topology = read_topology()
    assert bool(topology.problem) != bool(topology.gpus)
    assert isinstance(topology, Topology)


def test_the_real_package_has_every_name_used() -> None:
    import pynvml

    source = Path(nvlink.__file__).read_text()
    for name in [*vars(Nvml), *CALLS]:
        if name in source and name.startswith(("NVML", "nvml", "c_nvml")):
            assert hasattr(pynvml, name), name
    names = {field for field, _ in pynvml.c_nvmlGpuFabricInfo_v2_t._fields_}
    assert {field for field, _ in FabricInfo._fields_} <= names
