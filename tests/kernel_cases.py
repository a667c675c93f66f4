"""What the tests of Triton kernels share: devices, segment lists, rounding, bits.

A process runs the kernels either on a GPU or in Triton's interpreter (tests/conftest.py): on a
machine with a GPU, TRITON_INTERPRET=1 asks for the interpreter.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import pytest
import torch
from properties import st
from torch import Tensor

from feplb.kernels.tiles import HOPPER, INTERPRETER, SINGLE_PRECISION, TileConfig

pytest.importorskip("triton")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}

DEVICES = [
    pytest.param(
        "cpu",
        marks=pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1 before start"),
    ),
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
            pytest.mark.skipif(INTERPRETED, reason="TRITON_INTERPRET=1: kernels run on the CPU"),
        ],
    ),
]
on_each_device = pytest.mark.parametrize("device", DEVICES)

# Hypothesis examples, and rows of a segment: an interpreted product takes about 0.1 s.
EXAMPLES = 15 if INTERPRETED else 60
MOST_ROWS = 40 if INTERPRETED else 300

# Columns of two operands: less than a tile, several, and whole multiples of tiles_for() blocks.
SHAPES = [(8, 72), (40, 8), (16, 32)] if INTERPRETED else [(8, 264), (200, 8), (128, 256)]


def tiles_for(dtype: torch.dtype) -> TileConfig:
    if INTERPRETED:
        return INTERPRETER
    return SINGLE_PRECISION if dtype == torch.float32 else HOPPER


def rounding(dtype: torch.dtype) -> float:
    """Relative error of one rounding to ``dtype``; the interpreter cuts fp32 off to bf16."""
    cut_off = INTERPRETED and dtype == torch.bfloat16
    return torch.finfo(dtype).eps / (1 if cut_off else 2)


def subnormal_step(dtype: torch.dtype) -> float:
    """Largest error of one rounding of what is too small for ``rounding`` to hold (fp16: 2^-24)."""
    info = torch.finfo(dtype)
    return info.smallest_normal * info.eps


@st.composite
def segment_lists(
    draw: st.DrawFn, num_weights: int = 3, most_rows: int = MOST_ROWS
) -> list[tuple[int, int, int]]:
    """Segments (row start, row end, weight index): holes, empty ones, any start, any weight."""
    segments, at = [], 0
    block = tiles_for(torch.bfloat16).block_m
    sizes = st.sampled_from([0, 1, 2, block - 1, block, block + 1, most_rows])
    for _ in range(draw(st.integers(0, 4))):
        start = at + draw(st.integers(0, 5))
        at = start + draw(st.one_of(sizes, st.integers(0, most_rows)))
        segments.append((start, at, draw(st.integers(0, num_weights - 1))))
    return segments


def num_rows_of(segments: Sequence[tuple[int, int, int]]) -> int:
    """Rows of a call with a hole at its end."""
    return max((end for _, end, _ in segments), default=0) + 2


def is_hole(segments: Sequence[tuple[int, int, int]], num_rows: int) -> Tensor:
    holes = torch.ones(num_rows, dtype=torch.bool)
    for start, end, _ in segments:
        holes[start:end] = False
    return holes


def same_bits(seen: Tensor, expected: Tensor) -> bool:
    assert seen.shape == expected.shape
    assert seen.dtype == expected.dtype
    kind = _BITS[seen.element_size()]
    return torch.equal(seen.contiguous().view(kind), expected.contiguous().view(kind))
