"""One process per GPU: how the benches of several GPUs start their ranks and hear from them."""

from __future__ import annotations

import multiprocessing
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist

DEGREES = (1, 2, 4, 8)


def num_ranks(gpus: int) -> int:
    """The largest EP group that so many GPUs make."""
    return max((degree for degree in DEGREES if degree <= gpus), default=0)


def over_ranks(
    body: Callable[..., Any], ranks: int, *args: Any, backend: str, timeout_s: float = 180.0
) -> list[Any]:
    """What ``body(rank, *args)`` returned on every rank; SystemExit if one fails or takes too long.

    Each is a process whose GPU, where there are GPUs, is the one of its rank's number.

    Args:
        body: importable; runs with the ranks as default process group.
        backend: of that group.
    """
    context = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    with tempfile.TemporaryDirectory(prefix="feplb-ranks-") as folder:
        try:
            for rank in range(ranks):
                here, there = context.Pipe(duplex=False)
                job = (rank, ranks, folder, backend, body, args, there)
                process = context.Process(target=_run_rank, args=job, daemon=True)
                process.start()
                there.close()
                pipes.append(here)
                processes.append(process)
            said = _collect(pipes, time.monotonic() + timeout_s)
            for process in processes:
                process.join(timeout=10)
        finally:
            for process in processes:
                process.kill()
    return said


def _run_rank(
    rank: int, ranks: int, folder: str, backend: str, body: Callable[..., Any],
    args: Sequence[Any], results: Connection,
) -> None:  # fmt: skip
    """The body of a rank's process; an answer that is text is an error."""
    try:
        torch.set_num_threads(1)
        if torch.cuda.is_available():
            torch.cuda.set_device(rank)
        store = dist.FileStore(f"{folder}/store", ranks)  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=rank, world_size=ranks)
        found = body(rank, *args)
        dist.destroy_process_group()
        results.send((found,))
    except BaseException:
        results.send(f"rank {rank}:\n{traceback.format_exc()}")
        raise


def _collect(pipes: Sequence[Connection], deadline: float) -> list[Any]:
    found: dict[int, Any] = {}
    while len(found) < len(pipes):
        waiting = [pipe for i, pipe in enumerate(pipes) if i not in found]
        ready = wait(waiting, timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise SystemExit(f"{len(waiting)} of {len(pipes)} ranks did not end in time")
        for rank, pipe in enumerate(pipes):
            if pipe in ready:
                try:
                    answer = pipe.recv()
                except EOFError:
                    answer = f"rank {rank} died without a word"
                if isinstance(answer, str):
                    raise SystemExit(answer)
                found[rank] = answer[0]
    return [found[rank] for rank in range(len(pipes))]
