"""What feplb declares of the CUDA driver is what the toolkit declares; and no toolkit is needed.

The headers come with pip's nvidia-cuda-runtime (the ``test`` extra), or with a toolkit.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from cpp_build import BUILD, CORE, FLAGS, ROOT

CHECK = ROOT / "tests" / "cpp" / "cuda_abi_check.cpp"
DRIVER = CORE / "cuda_driver.h"
ABI = CORE / "cuda_abi.h"
NEEDED = ("cuda.h", "cudaTypedefs.h")
OLDEST = 12080  # the first that has batches of copies
FUNCTION = re.compile(r'^\s*X\((\w+), "(\w+)", (\d+),', re.MULTILINE)


def toolkit() -> Path | None:
    """A folder with the driver's headers, if there is one that is new enough."""
    folders = [found for entry in sys.path for found in Path(entry).glob("nvidia/*/include")]
    folders += [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "include"]
    for folder in folders:
        if all((folder / name).exists() for name in NEEDED):
            said = re.search(r"#define CUDA_VERSION (\d+)", (folder / "cuda.h").read_text())
            if said and int(said[1]) >= OLDEST:
                return folder
    return None


@pytest.fixture(scope="module")
def headers() -> Path:
    found = toolkit()
    if found is None:
        pytest.skip(
            f"no {' and '.join(NEEDED)} of CUDA 12.8 or newer: pip install nvidia-cuda-runtime, "
            "or set CUDA_HOME"
        )
    return found


def functions() -> list[tuple[str, str, str]]:
    """(name, symbol, version) of every function in cuda_driver.h."""
    return FUNCTION.findall(DRIVER.read_text())


def check(headers: Path, source: str, abi: str | None = None, driver: str | None = None) -> str:
    """The compiler's errors about ``source``; with other texts in place of our headers if given."""
    folder = BUILD / "tests-abi"
    (folder / "feplb" / "csrc").mkdir(parents=True, exist_ok=True)
    for path, text in ((ABI, abi), (DRIVER, driver)):
        (folder / "feplb" / "csrc" / path.name).write_text(text or path.read_text())
    for name in ("error.h", "handle.h", "shared_memory.h"):
        (folder / "feplb" / "csrc" / name).write_text((CORE / name).read_text())
    typedefs = [f"#define FEPLB_TYPEDEF_{n} PFN_{symbol}_v{v}\n" for n, symbol, v in functions()]
    (folder / "cuda_typedefs_by_name.h").write_text("".join(typedefs))
    (folder / "tests" / "cpp").mkdir(parents=True, exist_ok=True)
    copied = folder / "tests" / "cpp" / CHECK.name
    copied.write_text(source)
    command = ["g++", *FLAGS, f"-I{folder}", "-isystem", str(headers), "-fsyntax-only", str(copied)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return "" if result.returncode == 0 else result.stderr


def test_declarations_are_the_toolkits(headers: Path) -> None:
    assert check(headers, CHECK.read_text()) == ""


def test_every_function_is_compared() -> None:
    names = re.findall(r'"(cu[A-Z]\w+)"', DRIVER.read_text())
    assert len(names) >= 45
    assert [symbol for _, symbol, _ in functions()] == names


def test_every_declaration_is_compared() -> None:
    """A constant or a field that nobody compares may be wrong."""
    text, checked = ABI.read_text(), CHECK.read_text()
    declared = re.findall(r"^constexpr \w+ (k\w+) =", text, re.MULTILINE)
    declared += re.findall(r"^(?:using|struct|union) (\w+)", text, re.MULTILINE)
    assert len(declared) >= 40
    assert [name for name in declared if not re.search(rf"\b{name}\b", checked)] == []


WRONG = {
    "value": ("constexpr Result kNotPermitted = 800;", "constexpr Result kNotPermitted = 801;"),
    "size": ("  char reserved[64];", "  char reserved[60];"),
    "place": ("  int type;\n  int id;", "  int id;\n  int type;"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_declaration_is_found(headers: Path, name: str) -> None:
    right, wrong = WRONG[name]
    text = ABI.read_text()
    assert text.count(right) == 1
    assert "static assertion failed" in check(
        headers, CHECK.read_text(), abi=text.replace(right, wrong)
    )


WRONG_FUNCTIONS = {
    "arity": (
        "(Stream stream, EventHandle event, unsigned flags)",
        "(Stream stream, EventHandle event)",
    ),
    "width": ("(Address address, std::size_t bytes))", "(Address address, unsigned bytes))"),
    "pointer": ("(Address * address, std::size_t bytes))", "(Address address, std::size_t bytes))"),
}


@pytest.mark.parametrize("name", WRONG_FUNCTIONS)
def test_a_wrong_function_is_found(headers: Path, name: str) -> None:
    right, wrong = WRONG_FUNCTIONS[name]
    text = DRIVER.read_text()
    assert right in text
    assert "static assertion failed" in check(
        headers, CHECK.read_text(), driver=text.replace(right, wrong)
    )


def test_the_core_needs_no_cuda_header() -> None:
    """Nor a library of CUDA: one build serves every machine."""
    included = {
        name for path in [*CORE.glob("*.cpp"), *CORE.glob("*.h")]
        for name in re.findall(r"#include [<\"](.+)[>\"]", path.read_text())
    }  # fmt: skip
    assert {name for name in included if name.startswith("cuda")} == {
        path.name for path in CORE.glob("cuda_*.h")
    }
    from feplb import _core

    linked = subprocess.run(["ldd", _core.__file__], capture_output=True, text=True, check=True)
    assert "cuda" not in linked.stdout
