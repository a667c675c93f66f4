"""What doctor says of the cupy lane: the packages, and what is tried through them."""

from __future__ import annotations

import gc
import sys
from collections.abc import Mapping
from functools import partial
from typing import Any

import cupy_stand_in
import pytest
from conftest import put
from doctor_cases import CudaCore, check, cpu_machine, found, node
from nvml_stand_in import Nvml
from ranks import run_ranks
from stand_in import StandIn, environment

from feplb import cupy_trials
from feplb.cli import main
from feplb.observe import facts as facts_module
from feplb.observe.core_trials import Trial
from feplb.observe.cupy_findings import CupyFacts, read_cupy
from feplb.observe.doctor import judge
from feplb.observe.facts import Question

CUPY = Question(lane="cupy")
TRIALS = ("ipc", "pinned", "stream_values", "copies", "batch_copies")
VERSIONS = "imported; the driver brings CUDA 13.0, cuda.bindings is of CUDA 13.0"


def tried(problem: str = "", versions: str = VERSIONS, **failing: str) -> CupyFacts:
    """All is well, but for what a test names."""
    trials = tuple(
        Trial(name=name, ok=name not in failing, seen=failing.get(name, "done")) for name in TRIALS
    )
    return CupyFacts(problem=problem, versions=versions, trials=() if problem else trials)


# -------------------------------------------------------------------------------------- judging


def test_a_node_where_all_is_well_is_go() -> None:
    report = judge(node(cupy=tried()), CUPY)
    assert (report.lane, report.verdict) == ("cupy", "go")
    assert {finding.verdict for finding in report.findings} == {"go"}
    check(report, "CuPy packages", "go", VERSIONS)
    check(report, "CuPy copies", "go", "in batches: done")
    check(report, "peer access", "go", "between all 8")
    check(report, "copy engines", "go", "3 a GPU")
    assert report.lines()[-1] == "go for the cupy lane, 0 notes"
    # What the core tried is another lane's.
    assert not {"shared arena", "pinned flags", "GPU trials"} & {f.name for f in report.findings}


def test_other_lanes_do_not_speak_of_it() -> None:
    for facts in (node(cupy=tried()), node(), cpu_machine()):
        report = judge(facts, Question())
        assert not [finding for finding in report.findings if "CuPy" in finding.name]


def test_a_package_that_is_missing() -> None:
    facts = node(cupy=tried("they cannot be imported (No module named 'cupy')", versions=""))
    report = judge(facts, CUPY)
    check(report, "CuPy packages", "no-go", "No module named 'cupy'", "feplb[cupy12]", 'lane="ce"')
    assert not [f for f in report.findings if f.name == "CuPy arenas"]


def test_packages_that_find_no_gpu_are_named_with_their_versions() -> None:
    report = judge(cpu_machine(cupy=tried("counting GPUs failed: no device")), CUPY)
    check(report, "CuPy packages", "no-go", VERSIONS, "counting GPUs failed: no device", "See GPUs")
    check(report, "GPUs", "no-go", "none", "(ce, cupy) need GPUs", "--gpus all")


@pytest.mark.parametrize(
    ("trial", "name", "words"),
    [
        ("ipc", "CuPy arenas", ["no other way", "--ipc=host --pid=host", 'arena_handle="vmm"']),
        ("pinned", "CuPy flags", ["without a kernel", "memlock"]),
        ("stream_values", "CuPy stream values", ["without a kernel", "driver 570"]),
        ("copies", "CuPy copies", ["No row could travel"]),
    ],
)
def test_what_was_refused_is_a_no_go(trial: str, name: str, words: list[str]) -> None:
    report = judge(node(cupy=tried(**{trial: "refused (800)"})), CUPY)
    check(report, name, "no-go", "refused (800)", *words)
    assert report.lines()[-1] == f"no-go for the cupy lane: {name}"


def test_copies_one_by_one_are_told() -> None:
    report = judge(node(cupy=tried(batch_copies="needs cuda-python 12.8 or newer")), CUPY)
    check(report, "CuPy copies", "note", "one by one: done. Batches: needs cuda-python 12.8",
          "a call of its own", "driver 570")  # fmt: skip
    assert report.verdict == "go"


@pytest.mark.parametrize(
    ("facts", "name"),
    [
        (node(nvml=Nvml(num_gpus=8, links={7: []}), cupy=tried()), "NVLink"),
        (node(nvml=Nvml(num_gpus=8, mig={2}), cupy=tried()), "MIG"),
        (node(core=CudaCore(driver=11040), cupy=tried()), "driver"),
        (node(core=CudaCore((0, 1), no_access=[(0, 1)]), cupy=tried()), "peer access"),
        (node(core=CudaCore(engines=0), cupy=tried()), "copy engines"),
        (node(environment={"cuda_connections": "1"}, cupy=tried()), "queues"),
        (node(environment={"cuda_visible_devices": "-1"}, cupy=tried()), "visible GPUs"),
    ],
)
def test_what_every_lane_of_gpus_needs(facts: Any, name: str) -> None:
    assert found(judge(facts, CUPY), name).verdict == "no-go"


def test_the_variable_asks_for_it_as_the_option_does() -> None:
    report = judge(node(environment={"lane": "cupy"}, cupy=tried()), Question())
    assert (report.lane, report.because) == ("cupy", "FEPLB_LANE")


def test_without_torch_it_says_so() -> None:
    def no_torch() -> Mapping[str, Any]:
        raise ImportError("No module named 'torch'\nand more")

    assert read_cupy(no_torch) == CupyFacts(problem="No module named 'torch'")


# --------------------------------------------------------------------------------------- trying


@pytest.fixture
def _stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    put(monkeypatch, environment() | {"FEPLB_LANE": "cupy"})


FAILURES = [
    ("cuIpcGetMemHandle", 800, "ipc", "exporting the arena by CUDA IPC failed"),
    ("cuMemHostRegister", 304, "pinned", "ulimit -l"),
    ("cuStreamWaitValue32", 801, "stream_values", "enqueueing the wait for a flag failed"),
    ("cuStreamBatchMemOp", 801, "stream_values", "enqueueing flags failed"),
    ("cuMemcpyAsync", 700, "copies", "submitting a copy failed"),
    ("cuMemcpyBatchAsync", 801, "batch_copies", "submitting a batch of 2 copies failed"),
]


# Not in a process of the tests' ranks: those may start no other.
@pytest.fixture(scope="module")
def trials() -> list[Any]:
    """What is found where nothing fails, then where each does; and what is held afterwards."""
    with pytest.MonkeyPatch.context() as patch:
        put(patch, environment())
        driver = StandIn()
        before = driver.alive()
        found: list[Any] = [cupy_trials.try_cupy(packages_of=cupy_stand_in.packages)]
        for symbol, code, name, _ in FAILURES:
            if name != "ipc":  # its second process takes seconds
                patch.setattr(cupy_trials, "_try_ipc", lambda *_: "not tried again")
            driver.fail(symbol, code)
            found.append(cupy_trials.try_cupy(packages_of=cupy_stand_in.packages))
            driver.fail(symbol, 0)
        gc.collect()
        found.append((before, driver.alive()))
    return found


def test_all_is_tried_over_the_stand_in(trials: list[Any]) -> None:
    first = trials[0]
    assert (first["problem"], first["versions"][:8]) == ("", "imported")
    assert [(trial["name"], trial["ok"]) for trial in first["trials"]] == [
        (name, True) for name in TRIALS
    ]
    assert first["trials"][0]["seen"] == "opened by a second process, same bytes"


@pytest.mark.parametrize("at", range(len(FAILURES)), ids=lambda at: FAILURES[at][0])
def test_each_refusal_is_found_where_it_belongs(trials: list[Any], at: int) -> None:
    _, _, name, said = FAILURES[at]
    (trial,) = [each for each in trials[1 + at]["trials"] if each["name"] == name]
    assert not trial["ok"]
    assert said in trial["seen"]


def test_nothing_stays(trials: list[Any]) -> None:
    before, after = trials[-1]
    assert after == before


def packages_that_open_nothing() -> Any:
    """Making a handle works, and only who opens it is refused."""
    packages = cupy_stand_in.packages()
    StandIn().fail("cuIpcOpenMemHandle", 800)
    return packages


def never_written(rank: int, num_ranks: int) -> str:
    """The stream that should write the flag has forgotten it."""
    cupy_trials._DEADLINE_S = 0.2
    write = cupy_trials.CupyDevice.write_flags

    def forgets(self: Any, kind: int, *args: Any) -> None:
        if kind != cupy_trials._PUSHES:
            write(self, kind, *args)

    cupy_trials.CupyDevice.write_flags = forgets  # type: ignore[method-assign]
    gpu = cupy_trials.Gpu(cupy_stand_in.packages(), 0)
    try:
        cupy_trials._try_flags(gpu)
    except RuntimeError as error:
        return str(error)
    return ""


@pytest.mark.usefixtures("_stand_in")
def test_a_flag_that_is_never_written_ends_in_time_and_leaves_no_wait() -> None:
    assert run_ranks(never_written, 1) == ["the flag was never written"]


@pytest.mark.usefixtures("_stand_in")
def test_ipc_that_only_another_process_sees_refused() -> None:
    found = cupy_trials.try_cupy(packages_of=packages_that_open_nothing)
    StandIn().fail("cuIpcOpenMemHandle", 0)
    trial = found["trials"][0]
    assert not trial["ok"]
    assert "CUDA IPC of a peer's arena was refused: " in trial["seen"]
    assert "--ipc=host" in trial["seen"]


# ------------------------------------------------------------------------------------ the command


def test_packages_that_are_not_here(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    assert main(["doctor", "--lane", "cupy"]) == 1
    said = " ".join(capsys.readouterr().out.split())
    assert "CuPy packages lane='cupy' needs CuPy and cuda-python" in said
    assert said.count("pip install cupy-cuda12x") == 1
    assert ".. " not in said
    assert "no-go for the cupy lane: " in said


def test_it_is_tried_only_where_it_is_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def trials() -> Mapping[str, Any]:
        calls.append(1)
        return {"problem": "", "versions": VERSIONS, "trials": []}

    read = partial(facts_module.read_facts, core=CudaCore(), nvml=Nvml(), cupy=trials)
    monkeypatch.delenv("FEPLB_LANE", raising=False)
    read()
    read(lane="host")
    assert calls == []
    assert read(lane="cupy").cupy.versions == VERSIONS
    monkeypatch.setenv("FEPLB_LANE", "cupy")
    read()
    read(lane="ce")
    assert len(calls) == 2
