"""The command feplb: what it prints, and one clear sentence where the input is wrong."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from feplb.cli import main
from feplb.scheduler.traces import Trace, write_trace

RECORDED = np.array([[[50, 10, 10, 10, 5, 5, 5, 5]], [[5, 5, 5, 5, 10, 10, 10, 50]]])


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "two_steps.json"
    write_trace(path, Trace(name="two steps", recorded=RECORDED, top_k=2))
    return path


def output_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    assert main(["simulate", *arguments]) == 0
    return capsys.readouterr().out.splitlines()


def row_of(lines: list[str], policy: str) -> list[float]:
    line = next(line for line in lines if line.strip().startswith(f"{policy} "))
    return [float(cell) for cell in line.split() if cell.replace(".", "").isdigit()]


def test_an_answer_says_what_it_is_made_of(capsys: pytest.CaptureFixture[str]) -> None:
    lines = output_of(capsys, "calibrated", "--gpu", "h100", "--ep", "4", "--steps", "3")
    text = "\n".join(lines)
    assert max(map(len, lines)) <= 100
    assert "453 TFLOPS" in text
    assert "source: H100 SXM5" in text
    assert "modelled: one MoE layer's experts" in text
    assert "MiB per rank" in text
    modelled, unbalanced = row_of(lines, "none")[:2]
    assert modelled == unbalanced
    assert row_of(lines, "auto")[0] < unbalanced


def test_a_whole_step_counts_layers_and_the_rest(capsys: pytest.CaptureFixture[str]) -> None:
    common = ["--steps", "3", "--policies", "none", "auto"]
    with_rest = output_of(capsys, *common, "--layers", "10", "--rest-ms", "300")
    start = next(at for at, line in enumerate(with_rest) if "a whole step" in line)
    layer_ms = row_of(with_rest, "none")[0]
    step_ms = row_of(with_rest[start:], "none")[0]
    assert step_ms == pytest.approx(10 * layer_ms + 300, abs=0.1)
    share = output_of(capsys, *common, "--experts-share", "50")
    start = next(at for at, line in enumerate(share) if "a whole step" in line)
    saved_of_layer = row_of(share, "auto")[2]
    assert row_of(share[start:], "auto")[0] == pytest.approx(saved_of_layer / 2, abs=0.06)


def test_a_trace_is_replayed(capsys: pytest.CaptureFixture[str], trace: Path) -> None:
    lines = output_of(capsys, str(trace), "--ep", "2", "--steps", "2", "--tokens", "1000")
    assert str(trace) in lines[0] + lines[1]
    assert "top-2 of 8 experts" in " ".join(lines[:3])
    # Ranks have 80 and 20 of 100 selections, then 20 and 80: max / mean 1.6 un-balanced.
    assert row_of(lines, "none")[-2] == pytest.approx(1.6)


def test_a_job_of_several_groups(capsys: pytest.CaptureFixture[str]) -> None:
    lines = output_of(capsys, "--ep", "2", "--ranks", "8", "--steps", "2", "--policies", "none")
    assert "2 micro-batches of 4 EP groups of 2 ranks" in lines[0]
    alone = output_of(capsys, "--ep", "2", "--steps", "8", "--policies", "none")
    assert row_of(alone, "none") == row_of(lines, "none")


def test_the_papers_cells(capsys: pytest.CaptureFixture[str]) -> None:
    lines = output_of(capsys, "--paper", "--steps", "20")
    assert max(map(len, lines)) <= 100
    assert sum("fitted" in line for line in lines) == 4
    assert lines[-1].startswith("8 of 8 predicted cells within 10 %")


BAD = [
    (["nowhere.json"], "nowhere.json is neither a file nor a workload"),
    (["replay"], "replay is neither a file nor a workload"),
    (["--gpu", "h1"], "--gpu h1, expected one of h100"),
    (["--paper", "--gpu", "h1"], "--gpu h1, expected one of h100"),
    (["--ep", "3"], "--ep 3, expected a divisor of 128 experts"),
    (["--ep", "0"], "--ep 0, expected 1 or more"),
    (["--ep", "8", "--domain", "3"], "--domain 3, expected a divisor of --ep 8"),
    (["--ranks", "12"], "--ranks 12, expected a multiple of --ep 8"),
    (["--steps", "0"], "--steps 0, expected 1 or more"),
    (["--paper", "--steps", "0"], "--steps 0, expected 1 or more"),
    (["--hidden", "-1"], "--hidden -1, expected 1 or more"),
    (["--policies", "best"], "policy 'best', expected one of none"),
    (["--top-k", "200"], "top_k=200, expected 1 to num_experts=128"),
    (["--layers", "4"], "--layers and --rest-ms, expected both or neither"),
    (["--experts-share", "120"], "--experts-share 120, expected above 0"),
    (["--seed", "-1"], "seed=-1, expected 0 or more"),
]


@pytest.mark.parametrize(("arguments", "sentence"), BAD)
def test_wrong_input_is_one_sentence(
    capsys: pytest.CaptureFixture[str], arguments: list[str], sentence: str
) -> None:
    assert main(["simulate", *arguments]) == 2
    seen = capsys.readouterr()
    assert sentence in seen.err
    assert (seen.err.count("\n"), seen.out) == (1, "")


def test_a_truncated_trace_is_one_sentence(capsys: pytest.CaptureFixture[str], trace: Path) -> None:
    trace.write_text(trace.read_text()[:-20])
    assert main(["simulate", str(trace)]) == 2
    seen = capsys.readouterr()
    assert str(trace) in seen.err
    assert (seen.err.count("\n"), seen.out) == (1, "")


def test_the_module_runs_as_the_command_does() -> None:
    command = [sys.executable, "-m", "feplb", "simulate", "--ep", "5"]
    seen = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    assert seen.returncode == 2
    assert seen.stderr == "feplb simulate: --ep 5, expected a divisor of 128 experts\n"
    project = (Path(__file__).resolve().parent.parent / "pyproject.toml").read_text()
    assert 'feplb = "feplb.cli:main"' in project
