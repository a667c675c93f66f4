"""Which engine moves feplb's copies? By CUPTI's records, and by starving the SMs.

Copies go as the ce lane submits them (_core.CopyStream: its driver calls, its stream) and, to
compare, by torch's copy_: host to device, device to host, within the GPU, and to a peer if there is
one.

    records      what torch.profiler (CUPTI) saw while each ran: kind, bytes, stream, kernels
    channel      the kind of channel by CUPTI's own records, ASYNC_MEMCPY for a copy engine; read in
                 a process of its own, where libcupti can be opened
    starvation   a kernel fills every SM several times over; a copy submitted while it runs must end
                 before it does. A copy by a kernel, submitted alike, must not: else the test shows
                 nothing

Within one GPU the driver may copy by a kernel of its own, on SMs; the table says what was seen.
Between a GPU and the host, and between two GPUs, it must be an engine: exit status 1 if not.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from copy_records import Cupti, Seen, seen_in_trace
from copy_ways import CONTROL, Direction, LaneCopy, TorchCopy, directions
from gpu_timing import gpu_facts, has_gpu, nothing_measured
from report import Cell, Report, Row, arguments

COPY_BYTES = 16 << 20
SPIN_MS, WAVES = 20.0, 3
START_S = 5.0  # longest until the kernel is seen running
ENGINE, SMS, UNKNOWN = "copy engine", "SMs", "not told apart"


# --------------------------------------------------------------------------------------- records


@contextmanager
def profiled(folder: Path) -> Iterator[Callable[[], Seen]]:
    """Record with torch.profiler; what it saw can be asked for when the block has ended."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:

        def read() -> Seen:
            file = folder / "trace.json"
            profiler.export_chrome_trace(str(file))
            return seen_in_trace(json.loads(file.read_text()))

        yield read
        torch.cuda.synchronize()


def record_row(way: str, direction: str, seen: Seen, wanted_bytes: int) -> Row:
    """One line of what was seen of one copy."""
    kinds = sorted({copy.kind for copy in seen.copies})
    streams = sorted({copy.stream for copy in seen.copies})
    channels = sorted({copy.channel for copy in seen.copies if copy.channel})
    moved = sum(copy.num_bytes for copy in seen.copies)
    return {
        "copy": way,
        "direction": direction,
        "records": len(seen.copies),
        "kinds": ",".join(kinds) or None,
        "all_bytes": moved == wanted_bytes,
        "streams": ",".join(map(str, streams)) or None,
        "channels": ",".join(channels) or None,
        "kernels": len(seen.kernels),
    }


def record_rows(ways: Sequence[Any], found: Sequence[Direction]) -> list[Row]:
    """By torch.profiler, one session per copy: what is in it is that copy's."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for way in ways:
            for direction in found:
                way.wait(way.submit(direction))
                with profiled(Path(folder)) as read:
                    way.wait(way.submit(direction))
                rows.append(record_row(way.name, direction.name, read(), direction.src.nbytes))
    return rows


def child_main() -> int:
    """In a process of its own: feplb's copies under CUPTI; prints what it saw as JSON."""
    try:
        cupti = Cupti()
        cupti.start()
    except (OSError, RuntimeError) as error:
        print(json.dumps({"error": str(error)}))
        return 0
    torch.cuda.init()
    said: dict[str, Any] = {"library": cupti.path, "seen": {}}
    for copy_call in ("batch", "plain"):
        way = LaneCopy(copy_call)
        for direction in directions(COPY_BYTES):
            torch.cuda.synchronize()
            before = cupti.stop()
            way.wait(way.submit(direction))
            torch.cuda.synchronize()
            after = cupti.stop()
            new = Seen(after.copies[len(before.copies) :], after.kernels[len(before.kernels) :])
            said["seen"][f"{way.name}|{direction.name}"] = new.as_json()
    print(json.dumps(said))
    return 0


def channel_rows() -> tuple[list[Row], str]:
    """The child's records as rows; and what to say where there are none."""
    command = [sys.executable, str(Path(__file__).resolve()), "--cupti-child"]
    try:
        child = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    except subprocess.TimeoutExpired:
        return [], "CUPTI's own records: not read, the process that asked for them did not end"
    return channel_rows_of(child.stdout, child.stderr)


def channel_rows_of(stdout: str, stderr: str) -> tuple[list[Row], str]:
    """As channel_rows, of what the child printed."""
    lines = stdout.strip().splitlines()
    try:
        said = json.loads(lines[-1])
    except (IndexError, json.JSONDecodeError):
        last = (stderr.strip().splitlines() or ["it said nothing"])[-1]
        return [], f"CUPTI's own records: not read, the process that asked for them failed: {last}"
    if "error" in said:
        return [], f"CUPTI's own records: not read, {said['error']}"
    rows = []
    for name, of_copy in said["seen"].items():
        way, direction = name.split("|")
        rows.append(record_row(way, direction, Seen.from_json(of_copy), COPY_BYTES))
    return rows, f"CUPTI's own records, by {said['library']}"


# ------------------------------------------------------------------------------------ starvation


@dataclass(frozen=True)
class Starved:
    """One copy beside a kernel that leaves no SM free. ms from its submission."""

    way: str
    direction: str
    arrived_ms: float
    kernel_ms: float
    kernel_was_running: bool  # when the copy had arrived

    @property
    def escaped(self) -> bool:
        """It ended before the kernel did, and not by a hair."""
        return self.kernel_was_running and self.arrived_ms < self.kernel_ms / 2


def starve(way: Any, direction: Direction, spin: Any, ended: Callable[[], Any]) -> Starved:
    """Launch the kernel, wait until it runs, submit the copy, and see which ends first.

    Args:
        ended: records a point on the kernel's stream, with query() and synchronize().
    """
    way.wait(way.submit(direction))
    spin.launch()
    end = ended()
    deadline = time.monotonic() + START_S
    while not spin.has_started():
        if time.monotonic() > deadline:
            raise RuntimeError(f"the spinning kernel was not seen to start within {START_S:g} s")
    start = time.monotonic_ns()
    arrived = way.wait(way.submit(direction))
    running = not end.query()
    end.synchronize()
    whole = time.monotonic_ns() - start
    return Starved(way.name, direction.name, (arrived - start) / 1e6, whole / 1e6, running)


def event_on_current_stream() -> Any:
    event = torch.cuda.Event()
    event.record()
    return event


def starvation_rows(samples: Sequence[Starved]) -> list[Row]:
    """With the engine that each must have been; unknown if the control escaped too."""
    controls = [sample.escaped for sample in samples if sample.way == CONTROL]
    is_sound = bool(controls) and not any(controls)
    rows: list[Row] = []
    for sample in samples:
        engine: Cell = ENGINE if sample.escaped else SMS
        rows.append(
            {
                "copy": sample.way,
                "direction": sample.direction,
                "arrived_ms": sample.arrived_ms,
                "kernel_ms": sample.kernel_ms,
                "before_kernel_ended": sample.kernel_was_running,
                "engine": engine if is_sound else UNKNOWN,
            }
        )
    return rows


def broken_promises(rows: Sequence[Row], found: Sequence[Direction]) -> list[str]:
    """Sentences; empty where every copy of feplb's that must take an engine took one."""
    must = {direction.name for direction in found if direction.must_be_engine}
    return [
        f"{row['copy']}, {row['direction']}: {row['engine']}, expected {ENGINE}"
        for row in rows
        if str(row["copy"]).startswith("feplb")
        and row["direction"] in must
        and row["engine"] != ENGINE
    ]


def run(options: Any, report: Report) -> int:
    from spinning import Spin

    report.header(**gpu_facts(), mib=COPY_BYTES >> 20)
    found = directions(COPY_BYTES)
    ways: list[Any] = [LaneCopy("batch"), LaneCopy("plain"), TorchCopy()]
    if len(found) == 3:
        print("one GPU, or no peer access: copies to a peer were not measured")
    records = record_rows(ways, found)
    print("\nrecords of torch.profiler")
    report.table(records)
    channels, said = channel_rows()
    print(f"\n{said}")
    report.table(channels)
    spin = Spin(SPIN_MS, WAVES)
    control = TorchCopy(by_kernel=True)
    inside = [direction for direction in found if not direction.must_be_engine]
    repeats = 1 if options.quick else 3
    samples = [
        starve(way, direction, spin, event_on_current_stream)
        for _ in range(repeats)
        for way, those in ((control, inside), *((way, found) for way in ways))
        for direction in those
    ]
    starved = starvation_rows(samples)
    print(f"\ncopies beside a kernel of {spin.milliseconds:g} ms that fills every SM {WAVES} times")
    report.table(starved)
    wrong = broken_promises(starved, found)
    print("\n".join(wrong) if wrong else "feplb's copies with host or peer took copy engines")
    tests = (("records", records), ("channel", channels), ("starvation", starved))
    report.write(options.json, [{"test": name, **row} for name, rows in tests for row in rows])
    return 1 if wrong else 0


def main(given: Sequence[str] | None = None) -> int:
    parser = arguments(str(__doc__).splitlines()[0])
    parser.add_argument("--cupti-child", action="store_true", help="used by the bench itself")
    options = parser.parse_args(given)
    if options.cupti_child:
        return child_main()
    report = Report(bench="engine_proof", lane="ce")
    return run(options, report) if has_gpu() else nothing_measured(report, options)


if __name__ == "__main__":
    sys.exit(main())
