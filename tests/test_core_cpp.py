"""Builds the C++ tests of the core (tests/cpp) with g++ and runs each of them by name.

Three builds: plain, ThreadSanitizer, and AddressSanitizer with UBSan. Before a sanitizer's verdict
counts, it must catch a bug made for it (tests/cpp/seeded_bugs.cpp). Objects lie in build/tests-cpp.
"""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
from cpp_build import BUILD, CORE, FLAGS, ROOT, compile_together

TESTS = ROOT / "tests" / "cpp"
HARNESS = ["main", "ranks", "gpu_ranks", "scenario", "call_tensors", "rank_program"]
STAND_IN = ROOT / "tests" / "driver" / "stand_in.cpp"


@dataclass(frozen=True)
class Build:
    """One set of flags, and the files of tests/cpp it is used for, the harness apart."""

    name: str
    flags: tuple[str, ...]
    files: tuple[str, ...]
    bugs: tuple[str, ...] = ()  # of seeded_bugs.cpp, which must be caught

    def names(self) -> list[str]:
        """The tests in its files, without building them."""
        return [name for file in self.files for name in names_in(TESTS / f"{file}.cpp")]


SIMULATED = ("sim_run", "test_interleavings", "test_fences", "test_faults", "test_sim")
THREADED = ("test_host", "test_relay", "test_cuda_device", "test_cuda_waits")
BY_HAND = ("test_board", "test_copies", "test_arena", "test_mover", "test_watchdog")
PLAIN = Build("plain", ("-O2",), (*SIMULATED, *BY_HAND, *THREADED))
SANITIZED = [
    Build("tsan", ("-O1", "-fsanitize=thread"), ("test_board", *THREADED), ("race",)),
    Build(
        "asan",
        ("-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
        ("sim_run", "test_faults", "test_sim", *BY_HAND, *THREADED),
        ("overrun", "overflow"),
    ),
]


def names_in(source: Path) -> list[str]:
    """The names given to TEST(...) in a file."""
    return re.findall(r"^TEST\((\w+)\)", source.read_text(), re.MULTILINE)


def link(sources: list[Path], build: Build, name: str) -> Path:
    """Build the program `name` from `sources`."""
    folder = BUILD / "tests-cpp" / build.name
    flags = [*FLAGS, *build.flags, "-DFEPLB_FENCE_SWITCHES"]
    objects = compile_together(sources, flags, folder)
    program = folder / name
    if not program.exists() or any(o.stat().st_mtime > program.stat().st_mtime for o in objects):
        # The core finds the driver's functions in the program itself.
        command = ["g++", *flags, "-rdynamic", "-o", str(program), *map(str, objects)]
        command += ["-lrt", "-ldl"]
        subprocess.run(command, check=True)
    return program


@cache
def program(build: Build) -> Path:
    """The test program of a build; for a sanitizer only once it has caught its bugs."""
    for bug in build.bugs:
        seeded = link([TESTS / "seeded_bugs.cpp"], build, "seeded_bugs")
        result = subprocess.run([seeded, bug], capture_output=True, text=True, check=False)
        assert result.returncode != 0, f"{build.name} does not catch {bug}"
        assert re.search("Sanitizer|runtime error", result.stderr), result.stderr
    sources = [path for path in sorted(CORE.glob("*.cpp")) if "bindings" not in path.name]
    sources += [TESTS / f"{name}.cpp" for name in [*HARNESS, *build.files]] + [STAND_IN]
    return link(sources, build, "tests")


def run(build: Build, *names: str) -> None:
    """Run the named tests of a build."""
    result = subprocess.run(
        [program(build), *names],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "TSAN_OPTIONS": "halt_on_error=1"},
    )
    print(result.stdout)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("name", PLAIN.names())
def test_core(name: str) -> None:
    run(PLAIN, name)


@pytest.mark.parametrize("build", SANITIZED, ids=lambda build: build.name)
def test_core_is_clean_under(build: Build) -> None:
    run(build, *build.names())


def test_every_fence_has_its_test() -> None:
    """A fence that no test misses is a fence nobody knows to be there."""
    enum = (CORE / "fences.h").read_text().split("enum class Fence {")[1].split("kCount")[0]
    fences = re.findall(r"^\s*k(\w+),", enum, re.MULTILINE)
    snake = {re.sub(r"(?<=[a-z])(?=[A-Z])", "_", fence).lower() for fence in fences}
    tests = set(names_in(TESTS / "test_fences.cpp"))
    assert len(snake) >= 17
    assert {f"fence_{fence}_is_missed" for fence in snake} <= tests


def test_every_test_file_is_built() -> None:
    assert {path.stem for path in TESTS.glob("test_*.cpp")} <= set(PLAIN.files)
