"""Which GPUs may form a domain: those that NVLink joins, for certain."""

from __future__ import annotations

from collections.abc import Sequence

from .observe.nvlink import Gpu, Topology, read_topology


def _why_not(topology: Topology) -> list[str]:
    pairs = sorted({pair.why_not for pair in topology.pairs if not pair.joined})
    return [text for text in (topology.problem, *topology.refused, *pairs) if text]


def check_nvlink(
    uuids: Sequence[str], global_ranks: Sequence[int], *, topology: Topology | None = None
) -> None:
    """Refuse a domain whose GPUs are not all joined by NVLink; unknown means no.

    Args:
        uuids: the GPU of every rank, as nvidia-smi writes it. Ranks may share one.
        global_ranks: what messages call them.
        topology: as NVML has it; None: read.
    Raises:
        RuntimeError: names the first two ranks.
    """
    if len(set(uuids)) == 1:
        return
    topology = topology or read_topology(sorted(set(uuids)))
    for b, second in enumerate(uuids):
        for a, first in enumerate(uuids[:b]):
            if first == second or topology.are_joined(first, second):
                continue
            said = "; ".join(_why_not(topology))
            why = f" NVML: {said}." if said else ""
            raise RuntimeError(
                f"the GPUs of ranks {global_ranks[a]} ({first}) and {global_ranks[b]} ({second}) "
                f"are not known to be joined by NVLink.{why} Rows move through NVLink only, and "
                "instances of a GPU in MIG mode have none: use whole GPUs. Give each NVLink domain "
                "a name of its own in FEPLB_DOMAIN; install nvidia-ml-py if NVML could not be "
                "asked; or use lane='host'. `feplb doctor` shows what NVML says."
            )


def check_fabric(gpus: Sequence[Gpu], global_ranks: Sequence[int]) -> None:
    """Refuse a domain over hosts whose GPUs are not all in one NVLink fabric; unknown means no.

    Args:
        gpus: the GPU of every rank, as NVML of its own host has it.
        global_ranks: what messages call them.
    Raises:
        RuntimeError: names the first rank whose GPU is in no fabric, or two that are in different.
    """
    advice = (
        "A domain over several hosts moves rows through one NVLink fabric only. Give each NVLink "
        "domain a name of its own in FEPLB_DOMAIN; `feplb doctor` shows what NVML says."
    )
    for rank, gpu in zip(global_ranks, gpus, strict=True):
        state = gpu.fabric.state if gpu.fabric is not None else gpu.problem or "not said by NVML"
        if state != "completed":
            raise RuntimeError(
                f"the GPU of rank {rank} ({gpu.asked}) is in no NVLink fabric: its state is "
                f"{state}, expected completed. {advice}"
            )
        if gpu.fabric is not None and set(gpu.fabric.cluster) == {"0"}:
            raise RuntimeError(
                f"the NVLink fabric of the GPU of rank {rank} ({gpu.asked}) is its host's alone: "
                f"its cluster is all zeros. {advice}"
            )
    places = [(gpu.fabric.cluster, gpu.fabric.clique) for gpu in gpus if gpu.fabric is not None]
    for rank, place in zip(global_ranks, places, strict=True):
        if place != places[0]:
            raise RuntimeError(
                f"the GPUs of ranks {global_ranks[0]} and {rank} are in different NVLink fabrics: "
                f"cluster {places[0][0]}, clique {places[0][1]}, and cluster {place[0]}, clique "
                f"{place[1]}. {advice}"
            )
