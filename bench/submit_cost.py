"""How long from a plan to the last copy that the driver accepts?

Eight real processes, one Balancer each, the ce lane. All but the measured rank, the fullest one,
publish their counts and sleep; then it hands over its own, plans and submits. Measured on it:

    plan -> copies    plan ready (``begin`` has returned) -> the driver has accepted the last copy
    posted -> copies  addresses handed to the mover -> the same: the C++ part
    counts -> copies  counts handed over -> the same, per policy

Without a GPU the driver is a stand-in (tests/driver) whose calls cost what a real one's do (6 us,
by default) and which runs streams as threads: the figures are those of feplb's own path plus a
constant, and are labelled so. 8 MiB of other memory are written before every call: caches are
cold, as they are in a model.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import subprocess
import tempfile
import time
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from report import Report, Row, arguments, median, percentile

from feplb import Balancer, BalancerConfig, LayerSpec, SwiGLU
from feplb.scheduler.workloads import calibrated

NUM_RANKS, NUM_EXPERTS = 8, 128
HIDDEN = FFN = 8  # small rows: the driver's calls are measured, not the copies
EVICTED_BYTES = 8 << 20
TARGETS_US = {"p50": 30.0, "p99": 60.0}  # plan ready -> last copy accepted
MOST_DRIVER_CALLS = 4
POLICIES = ("greedy", "refine", "split", "auto")
STAND_IN = Path(__file__).parents[1] / "tests" / "driver" / "stand_in.cpp"
_SUBMITS_COPIES = ("cuMemcpyBatchAsync", "cuMemcpyAsync", "cuMemcpyPeerAsync")


class Submission(ctypes.Structure):
    """As tests/driver/ledger.h writes it down."""

    _fields_ = (
        ("end_ns", ctypes.c_int64),
        ("thread", ctypes.c_int64),
        ("symbol", ctypes.c_char * 32),
    )


class DriverLog:
    """What the stand-in was asked to submit; a real driver tells nothing."""

    def __init__(self, library: str) -> None:
        self._library = ctypes.CDLL(library)
        self._library.stand_in_take_log.restype = ctypes.c_int64
        self._buffer = (Submission * 4096)()

    def take(self) -> list[Submission]:
        """Submissions since the last look."""
        count = self._library.stand_in_take_log(self._buffer, ctypes.c_int64(len(self._buffer)))
        return list(self._buffer[:count])


def calls_until_last_copy(log: list[Submission], posted_ns: int, accepted_ns: int) -> int:
    """Driver calls of the thread that submitted the last copy, from the hand-over to that copy."""
    copies = [
        s
        for s in log
        if posted_ns <= s.end_ns <= accepted_ns and s.symbol.decode() in _SUBMITS_COPIES
    ]
    last = copies[-1]
    return sum(s.thread == last.thread and posted_ns <= s.end_ns <= last.end_ns for s in log)


class WatchedCore:
    """The core, which notes when addresses are handed over and lets the peers go on in time."""

    def __init__(self, core: Any, let_go: Any) -> None:
        self._core = core
        self._let_go = let_go
        self.posted_ns = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._core, name)

    def post_rows(self, *arguments: Any) -> None:
        self.posted_ns = time.perf_counter_ns()
        self._core.post_rows(*arguments)

    def await_rows(self) -> None:
        self._let_go()
        self._core.await_rows()


@dataclass(frozen=True)
class Job:
    """What a rank is told."""

    folder: str
    policy: str
    samples: int
    stand_in: str | None
    call_ns: int


def inputs_with_fullest_first(samples: int) -> list[np.ndarray]:
    """counts [NUM_RANKS, E], the fullest rank first, so that rank 0 is an owner in every call."""
    found = []
    for step in range(samples):
        counts = calibrated(NUM_RANKS, seed=31, step=step, num_experts=NUM_EXPERTS)
        order = np.argsort(-counts.sum(axis=1), kind="stable")
        found.append(counts[order])
    return found


def run_rank(rank: int, job: Job, published: Any, go: Any) -> None:
    """One rank; rank 0 leaves its samples in the folder."""
    if job.stand_in is not None:
        os.environ |= {"FEPLB_LIBCUDA": job.stand_in, "STAND_IN_CALL_NS": str(job.call_ns)}
    torch.set_num_threads(1)
    folder = Path(job.folder)
    store = dist.FileStore(str(folder / "store"), NUM_RANKS)  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=rank, world_size=NUM_RANKS)
    local = NUM_EXPERTS // NUM_RANKS
    spec = LayerSpec(
        local, HIDDEN, torch.float32, weights=((2 * FFN, HIDDEN), (HIDDEN, FFN)), max_rows=65536
    )
    config = BalancerConfig(policy=job.policy, lane="ce", deadline_s=60)
    with Balancer(config, dist.group.WORLD, layers=[spec]) as balancer:
        device = balancer.device
        inputs = inputs_with_fullest_first(job.samples)
        most = max(int(counts[rank].sum()) for counts in inputs)
        rows = torch.zeros(most, HIDDEN, device=device)
        weights = [
            torch.zeros(local, 2 * FFN, HIDDEN, device=device),
            torch.zeros(local, HIDDEN, FFN, device=device),
        ]
        measured = _Measured(balancer, job, published, go) if rank == 0 else None
        gc.disable()
        torch.set_grad_enabled(False)
        for counts in inputs:
            own = counts[rank].tolist()
            if measured is not None:
                measured.call(rows[: sum(own)], own, weights)
                continue
            ticket = balancer.begin(own, layer=0)
            published.release()
            go[rank].acquire()
            balancer.run_experts(rows[: sum(own)], own, weights, SwiGLU(), layer=0, ticket=ticket)
        if measured is not None:
            np.save(folder / "samples.npy", np.asarray(measured.samples).reshape(-1, 4))
    dist.destroy_process_group()


class _Measured:
    """Rank 0: one sample per call in which it sends, and helps nobody.

    ``samples``: (counts -> copies, plan -> copies, posted -> copies, driver calls), ns.
    """

    def __init__(self, balancer: Balancer, job: Job, published: Any, go: Any) -> None:
        self.samples: list[tuple[float, float, float, int]] = []
        self._balancer = balancer
        self._published, self._go = published, go
        self._core = WatchedCore(balancer.domain.core, self._release_peers)
        balancer.domain.core = self._core
        self._log = DriverLog(job.stand_in) if job.stand_in else None
        self._other_memory = np.zeros(EVICTED_BYTES, dtype=np.uint8)

    def _release_peers(self) -> None:
        for peer in self._go[1:]:
            peer.release()

    def call(self, rows: torch.Tensor, counts: list[int], weights: list[torch.Tensor]) -> None:
        for _ in range(NUM_RANKS - 1):
            self._published.acquire()
        self._other_memory += 1
        if self._log is not None:
            self._log.take()
        start = time.perf_counter_ns()
        ticket = self._balancer.begin(counts, layer=0)
        planned = time.perf_counter_ns()
        self._balancer.run_experts(rows, counts, weights, SwiGLU(), layer=0, ticket=ticket)
        accepted = self._core.stats()["last_accepted_ns"]
        record = self._balancer.last_call(0)
        assert record is not None
        if not (record.moves[:, 1] == 0).any() or (record.moves[:, 2] == 0).any():
            return  # the last copies must be those of rows and weights
        calls = 0
        if self._log is not None:
            calls = calls_until_last_copy(self._log.take(), self._core.posted_ns, accepted)
        self.samples.append(
            (accepted - start, accepted - planned, accepted - self._core.posted_ns, calls)
        )


def build_stand_in(folder: Path) -> str:
    """Compile the stand-in driver; its path."""
    library = folder / "libcuda_stand_in.so"
    command = ["g++", "-std=c++17", "-O2", "-fPIC", "-shared", "-pthread"]
    subprocess.run([*command, "-o", str(library), str(STAND_IN)], check=True)
    return str(library)


def measure(policy: str, samples: int, stand_in: str | None, call_ns: int) -> np.ndarray:
    """Samples of rank 0 under one policy, [n, 4]; the first tenth warms up."""
    context = multiprocessing.get_context("spawn")
    published, go = context.Semaphore(0), [context.Semaphore(0) for _ in range(NUM_RANKS)]
    with tempfile.TemporaryDirectory() as folder:
        job = Job(folder, policy, samples, stand_in, call_ns)
        ranks = [
            context.Process(target=run_rank, args=(rank, job, published, go), daemon=True)
            for rank in range(NUM_RANKS)
        ]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
        if any(process.exitcode for process in ranks):
            raise SystemExit("a rank of the bench failed")
        found: np.ndarray = np.load(Path(folder) / "samples.npy")
    return found[len(found) // 10 :]


def rows_of(policy: str, samples: np.ndarray, with_calls: bool) -> Row:
    """One line: medians and p99 in us; without figures where the policy moved nothing."""
    if not len(samples):
        return {"policy": policy, "calls": 0}
    counts_us, plan_us, posted_us = (samples[:, i] / 1000 for i in range(3))
    return {
        "policy": policy,
        "calls": len(samples),
        "driver_calls_most": int(samples[:, 3].max()) if with_calls else None,
        "plan_to_copies_us_p50": median(plan_us),
        "plan_to_copies_us_p99": percentile(plan_us, 99),
        "posted_to_copies_us_p50": median(posted_us),
        "posted_to_copies_us_p99": percentile(posted_us, 99),
        "counts_to_copies_us_p50": median(counts_us),
        "counts_to_copies_us_p99": percentile(counts_us, 99),
    }


def parse() -> Namespace:
    parser = arguments("Plan ready -> last copy accepted by the driver, 8 ranks x 128 experts.")
    parser.add_argument("--policies", nargs="+", default=list(POLICIES), choices=POLICIES)
    parser.add_argument("--samples", type=int, default=600, help="calls per policy")
    parser.add_argument(
        "--call-us", type=float, default=6.0, help="what a call of the stand-in driver costs"
    )
    return parser.parse_args()


def main() -> None:
    options = parse()
    samples = 40 if options.quick else options.samples
    is_real = torch.cuda.is_available()
    report = Report(bench="submit_cost", lane="ce")
    driver = "real" if is_real else f"stand-in, {options.call_us:g} us per call (no GPU here)"
    report.header(driver=driver, ranks=NUM_RANKS, experts=NUM_EXPERTS, calls=samples)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        stand_in = None if is_real else build_stand_in(Path(folder))
        for policy in options.policies:
            found = measure(policy, samples, stand_in, round(options.call_us * 1000))
            rows.append(rows_of(policy, found, not is_real))
    report.table(rows)
    print()
    print(
        f"wanted, plan to copies: p50 <= {TARGETS_US['p50']:g} us, "
        f"p99 <= {TARGETS_US['p99']:g} us, at most {MOST_DRIVER_CALLS} driver calls"
    )
    report.write(options.json, rows)


if __name__ == "__main__":
    main()
