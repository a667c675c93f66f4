"""Compiles C++ for the tests with g++. What it makes lies in build/, and is made again when the
flags or the content of a file it includes have changed.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CORE = ROOT / "feplb" / "csrc"
BUILD = ROOT / "build"
NUM_JOBS = 2  # of the compiler at a time
FILES_OF_A_UNIT = 7
FLAGS = ["-std=c++17", "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-pthread"]


def fingerprint(flags: list[str], depfile: Path) -> str:
    """Of everything that was compiled; empty if that is not known."""
    if not depfile.exists():
        return ""
    digest = hashlib.sha256(" ".join(flags).encode())
    for name in depfile.read_text().split(":", 1)[1].replace("\\\n", " ").split():
        if not Path(name).exists():
            return ""
        digest.update(Path(name).read_bytes())
    return digest.hexdigest()


def compile_to(made: Path, source: Path, flags: list[str], *, quiet: bool = False) -> Path:
    """Compile one source file to ``made`` unless that is up to date."""
    made.parent.mkdir(parents=True, exist_ok=True)
    stamp, deps = made.with_suffix(".sha256"), made.with_suffix(".d")
    with made.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of all processes that test, one compiles it
        if made.exists() and stamp.exists() and stamp.read_text() == fingerprint(flags, deps):
            return made
        # Under another name until it is whole: a process that has the old one open keeps it.
        unfinished = made.with_suffix(f".{os.getpid()}")
        command = ["g++", *flags, "-MMD", "-MF", str(deps), "-o", str(unfinished), str(source)]
        subprocess.run(command, check=True, cwd=ROOT, capture_output=quiet)
        unfinished.replace(made)
        stamp.write_text(fingerprint(flags, deps))
    return made


def compile_object(source: Path, flags: list[str], folder: Path) -> Path:
    """Compile `source` unless its object is up to date."""
    made = folder / f"{source.parent.name}_{source.stem}.o"
    return compile_to(made, source, [*flags, "-c"])


def compile_together(sources: list[Path], flags: list[str], folder: Path) -> list[Path]:
    """Objects of all ``sources``, several of which are compiled as one: most of the time goes into
    what they all include. Files that cannot share a unit, for a name of their own, are compiled
    apart, and so is what has an error.
    """
    num_units = -(-len(sources) // FILES_OF_A_UNIT)
    parts = [sources[i::num_units] for i in range(num_units)]
    with ThreadPoolExecutor(NUM_JOBS) as pool:
        made = list(pool.map(lambda part: _compile_unit(part, flags, folder), parts))
    return [compiled for objects in made for compiled in objects]


def _compile_unit(sources: list[Path], flags: list[str], folder: Path) -> list[Path]:
    text = "".join(f'#include "{source}"\n' for source in sources)
    unit = folder / f"unit_{hashlib.sha256(text.encode()).hexdigest()[:12]}.cpp"
    folder.mkdir(parents=True, exist_ok=True)
    if not unit.exists():
        unit.write_text(text)
    try:
        return [compile_to(unit.with_suffix(".o"), unit, [*flags, "-c"], quiet=True)]
    except subprocess.CalledProcessError:
        return [compile_object(source, flags, folder) for source in sources]
