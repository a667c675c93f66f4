"""What does a grouped GEMM lose to copies that run beside it, and how fast are they meanwhile?

GEMM: up and down projection of one rank's experts (GLM-5: 16 experts of 2,048 rows, bf16, Triton).
Copies of 1 to 128 MiB, one after the other, in every direction that there is: between host and GPU,
within the GPU (what several ranks on one GPU do), to a peer. Submitted as the ce lane does
(_core.CopyStream), and by torch's copy_. Which engine carries them: bench/engine_proof.py.

    gemm pct   time of the GEMM with copies during all of it, over its time alone
    gbps       GB copied per second: by one copy alone, from its submission until the host sees it
               arrive; by copies in a row, alone; by copies in a row, all of them beside GEMMs
"""

from __future__ import annotations

import math
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from copy_ways import CopyWay, Direction, LaneCopy, Pieces, TorchCopy, directions
from gpu_timing import DeviceClock, Work, gpu_facts, has_gpu, main_of
from report import Cell, Report, Row, iqr, median

BUFFER_BYTES = 256 << 20  # copies in a row walk through it, so that no cache holds what they read
MIB = (1, 4, 16, 64, 128)
NUM_EXPERTS, ROWS_PER_EXPERT = 16, 2048
MARGIN = 1.5  # how much longer what covers lasts than what is covered
MOST_IN_A_ROW = 4096


def in_a_row(num_bytes: int, count: int, buffer_bytes: int = BUFFER_BYTES) -> Pieces:
    """Where ``count`` copies of ``num_bytes`` lie, one after the other, around the buffer."""
    places = buffer_bytes // num_bytes
    return [(i % places * num_bytes, num_bytes) for i in range(count)]


def count_lasting(milliseconds: float, num_bytes: int, gbps: float) -> int:
    """How many copies last so long at this rate."""
    return min(MOST_IN_A_ROW, max(1, math.ceil(milliseconds * gbps * 1e6 / num_bytes)))


def gbps_of(num_bytes: int, nanoseconds: float) -> float:
    return num_bytes / nanoseconds


@dataclass(frozen=True)
class Beside:
    """The GEMM as one bench step needs it.

    Args:
        launch: puts so many of them on the current stream.
        alone_ms: of one.
        started: launches so many between two events; see DeviceClock.
    """

    launch: Callable[[int], object]
    alone_ms: float
    started: Callable[[Work], tuple[Any, Any]]


def timed(way: CopyWay, direction: Direction, pieces: Pieces) -> float:
    """Nanoseconds from submission to the last arrival."""
    start = time.monotonic_ns()
    return way.wait(way.submit(direction, pieces)) - start


@dataclass(frozen=True)
class Loaded:
    """One sample. None: what should have covered the other ended first."""

    gemm_ms: float | None
    copy_gbps: float | None


def under_load(
    way: CopyWay, direction: Direction, num_bytes: int, gbps: float, gemm: Beside
) -> Loaded:
    """GEMM inside copies, then copies inside GEMMs."""
    count = count_lasting(MARGIN * gemm.alone_ms + 1, num_bytes, gbps)
    ticket = way.submit(direction, in_a_row(num_bytes, count))
    first, last = gemm.started(lambda: gemm.launch(1))
    last.synchronize()
    covered = not way.done(ticket)
    way.wait(ticket)
    gemm_ms = float(first.elapsed_time(last)) if covered else None
    count = count_lasting(4 * gemm.alone_ms, num_bytes, gbps)
    few = in_a_row(num_bytes, count)
    repeats = math.ceil(2 * MARGIN * count * num_bytes / (gbps * 1e6) / gemm.alone_ms) + 1
    first, last = gemm.started(lambda: gemm.launch(repeats))
    first.synchronize()
    took = timed(way, direction, few)
    covered = not last.query()
    last.synchronize()
    return Loaded(gemm_ms, gbps_of(count * num_bytes, took) if covered else None)


def row_of(
    way: str, direction: str, num_bytes: int, alone: Sequence[Sequence[float]], gemm_ms: float,
    loaded: Sequence[Loaded],
) -> Row:  # fmt: skip
    """alone: GB/s of one copy, and of copies in a row."""
    slow = [100 * each.gemm_ms / gemm_ms for each in loaded if each.gemm_ms is not None]
    fast = [each.copy_gbps for each in loaded if each.copy_gbps is not None]

    def middle(samples: Sequence[float]) -> Cell:
        return median(samples) if samples else None

    return {
        "copy": way,
        "direction": direction,
        "mib": num_bytes / 2**20,
        "one_copy_gbps": middle(alone[0]),
        "in_a_row_gbps": middle(alone[1]),
        "beside_gemm_gbps": middle(fast),
        "gemm_alone_ms": gemm_ms,
        "gemm_pct": middle(slow),
        "gemm_pct_iqr": iqr(slow) if slow else None,
    }


def measure(
    ways: Sequence[CopyWay], found: Sequence[Direction], sizes: Sequence[int], gemm: Beside,
    repeats: int,
) -> list[Row]:  # fmt: skip
    rows: list[Row] = []
    for direction in found:
        for way in ways:
            for num_bytes in sizes:
                one = in_a_row(num_bytes, 1)
                many = in_a_row(num_bytes, max(2, BUFFER_BYTES // num_bytes))
                timed(way, direction, many)  # warm up
                alone: list[list[float]] = [[], []]
                for _ in range(repeats):
                    for pieces, rates in zip((one, many), alone, strict=True):
                        took = timed(way, direction, pieces)
                        rates.append(gbps_of(len(pieces) * num_bytes, took))
                rate = median(alone[1])
                loaded = [under_load(way, direction, num_bytes, rate, gemm) for _ in range(repeats)]
                rows.append(
                    row_of(way.name, direction.name, num_bytes, alone, gemm.alone_ms, loaded)
                )
    return rows


def check_copies(ways: Sequence[CopyWay], found: Sequence[Direction]) -> None:
    """Every byte of a row of copies arrives, each way, in each direction.

    Raises:
        RuntimeError: naming which did not.
    """
    for number, (way, direction) in enumerate((w, d) for d in found for w in ways):
        direction.dst.zero_()
        direction.src.fill_(number + 1)
        torch.cuda.synchronize()
        way.wait(way.submit(direction, in_a_row(1 << 20, direction.src.nbytes >> 20)))
        if not bool((direction.dst == number + 1).all()):
            raise RuntimeError(f"{way.name}, {direction.name}: what arrived is not what was sent")


def gemm_beside(clock: DeviceClock, repeats: int) -> Beside:
    """The experts of one rank, every expert with as many rows."""
    from gemm_straggler import Experts, Size

    from feplb.kernels.grouped_gemm import TritonGemm
    from feplb.kernels.tiles import HOPPER

    experts = Experts(Size(), NUM_EXPERTS, NUM_EXPERTS * ROWS_PER_EXPERT, TritonGemm(HOPPER))
    segments = [(i * ROWS_PER_EXPERT, (i + 1) * ROWS_PER_EXPERT, i) for i in range(NUM_EXPERTS)]
    experts.check(segments)
    work = experts.work(segments)

    def launch(times: int) -> None:
        for _ in range(times):
            work()

    return Beside(launch, median(clock.times(work, repeats)), clock.started)


def run(options: Namespace, report: Report) -> list[Row]:
    report.header(**gpu_facts(), experts=NUM_EXPERTS, rows_per_expert=ROWS_PER_EXPERT)
    repeats = 3 if options.quick else 10
    mib = (1, 16, 128) if options.quick else MIB
    ways: list[CopyWay] = [LaneCopy("batch"), TorchCopy()]
    found = directions(BUFFER_BYTES)
    if len(found) == 3:
        print("one GPU, or no peer access: copies to a peer were not measured")
    check_copies(ways, found)
    print("check: all bytes arrived, both products agree with fp32")
    gemm = gemm_beside(DeviceClock(flush=False), repeats)
    rows = measure(ways, found, [size << 20 for size in mib], gemm, repeats)
    for direction in found:
        report.table([row for row in rows if row["direction"] == direction.name])
    print("\n-: what should have covered the other ended first; not measured")
    return rows


def main(given: Sequence[str] | None = None) -> int:
    report = Report(bench="copy_overlap", lane="ce")
    return main_of(__doc__, given, report, has_gpu=has_gpu(), run=run)


if __name__ == "__main__":
    sys.exit(main())
