"""Topology through NVML, against a stand-in that records every call and can refuse any of them."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from feplb.observe import nvlink
from feplb.observe.nvlink import Fabric, Topology, read_topology

NOT_SUPPORTED, NO_PERMISSION, UNINITIALIZED, GPU_LOST = 3, 4, 1, 15
UUIDS = [f"GPU-0000000{n}-0000-0000-0000-000000000000" for n in range(8)]


class FabricInfo(ctypes.Structure):
    _fields_ = (
        ("clusterUuid", ctypes.c_uint8 * 16),
        ("status", ctypes.c_uint),
        ("cliqueId", ctypes.c_uint32),
        ("state", ctypes.c_uint),
    )


class NVMLError(Exception):
    def __init__(self, value: int) -> None:
        self.value = value
        super().__init__(f"error {value}")


@dataclass
class Nvml:
    """Stands in for the module pynvml. A node of `num_gpus`, as its fields say.

    links[g]: what each link of GPU g leads to: "switch", another GPU's index, or None (down).
    p2p[(a, b)]: NVLink peer-to-peer status, 0 where not named. refuse[call]: the error it raises,
    or a function of its arguments that returns one (0: none).
    """

    num_gpus: int = 2
    links: dict[int, list[Any]] = field(default_factory=dict)
    p2p: dict[tuple[int, int], int] = field(default_factory=dict)
    mig: set[int] = field(default_factory=set)
    fabric: dict[int, tuple[int, int, int, int]] = field(default_factory=dict)
    refuse: dict[str, int | Callable[..., int]] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)

    NVMLError = NVMLError
    NVML_ERROR_NOT_SUPPORTED, NVML_ERROR_INVALID_ARGUMENT = NOT_SUPPORTED, 2
    NVML_FEATURE_ENABLED, NVML_NVLINK_MAX_LINKS = 1, 18
    NVML_NVLINK_DEVICE_TYPE_GPU, NVML_NVLINK_DEVICE_TYPE_SWITCH = 0, 2
    NVML_P2P_CAPS_INDEX_NVLINK, NVML_P2P_STATUS_OK = 2, 0
    c_nvmlGpuFabricInfo_v2_t = FabricInfo  # noqa: N815

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("nvml"):
            raise AttributeError(name)
        answer = type(self).__dict__[f"answer_{name[4:]}"]

        def call(*arguments: Any) -> Any:
            self.calls.append(name)
            error = self.refuse.get(name, 0)
            code = error(*arguments) if callable(error) else error
            if code:
                raise NVMLError(code)
            return answer(self, *arguments)

        return call

    def answer_Init(self) -> None: ...  # noqa: N802
    def answer_Shutdown(self) -> None: ...  # noqa: N802
    def answer_SystemGetDriverVersion(self) -> str:  # noqa: N802
        return "570.86.10"

    def answer_SystemGetCudaDriverVersion(self) -> int:  # noqa: N802
        return 12080

    def answer_DeviceGetCount(self) -> int:  # noqa: N802
        return self.num_gpus

    def answer_DeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802
        return index

    def answer_DeviceGetHandleByUUID(self, uuid: str) -> int:  # noqa: N802
        return UUIDS.index(uuid)

    def answer_DeviceGetHandleByPciBusId(self, name: str) -> int:  # noqa: N802
        return int(name.split(":")[1], 16)

    def answer_DeviceGetUUID(self, gpu: int) -> str:  # noqa: N802
        return UUIDS[gpu]

    def answer_DeviceGetName(self, gpu: int) -> bytes:  # noqa: N802
        return b"NVIDIA H100 80GB HBM3"

    def answer_DeviceGetPciInfo(self, gpu: int) -> Any:  # noqa: N802
        return SimpleNamespace(busId=f"00000000:{gpu:02X}:00.0".encode())

    def answer_DeviceGetMemoryInfo(self, gpu: int) -> Any:  # noqa: N802
        return SimpleNamespace(total=80 << 30, free=79 << 30)

    def answer_DeviceGetCudaComputeCapability(self, gpu: int) -> tuple[int, int]:  # noqa: N802
        return (9, 0)

    def answer_DeviceGetMigMode(self, gpu: int) -> list[int]:  # noqa: N802
        return [int(gpu in self.mig)] * 2

    def answer_DeviceGetNvLinkState(self, gpu: int, link: int) -> int:  # noqa: N802
        ends = self.links.get(gpu, ["switch"] * 4)
        if link >= len(ends):
            raise NVMLError(self.NVML_ERROR_INVALID_ARGUMENT)
        return int(ends[link] is not None)

    def answer_DeviceGetNvLinkRemoteDeviceType(self, gpu: int, link: int) -> int:  # noqa: N802
        return 2 if self.links.get(gpu, ["switch"] * 4)[link] == "switch" else 0

    def answer_DeviceGetNvLinkRemotePciInfo(self, gpu: int, link: int) -> Any:  # noqa: N802
        return SimpleNamespace(busId=f"00000000:{self.links[gpu][link]:02X}:00.0")

    def answer_DeviceGetGpuFabricInfoV(self, gpu: int, where: Any) -> int:  # noqa: N802
        if gpu not in self.fabric:
            raise NVMLError(NOT_SUPPORTED)
        info = where._obj  # what ctypes.byref was given
        info.clusterUuid[0], info.cliqueId, info.state, info.status = self.fabric[gpu]
        return 0

    def answer_DeviceGetP2PStatus(self, first: int, second: int, index: int) -> int:  # noqa: N802
        assert index == self.NVML_P2P_CAPS_INDEX_NVLINK
        return self.p2p.get((first, second), 0)


def why_not(nvml: Nvml) -> str:
    topology = read_topology(nvml=nvml)
    assert not topology.pairs[0].joined
    return topology.pairs[0].why_not


def test_eight_gpus_on_switches_are_all_joined() -> None:
    topology = read_topology(nvml=Nvml(num_gpus=8))
    assert (topology.driver, topology.cuda) == ("570.86.10", (12, 8))
    assert [gpu.uuid for gpu in topology.gpus] == UUIDS
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
    pairs = {(p.first, p.second): p for p in read_topology(nvml=nvml).pairs}
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
    pynvml = pytest.importorskip("pynvml")
    source = Path(nvlink.__file__).read_text()
    for name in [*vars(Nvml), *CALLS]:
        if name in source and name.startswith(("NVML", "nvml", "c_nvml")):
            assert hasattr(pynvml, name), name
    names = {field for field, _ in pynvml.c_nvmlGpuFabricInfo_v2_t._fields_}
    assert {field for field, _ in FabricInfo._fields_} <= names
