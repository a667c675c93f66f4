"""Runs a function on N ranks, each a process of its own in one gloo group, and returns the results.

Tests call `run_ranks(fn, 4, ...)`; fn must be importable (a function at module level), because a
rank receives it by name. The processes are forked from a server that has torch loaded already;
on a GPU each is started anew, for a forked process cannot use a driver that was loaded before.
The first error of any rank is raised in the caller, caused by that rank's traceback; a rank that
dies or hangs is an error too, and no process outlives the call. Variables FEPLB_* and STAND_IN_*
are as they are in the caller at that moment.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import pickle
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Collection
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")
# Variables that a rank has as its caller has them; all others are those of the server's start.
TRAVELLING = ("FEPLB_", "STAND_IN_")
# The last two are what torch imports at the first backward and the first checkpoint (seconds).
PRELOAD = [
    "torch.distributed",
    "torch.utils.checkpoint",
    "pytest",
    "hypothesis",
    "torch.fx.experimental.symbolic_shapes",
    "torch._dynamo",
]
STACK_DUMP_S = 0.5  # what hanging ranks get to write their stacks
EXIT_S = 5.0  # what finished ranks get to leave by themselves


class RankTraceback(Exception):  # noqa: N818 - it explains an error
    """The cause of an error that run_ranks raises: the rank, and its traceback as text."""


@dataclass(frozen=True, slots=True, eq=False)
class _Rank:
    idx: int
    process: BaseProcess
    connection: Connection


@dataclass(frozen=True, slots=True)
class _Report:
    """What a rank says when fn has ended. One that died said nothing: no payload, only a text."""

    when: float  # monotonic clock, which all processes share
    payload: bytes  # the pickled result, or the pickled exception
    error: str = ""  # empty where fn returned


def on_gpu() -> bool:
    """Do ranks of this process, or this rank, run over the ce lane of a real driver?"""
    return os.environ.get("FEPLB_LANE") == "ce" and "FEPLB_LIBCUDA" not in os.environ


def run_ranks(
    fn: Callable[..., T],
    num_ranks: int,
    *args: Any,
    timeout_s: float = 60.0,
    may_die: Collection[int] = (),
) -> list[T]:
    """Call fn(rank, num_ranks, *args) on every rank and return the results in rank order.

    Args:
        fn: importable at module level. Its result and `args` travel by pickle, tensors by value.
        num_ranks: processes to start; all of them form the default process group (gloo).
        timeout_s: for everything, the start included; on a GPU, whose first ranks compile kernels,
            three times as long. Then all ranks are killed.
        may_die: ranks whose death is part of the test; their result is None.
    Raises:
        Exception: the first error of any rank, of its own type, its `__cause__` a RankTraceback.
        RuntimeError: a rank died without a report.
        TimeoutError: with the stack of every rank that had not finished.
    """
    timeout_s *= 3 if on_gpu() else 1
    deadline = time.monotonic() + timeout_s
    ranks: list[_Rank] = []
    with tempfile.TemporaryDirectory(prefix="feplb-ranks-") as folder:
        call = _Call(pickle.dumps((fn, args)), num_ranks, folder, timeout_s, _travelling())
        try:
            ranks.extend(_start(call, idx) for idx in range(num_ranks))
            results = _collect(ranks, deadline, may_die, folder)
            _release(ranks)
        finally:
            for rank in ranks:
                rank.process.kill()
                rank.process.join()
                rank.connection.close()
    return results


@dataclass(frozen=True, slots=True)
class _Call:
    """What every rank needs to know."""

    fn_and_args: bytes
    num_ranks: int
    folder: str
    timeout_s: float
    environment: dict[str, str]


def _travelling() -> dict[str, str]:
    return {name: os.environ[name] for name in os.environ if name.startswith(TRAVELLING)}


def _start(call: _Call, idx: int) -> _Rank:
    context: BaseContext
    if on_gpu():
        context = multiprocessing.get_context("spawn")
    else:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
    here, there = context.Pipe()
    process = context.Process(  # type: ignore[attr-defined]
        target=_run_rank, args=(call, idx, there), daemon=True
    )
    process.start()
    there.close()
    return _Rank(idx, process, here)


def _collect(
    ranks: list[_Rank], deadline: float, may_die: Collection[int], folder: str
) -> list[Any]:
    results: list[Any] = [None] * len(ranks)
    waiting = list(ranks)
    while waiting:
        timeout = max(0.0, deadline - time.monotonic())
        ready = wait([rank.connection for rank in waiting], timeout)
        if not ready:
            raise TimeoutError(_describe_hang(waiting, folder))
        reports = [(_receive(rank), rank) for rank in waiting if rank.connection in ready]
        waiting = [rank for rank in waiting if rank.connection not in ready]
        errors = [
            (report.when, rank.idx, report)
            for report, rank in reports
            if report.error and (report.payload or rank.idx not in may_die)
        ]
        if errors:
            _raise(*min(errors, key=lambda entry: entry[0])[1:])
        for report, rank in reports:
            results[rank.idx] = pickle.loads(report.payload) if report.payload else None
    return results


def _receive(rank: _Rank) -> _Report:
    try:
        report: _Report = rank.connection.recv()
    except (EOFError, ConnectionResetError):
        rank.process.join()
        text = f"rank {rank.idx} died without a report, exit code {rank.process.exitcode}"
        return _Report(time.monotonic(), b"", text)
    return report


def _raise(rank_idx: int, report: _Report) -> NoReturn:
    if not report.payload:
        raise RuntimeError(report.error)
    raise pickle.loads(report.payload) from RankTraceback(f"on rank {rank_idx}:\n{report.error}")


def _describe_hang(hanging: list[_Rank], folder: str) -> str:
    for rank in hanging:
        if _stack_file(folder, rank.idx).exists() and rank.process.pid is not None:
            os.kill(rank.process.pid, signal.SIGUSR1)
    time.sleep(STACK_DUMP_S)
    parts = [f"{len(hanging)} ranks had not finished in time"]
    for rank in hanging:
        file = _stack_file(folder, rank.idx)
        parts.append(f"rank {rank.idx}: {file.read_text() if file.exists() else 'not started'}")
    return "\n".join(parts)


def _stack_file(folder: str, rank_idx: int) -> Path:
    return Path(folder) / f"stack-{rank_idx}"


def _release(ranks: list[_Rank]) -> None:
    """Let all ranks leave, now that none of them needs another one any more."""
    for rank in ranks:
        if rank.process.is_alive():
            rank.connection.send(None)
    deadline = time.monotonic() + EXIT_S
    for rank in ranks:
        rank.process.join(max(0.0, deadline - time.monotonic()))


def _run_rank(call: _Call, rank_idx: int, connection: Connection) -> None:
    """The body of a rank's process."""
    for name in _travelling():
        del os.environ[name]
    os.environ.update(call.environment)
    if os.environ.get("FEPLB_LANE") == "cupy":
        import cupy_stand_in

        cupy_stand_in.install()
    if "STAND_IN_CORE" in os.environ:
        import fenced_core

        fenced_core.install()
    with _stack_file(call.folder, rank_idx).open("w") as stacks:
        faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=True)
        connection.send(_call_fn(call, rank_idx))
        connection.recv()  # until every rank has reported
        faulthandler.unregister(signal.SIGUSR1)
    if dist.is_initialized():
        dist.destroy_process_group()


def _call_fn(call: _Call, rank_idx: int) -> _Report:
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo",
            store=dist.FileStore(  # type: ignore[attr-defined]
                str(Path(call.folder) / "store"), call.num_ranks
            ),
            rank=rank_idx,
            world_size=call.num_ranks,
            timeout=timedelta(seconds=call.timeout_s),
        )
        fn, args = pickle.loads(call.fn_and_args)
        return _Report(time.monotonic(), pickle.dumps(fn(rank_idx, call.num_ranks, *args)))
    except BaseException as error:
        when = time.monotonic()
        return _Report(when, _pickle_error(error), traceback.format_exc())


def _pickle_error(error: BaseException) -> bytes:
    try:
        payload = pickle.dumps(error)
        pickle.loads(payload)
    except Exception:
        return pickle.dumps(RuntimeError(f"{type(error).__name__}: {error}"))
    return payload
