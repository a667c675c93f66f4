"""bench/gpu.sh without a GPU: every part says that there is none, and the exit status tells."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
GPU_SH = ROOT / "bench" / "gpu.sh"
BENCHES = (
    *("engine_proof", "gemm_straggler", "copy_overlap", "layer_emulated"),
    *("submit_cost", "grouped_gemm", "permute", "ep_overhead", "layer_time", "sanitizer"),
)
NO_GPU, FAILED, WRONG = 3, 1, 2

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="what happens without a GPU")


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(GPU_SH), *arguments],
        env={**os.environ, "PYTHON": sys.executable, **environment},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


def without(*parts: str) -> list[str]:
    return [word for part in parts for word in ("--skip", part)]


def test_every_bench_says_that_there_is_no_gpu_and_all_is_packed(tmp_path: Path) -> None:
    # The build would replace the core of the tests that run meanwhile.
    done = run(*without("build", "tests", "doctor"), OUT=str(tmp_path))
    assert done.returncode == NO_GPU, done.stdout + done.stderr
    assert done.stdout.rstrip().endswith("no GPU was there: nothing was measured")
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"gpu-dry-run.tar.gz", "gpu-dry-run.txt"}
    with tarfile.open(tmp_path / "gpu-dry-run.tar.gz") as archive:
        packed = {Path(name).name for name in archive.getnames()}
    assert packed >= {"0-machine.txt", *(f"{bench}.txt" for bench in BENCHES)}
    said = (tmp_path / "gpu-dry-run.txt").read_text()
    assert said.count("nothing was measured") == len(BENCHES)


def test_gpu_tests_are_collected_and_skipped(tmp_path: Path) -> None:
    done = run("--only", "tests", OUT=str(tmp_path))
    assert done.returncode == NO_GPU, done.stdout + done.stderr
    assert " skipped" in done.stdout
    assert " passed" not in done.stdout


def test_the_doctors_no_go_is_shown_and_fails_no_dry_run(tmp_path: Path) -> None:
    done = run("--only", "doctor", OUT=str(tmp_path))
    assert done.returncode == NO_GPU, done.stdout + done.stderr
    assert "==== doctor" in done.stdout


def test_a_failing_part_is_named_after_all_others_ran(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/sh\ncase "$*" in *engine_proof.py*) exit 7;; esac\nexec {sys.executable} "$@"\n'
    )
    python.chmod(0o755)
    done = run(
        *("--only", "engine_proof", "--only", "gemm_straggler"),
        OUT=str(tmp_path), PYTHON=str(python),
    )  # fmt: skip
    assert done.returncode == FAILED
    assert "==== gemm_straggler" in done.stdout
    assert done.stdout.rstrip().endswith("failed: engine_proof (status 7)")


def test_no_part_begins_when_the_time_is_over(tmp_path: Path) -> None:
    done = run("--only", "copy_overlap", OUT=str(tmp_path), GPU_SH_TOTAL_S="0")
    assert done.returncode == FAILED
    assert "copy_overlap: no time was left for it" in done.stdout


def test_a_part_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/sh\ncase "$*" in *copy_overlap.py*) exec sleep 60;; esac\n'
        f'exec {sys.executable} "$@"\n'
    )
    python.chmod(0o755)
    done = run("--only", "copy_overlap", OUT=str(tmp_path), PYTHON=str(python), GPU_SH_TOTAL_S="15")
    assert done.returncode == FAILED
    assert "copy_overlap: ended after" in done.stdout
    assert "copy_overlap (status 124)" in done.stdout


@pytest.mark.parametrize("arguments", [["--only"], ["--skip", "nothing"], ["--fast"]])
def test_wrong_usage_is_one_sentence(arguments: list[str]) -> None:
    done = run(*arguments)
    assert done.returncode == WRONG
    assert done.stderr.startswith("gpu.sh: ")
    assert len(done.stderr.splitlines()) == 1


def test_all_parts_together_stay_below_nine_minutes_unless_asked_for_more() -> None:
    listed = run("--list").stdout.split()
    assert set(listed[::2]) == {"build", "doctor", "tests", *BENCHES}
    assert "GPU_SH_TOTAL_S:-530" in GPU_SH.read_text()
