"""Where there is no GPU, Triton's kernels run in its interpreter, on CPU tensors."""

from __future__ import annotations

import os

import torch


def pytest_configure() -> None:
    """Triton reads this when it is imported, so it is set before any test module is."""
    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")
