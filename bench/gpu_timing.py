"""What the benches of a GPU share: whether there is one, what it is, and times by its own clock."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from report import Cell, Report, Row, arguments

from feplb.scheduler.machines import MACHINES, Machine, preset_of

Work = Callable[[], object]

# Longer than the host takes to launch what is timed: about 0.5 ms.
HEAD_START_CYCLES = 1_000_000
FLUSHED_BYTES = 256 << 20  # four times the L2 cache of an H200


def has_gpu() -> bool:
    return torch.cuda.is_available()


def main_of(
    description: str | None, given: Sequence[str] | None, report: Report, *, has_gpu: bool,
    run: Callable[[argparse.Namespace, Report], list[Row]],
) -> int:  # fmt: skip
    """The main of a bench that has no options of its own; its exit status."""
    options = arguments(str(description).splitlines()[0]).parse_args(given)
    if not has_gpu:
        return nothing_measured(report, options)
    report.write(options.json, run(options, report))
    return 0


def nothing_measured(report: Report, options: argparse.Namespace) -> int:
    """Say so, write a file without rows if one was asked for; the exit status."""
    report.header()
    print("No CUDA device here: nothing was measured.")
    report.write(options.json, [])
    return 0


def gpu_facts() -> dict[str, Cell]:
    """Of the current GPU and what drives it, for a header."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "gpu": properties.name,
        "gpus": torch.cuda.device_count(),
        "sms": properties.multi_processor_count,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }


def machine_of(gpu_name: str) -> tuple[str, Machine]:
    """The preset whose name the GPU's contains, h100 where none does; with its name."""
    name = preset_of(gpu_name) or "h100"
    return name, MACHINES[name]


@dataclass
class DeviceClock:
    """Times work on the current stream with events, behind a kernel that sleeps while it is
    launched.

    Args:
        flush: write over the L2 cache first.
    """

    flush: bool = True
    _scratch: list[torch.Tensor] = field(default_factory=list)

    def once(self, work: Work) -> float:
        """Milliseconds of one run; waits for the device."""
        first, last = self.started(work)
        last.synchronize()
        return float(first.elapsed_time(last))

    def started(self, work: Work) -> tuple[Any, Any]:
        """Launch it between two events, and do not wait."""
        if self.flush:
            if not self._scratch:
                self._scratch.append(torch.empty(FLUSHED_BYTES, dtype=torch.uint8, device="cuda"))
            self._scratch[0].zero_()
        torch.cuda._sleep(HEAD_START_CYCLES)
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        first.record()
        work()
        last.record()
        return first, last

    def times(self, work: Work, repeats: int, *, warm_up: int = 2) -> list[float]:
        """Milliseconds of each repeat; the first runs are not counted."""
        samples = [self.once(work) for _ in range(warm_up + repeats)]
        return samples[warm_up:]


def times_in_turn(
    once: Callable[[Work], float],
    works: Mapping[Any, Work],
    repeats: int,
    *,
    rounds: Callable[[list[Any]], Iterable[Any]],
) -> dict[Any, list[float]]:
    """Every work once per round, so that a GPU that grows warm slows all of them alike.

    Args:
        once: times one run, milliseconds.
        rounds: the order of one round.
    """
    for work in works.values():
        once(work)
    samples: dict[Any, list[float]] = {name: [] for name in works}
    for _ in range(repeats):
        for name in rounds(list(works)):
            samples[name].append(once(works[name]))
    return samples
