"""What the ranks of tests/test_gpu.py do, over a real GPU or over the stand-in driver.

As in balancer_cases.py, a program runs on every rank and returns tensors by name.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from balancer_cases import (
    PLAIN,
    Arm,
    Bits,
    as_bytes,
    build,
    device,
    experts,
    grads,
    loss_of,
    threads_of_feplb,
)
from ranks import on_gpu
from test_balancer_bits import train
from test_balancer_policies import hot_counts
from torch import Tensor

from feplb import SwiGLU
from feplb.compute import ExpertCompute, Saved, Segment, Weights
from feplb.two_phase import run_experts_locally

STORM_POINTS = ("await_rows", "post_returns", "await_returns")  # a wait lies in the stream
# What one call asks of its core, begin and check() apart.
PROTOCOL_STEPS = (
    "wait_plan", "post_rows", "await_rows", "release_weights", "release_rows", "post_returns",
    "await_returns", "release_returns", "finish", "await_grad_outbox", "post_grads", "await_grads",
    "release_grads",
)  # fmt: skip
MOST_LATE_S = 0.003
CLOCK_HZ = 1.7e9  # about a GPU's
RUN_AHEAD_CALLS, RUN_AHEAD_S = 6, 0.05
MORE_THAN_A_QUEUE = 1500  # a stream holds about a thousand launches
NOTHING = """
.version 7.0
.target sm_80
.address_size 64
.visible .entry nothing()
{
    ret;
}
"""


def synchronize() -> None:
    if on_gpu():
        torch.cuda.synchronize()


# -------------------------------------------------------------------------------------- the driver


class RawDriver:
    """Functions of the driver that this rank's lane has open, by their names there."""

    def __init__(self) -> None:
        library = ctypes.CDLL(os.environ.get("FEPLB_LIBCUDA", "libcuda.so.1"))
        self._find = library.cuGetProcAddress
        self._find.argtypes = (
            ctypes.c_char_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_uint64,
        )  # fmt: skip
        if not on_gpu():  # where PyTorch has made the context current
            context = ctypes.c_void_p()
            self.call("cuDevicePrimaryCtxRetain", 7000, ctypes.byref(context), ctypes.c_int(0))
            self.call("cuCtxSetCurrent", 4000, context)

    def call(self, name: str, version: int, *args: Any) -> None:
        """Call the form that ``version`` of CUDA brought."""
        address = ctypes.c_void_p()
        assert self._find(name.encode(), ctypes.byref(address), version, 0) == 0, name
        result = ctypes.CFUNCTYPE(ctypes.c_int)(address.value)(*args)  # type: ignore[arg-type]
        assert result == 0, f"{name} said {result}"


class Storm:
    """What a model or a library may do while a device wait lies in the stream."""

    def __init__(self) -> None:
        self.driver = RawDriver()
        self.scratch = torch.zeros(1, device=device())
        self.modules: list[ctypes.c_void_p] = []

    def free(self) -> None:
        """Device memory is taken and freed, by the driver and by PyTorch's allocator."""
        address = ctypes.c_uint64()
        for _ in range(3):
            self.driver.call("cuMemAlloc", 3020, ctypes.byref(address), ctypes.c_size_t(1 << 20))
            self.driver.call("cuMemFree", 3020, address)
        if on_gpu():
            torch.empty(32 << 20, dtype=torch.uint8, device="cuda")
            torch.cuda.empty_cache()

    def load(self) -> None:
        """A module is loaded and its kernel launched on the compute stream."""
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        self.driver.call("cuModuleLoadData", 2000, ctypes.byref(module), NOTHING.encode())
        self.driver.call("cuModuleGetFunction", 2000, ctypes.byref(function), module, b"nothing")
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        ones = [ctypes.c_uint(1)] * 6
        nothing = ctypes.c_void_p()
        self.driver.call(
            "cuLaunchKernel", 4000, function, *ones, ctypes.c_uint(0), stream, nothing, nothing
        )
        self.modules.append(module)

    def fill_the_queue(self) -> None:
        """More kernels are launched than the stream's queue holds."""
        for _ in range(MORE_THAN_A_QUEUE):
            self.scratch.add_(1)


def nothing() -> None:
    """What happens where nothing does."""


class DisturbedCore:
    """A rank's C++ core; something happens before and after its steps of these names."""

    def __init__(
        self,
        core: Any,
        steps: Sequence[str],
        *,
        before: Callable[[], None] = nothing,
        after: Callable[[], None] = nothing,
    ) -> None:
        self._core, self._steps, self._before, self._after = core, steps, before, after
        self.times = 0

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._core, name)
        if name not in self._steps:
            return method

        def disturbed(*args: Any) -> Any:
            self._before()
            result = method(*args)
            self._after()
            self.times += 1
            return result

        return disturbed


def train_in_a_storm(arm: Arm, storm: str) -> Bits:
    """Three steps; every rank has a storm at every point of every call."""
    if arm.balancer is None:
        return train(arm, True, True, True, num_steps=3)
    core = DisturbedCore(arm.balancer.domain.core, STORM_POINTS, after=getattr(Storm(), storm))
    arm.balancer.domain.core = core
    bits = train(arm, True, True, True, num_steps=3)
    assert core.times == 3 * 2 * len(STORM_POINTS)
    return bits


class Dawdler:
    """Takes its time at random: this thread, or the compute stream, which it then runs ahead of."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def __call__(self) -> None:
        choice = self._random.randrange(4)
        if choice == 0:
            time.sleep(self._random.uniform(0, MOST_LATE_S))
        elif choice == 1 and on_gpu():
            torch.cuda._sleep(self._random.randrange(round(MOST_LATE_S * CLOCK_HZ)))


def train_with_delays(arm: Arm, num_steps: int) -> Bits:
    """Every rank is late in its own way, before and after every step of the protocol."""
    if arm.balancer is None:
        return train(arm, True, True, True, num_steps=num_steps)
    late = Dawdler(arm.rank)
    core = DisturbedCore(arm.balancer.domain.core, PROTOCOL_STEPS, before=late, after=late)
    arm.balancer.domain.core = core
    bits = train(arm, True, True, True, num_steps=num_steps)
    assert core.times >= 2 * num_steps * len(STORM_POINTS) * len(arm.specs)
    return bits


def run_ahead(arm: Arm, fence: str) -> str:
    """Calls that a rank makes while its GPU sleeps, so that movers withhold what they push.

    In the last one device memory is freed wherever a wait lies in the stream. ``fence`` is taken
    out, if named.
    """
    if fence:
        import fenced_core

        fenced_core.take_out(fence)
    weights = arm.weights(grad=False)
    rows = [arm.rows(step=step, grad=False)[0] for step in range(RUN_AHEAD_CALLS)]
    core = DisturbedCore(arm.door.domain.core, STORM_POINTS, after=Storm().free)
    for step, of_step in enumerate(rows):
        if on_gpu():
            torch.cuda._sleep(round(RUN_AHEAD_S * CLOCK_HZ))
        if step == RUN_AHEAD_CALLS - 1:
            arm.door.domain.core = core
        with torch.no_grad():
            arm.run(of_step, weights, step=step)
    arm.check()
    return f"{core.times} storms"


# ------------------------------------------------------------------------------ streams, splitting


def on_streams(arm: Arm, names: Sequence[str]) -> Bits:
    """One step per name, on the default stream or on one of the caller's own."""
    weights, bits = arm.weights(), Bits()
    for step, name in enumerate(names):
        with caller_stream(name):
            rows, _ = arm.rows(step=step)
            out = arm.run(rows, weights, step=step)
            loss_of(out).backward()
        bits |= {f"out of step {step}": out.detach(), **grads(**{f"rows of step {step}": rows})}
    arm.check()
    return bits | grads(weights=weights)


@contextlib.contextmanager
def caller_stream(name: str) -> Any:
    """What a model does that runs a part of itself on another stream."""
    if name == "default" or not on_gpu():
        yield
        return
    stream, outer = torch.cuda.Stream(), torch.cuda.current_stream()
    stream.wait_stream(outer)
    with torch.cuda.stream(stream):
        yield
    outer.wait_stream(stream)


class RowByRow(ExpertCompute):
    """SwiGLU of one row at a time: a row's bits do not depend on the rows beside it."""

    def __init__(self) -> None:
        self._compute = SwiGLU()

    def forward(
        self, rows: Tensor, row_data: Sequence[Tensor], segments: Sequence[Segment],
        weights: Weights, **rest: Any,
    ) -> Saved:  # fmt: skip
        return self._compute.forward(rows, row_data, one_by_one(segments), weights, **rest)

    def backward_rows(
        self, grad_out: Tensor, rows: Tensor, row_data: Sequence[Tensor],
        segments: Sequence[Segment], weights: Weights, saved: Saved, **rest: Any,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        return self._compute.backward_rows(
            grad_out, rows, row_data, one_by_one(segments), weights, saved, **rest
        )

    def backward_weights(
        self, grad_out: Tensor, rows: Tensor, row_data: Sequence[Tensor],
        segments: Sequence[Segment], saved: Saved, carry: tuple[Tensor, ...], **rest: Any,
    ) -> None:  # fmt: skip
        self._compute.backward_weights(
            grad_out, rows, row_data, one_by_one(segments), saved, carry, **rest
        )


def one_by_one(segments: Sequence[Segment]) -> list[Segment]:
    return [(row, row + 1, weight) for start, end, weight in segments for row in range(start, end)]


def split_rows(
    arm: Arm, with_weights: bool, *, num_steps: int = 3, interpreted: bool = False
) -> Bits:
    """Experts hotter than a rank; outputs and grads of rows, and of weights if asked.

    In Triton on a GPU. Elsewhere only if ``interpreted``: that takes seconds per step, and torch is
    as good at showing that rows go where they belong.
    """
    from feplb.gpu_compute import TritonSwiGLU

    compute = TritonSwiGLU() if on_gpu() or interpreted else RowByRow()
    arm.counts = lambda layer=0, step=0: hot_counts(arm, step)  # type: ignore[method-assign]
    bits, shared = Bits(), False
    for step in range(num_steps):
        weights = arm.weights()
        rows, _ = arm.rows(step=step)
        out = arm.run(rows, weights, step=step, compute=compute)
        record = arm.door.last_call(0)
        assert record is not None
        shared |= bool((record.moves[:, 3] > 0).any())
        loss_of(out).backward()
        arm.check()
        found = grads(rows=rows, weights=weights) if with_weights else grads(rows=rows)
        bits |= {f"step {step} {name}": tensor for name, tensor in found.items()}
        bits[f"step {step} out"] = out.detach()
    assert shared == (arm.door.policy == "split"), "an owner shares an expert under split alone"
    return bits


# ------------------------------------------------------------------------------------ many calls


def call_often(arm: Arm, num_calls: int) -> Bits:
    """Forward calls from one buffer; before each, all that a call reads or writes is poison.

    Returns how many outputs had wrong bits.
    """
    wrong = torch.zeros((), dtype=torch.int64, device=device())
    if arm.balancer is None:
        return {"wrong": wrong}
    weights, steps = arm.weights(grad=False), range(7)
    fresh = [arm.rows(step=step, grad=False)[0] for step in steps]
    compute = experts()
    expected = [
        run_experts_locally(fresh[step], arm.counts(step=step), weights, compute) for step in steps
    ]
    buffer = torch.empty(max(map(len, fresh)), arm.specs[0].hidden, device=device())
    arena = arm.balancer.domain.views._memory
    for call in range(num_calls):
        step = call % len(steps)
        synchronize()
        dist.barrier()
        arena.fill_(0xFF)  # NaN
        buffer.fill_(float("nan"))
        synchronize()
        dist.barrier()
        rows = buffer[: len(fresh[step])].copy_(fresh[step])
        with torch.no_grad():
            out = arm.run(rows, weights, step=step)
        wrong += (as_bytes(out) != as_bytes(expected[step])).any()
        out.fill_(float("nan"))
    arm.check()
    return {"wrong": wrong}


def none_wrong(arm: Arm) -> Bits:
    del arm
    return {"wrong": torch.zeros((), dtype=torch.int64, device=device())}


# ----------------------------------------------------------------------------------------- leaks


@dataclass(frozen=True)
class Held:
    """What a rank holds, and what is free on the GPU that all share."""

    files: int
    threads: list[str]
    free_bytes: int
    of_the_driver: dict[str, int]

    @staticmethod
    def now() -> Held:
        """Collective: nobody takes anything while another rank looks."""
        gc.collect()
        free_bytes, alive = 0, {}
        dist.barrier()
        if on_gpu():
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            dist.barrier()
            free_bytes = torch.cuda.mem_get_info()[0]
        else:
            from stand_in import StandIn

            alive = dict(StandIn().alive())
        files = len(os.listdir("/proc/self/fd"))
        found = Held(files, threads_of_feplb(0), free_bytes, alive)
        dist.barrier()
        return found


def live(rank: int, num_ranks: int) -> None:
    """The life of a Balancer."""
    with build(lane="ce") as balancer:
        arm = Arm(rank, num_ranks, PLAIN, balancer)
        rows: Tensor = arm.rows()[0]
        loss_of(arm.run(rows, arm.weights())).backward()
        arm.check()
        dist.barrier()


def live_often(rank: int, num_ranks: int, lives: int) -> tuple[Held, Held]:
    """What is held after the first two lives, and after all."""
    for _ in range(2):
        live(rank, num_ranks)
    before = Held.now()
    for _ in range(lives):
        live(rank, num_ranks)
    return before, Held.now()
