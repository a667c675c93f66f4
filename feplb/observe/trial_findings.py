"""Findings from what the core tried on GPUs: peer access, the arena, flags, copies."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from feplb.observe.core_trials import CudaDevice, CudaFacts, Trial
from feplb.observe.facts import Facts, bare
from feplb.observe.findings import GPU_LANES, Finding, go, names, no_go_if, note

_TRIALS = "GPU trials"
_ARENA = ("vmm", "cuda_ipc")
_FLAGS = ("pinned_board", "stream_values")
_NAMES = {"pinned_board": "pinned flags", "stream_values": "stream values"}
_ADVICE = {
    "pinned_board": "Raise the limit on locked memory (docker --ulimit memlock=-1), and give the "
    "container /dev/shm.",
    "stream_values": "Install driver 570 (CUDA 12.8) or newer.",
}


def trial_findings(facts: Facts, lane: str) -> Iterator[Finding]:
    """In the order they are shown."""
    cuda = facts.core.cuda
    if facts.core.problem:
        return
    if cuda is None:
        yield no_go_if(
            lane == "ce",
            _TRIALS,
            facts.core.cuda_problem,
            "Peer access and shared GPU memory are tried, not guessed; untried is no.",
            'Use lane="host", or install a feplb whose core has the lane and see that nvidia-smi '
            "runs here.",
        )
        return
    if not cuda.devices:
        yield no_go_if(
            lane == "ce",
            _TRIALS,
            "CUDA shows this process no GPU",
            "Nothing could be tried.",
            "See visible GPUs.",
        )
        return
    yield from peer_findings(facts, lane)
    yield from _broken_trials(cuda, lane)
    yield _arena(cuda, lane)
    yield from _flags(cuda, lane)
    yield from _batch(cuda)
    yield _locked_memory(facts, cuda)


def peer_findings(facts: Facts, lane: str) -> Iterator[Finding]:
    """Copy engines and peer access, as the driver says: for every lane of GPUs."""
    cuda = facts.core.cuda
    if cuda is not None and cuda.devices:
        yield from _engines(cuda, lane)
        yield _peer_access(facts, cuda, lane)


def _trial(device: CudaDevice, name: str) -> Trial | None:
    return next((trial for trial in device.trials if trial.name == name), None)


def _is_ok(device: CudaDevice, name: str) -> bool:
    trial = _trial(device, name)
    return trial is not None and trial.ok


def _failures(cuda: CudaFacts, name: str) -> list[str]:
    """What was seen where a trial failed or was not made."""
    seen = []
    for at, device in enumerate(cuda.devices):
        trial = _trial(device, name)
        if trial is None:
            seen.append(f"cuda:{at}: {name} was not tried")
        elif not trial.ok:
            seen.append(f"cuda:{at}: {trial.seen}")
    return seen


def _engines(cuda: CudaFacts, lane: str) -> Iterator[Finding]:
    without = [f"cuda:{at}" for at, each in enumerate(cuda.devices) if each.async_engines == 0]
    if without:
        yield no_go_if(
            lane in GPU_LANES,
            "copy engines",
            f"none on {names(without)}",
            "Every copy would run on SMs.",
            'Choose other GPUs, or lane="host".',
        )
    else:
        numbers = sorted({device.async_engines for device in cuda.devices})
        yield go("copy engines", f"{' or '.join(map(str, numbers))} a GPU, says the driver")


def _peer_access(facts: Facts, cuda: CudaFacts, lane: str) -> Finding:
    name = "peer access"
    if len(cuda.devices) == 1:
        return note(
            name,
            "this process sees one GPU",
            "Between ranks it is proven when the Balancer starts: each peer checks a pattern.",
        )
    if not cuda.no_peer_access:
        return go(name, f"between all {len(cuda.devices)} visible GPUs")
    linked = _linked(facts, cuda)
    refused = [
        f"cuda:{pair[0]} -> cuda:{pair[1]} ({'NVLink' if pair in linked else 'PCIe only'})"
        for pair in cuda.no_peer_access
    ]
    advice = "Choose GPUs that NVLink joins, or use "
    if linked.intersection(cuda.no_peer_access):
        advice = "NVLink is there: look at the virtual machine, the IOMMU and MIG; or use "
    return no_go_if(
        lane in GPU_LANES,
        name,
        f"none: {names(refused, 2)}",
        "A copy between these GPUs would go through the host, silently.",
        f'{advice}lane="host" or policy="none".',
    )


def _linked(facts: Facts, cuda: CudaFacts) -> set[tuple[int, int]]:
    """Ordered pairs of ordinals that NVLink joins, as NVML says."""
    topology = facts.topology
    joined = {(pair.first, pair.second) for pair in topology.pairs if pair.joined}
    at = {bare(gpu.uuid): index for index, gpu in enumerate(topology.gpus)}
    index = [at.get(bare(device.uuid), -1) for device in cuda.devices]
    return {
        (first, second)
        for first, second in itertools.permutations(range(len(index)), 2)
        if {(index[first], index[second]), (index[second], index[first])} & joined
    }


def _broken_trials(cuda: CudaFacts, lane: str) -> Iterator[Finding]:
    """Where the trials themselves could not run, or one failed that has no place below."""
    known = {*_ARENA, *_FLAGS, "batch_copy"}
    seen = [
        f"cuda:{at}, {trial.name}: {trial.seen}"
        for at, device in enumerate(cuda.devices)
        for trial in device.trials
        if trial.name not in known and not trial.ok
    ]
    if seen:
        yield no_go_if(
            lane == "ce", _TRIALS, names(seen, 2), "The lane does not work here.",
            "The reason above says what to change.",
        )  # fmt: skip


def _arena(cuda: CudaFacts, lane: str) -> Finding:
    name = "shared arena"
    vmm, ipc = (_failures(cuda, way) for way in _ARENA)
    neither = [
        at for at, each in enumerate(cuda.devices) if not any(_is_ok(each, w) for w in _ARENA)
    ]
    if neither:
        return no_go_if(
            lane == "ce",
            name,
            f"refused both ways. VMM: {names(vmm, 1)}. CUDA IPC: {names(ipc, 1)}",
            "Ranks cannot write into each other's GPU memory.",
            "Use one container for all ranks of the host, or --ipc=host --pid=host, and a seccomp "
            "profile that allows SCM_RIGHTS. MIG and most virtual GPUs share nothing.",
        )
    if vmm:
        return note(
            name,
            f"by CUDA IPC; VMM: {names(vmm, 1)}",
            "The second way is used, and the log says so. It works within one host and needs one "
            "IPC namespace.",
            "For the first way update the driver, or allow SCM_RIGHTS in the container.",
        )
    fabric = " Fabric handles too." if all(device.fabric for device in cuda.devices) else ""
    second = f"; CUDA IPC: {names(ipc, 1)}" if ipc else "; CUDA IPC works too"
    return go(name, f"by VMM handles{second}", f"Created, exported and imported.{fabric}")


def _flags(cuda: CudaFacts, lane: str) -> Iterator[Finding]:
    for trial in _FLAGS:
        failed = _failures(cuda, trial)
        if failed:
            yield no_go_if(
                lane == "ce",
                _NAMES[trial],
                names(failed, 2),
                "Copies could not be signalled without a kernel.",
                _ADVICE[trial],
            )
        else:
            first = _trial(cuda.devices[0], trial)
            yield go(_NAMES[trial], first.seen if first else "")


def _batch(cuda: CudaFacts) -> Iterator[Finding]:
    failed = _failures(cuda, "batch_copy")
    if failed:
        yield note(
            "batch copies",
            names(failed, 2),
            "Each copy is a call of its own, and the log says so.",
            "Install driver 570 (CUDA 12.8) or newer.",
        )
    else:
        first = _trial(cuda.devices[0], "batch_copy")
        yield go("batch copies", first.seen if first else "")


def _locked_memory(facts: Facts, cuda: CudaFacts) -> Finding:
    limit = facts.machine.memlock_limit
    seen = "no limit" if limit is None else f"at most {limit >> 10} KiB"
    if limit is not None and _failures(cuda, "pinned_board"):
        return note(
            "locked memory",
            seen,
            "Shared memory could not be pinned, and this limit may be why.",
            "ulimit -l unlimited (docker: --ulimit memlock=-1).",
        )
    return go("locked memory", seen, "What feplb pins was accepted." if limit is not None else "")
