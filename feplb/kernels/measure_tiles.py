"""Which tile configuration is fastest on this GPU: measured once, at start-up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor
from triton import OutOfResources

from .grouped_gemm import TritonGemm
from .products import Operand
from .segment_tables import grad_table, row_table
from .tiles import CANDIDATES, TileConfig

__all__ = ["MeasuredTiles", "device_times", "measure_tiles"]

Work = Callable[[], object]

# About 0.5 ms, longer than the host takes to launch what is timed.
_HEAD_START_CYCLES = 1_000_000


@dataclass(frozen=True)
class MeasuredTiles:
    """milliseconds: all six products of one layer, forward and backward; median."""

    tiles: TileConfig
    milliseconds: float


def device_times(work: Work, repeats: int = 10) -> list[float]:
    """Milliseconds of ``work`` on the current CUDA stream, each repeat timed alone by events.

    The first two runs are not counted: they compile and fill the allocator. Waits for the device.
    """
    times = []
    for repeat in range(-2, repeats):
        torch.cuda._sleep(_HEAD_START_CYCLES)
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        first.record()
        work()
        last.record()
        last.synchronize()
        if repeat >= 0:
            times.append(float(first.elapsed_time(last)))
    return times


def measure_tiles(
    hidden: int,
    width: int,
    *,
    dtype: torch.dtype,
    device: torch.device,
    rows_per_expert: int = 256,
    num_experts: int = 4,
    candidates: Sequence[TileConfig] = CANDIDATES,
    times: Callable[[Work], list[float]] = device_times,
) -> list[MeasuredTiles]:
    """Time every candidate on the products of one SwiGLU layer; fastest first.

    All ranks must use the same configuration: see agreed_tiles.py.
    Compiles and runs on the current stream and waits for the device, several seconds; allocates
    3 * hidden * width elements per expert twice (weights and their gradients). Random numbers are
    its own: the caller's generators stay where they are.

    Raises:
        RuntimeError: no candidate fits the device.
    """
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device).normal_(generator=generator)

    rows = random(num_experts * rows_per_expert, hidden)
    h = random(len(rows), 2 * width)
    shapes = (2 * width, hidden), (hidden, width)
    stacks = [random(num_experts, *shape) for shape in shapes]
    weights = [list(stack) for stack in stacks]
    grads = [list(torch.empty_like(stack)) for stack in stacks]
    measured = []
    for tiles in candidates:
        try:
            layer = _layer(TritonGemm(tiles), rows, h, weights, grads)
            measured.append(MeasuredTiles(tiles, median(times(layer))))
        except OutOfResources:
            continue
    if not measured:
        raise RuntimeError(f"none of {len(candidates)} tile configurations fits {device}.")
    return sorted(measured, key=lambda each: each.milliseconds)


def _layer(
    gemm: TritonGemm,
    rows: Tensor,
    h: Tensor,
    weights: Sequence[Sequence[Tensor]],
    grads: Sequence[Sequence[Tensor]],
) -> Work:
    """The six products over equal segments; their values do not matter."""
    size = len(rows) // len(weights[0])
    segments = [(i * size, (i + 1) * size, i) for i in range(len(weights[0]))]
    act = h[:, : h.shape[1] // 2].contiguous()
    out = torch.empty_like(rows)
    x, gate_up, activation, y = (Operand(each) for each in (rows, h, act, out))
    table = row_table(segments, weights, gemm.block_m, rows.device)
    targets = grad_table(segments, grads, rows.device)

    def run() -> None:
        gemm.multiply_rows(x, gate_up, table, tensor=0, transposed=True)
        gemm.multiply_rows(activation, y, table, tensor=1, transposed=True)
        gemm.multiply_rows(x, activation, table, tensor=1, transposed=False)
        gemm.multiply_rows(gate_up, y, table, tensor=0, transposed=False)
        gemm.multiply_weights(gate_up, x, targets, tensor=0)
        gemm.multiply_weights(x, activation, targets, tensor=1)

    return run
