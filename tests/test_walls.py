"""The walls of the house: what may be named where. A room that grows a second door fails here."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "feplb"

# What only some files may say.
WALLS = {
    "pybind11": (
        r"pybind11",
        "csrc/*",
        {
            "csrc/bindings.h",
            "csrc/bindings.cpp",
            "csrc/bindings_plan.cpp",
            "csrc/bindings_domain.cpp",
            "csrc/bindings_cuda.cpp",
            "csrc/bindings_lane.cpp",
        },
    ),
    "libtorch": (r"#include <(torch|ATen|c10)/", "csrc/*", set()),
    "cuda": (
        r"\bcuda[A-Z]|\bcu[A-Z][a-z]+\(|<cuda|\"cu[A-Z]",
        "csrc/*",
        {
            "csrc/cuda_driver.h",
            "csrc/cuda_driver.cpp",
            "csrc/cuda_memory.h",
            "csrc/cuda_memory.cpp",
            "csrc/cuda_trials.h",
            "csrc/cuda_trials.cpp",
            "csrc/device_cuda.h",
            "csrc/device_cuda.cpp",
            "csrc/bindings_cuda.cpp",
        },
    ),
    "threads": (
        r"std::thread\b|pthread_create",
        "csrc/*",
        {
            "csrc/mover.h",
            "csrc/mover.cpp",
            "csrc/device_host.cpp",
            "csrc/sim_world.h",
            "csrc/sim_world.cpp",
        },
    ),
    "environment": (r"os\.environ|os\.getenv|\bgetenv\(", "**/*", {"config.py"}),
    "frameworks": (
        r"^\s*(import|from) (megatron|transformers|torchtitan|deep_ep)",
        "**/*.py",
        {"dispatch/deepep.py"},
    ),
    "cupy": (r"^\s*(import|from) (cupy|cuda)\b", "**/*.py", {"cupy_lane.py"}),
    "print": (r"^\s*print\(", "**/*.py", {"cli.py"}),
}

# Imports run downwards only: a room may use the rooms after it, never those before it.
ORDER = [
    ["moe"],
    ["training"],
    ["balancer"],
    ["two_phase"],
    ["late_grads"],
    ["domain_calls"],
    ["arena_views", "arguments", "connect"],
    [
        "agreed_tiles",
        "call",
        "memory",
        "lanes",
        "lane_rates",
        "mesh",
        "gpu_costs",
        "function_compute",
        "device_swiglu",
    ],
    ["cupy_trials"],
    ["cupy_lane"],
    ["cupy_device", "links"],
    ["cupy_gpu"],
    ["peers", "costs", "gpu_compute", "observe"],
    ["compute", "router", "dispatch", "scheduler"],
    ["kernels"],
    ["config", "_core"],
]
LEVEL = {name: level for level, names in enumerate(ORDER) for name in names}

# The planner is mathematics: no device, thread, time or log.
PURE = [
    f"csrc/{name}"
    for name in (
        "plan_types.h", "plan.h", "plan.cpp", "greedy.h", "greedy.cpp", "arena.h", "arena.cpp",
        "split.h", "split.cpp",
        "refine.h", "refine.cpp", "refine_ranks.h", "refine_ranks.cpp", "refine_close.cpp",
        "refine_pairs.cpp", "refine_relieve.cpp", "refine_polish.cpp", "split_match.h",
        "split_match.cpp", "split_cover.h", "split_cover.cpp", "split_subsets.h",
        "split_subsets.cpp", "cost.h", "cost.cpp",
        "auto_plan.h", "auto_plan.cpp", "plan_check.h", "plan_check.cpp",
    )
]  # fmt: skip


def sources(pattern: str) -> Iterator[Path]:
    for path in sorted(PACKAGE.glob(pattern)):
        if path.suffix in (".py", ".h", ".cpp"):
            yield path


def code_of(path: Path) -> str:
    """A file without its C++ comments: what it does, not what it talks about."""
    text = path.read_text()
    return text if path.suffix == ".py" else re.sub(r"//.*", "", text)


@pytest.mark.parametrize("wall", WALLS)
def test_only_its_room_names(wall: str) -> None:
    pattern, where, allowed = WALLS[wall]
    found = {
        str(path.relative_to(PACKAGE))
        for path in sources(where)
        if re.search(pattern, code_of(path), re.MULTILINE)
    }
    assert found <= allowed | {name for name in found if name.startswith("integrations/")}


@pytest.mark.parametrize("name", PURE)
def test_planning_knows_no_device_thread_time_or_log(name: str) -> None:
    text = (PACKAGE / name).read_text()
    assert not re.search(r"#include <(thread|mutex|chrono|atomic|iostream|cstdio)>", text)


def _imports(path: Path) -> Iterator[str]:
    """Rooms of feplb that a file imports when it is loaded (not for type checking only)."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and (node.level or str(node.module)[:6] == "feplb."):
            module = (node.module or "").removeprefix("feplb.").split(".")[0]
            yield from [module] if module else [alias.name for alias in node.names]


@pytest.mark.parametrize("room", sorted(set(LEVEL) - {"_core"}))
def test_imports_run_downwards(room: str) -> None:
    folder = PACKAGE / room
    files = sorted(folder.glob("*.py")) if folder.is_dir() else [PACKAGE / f"{room}.py"]
    siblings = {path.stem for path in files}
    for path in files:
        for other in _imports(path):
            if other == room or (folder.is_dir() and other in siblings):
                continue
            assert LEVEL[other] > LEVEL[room], f"{path.name} imports {other}, which is not below it"


def test_every_room_has_its_place() -> None:
    rooms = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__", "__main__"}
    rooms |= {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert rooms <= set(LEVEL) | {"integrations", "cli"}


def test_import_starts_no_thread_and_touches_no_gpu() -> None:
    code = (
        "import threading, sys, os; import feplb; "
        "assert threading.active_count() == 1; "
        "tasks = '/proc/self/task'; "
        "names = [open(f'{tasks}/{t}/comm').read() for t in os.listdir(tasks)]; "
        "assert not any(n.startswith('feplb') for n in names), names; "
        "import torch; assert not torch.cuda.is_initialized(); "
        "assert 'torch._dynamo' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
