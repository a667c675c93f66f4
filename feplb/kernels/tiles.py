"""Which part of a product one program computes. Fixed at start-up, the same on every rank."""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["CANDIDATES", "HOPPER", "INTERPRETER", "SINGLE_PRECISION", "TileConfig", "default_tiles"]


@dataclass(frozen=True)
class TileConfig:
    """One configuration of the grouped GEMM; all products of a run use the same.

    A configuration fixes in which order a dot product is added, so ranks that agree on it, on the
    GPU and on the Triton version compute the same bits.

    Args:
        block_m, block_n: rows and columns of the product per program.
        block_k: terms of the dot products per step.
        num_warps: warps per program.
        num_stages: steps in flight; each takes (block_m + block_n) * block_k elements of shared
            memory.
    Raises:
        ValueError: a block is no power of two from 16 on, or the warps are none, or no stage.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int

    def __str__(self) -> str:
        return (
            f"{self.block_m}x{self.block_n}x{self.block_k} tiles, {self.num_warps} warps, "
            f"{self.num_stages} stages"
        )

    def __post_init__(self) -> None:
        for name in ("block_m", "block_n", "block_k"):
            size = getattr(self, name)
            if size < 16 or size & (size - 1):
                raise ValueError(f"{name} is {size}, expected a power of two, 16 or more.")
        if self.num_warps not in (1, 2, 4, 8, 16):
            raise ValueError(f"num_warps is {self.num_warps}, expected 1, 2, 4, 8 or 16.")
        if self.num_stages < 1:
            raise ValueError(f"num_stages is {self.num_stages}, expected at least 1.")


# 144 KiB of shared memory in 16-bit dtypes: fits Hopper, Blackwell and A100.
HOPPER = TileConfig(128, 256, 64, num_warps=8, num_stages=3)

# fp32 products run without tensor cores, where larger tiles only cost registers.
SINGLE_PRECISION = TileConfig(64, 64, 32, num_warps=4, num_stages=3)

# Several tiles of each kind at the sizes tests can afford.
INTERPRETER = TileConfig(16, 32, 16, num_warps=4, num_stages=1)

# What is tried in 16-bit dtypes. All have one block_k: which of them wins should not be a matter of
# bits, or a run could not be repeated. tests/test_measure_tiles.py compares them on a GPU.
CANDIDATES = (
    HOPPER,
    TileConfig(128, 256, 64, num_warps=8, num_stages=4),
    TileConfig(128, 128, 64, num_warps=8, num_stages=4),
    TileConfig(128, 128, 64, num_warps=4, num_stages=3),
    TileConfig(256, 128, 64, num_warps=8, num_stages=3),
    TileConfig(64, 256, 64, num_warps=8, num_stages=4),
)


def default_tiles(dtype: torch.dtype) -> TileConfig:
    """The configuration where none was measured."""
    return HOPPER if dtype.itemsize == 2 else SINGLE_PRECISION
