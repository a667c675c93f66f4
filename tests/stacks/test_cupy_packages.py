"""What the cupy lane is tested over (cupy_stand_in.py) against the packages it is used with: every
function is there under its name, with these parameters, in the real CuPy and cuda-python.

They import without a driver; calling them takes a GPU.
"""

from __future__ import annotations

import inspect
import re
from typing import Any

import cupy_stand_in
import pytest

from feplb import cupy_lane
from feplb.cupy_gpu import Packages


@pytest.fixture(scope="module")
def packages() -> Packages:
    return cupy_lane.import_packages()


def functions_of(stand_in: type) -> list[str]:
    return [name for name, _ in inspect.getmembers(stand_in, inspect.isfunction) if name[0] != "_"]


def constants_of(stand_in: type) -> dict[str, int]:
    return {name: value for name, value in vars(stand_in).items() if isinstance(value, int)}


def num_parameters(function: Any) -> int:
    """As the first line of a Cython function's docstring has them."""
    line = function.__doc__.splitlines()[0]
    parameters = re.sub(r"\[.*?\]", "", line[line.index("(") + 1 : line.rindex(")")])
    return len([parameter for parameter in parameters.split(",") if parameter.strip()])


@pytest.mark.parametrize("name", functions_of(cupy_stand_in.Runtime))
def test_cupy_has_the_function(packages: Packages, name: str) -> None:
    own = inspect.signature(getattr(cupy_stand_in.Runtime, name)).parameters
    assert num_parameters(getattr(packages.runtime, name)) == len(own) - 1


@pytest.mark.parametrize("name", functions_of(cupy_stand_in.Driver))
def test_cuda_python_has_the_function(packages: Packages, name: str) -> None:
    own = inspect.signature(getattr(cupy_stand_in.Driver, name)).parameters
    assert num_parameters(getattr(packages.driver, name)) == len(own) - 1


@pytest.mark.parametrize(("name", "value"), constants_of(cupy_stand_in.Runtime).items())
def test_cupy_has_the_constant(packages: Packages, name: str, value: int) -> None:
    assert getattr(packages.runtime, name) == value


@pytest.mark.parametrize(
    "enum",
    [
        cupy_stand_in.CUstreamWaitValue_flags,
        cupy_stand_in.CUdevice_attribute,
        cupy_stand_in.CUstreamBatchMemOpType,
        cupy_stand_in.CUmemcpySrcAccessOrder,
        cupy_stand_in.CUmemcpyFlags,
    ],
)
def test_cuda_python_has_the_enumeration(packages: Packages, enum: Any) -> None:
    real = getattr(packages.driver, enum.__name__)
    assert {one.name: int(getattr(real, one.name)) for one in enum} == {
        one.name: one.value for one in enum
    }


def test_cuda_python_takes_what_the_lane_fills_in(packages: Packages) -> None:
    driver = packages.driver
    kind = driver.CUstreamBatchMemOpType.CU_STREAM_MEM_OP_WRITE_VALUE_32
    operation = driver.CUstreamBatchMemOpParams()
    operation.operation = kind
    write = operation.writeValue
    write.operation, write.flags = kind, 0
    write.address, write.value = 1 << 40, (1 << 32) - 1
    filled = operation.writeValue
    assert (int(filled.address), int(filled.value)) == (1 << 40, (1 << 32) - 1)
    assert (filled.operation, operation.operation) == (kind, kind)
    attributes = driver.CUmemcpyAttributes()
    attributes.srcAccessOrder = driver.CUmemcpySrcAccessOrder.CU_MEMCPY_SRC_ACCESS_ORDER_STREAM
    attributes.flags = int(driver.CUmemcpyFlags.CU_MEMCPY_FLAG_PREFER_OVERLAP_WITH_COMPUTE)
    assert attributes.flags == 1
    assert int(driver.CUdeviceptr(1 << 40)) == 1 << 40
    assert driver.CUDA_VERSION >= 12080
    assert len(driver.CUuuid().bytes) == 16
