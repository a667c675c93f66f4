"""Versions of what feplb works with, read from what is installed. Nothing is imported.

The ranges are those of docs/deepep.md, docs/megatron.md and pyproject.toml; a test compares.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from importlib import metadata

from feplb.observe.findings import Finding, go, no_go, note

TORCH = (2, 8)
DEEPEP = ((1, 2), (2,))
MEGATRON = ((0, 16), (0, 20))
_DEEPEP_V2_TORCH = (2, 10)

_NAMES = (
    "torch",
    "megatron-core",
    "deep_ep",
    "transformers",
    "triton",
    "cupy",
    "cupy-cuda12x",
    "cupy-cuda13x",
    "cuda-bindings",
    "nvidia-ml-py",
)


def read_packages() -> dict[str, str]:
    """Distribution -> version, of those that are installed."""
    found = {}
    for name in _NAMES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def numbers(version: str) -> tuple[int, ...]:
    """The leading numbers: "2.13.0+cpu" is (2, 13, 0)."""
    return tuple(int(part) for part in re.findall(r"\d+", re.split(r"[+a-z]", version)[0]))


def package_findings(packages: Mapping[str, str]) -> Iterator[Finding]:
    """One finding per package found whose version matters, and one line for the others."""
    if "megatron-core" in packages:
        yield _megatron(packages["megatron-core"])
    if "deep_ep" in packages:
        yield _deepep(packages)
    if "transformers" in packages:
        yield note(
            "transformers",
            packages["transformers"],
            "feplb has no integration for it.",
            "Call run_experts from an expert module of your own, or use MoELayer.",
        )
    yield from _cupy(packages)
    others = [f"{name} {packages[name]}" for name in ("triton", "nvidia-ml-py") if name in packages]
    missing = [name for name in _NAMES if name not in packages and not name.startswith("cupy")]
    missing += [] if any(name.startswith("cupy") for name in packages) else ["cupy"]
    others += [f"not installed: {', '.join(missing)}"] if missing else []
    yield go("other packages", "; ".join(others), "The host lane needs none of them.")


def _megatron(version: str) -> Finding:
    oldest, newest = (".".join(map(str, end)) for end in MEGATRON)
    if MEGATRON[0] <= numbers(version)[:2] <= MEGATRON[1]:
        tested = "" if version.startswith("0.16.1") else " Only 0.16.1 is tested."
        return go("megatron-core", version, f"In the known range, {oldest} to {newest}.{tested}")
    return note(
        "megatron-core",
        version,
        f"Outside {oldest} to {newest}: feplb.integrations.megatron refuses it.",
        "Install megatron-core 0.16.1, or a feplb that knows this one.",
    )


def _deepep(packages: Mapping[str, str]) -> Finding:
    version = packages["deep_ep"]
    if not (DEEPEP[0] <= numbers(version)[:2] and numbers(version)[:1] <= DEEPEP[1]):
        return note(
            "deep_ep",
            version,
            "Outside 1.2 to 2.x, whose contract feplb knows.",
            "Install DeepEP 1.2.1 or 2.x.",
        )
    if numbers(version)[:1] < (2,):
        return go("deep_ep", version, "Its Buffer (V1) works; ElasticBuffer (V2) came with 2.0.")
    if "megatron-core" in packages:
        return note(
            "deep_ep",
            version,
            "feplb takes it, but Megatron-Core imports names that 2.x no longer has and then says "
            "that DeepEP is not installed.",
            "For Megatron's flex dispatcher install DeepEP 1.2.1 or its branch hybrid-ep.",
        )
    if numbers(packages.get("torch", "0"))[:2] < _DEEPEP_V2_TORCH:
        return note("deep_ep", version, "DeepEP 2.x wants torch 2.10 or newer.", "Update torch.")
    return go("deep_ep", version, "Both Buffer (V1) and ElasticBuffer (V2) work.")


def _cupy(packages: Mapping[str, str]) -> Iterator[Finding]:
    found = [f"{name} {packages[name]}" for name in packages if name.startswith("cupy")]
    if not found:
        return
    seen = ", ".join([*found, f"cuda-bindings {packages.get('cuda-bindings', 'not installed')}"])
    if len(found) > 1:
        yield note("cupy", seen, "Several CuPys overwrite each other.", "Keep one of them.")
    elif "cuda-bindings" not in packages:
        yield note(
            "cupy",
            seen,
            "CuPy has no stream wait-value, no exportable memory and no batch copy.",
            "pip install cuda-python, of the driver's major version, beside it.",
        )
    else:
        yield go("cupy", seen)


def torch_finding(version: str) -> Finding:
    """Whether torch is new enough."""
    if numbers(version)[:2] >= TORCH:
        return go("torch", version)
    oldest = ".".join(map(str, TORCH))
    return no_go("torch", version, f"feplb needs {oldest} or newer.", f"Install torch>={oldest}.")
