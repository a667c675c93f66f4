"""bench/sanitizer.py with a tool that is made up, and the calls it watches over the stand-in."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import stand_in
import torch

BENCH = Path(__file__).parents[1] / "bench"
sys.path.insert(0, str(BENCH))

import sanitized_calls  # noqa: E402
import sanitizer  # noqa: E402

FAKE = """#!/bin/sh
echo "asked: $*"
echo "========= ERROR SUMMARY: {first} errors"
echo "========= ERROR SUMMARY: {second} error"
exit {status}
"""


def put_tool(folder: Path, *, first: int = 0, second: int = 0, status: int = 0) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    tool = folder / sanitizer.TOOL
    tool.write_text(FAKE.format(first=first, second=second, status=status))
    tool.chmod(0o755)
    return tool


@pytest.fixture
def _gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sanitizer, "has_gpu", lambda: True)
    monkeypatch.setattr(sanitizer, "gpu_facts", lambda: {"gpu": "a made-up H100"})


def test_the_tool_is_looked_for_on_path_then_in_the_toolkit(tmp_path: Path) -> None:
    toolkit = put_tool(tmp_path / "cuda" / "bin")
    home = {"CUDA_HOME": str(tmp_path / "cuda")}
    assert sanitizer.find_tool(home) == str(toolkit)
    first = put_tool(tmp_path / "first")
    assert sanitizer.find_tool({"PATH": str(tmp_path / "first"), **home}) == str(first)


def run_main(tmp_path: Path) -> tuple[int, list[dict[str, object]]]:
    file = tmp_path / "rows.json"
    status = sanitizer.main(["--quick", "--json", str(file)])
    rows: list[dict[str, object]] = json.loads(file.read_text())["rows"]
    return status, rows


@pytest.mark.usefixtures("_gpu")
def test_the_program_and_its_children_are_watched(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    put_tool(tmp_path / "bin")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=":")
    status, rows = run_main(tmp_path)
    assert (status, rows) == (0, [{"tool": "memcheck", "status": 0, "processes": 2, "errors": 0}])
    said = capfd.readouterr().out
    asked = next(line for line in said.splitlines() if line.startswith("asked: "))
    assert asked == (
        "asked: --tool memcheck --target-processes all --error-exitcode 86 --report-api-errors no "
        f"--require-cuda-init no {sys.executable} {BENCH / 'sanitized_calls.py'}"
    )
    assert said.rstrip().endswith("memcheck found nothing, in 2 processes")


@pytest.mark.usefixtures("_gpu")
def test_findings_fail_the_part(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    put_tool(tmp_path / "bin", second=3, status=sanitizer.FOUND_STATUS)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=":")
    status, rows = run_main(tmp_path)
    assert (status, rows[0]["errors"]) == (1, 3)
    assert "found errors: 3" in capfd.readouterr().out


@pytest.mark.usefixtures("_gpu")
def test_without_the_tool_it_says_so_and_does_not_fail(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sanitizer, "find_tool", lambda _: None)
    assert run_main(tmp_path) == (0, [])
    assert "comes with the CUDA toolkit" in capsys.readouterr().out


def test_only_a_summary_without_errors_is_good() -> None:
    good = sanitizer.Outcome(0, (0, 0))
    assert good.is_good
    for bad in (
        replace(good, status=1),
        replace(good, summaries=()),
        replace(good, summaries=(0, 1)),  # whatever the status
        replace(good, status=sanitizer.FOUND_STATUS),
    ):
        assert not bad.is_good
        assert "found nothing" not in bad.sentence


def test_without_a_gpu_nothing_is_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert sanitizer.main([]) == 0
    assert "nothing was measured" in capsys.readouterr().out


def test_the_calls_that_are_watched_run_over_the_stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.is_available():
        for name, value in stand_in.environment().items():
            monkeypatch.setenv(name, value)
    done = subprocess.run(
        [sys.executable, str(BENCH / "sanitized_calls.py")],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "outputs checked" in done.stdout


def test_calls_that_move_nothing_or_compute_wrong_are_refused() -> None:
    right = sanitized_calls.Called("greedy", moves=1, same_bits=True, off=0.0)
    split = replace(right, policy="split", same_bits=False, off=2**-7)
    sanitized_calls.check([right, split])
    for wrong in (
        replace(right, moves=0),
        replace(right, same_bits=False),
        replace(split, off=0.1),
        replace(split, off=float("nan")),
    ):
        with pytest.raises(RuntimeError, match="expected moves"):
            sanitized_calls.check([right, wrong])
