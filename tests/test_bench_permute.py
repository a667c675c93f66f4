"""bench/permute.py: what it says without a GPU, its check, and its figures by hand."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_cases import BENCH, run_without_a_gpu
from kernel_cases import on_each_device
from torch import Tensor

from feplb.dispatch.row_operations import TorchRowOperations

sys.path.insert(0, str(BENCH))

import permute as bench
from expert_operands import Size

KERNELS = ["swiglu forward", "swiglu backward", "permute", "unpermute", "unpermute backward"]


def tiny(device: str) -> Size:
    return Size(
        hidden=24, width=16, num_experts=2, num_tokens=2, dtype=torch.float32, device=device
    )


def test_without_a_gpu_nothing_is_measured_and_it_says_so(tmp_path: Path) -> None:
    shown, content = run_without_a_gpu("permute", tmp_path)
    assert shown.endswith("No CUDA device here: nothing was measured.\n")
    assert (content["bench"], content["rows"]) == ("permute", [])


@on_each_device
def test_every_kernel_passes_the_check(device: str) -> None:
    bench.check_memory_work(tiny(device))


class LastChoiceForgotten(TorchRowOperations):
    """Adds all choices of a token but one."""

    def sum_choices(self, rows: Tensor, row_of_pair: Tensor, weights: Any) -> Tensor:
        return super().sum_choices(rows, row_of_pair[:, :-1], weights[:, :-1])


def test_the_check_finds_a_wrong_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "row_operations", lambda _: LastChoiceForgotten())
    with pytest.raises(RuntimeError, match="unpermute: off by"):
        bench.check_memory_work(tiny("cpu"))


def test_bytes_by_hand() -> None:
    work = bench.memory_work(tiny("cpu"))
    narrow, wide, once = 16 * 16 * 4, 16 * 24 * 4, 2 * 24 * 4
    assert {name: num_bytes for name, (_, num_bytes) in work.items()} == {
        "swiglu forward": 3 * narrow,
        "swiglu backward": 6 * narrow,
        "permute": once + wide,
        "unpermute": wide + once,
        "unpermute backward": once + 2 * wide,
    }


def test_figures_by_hand() -> None:
    slow = bench.memory_row("permute", 3 * 2**20, [1.0], copy_gbps=6.291456)
    assert (slow["mib"], slow["gbps"], slow["rate_pct"]) == (3.0, 3.145728, 50.0)
    assert (slow["to_show_pct"], slow["shown"]) == (85.0, False)
    enough = bench.memory_row("unpermute", 85 * 10**6, [1.0], copy_gbps=100.0)
    assert (enough["rate_pct"], enough["shown"]) == (85.0, True)
    assert bench.finding([slow, enough]).endswith("below it: permute 50.0 %")
    assert bench.finding([enough]).endswith("all kernels show it")


@on_each_device
def test_every_kernel_is_timed_after_the_copy(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "COPY_BYTES", 1 << 10)
    ran = []

    def times(work: Any) -> list[float]:
        ran.append(work())
        return [1.0]

    rows = bench.memory_rows(tiny(device), times)
    assert [row["kernel"] for row in rows] == KERNELS
    assert len(ran) == 1 + len(KERNELS)
    assert {row["copy_gbps"] for row in rows} == {2 * (1 << 10) / 1e6}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_quick_run_on_a_gpu(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    command = [sys.executable, str(BENCH / "permute.py"), "--quick", "--json", str(file)]
    subprocess.run(command, check=True, timeout=600)
    rows = json.loads(file.read_text())["rows"]
    assert [row["kernel"] for row in rows] == KERNELS
    assert all(row["rate_pct"] > 0 for row in rows)
