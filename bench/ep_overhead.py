"""What do dispatch and combine lose to feplb's copies? The paper says less than 1 %.

Several GPUs: one process each; dispatch and combine are all-to-alls of torch.distributed over NCCL,
of the calibrated workload's rows (4,096 tokens x top-8 per rank, 6,144 wide, bf16). Meanwhile every
rank copies expert weights to its neighbour's GPU, as the ce lane submits them, during all of it:
more than feplb ever does, for in a layer its copies run after the dispatch.

One GPU: a STAND-IN for the exchange, as many bytes copied within the GPU by a kernel, beside the
same copies within it. It shows what they take from the GPU's memory; the paper's figure is then
unmeasured.

Times are those of the slowest rank, medians over samples that the copies covered whole.
"""

from __future__ import annotations

import random
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from copy_overlap import BUFFER_BYTES, count_lasting, in_a_row, timed
from copy_ways import CopyWay, Direction, LaneCopy
from gpu_ranks import num_ranks, over_ranks
from gpu_timing import DeviceClock, Work, gpu_facts, has_gpu, main_of
from report import Report, Row, iqr, median
from torch import Tensor

from feplb.scheduler.machines import GLM5
from feplb.scheduler.shares import Rows
from feplb.scheduler.workloads import calibrated_by_source

TOKENS, TOP_K, NUM_EXPERTS = 4096, 8, 128
COPY_BYTES = 72 << 20  # the weights of one expert
MARGIN = 2.0
PAPER_PCT = 1.0
PASSES = ("dispatch", "combine")
BACKEND = "nccl"
STAND_IN = "STAND-IN, one GPU"


def splits_of(by_source: Rows, rank: int) -> tuple[list[int], list[int]]:
    """Rows that ``rank`` sends to and gets from each rank; by_source [ranks, experts]."""
    ranks = len(by_source)
    by_owner = by_source.reshape(ranks, ranks, -1).sum(axis=2)
    return by_owner[rank].tolist(), by_owner[:, rank].tolist()


class Exchange(Protocol):
    """Dispatch and combine on the current stream; neither waits for the host.

    Attributes:
        name: for tables.
    """

    name: str

    def dispatch(self) -> None: ...

    def combine(self) -> None: ...


class AllToAll:
    """Rows to their owners and back, over the default process group."""

    def __init__(self, sent: Sequence[int], received: Sequence[int], like: Tensor) -> None:
        self.name = f"{dist.get_backend()} all-to-all, {dist.get_world_size()} ranks"
        self._sent, self._received = list(sent), list(received)
        self.rows = like.new_ones(sum(sent), like.shape[1])
        self.at_owners = like.new_empty(sum(received), like.shape[1])
        self.back = torch.empty_like(self.rows)

    def dispatch(self) -> None:
        """See Exchange."""
        dist.all_to_all_single(self.at_owners, self.rows, self._received, self._sent)

    def combine(self) -> None:
        """See Exchange."""
        dist.all_to_all_single(self.back, self.at_owners, self._sent, self._received)


class KernelCopies:
    """As many bytes within one GPU, moved by a kernel: a stand-in for the exchange."""

    def __init__(self, num_rows: int, like: Tensor) -> None:
        self.name = STAND_IN
        self.rows = like.new_ones(num_rows, like.shape[1])
        self.at_owners = torch.empty_like(self.rows)
        self.back = torch.empty_like(self.rows)

    def dispatch(self) -> None:
        """See Exchange."""
        torch.add(self.rows, 0, out=self.at_owners)

    def combine(self) -> None:
        """See Exchange."""
        torch.add(self.at_owners, 0, out=self.back)


@dataclass(frozen=True)
class Sample:
    """One run of one pass on one rank. covered: copies ran during all of it, or there were none."""

    pass_name: str
    with_copies: bool
    milliseconds: float
    covered: bool = True


def check_exchange(exchange: Any) -> None:
    """What was dispatched comes back.

    Raises:
        RuntimeError: it does not.
    """
    exchange.rows.copy_(torch.arange(len(exchange.rows), device=exchange.rows.device)[:, None] % 97)
    exchange.back.zero_()
    exchange.dispatch()
    exchange.combine()
    if not torch.equal(exchange.back, exchange.rows):
        raise RuntimeError(f"{exchange.name}: rows did not come back as they were sent")


def sample_passes(
    exchange: Exchange, way: CopyWay, direction: Direction,
    started: Callable[[Work], tuple[Any, Any]], repeats: int, meet: Callable[[], None],
) -> list[Sample]:  # fmt: skip
    """Every pass with and without copies, in turn; the same order on every rank.

    Args:
        meet: lets all ranks begin a sample together.
    """
    works = {"dispatch": exchange.dispatch, "combine": exchange.combine}
    alone: dict[str, float] = {}
    for name, work in works.items():
        for _ in range(3):
            meet()
            first, last = started(work)
            last.synchronize()
        alone[name] = float(first.elapsed_time(last))
    many = in_a_row(COPY_BYTES, max(1, direction.src.nbytes // COPY_BYTES), direction.src.nbytes)
    gbps = COPY_BYTES * len(many) / min(timed(way, direction, many) for _ in range(3))
    order, found = random.Random(0), []
    for _ in range(repeats):
        jobs = [(name, copies) for name in works for copies in (False, True)]
        for name, copies in order.sample(jobs, len(jobs)):
            meet()
            ticket = None
            if copies:
                # The sleeping kernel ahead of what is timed, and what copies may gain when alone.
                count = count_lasting(MARGIN * alone[name] + 2, COPY_BYTES, gbps)
                pieces = in_a_row(COPY_BYTES, count, direction.src.nbytes)
                ticket = way.submit(direction, pieces)
            first, last = started(works[name])
            last.synchronize()
            covered = ticket is None or not way.done(ticket)
            if ticket is not None:
                way.wait(ticket)
            found.append(Sample(name, copies, float(first.elapsed_time(last)), covered))
    return found


def slowest(of_ranks: Sequence[Sequence[Sample]]) -> list[Sample]:
    """Sample by sample over the ranks, which all have them in one order."""
    return [
        Sample(
            each[0].pass_name, each[0].with_copies, max(s.milliseconds for s in each),
            all(s.covered for s in each),
        )
        for each in zip(*of_ranks, strict=True)
    ]  # fmt: skip


def table_rows(exchange: str, samples: Sequence[Sample]) -> list[Row]:
    """One row per pass; None where copies never covered it."""
    rows: list[Row] = []
    for name in PASSES:
        without, beside = (
            [
                s.milliseconds
                for s in samples
                if s.pass_name == name and s.with_copies == copies and s.covered
            ]
            for copies in (False, True)
        )
        overhead = 100 * (median(beside) / median(without) - 1) if beside else None
        rows.append(
            {
                "pass": name,
                "exchange": exchange,
                "without_ms": median(without),
                "without_ms_iqr": iqr(without),
                "with_copies_ms": median(beside) if beside else None,
                "with_copies_ms_iqr": iqr(beside) if beside else None,
                "overhead_pct": overhead,
                "paper_below_pct": None if exchange == STAND_IN else PAPER_PCT,
                "samples": len(beside),
            }
        )
    return rows


def neighbours_copy(ordinal: int, peer: int) -> Direction:
    """Buffers here and on the peer's GPU (the same one: within it)."""
    src = torch.ones(BUFFER_BYTES, dtype=torch.uint8, device=f"cuda:{ordinal}")
    dst = torch.zeros(BUFFER_BYTES, dtype=torch.uint8, device=f"cuda:{peer}")
    dst.copy_(src)  # lets PyTorch map the peer's memory
    torch.cuda.synchronize()
    return Direction("beside", dst, src)


# ----------------------------------------------------------------------------------- several GPUs


def sample_rank(rank: int, ranks: int, repeats: int) -> tuple[str, list[Sample]]:
    """The body of one rank's process."""
    by_source = calibrated_by_source(ranks, seed=5, step=0, num_experts=NUM_EXPERTS)
    like = torch.empty(0, GLM5.hidden, dtype=torch.bfloat16, device="cuda")
    exchange = AllToAll(*splits_of(by_source, rank), like)
    check_exchange(exchange)
    direction = neighbours_copy(rank, (rank + 1) % ranks)

    def meet() -> None:
        torch.cuda.synchronize()
        dist.barrier()

    clock, way = DeviceClock(flush=False), LaneCopy("batch", ordinal=rank)
    samples = sample_passes(exchange, way, direction, clock.started, repeats, meet)
    return exchange.name, samples


def over_gpus(ranks: int, repeats: int) -> tuple[str, list[Sample]]:
    """One process per GPU; SystemExit if one fails."""
    said = over_ranks(sample_rank, ranks, ranks, repeats, backend=BACKEND)
    return said[0][0], slowest([samples for _, samples in said])


def on_one_gpu(repeats: int) -> tuple[str, list[Sample]]:
    """The stand-in, of the mean rank of an EP group of 8."""
    like = torch.empty(0, GLM5.hidden, dtype=torch.bfloat16, device="cuda")
    exchange = KernelCopies(TOKENS * TOP_K, like)
    check_exchange(exchange)
    clock = DeviceClock(flush=False)
    way, direction = LaneCopy("batch"), neighbours_copy(0, 0)
    meet = torch.cuda.synchronize
    return exchange.name, sample_passes(exchange, way, direction, clock.started, repeats, meet)


def run(options: Namespace, report: Report) -> list[Row]:
    repeats = 10 if options.quick else 50
    gpus = torch.cuda.device_count()
    ranks = num_ranks(gpus)
    report.header(**gpu_facts(), ranks=ranks, copies_mib=COPY_BYTES >> 20, samples=repeats)
    name, samples = on_one_gpu(repeats) if ranks == 1 else over_gpus(ranks, repeats)
    rows = table_rows(name, samples)
    report.table(rows)
    if ranks == 1:
        print(
            "\nthe paper's overhead of dispatch and combine (< 1 %): unmeasured, it takes several "
            "GPUs.\nThe figures above are of a stand-in within one GPU."
        )
    return rows


def main(given: Sequence[str] | None = None) -> int:
    report = Report(bench="ep_overhead", lane="ce")
    return main_of(__doc__, given, report, has_gpu=has_gpu(), run=run)


if __name__ == "__main__":
    sys.exit(main())
