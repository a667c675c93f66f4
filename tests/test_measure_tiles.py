"""measure_tiles: the fastest first, what does not fit left out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernel_cases import on_each_device, tiles_for
from triton import OutOfResources

from feplb.kernels.measure_tiles import device_times, measure_tiles
from feplb.kernels.tiles import CANDIDATES, TileConfig

SMALL = [TileConfig(16, size, 16, num_warps=4, num_stages=1) for size in (16, 32, 64)]


def measure(device: str, answers: list[Any], candidates: list[TileConfig]) -> list[Any]:
    left = iter(answers)

    def times(work: Any) -> list[float]:
        work()
        answer = next(left)
        if isinstance(answer, Exception):
            raise answer
        return list(answer)

    return measure_tiles(
        24, 16, dtype=torch.float32, device=torch.device(device), rows_per_expert=3, num_experts=2,
        candidates=candidates, times=times,
    )  # fmt: skip


@on_each_device
def test_the_fastest_median_comes_first(device: str) -> None:
    too_large = OutOfResources(400, 227, "shared memory")
    measured = measure(device, [[5.0, 1.0, 3.0], too_large, [9.0, 2.0, 2.0]], SMALL)
    assert [(m.tiles, m.milliseconds) for m in measured] == [(SMALL[2], 2.0), (SMALL[0], 3.0)]


@on_each_device
def test_no_candidate_that_fits_is_an_error(device: str) -> None:
    with pytest.raises(RuntimeError, match="none of 1 tile configurations fits"):
        measure(device, [OutOfResources(400, 227, "shared memory")], SMALL[:1])


@on_each_device
def test_a_real_measurement(device: str) -> None:
    if device == "cpu":
        pytest.skip("device times need a CUDA device")
    assert all(time > 0 for time in device_times(lambda: torch.zeros(1, device=device), 3))
    measured = measure_tiles(512, 256, dtype=torch.bfloat16, device=torch.device(device))
    assert {each.tiles for each in measured} <= set(CANDIDATES)
    assert tiles_for(torch.bfloat16) in {each.tiles for each in measured}
