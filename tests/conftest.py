"""Fixtures of several files: the lanes. And Triton's interpreter, where there is no GPU."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import stand_in
import torch


def pytest_configure() -> None:
    """Where there is no GPU, Triton's kernels run in its interpreter, on CPU tensors.

    Triton reads this when it is imported, so it is set before any test module is.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")


GPU = pytest.param("gpu", marks=pytest.mark.gpu)


def put(patch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    """Have these variables, and no others of the stand-in's."""
    for known in [variable for variable in os.environ if variable.startswith("STAND_IN_")]:
        patch.delenv(known)
    patch.delenv("FEPLB_LIBCUDA", raising=False)
    for variable, value in variables.items():
        patch.setenv(variable, value)


def environment_of(lane: str) -> dict[str, str]:
    """Variables under which ranks use it: host, ce (over the stand-in driver), gpu (ce, real)."""
    if lane == "ce":
        return stand_in.environment()
    return {"FEPLB_LANE": "ce" if lane == "gpu" else lane}


def enter(patch: pytest.MonkeyPatch, lane: str) -> str:
    """Let ranks use the lane; skips where it takes a GPU that is not there."""
    if lane == "gpu" and not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    put(patch, environment_of(lane))
    return lane


@pytest.fixture(scope="module", params=["host", "ce", GPU])
def lane(request: pytest.FixtureRequest) -> Iterator[str]:
    """The ranks of what depends on it run over one lane, then over the others.

    "ce" runs over the stand-in driver with tensors of the host, "gpu" over the real one, all ranks
    on one GPU.
    """
    with pytest.MonkeyPatch.context() as patch:
        yield enter(patch, request.param)


@pytest.fixture(scope="module", params=["ce", GPU])
def ce_lane(request: pytest.FixtureRequest) -> Iterator[str]:
    """The same without the host lane."""
    with pytest.MonkeyPatch.context() as patch:
        yield enter(patch, request.param)


@pytest.fixture(scope="module")
def stand_in_machine() -> Iterator[None]:
    """Every rank has the stand-in for a driver, and the ce lane."""
    with pytest.MonkeyPatch.context() as patch:
        put(patch, stand_in.environment())
        yield


@pytest.fixture(scope="module")
def cupy_machine() -> Iterator[None]:
    """Every rank has the stand-ins for a driver, CuPy and cuda-python, and the cupy lane."""
    with pytest.MonkeyPatch.context() as patch:
        put(patch, stand_in.environment() | {"FEPLB_LANE": "cupy"})
        yield
