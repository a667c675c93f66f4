"""Ranks that are threads of one process, on one GPU or over the stand-in driver.

A job has one process for each rank; here one process holds them all, as N Balancers. What that
takes, beside ``run_rank_threads``:

- A control plane: torch.distributed has one rank per process, so ``ThreadPeers`` meet in memory.
- A compute stream for each rank: on a shared one, a rank's wait would stand before the very copies
  it waits for. Streams of PyTorch's pool are too many, so these are the driver's own.
- A hardware queue for each stream (``ENVIRONMENT``): in one context they are shared by all ranks,
  and the deadlock rule speaks of one rank's submissions.
- Backward in the rank's own thread: one thread of autograd serves a GPU for the whole process, and
  a rank's backward waits in it for headers that the other ranks' backwards publish there.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import pytest
import torch
from gpu_programs import RawDriver
from ranks import on_gpu

from feplb.peers import Peers

T = TypeVar("T")

# Of a GPU's process: a queue for every stream, and no module that is loaded while waits are queued.
ENVIRONMENT = {
    "CUDA_DEVICE_MAX_CONNECTIONS": "32",
    "CUDA_DEVICE_MAX_COPY_CONNECTIONS": "32",
    "CUDA_MODULE_LOADING": "EAGER",
}
MEETING_S = 30.0


class _Meeting:
    """Where threads tell each other something."""

    def __init__(self, num_ranks: int) -> None:
        self.num_ranks = num_ranks
        self._values: list[Any] = [None] * num_ranks
        self._barrier = threading.Barrier(num_ranks, timeout=MEETING_S)

    def gather(self, rank: int, value: Any) -> list[Any]:
        """What every rank has said; blocks. BrokenBarrierError: one will not come."""
        self._values[rank] = value
        self._barrier.wait()
        values = list(self._values)
        self._barrier.wait()
        return values

    def leave(self) -> None:
        """Nobody waits for this rank any more."""
        self._barrier.abort()


class ThreadPeers(Peers):
    """One rank's end of the control plane; what a Balancer is given for its group."""

    def __init__(self, rank: int, meeting: _Meeting) -> None:
        self.rank = rank
        self.num_ranks = meeting.num_ranks
        self.global_ranks = list(range(meeting.num_ranks))
        self._meeting = meeting

    def gather(self, value: T) -> list[T]:
        return self._meeting.gather(self.rank, value)


def run_rank_threads(fn: Callable[..., T], num_ranks: int, *args: Any) -> list[T]:
    """Call fn(peers, *args) on every rank, each a thread of this process.

    Returns:
        Results in rank order.
    Raises:
        Exception: what a rank has raised; of several, one that does not merely miss another.
    """
    meeting = _Meeting(num_ranks)
    streams = _streams(num_ranks) if on_gpu() else []

    def body(rank: int) -> T:
        torch.set_num_threads(1)
        torch.autograd.set_multithreading_enabled(False)
        stream = torch.cuda.stream(streams[rank]) if streams else contextlib.nullcontext()
        try:
            with stream:
                return fn(ThreadPeers(rank, meeting), *args)
        except BaseException:
            meeting.leave()
            raise

    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(num_ranks, "rank") as threads:
        patch.setattr("feplb.balancer.Peers", lambda peers: peers)
        futures = [threads.submit(body, rank) for rank in range(num_ranks)]
        errors = [future.exception() for future in futures]
    for error in sorted(filter(None, errors), key=_misses_another):
        raise error
    return [future.result() for future in futures]


def _misses_another(error: BaseException) -> bool:
    return isinstance(error, threading.BrokenBarrierError)


def _streams(count: int) -> list[torch.cuda.Stream]:
    """Non-blocking ones; they live as long as the process."""
    torch.cuda.synchronize()  # the context is there
    driver, made = RawDriver(), []
    for _ in range(count):
        stream = ctypes.c_void_p()
        driver.call("cuStreamCreate", 2000, ctypes.byref(stream), ctypes.c_uint(1))
        made.append(torch.cuda.ExternalStream(stream.value))
    return made
