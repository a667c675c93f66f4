"""measure_tiles: the fastest first, what does not fit left out; and the bits of what it tries."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernel_cases import on_each_device, same_bits, tiles_for
from test_gpu_compute import on_device
from triton import OutOfResources

from feplb.gpu_compute import TritonSwiGLU
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


@on_each_device
def test_the_callers_random_numbers_stay_where_they_are(device: str) -> None:
    state = torch.cuda.get_rng_state if device == "cuda" else torch.random.get_rng_state
    before = state()
    measure(device, [[1.0]], SMALL[:1])
    assert torch.equal(state(), before)


def test_all_candidates_add_as_many_terms_at_a_time() -> None:
    assert len({tiles.block_k for tiles in CANDIDATES}) == 1
    assert tiles_for(torch.float32) not in CANDIDATES


@on_each_device
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_all_candidates_have_the_same_bits(device: str, dtype: torch.dtype) -> None:
    if device == "cpu":
        pytest.skip("the interpreter's products are those of NumPy")
    segments = [(0, 300, 0), (310, 311, 2), (311, 500, 1)]
    fitting = {}
    for tiles in CANDIDATES:
        try:
            case = on_device(device, segments, dtype=dtype, hidden=512, width=256)
            fitting[tiles] = case.run(TritonSwiGLU(tiles=tiles)).results()
        except OutOfResources:
            continue
    first = next(iter(fitting))
    for tiles, results in fitting.items():
        for name, (seen, expected) in enumerate(zip(results, fitting[first], strict=True)):
            assert same_bits(seen, expected), f"result {name} with {tiles}, compared with {first}"
