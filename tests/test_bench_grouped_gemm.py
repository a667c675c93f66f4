"""bench/grouped_gemm.py: what it says without a GPU, its checks, and its figures by hand."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bench_cases import BENCH, run_without_a_gpu
from kernel_cases import on_each_device, tiles_for

from feplb.kernels.grouped_gemm import TritonGemm
from feplb.kernels.products import Operand
from feplb.kernels.segment_tables import GradTable, RowTable
from feplb.kernels.stream_gemm import StreamGemm

sys.path.insert(0, str(BENCH))

import grouped_gemm as bench


def tiny(device: str) -> bench.Size:
    return bench.Size(
        hidden=24, width=16, num_experts=2, rows_per_expert=(3,), dtype=torch.float32,
        device=device,
    )  # fmt: skip


def test_without_a_gpu_nothing_is_measured_and_it_says_so(tmp_path: Path) -> None:
    shown, content = run_without_a_gpu("grouped_gemm", tmp_path)
    assert shown.endswith("No CUDA device here: nothing was measured.\n")
    assert (content["bench"], content["rows"]) == ("grouped_gemm", [])


@on_each_device
def test_both_ways_pass_the_check(device: str) -> None:
    layer = bench.Layer.draw(tiny(device), 3)
    tiles = tiles_for(torch.float32)
    bench.check_products(TritonGemm(tiles), layer)
    bench.check_products(StreamGemm(2), layer)


class LastRowForgotten(StreamGemm):
    """Leaves out the last row of every sum, or the last row of every result."""

    def multiply_rows(
        self, source: Operand, out: Operand, table: RowTable, *, tensor: int, transposed: bool
    ) -> None:
        super().multiply_rows(source, out, table, tensor=tensor, transposed=transposed)
        if tensor == 1:
            out.rows[-1] = 0

    def multiply_weights(
        self, left: Operand, right: Operand, table: GradTable, *, tensor: int
    ) -> None:
        left.rows[-1] = 0
        super().multiply_weights(left, right, table, tensor=tensor)


def test_the_check_finds_a_wrong_product() -> None:
    layer = bench.Layer.draw(tiny("cpu"), 3)
    with pytest.raises(RuntimeError, match="down, expert 1: off by"):
        bench.check_products(LastRowForgotten(2), layer)


def test_products_and_bytes_by_hand() -> None:
    layer = bench.Layer.draw(tiny("cpu"), 3)
    shapes = {p.name: tuple(tuple(t.shape) for t in p.operands(layer)) for p in bench.PRODUCTS}
    x, h, a = (6, 24), (6, 32), (6, 16)
    assert shapes == {
        "up": (x, h), "down": (a, x), "down dgrad": (x, a), "up dgrad": (h, x),
        "up wgrad": (h, x), "down wgrad": (x, a),
    }  # fmt: skip
    assert [p.flops(layer) for p in bench.PRODUCTS[:2]] == [2 * 6 * 32 * 24, 2 * 6 * 24 * 16]


def test_figures_by_hand() -> None:
    samples = {"one gemm": [2.0, 2.0, 5.0], "triton": [2.5, 2.5, 2.5]}
    row = bench.product_row(bench.PRODUCTS[0], 64, 4_000_000_000, samples)
    assert row == {
        "product": "up", "rows_per_expert": 64, "one_gemm_tflops": 2.0,
        "one_gemm_ms_p50": 2.0, "one_gemm_ms_iqr": 1.5,
        "triton_ms_p50": 2.5, "triton_ms_iqr": 0.0, "triton_rate_pct": 80.0,
    }  # fmt: skip


@on_each_device
def test_all_arms_are_timed_on_every_product(device: str) -> None:
    ran = 0

    def times(work: object) -> list[float]:
        nonlocal ran
        assert callable(work)
        work()
        ran += 1
        return [1.0]

    gemms = {"streams 2": StreamGemm(2), "triton": TritonGemm(tiles_for(torch.float32))}
    rows = bench.product_rows(tiny(device), gemms, times)
    assert [row["product"] for row in rows] == [product.name for product in bench.PRODUCTS]
    assert ran == 3 * len(bench.PRODUCTS)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_quick_run_on_a_gpu(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    command = [sys.executable, str(BENCH / "grouped_gemm.py"), "--quick", "--json", str(file)]
    subprocess.run(command, check=True, timeout=600)
    rows = json.loads(file.read_text())["rows"]
    assert {row["product"] for row in rows if "product" in row} == {
        product.name for product in bench.PRODUCTS
    }
    assert all(row["rate_pct"] > 0 for row in rows if "rate_pct" in row)
