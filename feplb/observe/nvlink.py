"""Which GPUs are joined by NVLink, as NVML says it. What NVML does not say counts as no.

A pair is joined where NVML grants NVLink peer-to-peer between the two, and the active links of both
lead to each other or into NVSwitches. Nothing here starts CUDA. NVML sees every GPU of the
container, whatever CUDA_VISIBLE_DEVICES hides, and names them by UUID and PCI bus id, never by
CUDA's ordinals.
"""

from __future__ import annotations

import ctypes
import itertools
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

_FABRIC_STATES = ("not supported", "not started", "in progress", "completed")
_BARE_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fabric:
    """A GPU's place in an NVLink fabric, which may span hosts (NVL72).

    Attributes:
        state: "not supported", "not started", "in progress", "completed" or "failed".
        cluster: 32 hexadecimal digits; all zero where the fabric is one host's.
        clique: only GPUs of one cluster and clique reach each other.
    """

    state: str
    cluster: str
    clique: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """What NVML says of one GPU. None: it did not say.

    Attributes:
        asked: the name it was asked for by.
        bus_id: "domain:bus:device.function" in lower case; "" where unknown.
        mig: whether it is cut into instances.
        peers: bus ids at the far ends of active links, one per link that leads to a GPU.
        switch_links: active links into NVSwitches.
        problem: why NVML knows nothing of it; "" where it does.
    """

    asked: str
    uuid: str = ""
    bus_id: str = ""
    name: str = ""
    memory_bytes: int | None = None
    free_bytes: int | None = None
    compute_capability: tuple[int, int] | None = None
    mig: bool | None = None
    peers: tuple[str, ...] | None = None
    switch_links: int | None = None
    fabric: Fabric | None = None
    problem: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Two GPUs, as indices into Topology.gpus: joined `by` "link" or "switch", or `why_not`."""

    first: int
    second: int
    by: str = ""
    why_not: str = ""

    @property
    def joined(self) -> bool:
        """Whether NVLink joins them, for certain."""
        return bool(self.by)


@dataclass(frozen=True, slots=True, kw_only=True)
class Topology:
    """What NVML says of a list of GPUs.

    Attributes:
        driver: its version, "" where unknown.
        cuda: newest CUDA the driver brings, e.g. (12, 8).
        pairs: every two of `gpus`, (0, 1), (0, 2), ..., (1, 2), ...
        refused: calls that NVML refused, each with its reason.
        problem: why NVML says nothing at all; "" where it answers.
    """

    driver: str = ""
    cuda: tuple[int, int] | None = None
    gpus: tuple[Gpu, ...] = ()
    pairs: tuple[Pair, ...] = ()
    refused: tuple[str, ...] = ()
    problem: str = ""

    def are_joined(self, first: str, second: str) -> bool:
        """Whether NVLink joins two of the GPUs that were asked for, by the names they had then.

        A GPU is joined to itself. Raises ValueError for a name that was not asked for.
        """
        names = [gpu.asked for gpu in self.gpus]
        for name in (first, second):
            if name not in names:
                raise ValueError(f"GPU {name!r} was not asked for, expected one of {names}")
        at = {names.index(first), names.index(second)}
        if len({self.gpus[index].uuid or index for index in at}) == 1:
            return True
        return any(pair.joined and {pair.first, pair.second} == at for pair in self.pairs)


def read_topology(gpus: Sequence[str] | None = None, *, nvml: Any = None) -> Topology:
    """Ask NVML. Never raises for what the machine is like: what is not known is said so.

    Args:
        gpus: UUIDs ("GPU-..." as NVML has them, or bare as torch has them), MIG UUIDs ("MIG-...")
            or PCI bus ids; None: every GPU that NVML sees.
        nvml: the module pynvml, or what stands in for it; None: the installed nvidia-ml-py.
    Raises:
        ValueError: a name that is none of these.
    Thread/stream: blocks for milliseconds; initializes NVML and shuts it down.
    """
    named = None if gpus is None else tuple(_checked(name) for name in gpus)
    if nvml is None:
        try:
            nvml = import_module("pynvml")
        except ImportError as error:
            return _silent(named, f"nvidia-ml-py cannot be loaded ({error})")
    try:
        nvml.nvmlInit()
    except (nvml.NVMLError, OSError) as error:
        return _silent(named, f"NVML does not start ({error})")
    reader = _Reader(nvml)
    try:
        return reader.topology(named)
    finally:
        reader.ask("nvmlShutdown")


def _silent(named: Sequence[str] | None, problem: str) -> Topology:
    """Nothing is known, so nothing is joined."""
    gpus = tuple(Gpu(asked=name, problem=problem) for name in named or ())
    pairs = tuple(
        Pair(first=first, second=second, why_not=problem) for first, second in _twos(len(gpus))
    )
    return Topology(gpus=gpus, pairs=pairs, problem=problem)


def _twos(count: int) -> Iterable[tuple[int, int]]:
    return itertools.combinations(range(count), 2)


def _checked(name: str) -> str:
    if name.startswith(("GPU-", "MIG-")) or ":" in name or _BARE_UUID.fullmatch(name):
        return name
    raise ValueError(f"GPU {name!r}, expected a UUID or a PCI bus id")


def _text(value: str | bytes | None) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else value or ""


def _bus_id(value: str | bytes) -> str:
    """NVML and CUDA write the PCI domain with eight or four digits, in either case."""
    domain, _, rest = _text(value).lower().partition(":")
    return f"{domain.lstrip('0').rjust(4, '0')}:{rest}"


class _Reader:
    """One conversation with NVML; what it refuses is kept, and counts as unknown."""

    def __init__(self, nvml: Any) -> None:
        self._nvml = nvml
        self._refused: list[str] = []
        self._no_such = (nvml.NVML_ERROR_NOT_SUPPORTED, nvml.NVML_ERROR_INVALID_ARGUMENT)

    def ask(self, call: str, *arguments: Any, otherwise: Any = None, about: str = "") -> Any:
        """What NVML answers; `otherwise` where it says there is no such thing; None if refused."""
        function: Callable[..., Any] | None = getattr(self._nvml, call, None)
        what = f"{call} ({about})" if about else call
        if function is None:
            self._refused.append(f"{what}: this nvidia-ml-py does not have it")
            return None
        try:
            return function(*arguments)
        except self._nvml.NVMLError as error:
            if otherwise is not None and getattr(error, "value", None) in self._no_such:
                return otherwise
            self._refused.append(f"{what}: {error}")
            return None

    def topology(self, names: Sequence[str] | None) -> Topology:
        version = self.ask("nvmlSystemGetCudaDriverVersion")
        driver = _text(self.ask("nvmlSystemGetDriverVersion"))
        count = self.ask("nvmlDeviceGetCount") or 0 if names is None else len(names)
        handles = []
        gpus: list[Gpu] = []
        for index in range(count):
            handle = self._handle(index, names)
            handles.append(handle)
            gpus.append(self._gpu(index, names, handle))
        return Topology(
            driver=driver,
            cuda=None if version is None else (version // 1000, version % 1000 // 10),
            gpus=tuple(gpus),
            pairs=tuple(self._pair(*two, gpus, handles) for two in _twos(len(gpus))),
            refused=tuple(self._refused),
        )

    # ------------------------------------------------------------------------------- one GPU

    def _handle(self, index: int, names: Sequence[str] | None) -> Any:
        about = f"GPU {index}"
        if names is None:
            return self.ask("nvmlDeviceGetHandleByIndex", index, about=about)
        name = names[index]
        if name.startswith("MIG-"):
            return None
        if ":" in name:
            return self.ask("nvmlDeviceGetHandleByPciBusId", name, about=about)
        uuid = f"GPU-{name}" if _BARE_UUID.fullmatch(name) else name
        return self.ask("nvmlDeviceGetHandleByUUID", uuid, about=about)

    def _gpu(self, index: int, names: Sequence[str] | None, handle: Any) -> Gpu:
        about = f"GPU {index}"
        asked = about if names is None else names[index]
        if asked.startswith("MIG-"):
            return Gpu(asked=asked, uuid=asked, mig=True)
        if handle is None:
            return Gpu(asked=asked, problem=self._refused[-1])
        uuid = _text(self.ask("nvmlDeviceGetUUID", handle, about=about))
        memory = self.ask("nvmlDeviceGetMemoryInfo", handle, about=about)
        pci = self.ask("nvmlDeviceGetPciInfo", handle, about=about)
        capability = self.ask("nvmlDeviceGetCudaComputeCapability", handle, about=about)
        mig = self.ask("nvmlDeviceGetMigMode", handle, otherwise=(0, 0), about=about)
        peers, switch_links = self._links(about, handle)
        return Gpu(
            asked=(uuid or asked) if names is None else asked,
            uuid=uuid,
            bus_id="" if pci is None else _bus_id(pci.busId),
            name=_text(self.ask("nvmlDeviceGetName", handle, about=about)),
            memory_bytes=None if memory is None else memory.total,
            free_bytes=None if memory is None else memory.free,
            compute_capability=None if capability is None else tuple(capability),
            mig=None if mig is None else bool(mig[0]),
            peers=peers,
            switch_links=switch_links,
            fabric=self._fabric(about, handle),
        )

    def _links(self, gpu: str, handle: Any) -> tuple[tuple[str, ...] | None, int | None]:
        """(far ends that are GPUs, links into switches); (None, None) where a link is unknown."""
        peers, switch_links = [], 0
        for link in range(self._nvml.NVML_NVLINK_MAX_LINKS):
            about = f"{gpu}, link {link}"
            active = self.ask("nvmlDeviceGetNvLinkState", handle, link, otherwise=0, about=about)
            if active is None:
                return None, None
            if active != self._nvml.NVML_FEATURE_ENABLED:
                continue  # also a link that is up and carries no traffic
            kind = self.ask("nvmlDeviceGetNvLinkRemoteDeviceType", handle, link, about=about)
            if kind is None:
                return None, None
            if kind == self._nvml.NVML_NVLINK_DEVICE_TYPE_SWITCH:
                switch_links += 1
            elif kind == self._nvml.NVML_NVLINK_DEVICE_TYPE_GPU:
                far = self.ask("nvmlDeviceGetNvLinkRemotePciInfo", handle, link, about=about)
                if far is None:
                    return None, None
                peers.append(_bus_id(far.busId))
        return tuple(peers), switch_links

    def _fabric(self, about: str, handle: Any) -> Fabric | None:
        make = getattr(self._nvml, "c_nvmlGpuFabricInfo_v2_t", None)
        if make is None:
            return None
        info = make()
        call = "nvmlDeviceGetGpuFabricInfoV"
        answer = self.ask(call, handle, ctypes.byref(info), otherwise="none", about=about)
        if answer is None:
            return None
        if answer == "none":
            return Fabric(state=_FABRIC_STATES[0], cluster="0" * 32, clique=0)
        is_known = info.state < len(_FABRIC_STATES) and (info.status == 0 or info.state != 3)
        return Fabric(
            state=_FABRIC_STATES[info.state] if is_known else "failed",
            cluster=bytes(info.clusterUuid).hex(),
            clique=info.cliqueId,
        )

    # ------------------------------------------------------------------------------ two GPUs

    def _pair(self, first: int, second: int, gpus: Sequence[Gpu], handles: Sequence[Any]) -> Pair:
        ends = (gpus[first], gpus[second])
        why_not = _alone(first, ends[0]) or _alone(second, ends[1]) or _apart(*ends)
        if not why_not:
            about = f"GPU {first}, GPU {second}"
            why_not = self._refused_p2p(handles[first], handles[second], about)
        by = "" if why_not else _way(*ends)
        if not why_not and not by:
            why_not = "their active NVLinks lead elsewhere"
        return Pair(first=first, second=second, by=by, why_not=why_not)

    def _refused_p2p(self, first: Any, second: Any, about: str) -> str:
        index = self._nvml.NVML_P2P_CAPS_INDEX_NVLINK
        status = self.ask("nvmlDeviceGetP2PStatus", first, second, index, about=about)
        if status is None:
            return f"NVML does not say ({self._refused[-1]})"
        if status != self._nvml.NVML_P2P_STATUS_OK:
            return f"NVML says no NVLink peer-to-peer (status {status}): PCIe only"
        return ""


def _alone(index: int, gpu: Gpu) -> str:
    """Why this GPU is joined to none; "" where it may be."""
    if gpu.problem:
        return gpu.problem
    if gpu.mig is None:
        return f"NVML does not say whether GPU {index} is in MIG mode"
    if gpu.mig:
        return f"GPU {index} is in MIG mode"
    if gpu.fabric is not None and gpu.fabric.state in ("not started", "in progress", "failed"):
        return f"the NVLink fabric of GPU {index} is {gpu.fabric.state}"
    if gpu.peers is None:
        return f"NVML does not say where the NVLinks of GPU {index} lead"
    if not gpu.peers and not gpu.switch_links:
        return f"GPU {index} has no active NVLink: PCIe only"
    return ""


def _apart(first: Gpu, second: Gpu) -> str:
    """Why the fabric parts them; "" where it does not."""
    places = [gpu.fabric for gpu in (first, second) if gpu.fabric is not None]
    done = [(place.cluster, place.clique) for place in places if place.state == "completed"]
    return "they are in different NVLink cliques" if len(set(done)) > 1 else ""


def _way(first: Gpu, second: Gpu) -> str:
    if second.bus_id in (first.peers or ()) and first.bus_id in (second.peers or ()):
        return "link"
    return "switch" if first.switch_links and second.switch_links else ""
