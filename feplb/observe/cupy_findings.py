"""Findings about the cupy lane: its packages, and what was tried through them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from feplb.observe.core_trials import Trial
from feplb.observe.findings import Finding, go, no_go, note

_INSTALL = (
    "pip install 'feplb[cupy12]' or 'feplb[cupy13]', for the CUDA of PyTorch; or use "
    'lane="ce", which needs neither.'
)


@dataclass(frozen=True, slots=True, kw_only=True)
class CupyFacts:
    """What was tried of the cupy lane.

    Attributes:
        problem: why packages or GPU are not to be had; "" where they are.
        versions: what the packages and the driver say of themselves; "" where not imported.
        trials: named as ``feplb.cupy_trials.try_cupy`` has them; none where there is a problem.
    """

    problem: str = ""
    versions: str = ""
    trials: tuple[Trial, ...] = ()


NOT_TRIED = CupyFacts(problem="the cupy lane was not tried")


def read_cupy(trials: Callable[[], Mapping[str, Any]]) -> CupyFacts:
    """Try it. Blocks for seconds: a second process opens a handle."""
    try:
        said = trials()
    except (ImportError, OSError) as error:  # torch cannot be loaded
        return CupyFacts(problem=str(error).partition("\n")[0])
    return CupyFacts(
        problem=str(said["problem"]),
        versions=str(said["versions"]),
        trials=tuple(Trial(**trial) for trial in said["trials"]),
    )


def cupy_findings(facts: CupyFacts) -> Iterator[Finding]:
    """In the order they are shown."""
    yield _packages(facts)
    if facts.problem:
        return
    tried = {trial.name: trial for trial in facts.trials}
    yield _no_go_unless(
        tried["ipc"],
        "CuPy arenas",
        "Ranks cannot write into each other's GPU memory, and the cupy lane has no other way.",
        "Use one container for all ranks of the host, or --ipc=host --pid=host; or lane=\"ce\", "
        'which has another way (arena_handle="vmm"). MIG and most virtual GPUs share nothing.',
    )  # fmt: skip
    for name, advice in (
        ("pinned", "Raise the limit on locked memory (docker --ulimit memlock=-1)."),
        ("stream_values", "Install driver 570 (CUDA 12.8) or newer."),
    ):
        yield _no_go_unless(
            tried[name],
            "CuPy flags" if name == "pinned" else "CuPy stream values",
            "Copies could not be signalled without a kernel.",
            advice,
        )
    yield _copies(tried)


def _packages(facts: CupyFacts) -> Finding:
    name = "CuPy packages"
    if not facts.problem:
        return go(name, facts.versions)
    means = "The cupy lane makes all its calls through CuPy and cuda-python."
    if facts.versions:  # it is the GPU
        advice = "See GPUs, driver and visible GPUs."
        return no_go(name, f"{facts.versions}; {facts.problem}", means, advice)
    seen, _, advice = facts.problem.rpartition("). ")
    if seen:  # the lane's own sentences: what was seen, and what to install
        return no_go(name, f"{seen})", means, advice)
    return no_go(name, facts.problem, means, _INSTALL)


def _no_go_unless(trial: Trial, name: str, means: str, advice: str) -> Finding:
    return go(name, trial.seen) if trial.ok else no_go(name, trial.seen, means, advice)


def _copies(tried: Mapping[str, Trial]) -> Finding:
    name, plain, batch = "CuPy copies", tried["copies"], tried["batch_copies"]
    if not plain.ok:
        return no_go(
            name, plain.seen, "No row could travel.", "The reason above says what to change."
        )
    if not batch.ok:
        return note(
            name,
            f"one by one: {plain.seen}. Batches: {batch.seen}",
            "Each copy is a call of its own, and the log says so.",
            "Install driver 570 (CUDA 12.8) or newer, and a cuda-python of its major version.",
        )
    return go(name, f"in batches: {batch.seen}")
