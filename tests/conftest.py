"""Fixtures of several files: the lanes that need no GPU, and Triton without one."""

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


def put(patch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    """Have these variables, and no others of the stand-in's."""
    for known in [variable for variable in os.environ if variable.startswith("STAND_IN_")]:
        patch.delenv(known)
    for variable, value in variables.items():
        patch.setenv(variable, value)


@pytest.fixture(scope="module", params=["host", "ce"])
def lane(request: pytest.FixtureRequest) -> Iterator[str]:
    """The ranks of what depends on it run over one lane, then over the other.

    The ce lane runs over the stand-in driver, with tensors of the host.
    """
    name: str = request.param
    with pytest.MonkeyPatch.context() as patch:
        put(patch, stand_in.environment() if name == "ce" else {"FEPLB_LANE": name})
        yield name


@pytest.fixture(scope="module")
def stand_in_machine() -> Iterator[None]:
    """Every rank has the stand-in for a driver, and the ce lane."""
    with pytest.MonkeyPatch.context() as patch:
        put(patch, stand_in.environment())
        yield
