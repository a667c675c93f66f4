"""Runs the products on tensors that end where unreadable memory begins; a read past them crashes.

Run by test_grouped_gemm.py, in Triton's interpreter and a process of its own.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

from feplb.kernels.grouped_gemm import TritonGemm
from feplb.kernels.products import Operand
from feplb.kernels.segment_tables import grad_table, row_table
from feplb.kernels.tiles import INTERPRETER

PAGE = mmap.PAGESIZE
CPU = torch.device("cpu")
libc = ctypes.CDLL(None, use_errno=True)


def guarded(*shape: int) -> Tensor:
    """fp32 ones, directly before a page that may not be touched."""
    size = 4 * int(torch.Size(shape).numel())
    pages = -(-size // PAGE)
    memory = mmap.mmap(-1, (pages + 1) * PAGE)
    end = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + pages * PAGE
    if libc.mprotect(ctypes.c_void_p(end), PAGE, 0):
        raise OSError(ctypes.get_errno(), "mprotect")
    tensor = torch.frombuffer(
        memory, dtype=torch.float32, offset=pages * PAGE - size, count=size // 4
    )
    return tensor.view(shape).fill_(1.0)


def main() -> None:
    gemm, segments = TritonGemm(INTERPRETER), [(0, 3, 0), (5, 24, 0)]
    inner, width = 24, 40
    rows, out, grads = guarded(24, inner), guarded(24, width), guarded(1, width, inner)
    weights: Sequence[tuple[Tensor, bool]] = (
        (guarded(1, width, inner), True),
        (guarded(1, inner, width), False),
    )
    for weight, transposed in weights:
        table = row_table(segments, [weight], gemm.block_m, CPU)
        gemm.multiply_rows(Operand(rows), Operand(out), table, tensor=0, transposed=transposed)
        assert bool((out[5:] == inner).all())
    table = grad_table(segments, [grads], CPU)
    gemm.multiply_weights(Operand(out), Operand(rows), table, tensor=0)
    assert bool((grads == 22 * inner).all())


if __name__ == "__main__":
    main()
