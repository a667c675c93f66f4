"""Compiles C++ for the tests with g++. What it makes lies in build/, and is made again when the
flags or the content of a file it includes have changed.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CORE = ROOT / "feplb" / "csrc"
BUILD = ROOT / "build"
NUM_JOBS = 2  # of the compiler at a time
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


def compile_to(made: Path, source: Path, flags: list[str]) -> Path:
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
        subprocess.run(command, check=True, cwd=ROOT)
        unfinished.replace(made)
        stamp.write_text(fingerprint(flags, deps))
    return made


def compile_object(source: Path, flags: list[str], folder: Path) -> Path:
    """Compile `source` unless its object is up to date."""
    made = folder / f"{source.parent.name}_{source.stem}.o"
    return compile_to(made, source, [*flags, "-c"])
