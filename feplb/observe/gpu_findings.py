"""Findings about GPUs: driver, torch's CUDA, masks, MIG, NVLink, queues, allocator.

What the lanes of GPUs (ce, cupy) cannot do without is a no-go where one of them is judged, and a
note where the host lane is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from feplb.config import BalancerConfig, check_queues
from feplb.observe.cupy_findings import cupy_findings
from feplb.observe.facts import Facts, Question
from feplb.observe.findings import GPU_LANES, Finding, go, names, no_go_if, note
from feplb.observe.host_findings import ranks_here, size
from feplb.observe.trial_findings import peer_findings, trial_findings

_OLDEST_CUDA = (11, 7)  # stream memory operations as feplb calls them
_BATCH_CUDA = (12, 8)  # cuMemcpyBatchAsync
_SAME_GPU_CUDA = (13, 1)  # its overlap flag also counts for copies within one GPU
_HOPPER = (9, 0)
_UPDATE = "Install driver 570 (CUDA 12.8) or newer."


def gpu_findings(facts: Facts, question: Question, lane: str) -> Iterator[Finding]:
    """In the order they are shown."""
    yield _toolkit(facts)
    if lane == "cupy":
        yield from cupy_findings(facts.cupy)
    if not facts.has_gpu:
        yield _no_gpu(facts, lane)
        return
    yield _driver(facts, lane)
    if not facts.torch.problem:
        yield _torch_cuda(facts, lane)
    yield from _gpus(facts, lane)
    yield from _mig(facts, lane)
    yield from _visible(facts, lane)
    yield _nvlink(facts, lane)
    if lane == "cupy":
        yield from peer_findings(facts, lane)
    else:
        yield from trial_findings(facts, lane)
    yield from _gpu_memory(facts, question, lane)
    if facts.environment is not None:
        yield _queues(facts, lane)
        yield _allocator(facts)


def _toolkit(facts: Facts) -> Finding:
    nvcc = facts.machine.nvcc
    return go("CUDA toolkit", f"nvcc {nvcc}" if nvcc else "no nvcc", "feplb needs none.")


def _no_gpu(facts: Facts, lane: str) -> Finding:
    reason = facts.topology.problem or "NVML lists none"
    if facts.machine.kernel_driver:
        reason = (
            f"the host has NVIDIA driver {facts.machine.kernel_driver}, but this container was "
            f"given no GPU; {reason}"
        )
    return no_go_if(
        lane in GPU_LANES,
        "GPUs",
        f"none: {reason}",
        "The copy-engine lanes (ce, cupy) need GPUs. The host lane works without, and so do plan, "
        "simulate and all CPU tests.",
        "For the ce or cupy lane run where GPUs are; a container gets them by docker --gpus all.",
    )


# ------------------------------------------------------------------------------ driver and torch


def driver_cuda(facts: Facts) -> tuple[int, int] | None:
    """Newest CUDA the driver brings; the core's word (a compatibility package counts) first."""
    return facts.core.cuda.driver if facts.core.cuda is not None else facts.topology.cuda


def _driver(facts: Facts, lane: str) -> Finding:
    cuda = driver_cuda(facts)
    version = facts.topology.driver or facts.machine.kernel_driver or "of unknown version"
    if cuda is None:
        return no_go_if(
            lane in GPU_LANES,
            "driver",
            f"{version}; its CUDA is unknown: {facts.topology.problem or facts.core.cuda_problem}",
            "Whether it can copy in batches is not known.",
            "pip install 'feplb[gpu]' (nvidia-ml-py), and see that nvidia-smi runs here.",
        )
    seen = f"{version}, CUDA {cuda[0]}.{cuda[1]}"
    if cuda < _OLDEST_CUDA:
        return no_go_if(
            lane in GPU_LANES,
            "driver",
            seen,
            "Too old: streams write and wait for values as feplb asks from CUDA 11.7 on.",
            _UPDATE,
        )
    if cuda < _BATCH_CUDA:
        return note(
            "driver",
            seen,
            "No batch copies before CUDA 12.8: each copy is a call of its own, about 5 to 7 us "
            "(published, not measured here).",
            _UPDATE,
        )
    within = "" if cuda >= _SAME_GPU_CUDA else " Copies within one GPU may run on SMs before 13.1."
    return go("driver", seen, f"It copies in batches.{within}")


def _torch_cuda(facts: Facts, lane: str) -> Finding:
    torch, cuda = facts.torch, driver_cuda(facts)
    if torch.cuda is None:
        built = f"ROCm {torch.hip}" if torch.hip else "the CPU only"
        return no_go_if(
            lane in GPU_LANES,
            "torch and CUDA",
            f"torch {torch.version} is built for {built}",
            "Its tensors cannot be on these GPUs.",
            "Install a torch that is built for CUDA.",
        )
    if not torch.cuda_problem:
        return go("torch and CUDA", f"torch sees GPUs: {len(torch.uuids)}, with CUDA {torch.cuda}")
    needs = tuple(int(part) for part in torch.cuda.split(".")[:2])
    if cuda is not None and cuda < needs:
        advice = f"Install a driver that brings CUDA {torch.cuda}, or a torch built for {cuda[0]}."
    else:
        advice = "nvidia-smi and CUDA_VISIBLE_DEVICES say more."
    return no_go_if(
        lane in GPU_LANES,
        "torch and CUDA",
        f"torch's CUDA {torch.cuda} does not start: {torch.cuda_problem}",
        "Its tensors cannot be on these GPUs.",
        advice,
    )


# ------------------------------------------------------------------------------------------ GPUs


def _gpus(facts: Facts, lane: str) -> Iterator[Finding]:
    lost = [gpu.problem for gpu in facts.topology.gpus if gpu.problem]
    if lost:
        job = facts.job_gpus
        in_job = len(job) < len(facts.visible) or any(facts.topology.gpus[at].problem for at in job)
        yield no_go_if(
            lane in GPU_LANES and in_job,
            "GPUs",
            names(lost, 2),
            "A GPU that NVML cannot reach cannot be used.",
            "nvidia-smi says more; a lost GPU needs a reset by the machine's owner, or a reboot.",
        )
    kinds: Counter[str] = Counter()
    oldest = _HOPPER
    for gpu in facts.topology.gpus:
        if gpu.problem:
            continue
        capability = gpu.compute_capability
        oldest = min(oldest, capability or oldest)
        kinds[
            f"{gpu.name or 'unnamed'}, {size(gpu.memory_bytes or 0)}, compute capability "
            + ("unknown" if capability is None else "{}.{}".format(*capability))
        ] += 1
    for device in facts.core.cuda.devices if facts.core.cuda and not kinds else ():
        oldest = min(oldest, device.compute_capability)
        kinds["{}, compute capability {}.{}".format(device.name, *device.compute_capability)] += 1
    seen = "; ".join(f"{count} x {kind}" for kind, count in kinds.items())
    if not seen:
        seen = f"{facts.machine.gpu_nodes} device nodes, nothing more is known"
    if oldest < _HOPPER:
        yield note("GPUs", seen, "The copy-engine lane is built for Hopper (9.0) and later.")
    else:
        yield go("GPUs", seen)


def _mig(facts: Facts, lane: str) -> Iterator[Finding]:
    cut = [f"GPU {at}" for at in facts.job_gpus if facts.topology.gpus[at].mig]
    mask = facts.environment.cuda_visible_devices if facts.environment else None
    if cut or "MIG-" in (mask or ""):
        yield no_go_if(
            lane in GPU_LANES,
            "MIG",
            f"on: {names(cut)}" if cut else f"CUDA_VISIBLE_DEVICES={mask}",
            "Instances of a cut GPU reach no peer: no NVLink, no CUDA IPC.",
            "nvidia-smi -i N -mig 0 (by the machine's owner), or choose whole GPUs.",
        )


def _visible(facts: Facts, lane: str) -> Iterator[Finding]:
    if facts.environment is None:
        return
    mask = facts.environment.cuda_visible_devices
    name, there = "visible GPUs", len(facts.topology.gpus)
    if mask is None:
        yield go(name, "CUDA_VISIBLE_DEVICES is not set")
        return
    seen = f"CUDA_VISIBLE_DEVICES={mask or '(empty)'}, {there} GPUs here"
    entries = [entry for entry in mask.split(",") if entry.strip()]
    if not entries or entries[0].strip() == "-1":
        yield no_go_if(lane in GPU_LANES, name, seen, "It hides every GPU.", "Unset it.")
    elif len(entries) == 1 and there > 1:
        yield note(
            name,
            seen,
            "Each rank sees one GPU, so its peers' ordinals are hidden: copies go to their mapped "
            "addresses (plain UVA copies), and cudaMemcpyPeerAsync cannot be chosen.",
            "Nothing must be changed. To have ordinals unset it and call "
            "torch.cuda.set_device(local_rank).",
        )
    else:
        yield go(name, seen)


def _nvlink(facts: Facts, lane: str) -> Finding:
    topology, job = facts.topology, facts.job_gpus
    is_split = facts.environment is not None and facts.environment.domain is not None
    name = "NVLink"
    if topology.problem:
        return no_go_if(
            lane in GPU_LANES
            and not is_split
            and max(len(facts.visible), facts.machine.gpu_nodes) > 1,
            name,
            f"unknown: {topology.problem}",
            "What is not known counts as no NVLink, and the lane uses nothing else.",
            "pip install 'feplb[gpu]' (nvidia-ml-py), and see that nvidia-smi runs here.",
        )
    pairs = [pair for pair in topology.pairs if pair.first in job and pair.second in job]
    if not pairs:
        return note(
            name,
            "one GPU",
            "A domain needs peers. Two ranks on one GPU work, for tests: their copies may run on "
            "SMs.",
        )
    apart = [pair for pair in pairs if not pair.joined]
    if not apart:
        ways = " and ".join(sorted({pair.by for pair in pairs}))
        return go(name, f"all {len(pairs)} pairs of {len(job)} GPUs are joined, by {ways}")
    reasons = Counter(pair.why_not for pair in apart)
    first = [f"{pair.first}-{pair.second}" for pair in apart]
    return no_go_if(
        lane in GPU_LANES and not is_split,
        name,
        f"{len(apart)} of {len(pairs)} pairs are not joined ({names(first)}): "
        f"{names(list(reasons), 2)}",
        "The lane goes over NVLink only: over PCIe copies are slow, and may be lost where an IOMMU "
        "is in the way.",
        _advice_on_links(list(reasons)),
    )


def _advice_on_links(reasons: list[str]) -> str:
    if any("fabric" in reason for reason in reasons):
        return "Start nvidia-fabricmanager, of the driver's version, and wait until it is done."
    return (
        "Choose joined GPUs (CUDA_VISIBLE_DEVICES), give ranks that are joined a FEPLB_DOMAIN of "
        'their own, or use lane="host".'
    )


# ------------------------------------------------------------------------ memory, queues, allocator


def _gpu_memory(facts: Facts, question: Question, lane: str) -> Iterator[Finding]:
    free = [facts.topology.gpus[at].free_bytes for at in facts.job_gpus]
    known = [each for each in free if each is not None]
    if not known or question.arena_bytes is None:
        return
    each = -(-ranks_here(facts, question) // len(facts.job_gpus))
    need = each * question.arena_bytes
    seen = f"{size(min(known))} free on the fullest GPU"
    if need > min(known):
        yield no_go_if(
            lane in GPU_LANES,
            "GPU memory",
            seen,
            f"Too little for {each} x {size(question.arena_bytes)} of arena.",
            "Lower max_rows, num_slots or num_grad_slots, or free memory there.",
        )
    else:
        yield go("GPU memory", seen, f"{each} x {size(question.arena_bytes)} of arena fit.")


def _queues(facts: Facts, lane: str) -> Finding:
    environment = facts.environment
    assert environment is not None
    try:
        check_queues(environment, BalancerConfig())
    except ValueError as error:
        seen, _, advice = str(error).partition(". ")
        means = "Copies would wait behind kernels, and little be gained."
        return no_go_if(lane in GPU_LANES, "queues", seen, means, advice)
    values = {
        "CUDA_DEVICE_MAX_CONNECTIONS": environment.cuda_connections,
        "CUDA_DEVICE_MAX_COPY_CONNECTIONS": environment.cuda_copy_connections,
    }
    listed = [f"{name}={value}" for name, value in values.items() if value is not None]
    return go("queues", ", ".join(listed) or "CUDA's own number, nothing is set")


def _allocator(facts: Facts) -> Finding:
    assert facts.environment is not None
    setting = facts.environment.alloc_conf
    if setting and "expandable_segments:true" in setting.lower():
        return go(
            "allocator", setting, "Fine: only feplb's own arena is shared, never torch's memory."
        )
    return go("allocator", setting or "torch's defaults")
