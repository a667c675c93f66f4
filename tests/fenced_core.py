"""The C++ core with switches for its fences (feplb/csrc/fences.h), in place of the installed one.

A rank has it where STAND_IN_CORE names ``library()``; then ``take_out`` takes a fence out of it.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import torch
from cpp_build import BUILD, CORE, compile_object

FOLDER = BUILD / "tests-fences"
# PyTorch brings pybind11's headers.
INCLUDED = (Path(torch.__file__).parent / "include", Path(sysconfig.get_path("include")))


@cache
def library() -> Path:
    """Build it, unless it is up to date; as many files at a time as there are cores."""
    included = [word for folder in INCLUDED for word in ("-isystem", str(folder))]
    # Whichever compiler a GPU's machine has, and whatever it warns of.
    flags = ["-std=c++17", "-pthread", "-O1", "-fPIC", "-DFEPLB_FENCE_SWITCHES", *included]
    sources = sorted(CORE.glob("*.cpp"))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(lambda source: compile_object(source, flags, FOLDER), sources))
    made = FOLDER / "_core.so"
    # The functions of the switches have C++ names: nothing is hidden.
    command = ["g++", "-shared", "-pthread", "-o", str(made), *map(str, objects), "-lrt", "-ldl"]
    subprocess.run(command, check=True)
    return made


def install() -> None:
    """Before anything of this process has loaded the installed one."""
    assert "feplb._core" not in sys.modules
    spec = importlib.util.spec_from_file_location("feplb._core", os.environ["STAND_IN_CORE"])
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["feplb._core"] = module
    spec.loader.exec_module(module)


def take_out(fence: str) -> None:
    """From here on, in this process."""
    functions = ctypes.CDLL(os.environ["STAND_IN_CORE"])
    functions._ZN5feplb9set_fenceENS_5FenceEb(_number_of(fence), False)


def _number_of(fence: str) -> int:
    enum = (CORE / "fences.h").read_text().split("enum class Fence {")[1].split("kCount")[0]
    names = re.findall(r"^\s*k(\w+),", enum, re.MULTILINE)
    return [name.lower() for name in names].index(fence)
