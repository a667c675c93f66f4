"""Counts handed over -> plan readable by Python: the second part of bench/plan_latency.py.

Two processes, each pinned to its own core; its mover shares that core and sleeps on a futex. Both
leave a spinning barrier together, hand over their counts (Balancer.begin) and wait until Python can
read the plan. The rest of the call (copies, flags) runs outside the measurement.

Measured twice. In turn: directly after three calls that move nothing, as micro-second figures of a
relay or a function usually are. After experts: 64 experts have run in between, some hundred
microseconds of other code, as in a model; on a shared machine the core's caches are then cold.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from layer_arms import EmptyCompute
from report import Row, iqr, median, percentile

from feplb import Balancer, BalancerConfig, LayerSpec, SwiGLU
from feplb.scheduler.workloads import calibrated

NUM_RANKS, NUM_EXPERTS = 2, 128
HIDDEN = 4  # a row of 16 bytes: what is measured moves no rows
FFN = 4
NUM_INPUTS = 200  # distinct counts, each met again after this many calls
CALLS_IN_TURN = 3
TARGET_US = 15.0


class SpinningBarrier:
    """Ranks leave within a fraction of a microsecond of each other; for pinned processes only."""

    def __init__(self, path: Path, rank: int) -> None:
        words = 8 * NUM_RANKS  # a cache line each
        shared = torch.from_file(str(path), shared=True, size=words, dtype=torch.int64)
        self._rounds = shared.numpy()
        self._rank = rank
        self._round = 0

    def wait(self) -> None:
        """Spin until every rank is here."""
        self._round += 1
        self._rounds[8 * self._rank] = self._round
        while any(self._rounds[8 * rank] < self._round for rank in range(NUM_RANKS)):
            pass


@dataclass(frozen=True)
class Job:
    """What a rank is told."""

    folder: str
    policy: str
    num_dynamic: int
    samples: int
    after_experts: bool


def run_rank(rank: int, job: Job) -> None:
    """One rank: measure, and leave the samples in the folder."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})
    torch.set_num_threads(1)
    folder = Path(job.folder)
    store = dist.FileStore(str(folder / "store"), NUM_RANKS)  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=rank, world_size=NUM_RANKS)
    local = NUM_EXPERTS // NUM_RANKS
    spec = LayerSpec(
        local, HIDDEN, torch.float32, weights=((2 * FFN, HIDDEN), (HIDDEN, FFN)), max_rows=65536
    )
    config = BalancerConfig(policy=job.policy, num_dynamic=job.num_dynamic, deadline_s=30)
    barrier = SpinningBarrier(folder / "barrier", rank)
    times_us = []
    with Balancer(config, dist.group.WORLD, layers=[spec]) as balancer:
        weights = [torch.zeros(local, 2 * FFN, HIDDEN), torch.zeros(local, HIDDEN, FFN)]
        inputs = [
            calibrated(NUM_RANKS, seed=1, step=step, num_experts=NUM_EXPERTS)[rank].tolist()
            for step in range(NUM_INPUTS)
        ]
        all_rows = torch.zeros(max(sum(counts) for counts in inputs), HIDDEN)
        nothing, even = EmptyCompute(), [1] * local
        for step in range(job.samples):
            counts = inputs[step % NUM_INPUTS]
            rows = all_rows[: sum(counts)]
            with torch.no_grad():
                for _ in range(0 if job.after_experts else CALLS_IN_TURN):
                    ticket = balancer.begin(even, layer=0)
                    balancer.run_experts(
                        rows[:local], even, weights, nothing, layer=0, ticket=ticket
                    )
                barrier.wait()
                start = time.perf_counter_ns()
                ticket = balancer.begin(counts, layer=0)
                balancer.domain.core.wait_plan()
                times_us.append((time.perf_counter_ns() - start) / 1000)
                balancer.run_experts(
                    rows, counts, weights, SwiGLU() if job.after_experts else nothing,
                    layer=0, ticket=ticket,
                )  # fmt: skip
    np.save(folder / f"times_{rank}.npy", np.asarray(times_us))
    dist.destroy_process_group()


def handover_row(policy: str, num_dynamic: int, samples: int, *, after_experts: bool) -> Row:
    """The slower rank of each round; the first tenth warms up."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        job = Job(folder, policy, num_dynamic, samples, after_experts)
        ranks = [context.Process(target=run_rank, args=(r, job)) for r in range(NUM_RANKS)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
        if any(process.exitcode for process in ranks):
            raise SystemExit("a rank of the hand-over bench failed")
        times = [np.load(Path(folder) / f"times_{rank}.npy") for rank in range(NUM_RANKS)]
    slower = np.max(times, axis=0)[samples // 10 :]
    return {
        "policy": f"{policy}, counts -> plan in Python, "
        + ("after experts" if after_experts else "in turn"),
        "ranks": NUM_RANKS,
        "experts": NUM_EXPERTS,
        "num_dynamic": num_dynamic,
        "inputs": len(slower),
        "moves_mean": None,
        "straggler_before": None,
        "straggler_after": None,
        "us_p50": median(slower),
        "us_p99": percentile(slower, 99),
        "us_iqr": iqr(slower),
        "target_us": None if after_experts else TARGET_US,
    }
