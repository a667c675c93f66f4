"""The kernels as a GPU would get them, compiled on any machine with Triton's own assembler."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

SCRIPT = Path(__file__).with_name("kernel_compilation.py")
HOPPER_SHARED_BYTES = 227 * 1024
PRODUCTS = {"_multiply_rows", "_multiply_weights"}
SUMS = {"_gather", "_sum_choices", "_spread_grads"}


def compile_for(capability: int, what: str, cache: Path) -> list[dict[str, Any]]:
    environment = {name: text for name, text in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache)
    result = subprocess.run(
        [sys.executable, str(SCRIPT), str(capability), what],
        check=True, capture_output=True, text=True, timeout=600, env=environment,
    )  # fmt: skip
    return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("triton")


@pytest.fixture(scope="module")
def hopper(cache: Path) -> list[dict[str, Any]]:
    """GLM-5's layer in bf16 with default tiles: first a note, then a row per compiled kernel."""
    return compile_for(90, "layer", cache)


def test_nothing_is_compiled_after_warm_up_whatever_the_counts(
    hopper: list[dict[str, Any]],
) -> None:
    assert hopper[0] == {"compiled_after_warm_up": 0}
    # Two shapes forward, two backward, two weight gradients; SwiGLU with and without the
    # gradient of probabilities; the permutations once, for any number of tokens.
    kernels = [row["kernel"] for row in hopper[1:]]
    counts = {kernel: kernels.count(kernel) for kernel in kernels}
    assert counts == {
        "_multiply_rows": 4, "_multiply_weights": 2, "_forward": 1, "_backward": 2,
        "_gather": 1, "_sum_choices": 1, "_spread_grads": 1,
    }  # fmt: skip


def test_products_use_tensor_cores_and_whole_vectors(hopper: list[dict[str, Any]]) -> None:
    for row in hopper[1:]:
        assert row["stack_bytes"] == 0, row
        if row["kernel"] in PRODUCTS:
            assert row["tensor_core"] > 0, row
            assert row["async_copies_16_bytes"] > 0, row
            assert row["async_copies_smaller"] == 0, row
            assert row["shared_bytes"] <= HOPPER_SHARED_BYTES, row
        else:
            assert row["loads_16_bytes"] > 0, row
        assert row["stores_16_bytes"] > 0, row


def test_sums_over_choices_round_each_product_as_torch_does(hopper: list[dict[str, Any]]) -> None:
    fused = {row["kernel"]: row["fused"] for row in hopper if row.get("kernel") in SUMS}
    assert fused == dict.fromkeys(SUMS, 0)


def test_every_candidate_fits_hopper_without_spilling(cache: Path) -> None:
    for row in compile_for(90, "candidates", cache):
        assert row["stack_bytes"] == 0, row
        assert row["shared_bytes"] <= HOPPER_SHARED_BYTES, row


@pytest.mark.parametrize("capability", [80, 100])
def test_default_tiles_fit_ampere_and_blackwell_too(capability: int, cache: Path) -> None:
    rows = compile_for(capability, "products", cache)
    assert max(row["shared_bytes"] for row in rows) <= 163 * 1024
    # Four spilled registers cost nothing beside the loop; Triton 3.6 has two on Ampere.
    assert max(row["stack_bytes"] for row in rows) <= 16
