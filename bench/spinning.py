"""A kernel that holds every SM for a given time, by the GPU's own clock."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import globaltimer

WARPS = 32  # two programs of 1024 threads fill an SM
PROGRAMS_PER_SM = 2


@triton.jit
def _spin(started: tl.tensor, nanoseconds: tl.tensor, results: tl.tensor) -> None:
    program = tl.program_id(0)
    begin = globaltimer()
    if program == 0:
        tl.store(started, 1)
    now = begin
    while now - begin < nanoseconds:
        now = globaltimer()
    tl.store(results + program, now - begin)


class Spin:
    """Fills the GPU ``waves`` times over; each program spins for ``milliseconds``."""

    def __init__(self, milliseconds: float, waves: int) -> None:
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        self.num_programs = properties.multi_processor_count * PROGRAMS_PER_SM * waves
        self.milliseconds = milliseconds * waves
        self._nanoseconds = round(milliseconds * 1e6) // 16 * 16
        self._results = torch.zeros(self.num_programs, dtype=torch.int64, device="cuda")
        self._started = torch.zeros(1, dtype=torch.int32, pin_memory=True)
        self.launch(nanoseconds=16)  # compiled for multiples of 16, which all times are
        torch.cuda.synchronize()

    def launch(self, nanoseconds: int | None = None) -> None:
        """On the current stream; does not wait."""
        self._started.zero_()
        grid: Any = (self.num_programs,)
        spun = self._nanoseconds if nanoseconds is None else nanoseconds
        _spin[grid](self._started, spun, self._results, num_warps=WARPS)

    def has_started(self) -> bool:
        """Does a program of the last launch run, or has it run?"""
        return bool(self._started.item())


@triton.jit
def _mark(marker: tl.tensor) -> None:
    tl.store(marker, globaltimer())


@triton.jit
def _await(marker: tl.tensor, delays: tl.tensor, which: tl.constexpr) -> None:
    until = tl.load(marker) + tl.load(delays + which)
    now = globaltimer()
    while now < until:
        now = globaltimer()


class TimedFlags:
    """Waits on the current stream that end at given times after a mark in it.

    A wait is a kernel of one warp: nothing else runs on its stream, so it takes no time from others
    but a place on one SM.
    """

    def __init__(self, num_flags: int = 2) -> None:
        self._marker = torch.zeros(1, dtype=torch.int64, device="cuda")
        self._delays = torch.zeros(num_flags, dtype=torch.int64, device="cuda")
        self.set([0.0] * num_flags)
        self.mark()
        for which in range(num_flags):
            self.wait(which)
        torch.cuda.synchronize()

    def set(self, milliseconds: list[float]) -> None:
        """When each flag is released, from the next mark on; waits for the device."""
        nanoseconds = [round(each * 1e6) for each in milliseconds]
        self._delays.copy_(torch.tensor(nanoseconds, dtype=torch.int64))

    def mark(self) -> None:
        """The time from which delays count."""
        grid: Any = (1,)
        _mark[grid](self._marker, num_warps=1)

    def wait(self, which: int) -> None:
        """What follows on this stream waits for this flag."""
        grid: Any = (1,)
        _await[grid](self._marker, self._delays, which, num_warps=1)
