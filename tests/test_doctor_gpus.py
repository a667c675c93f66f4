"""What doctor says of GPUs: each trouble is one finding that says what, why and what to do."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from doctor_cases import (
    GIB,
    GPU_NODE,
    NODE,
    CudaCore,
    check,
    cpu_machine,
    found,
    node,
)
from nvml_stand_in import GPU_LOST, Nvml

from feplb.observe.core_trials import TorchFacts
from feplb.observe.doctor import judge
from feplb.observe.facts import Question

# ------------------------------------------------------------------- bad input, copy-engine lane


def test_no_peer_access_over_pcie() -> None:
    core = CudaCore((0, 1), no_access=[(0, 1), (1, 0)])
    report = judge(node(core=core, nvml=Nvml(links={0: [], 1: []})), Question())
    check(report, "peer access", "no-go", "none: cuda:0 -> cuda:1 (PCIe only)",
          "through the host", "NVLink joins", 'lane="host" or policy="none"')  # fmt: skip


def test_no_peer_access_although_nvlink_is_there() -> None:
    core = CudaCore((0, 1), no_access=[(0, 1)])
    check(judge(node(core=core), Question()), "peer access", "no-go",
          "cuda:0 -> cuda:1 (NVLink)", "virtual machine")  # fmt: skip


def test_a_peer_behind_pcie_only() -> None:
    report = judge(node(nvml=Nvml(num_gpus=8, links={7: []})), Question())
    check(report, "NVLink", "no-go", "7 of 28 pairs are not joined (0-7, 1-7, 2-7, 3-7 and 3 more)",
          "GPU 7 has no active NVLink: PCIe only", "CUDA_VISIBLE_DEVICES",
          "FEPLB_DOMAIN")  # fmt: skip


def test_domains_by_name_leave_pcie_between_them() -> None:
    facts = node(nvml=Nvml(num_gpus=8, links={7: []}), environment={"domain": "left"})
    check(judge(facts, Question()), "NVLink", "note", "7 of 28 pairs")


def test_gpus_outside_the_job_do_not_count() -> None:
    # GPU 7 is behind PCIe; the job sees 0 to 3.
    core = CudaCore(range(4))
    facts = node(
        nvml=Nvml(num_gpus=8, links={7: []}),
        core=core,
        environment={"cuda_visible_devices": "0,1,2,3"},
    )
    check(judge(facts, Question()), "NVLink", "go", "all 6 pairs of 4 GPUs")


def test_the_fabric_manager_is_not_done() -> None:
    facts = node(nvml=Nvml(num_gpus=8, fabric=dict.fromkeys(range(8), (0, 0, 2, 0))))
    check(judge(facts, Question()), "NVLink", "no-go", "in progress", "Start nvidia-fabricmanager")


def test_nvml_that_says_nothing_is_no() -> None:
    facts = node(nvml=Nvml(refuse={"nvmlInit": 12}))
    check(judge(facts, Question()), "NVLink", "no-go", "unknown", "counts as no", "feplb[gpu]")


def test_nvml_that_says_nothing_stops_neither_one_gpu_nor_named_domains() -> None:
    silent = Nvml(refuse={"nvmlInit": 12})
    named = node(nvml=silent, environment={"domain": "left"})
    check(judge(named, Question()), "NVLink", "note", "unknown")
    one = node(nvml=silent, core=CudaCore([0]), machine=replace(GPU_NODE, gpu_nodes=1))
    check(judge(one, Question()), "NVLink", "note", "unknown")
    check(judge(node(nvml=silent), Question(lane="host")), "NVLink", "note", "unknown")


def test_gpus_before_hopper_are_noted() -> None:
    facts = node(nvml=Nvml(num_gpus=8, capability=(8, 0)))
    check(judge(facts, Question()), "GPUs", "note", "compute capability 8.0. The", "Hopper (9.0)")
    refuse = {"nvmlDeviceGetCudaComputeCapability": 999}
    unknown = node(nvml=Nvml(num_gpus=8, refuse=refuse))
    check(judge(unknown, Question()), "GPUs", "go", "compute capability unknown")


def test_a_toolkit_is_shown_and_not_needed() -> None:
    check(judge(node(), Question()), "CUDA toolkit", "go", "no nvcc. feplb needs none")
    machine = replace(GPU_NODE, nvcc="12.8")
    check(judge(node(machine=machine), Question()), "CUDA toolkit", "go", "nvcc 12.8")


def test_a_lost_gpu() -> None:
    lost = Nvml(num_gpus=8, refuse={"nvmlDeviceGetHandleByIndex": lambda g: GPU_LOST * (g == 2)})
    report = judge(node(nvml=lost), Question())
    first = next(finding for finding in report.findings if finding.name == "GPUs")
    assert (first.verdict, "GPU 2): error 15" in first.seen) == ("no-go", True)


def test_troubles_of_gpus_outside_the_job_stop_nothing() -> None:
    # The job sees GPU 0 and 1; GPU 2 is lost, GPU 3 cut.
    refuse: dict[str, Any] = {"nvmlDeviceGetHandleByIndex": lambda gpu: GPU_LOST * (gpu == 2)}
    facts = node(nvml=Nvml(num_gpus=4, refuse=refuse, mig={3}), core=CudaCore([0, 1]))
    report = judge(facts, Question())
    assert report.verdict == "go"
    assert [each.verdict for each in report.findings if each.name == "GPUs"] == ["note", "go"]


def test_ipc_refused_in_a_container() -> None:
    denied = {"vmm": "Operation not permitted", "cuda_ipc": "invalid resource handle"}
    report = judge(node(core=CudaCore(failing=denied)), Question())
    check(report, "shared arena", "no-go", "refused both ways",
          "VMM: cuda:0: Operation not permitted", "CUDA IPC: cuda:0: invalid resource handle",
          "--ipc=host --pid=host")  # fmt: skip


def test_fabric_handles_are_told() -> None:
    report = judge(node(core=CudaCore(fabric=True)), Question())
    check(report, "shared arena", "go", "Created, exported and imported. Fabric handles too.")
    assert "Fabric" not in found(judge(node(), Question()), "shared arena").means


def test_the_second_way_is_told() -> None:
    report = judge(node(core=CudaCore(failing={"vmm": "not supported"})), Question())
    check(report, "shared arena", "note", "by CUDA IPC", "not supported", "the log says so")
    assert report.verdict == "go"


@pytest.mark.parametrize(
    ("trial", "name"), [("pinned_board", "pinned flags"), ("stream_values", "stream values")]
)
def test_flags_that_do_not_work(trial: str, name: str) -> None:
    report = judge(node(core=CudaCore(failing={trial: "out of memory"})), Question())
    check(report, name, "no-go", "cuda:0: out of memory, cuda:1: out of memory and 6 more")


def test_a_limit_on_locked_memory_counts_where_pinning_failed() -> None:
    small = replace(GPU_NODE, memlock_limit=64 << 10)
    fails = node(core=CudaCore(failing={"pinned_board": "EPERM"}), machine=small)
    check(judge(fails, Question()), "locked memory", "note", "64 KiB", "ulimit")
    check(judge(node(machine=small), Question()), "locked memory", "go", "64 KiB", "was accepted")


def test_batch_copies_that_are_refused_are_told() -> None:
    report = judge(node(core=CudaCore(failing={"batch_copy": "not found"})), Question())
    check(report, "batch copies", "note", "not found", "a call of its own")


def test_a_trial_that_was_not_made_is_no() -> None:
    core = CudaCore()
    core.cuda_trials = lambda device, library: []
    report = judge(node(core=core), Question())
    check(report, "shared arena", "no-go", "vmm was not tried")
    check(report, "stream values", "no-go", "stream_values was not tried")


def test_trials_that_stop_are_told() -> None:
    core = CudaCore()

    def stops(device: int, library: str) -> list[dict[str, Any]]:
        raise RuntimeError("cuCtxCreate: out of memory")

    core.cuda_trials = stops
    check(judge(node(core=core), Question()), "GPU trials", "no-go", "cuCtxCreate: out of memory")


def test_a_core_without_trials_says_so() -> None:
    core = CudaCore()
    bare = SimpleNamespace(**{name: getattr(core, name) for name in vars(core)})
    report = judge(node(core=bare), Question())
    check(report, "GPU trials", "no-go", "this build of feplb's core has no copy-engine lane")
    check(judge(node(core=bare), Question(lane="host")), "GPU trials", "note", "untried is no")


def test_no_copy_engine() -> None:
    report = judge(node(core=CudaCore(engines=0)), Question())
    check(report, "copy engines", "no-go", "none on cuda:0", "SMs")


DRIVERS = [
    (11040, "no-go", "CUDA 11.4. Too old", "Install driver 570"),
    (11070, "note", "CUDA 11.7. No batch copies before CUDA 12.8", "Install driver 570"),
    (12070, "note", "CUDA 12.7. No batch copies", "Install driver 570"),
    (12080, "go", "CUDA 12.8. It copies in batches. Copies within one GPU may run", ""),
    (13010, "go", "CUDA 13.1. It copies in batches. Nothing.", ""),
]  # fmt: skip


@pytest.mark.parametrize(("driver", "verdict", "means", "advice"), DRIVERS)
def test_a_driver_too_old(driver: int, verdict: str, means: str, advice: str) -> None:
    report = judge(node(core=CudaCore(driver=driver)), Question())
    check(report, "driver", verdict, means, advice)


def test_mig() -> None:
    report = judge(node(nvml=Nvml(num_gpus=8, mig={2, 5})), Question())
    check(report, "MIG", "no-go", "on: GPU 2, GPU 5", "reach no peer", "nvidia-smi -i N -mig 0")


def test_mig_by_mask() -> None:
    facts = node(environment={"cuda_visible_devices": "MIG-0a1b"})
    check(judge(facts, Question()), "MIG", "no-go", "CUDA_VISIBLE_DEVICES=MIG-0a1b")


def test_a_mask_of_one_gpu_per_rank() -> None:
    facts = node(core=CudaCore([3]), environment={"cuda_visible_devices": "3"})
    report = judge(facts, Question())
    check(report, "visible GPUs", "note", "CUDA_VISIBLE_DEVICES=3, 8 GPUs here",
          "ordinals are hidden", "plain UVA copies", "set_device(local_rank)")  # fmt: skip
    # The peers' GPUs are other ranks' of this job.
    check(report, "NVLink", "go", "all 28 pairs of 8 GPUs")
    check(report, "peer access", "note", "sees one GPU")
    assert report.verdict == "go"


@pytest.mark.parametrize(("mask", "num_gpus"), [("0", 1), ("0,1", 8)])
def test_a_mask_that_hides_no_peer(mask: str, num_gpus: int) -> None:
    core = CudaCore(range(len(mask.split(","))))
    facts = node(
        core=core, nvml=Nvml(num_gpus=num_gpus), environment={"cuda_visible_devices": mask}
    )
    check(judge(facts, Question()), "visible GPUs", "go", f"CUDA_VISIBLE_DEVICES={mask}")


@pytest.mark.parametrize("mask", ["", "-1"])
def test_a_mask_that_hides_every_gpu(mask: str) -> None:
    facts = node(core=CudaCore([]), environment={"cuda_visible_devices": mask})
    report = judge(facts, Question())
    check(report, "visible GPUs", "no-go", "It hides every GPU. Unset it.")
    check(report, "GPU trials", "no-go", "CUDA shows this process no GPU")
    assert judge(facts, Question(lane="host")).verdict == "go"


def test_too_little_gpu_memory_for_the_arena() -> None:
    # 79 GiB are free; 8 ranks on 8 GPUs are one each, 16 are two.
    check(judge(node(), Question(arena_bytes=40 * GIB)), "GPU memory", "go", "1 x 40.0 GiB")
    report = judge(node(), Question(arena_bytes=40 * GIB, ranks=16))
    check(report, "GPU memory", "no-go", "79.0 GiB free", "2 x 40.0 GiB", "max_rows")


def test_one_queue_for_kernels_and_copies() -> None:
    one = {"cuda_connections": "1"}
    check(judge(node(environment=one), Question()), "queues", "no-go", "one queue",
          "CUDA_DEVICE_MAX_COPY_CONNECTIONS=8")  # fmt: skip
    check(judge(node(environment=one), Question(lane="host")), "queues", "note", "one queue")
    both = judge(node(environment={**one, "cuda_copy_connections": "8"}), Question())
    check(both, "queues", "go", "CUDA_DEVICE_MAX_COPY_CONNECTIONS=8")


def test_expandable_segments_are_fine() -> None:
    facts = node(environment={"alloc_conf": "expandable_segments:True"})
    check(judge(facts, Question()), "allocator", "go", "only feplb's own arena is shared")


def test_a_torch_for_the_cpu_on_gpus() -> None:
    facts = node(torch=TorchFacts(version="2.13.0+cpu"))
    check(judge(facts, Question()), "torch and CUDA", "no-go", "built for the CPU only")
    rocm = node(torch=TorchFacts(version="2.13.0", hip="7.0"))
    check(judge(rocm, Question()), "torch and CUDA", "no-go", "built for ROCm 7.0")


def test_a_torch_newer_than_the_driver() -> None:
    torch = TorchFacts(version="2.13.0", cuda="13.0", cuda_problem="The NVIDIA driver is too old")
    report = judge(node(torch=torch), Question())
    check(report, "torch and CUDA", "no-go", "too old", "brings CUDA 13.0, or a torch built for 12")
    other = TorchFacts(version="2.13.0", cuda="12.8", cuda_problem="system not yet initialized")
    report = judge(node(torch=other), Question())
    check(report, "torch and CUDA", "no-go", "not yet initialized", "nvidia-smi and")


def test_a_driver_that_gave_this_container_no_gpu() -> None:
    facts = cpu_machine(machine=replace(NODE, kernel_driver="570.86.10"))
    check(judge(facts, Question(lane="ce")), "GPUs", "no-go",
          "the host has NVIDIA driver 570.86.10, but this container was given no GPU")  # fmt: skip


def test_a_driver_nobody_can_ask() -> None:
    facts = cpu_machine(machine=GPU_NODE)
    report = judge(facts, Question())
    assert report.lane == "ce"
    check(report, "driver", "no-go", "its CUDA is unknown: NVML does not start", "nvidia-smi")
    check(report, "GPU trials", "no-go", "libcuda.so.1: cannot open")


def test_one_gpu_is_for_tests() -> None:
    facts = node(nvml=Nvml(num_gpus=1), core=CudaCore([0]))
    report = judge(facts, Question())
    check(report, "NVLink", "note", "one GPU", "may run on SMs")
    assert report.verdict == "go"
