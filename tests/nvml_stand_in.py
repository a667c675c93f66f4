"""Stands in for the module pynvml: records every call, and can refuse any of them."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

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
    capability: tuple[int, int] = (9, 0)
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
        return self.capability

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
