"""What every bench prints and writes: the machine and commit, a table, and the same rows as JSON.

A bench makes one Report, prints its header, checks what it will measure, measures, and hands flat
rows to table() and write(). A figure without its machine and commit does not exist.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

Cell = str | int | float | bool | None
Row = Mapping[str, Cell]
GAP = "  "


def arguments(description: str) -> argparse.ArgumentParser:
    """A parser with the two options that every bench has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="few samples: shows that it runs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to FILE as JSON")
    return parser


def machine() -> str:
    """CPU model, usable cores and system, in one line."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        model = names[0].split(":", 1)[1].strip() if names else model
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{model}, {cores} cores, {platform.system()} {platform.machine()}"


def commit() -> str:
    """Short hash of the commit measured, with "+dirty" if the tree differs; "none" outside git."""
    here = Path(__file__).parent
    try:
        head = _git(here, "rev-parse", "--short", "HEAD")
        return head + ("+dirty" if _git(here, "status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return "none"


def _git(folder: Path, *command: str) -> str:
    result = subprocess.run(["git", *command], cwd=folder, check=True, capture_output=True)
    return result.stdout.decode().strip()


def percentile(samples: npt.ArrayLike, percent: float) -> float:
    return float(np.percentile(np.asarray(samples, dtype=np.float64), percent))


def median(samples: npt.ArrayLike) -> float:
    return percentile(samples, 50)


def iqr(samples: npt.ArrayLike) -> float:
    """Width of the middle half of the samples."""
    return percentile(samples, 75) - percentile(samples, 25)


@dataclass(frozen=True, kw_only=True)
class Report:
    """One bench's output. lane: ce, host, sim, or none where no bytes travel."""

    bench: str
    lane: str
    machine: str = field(default_factory=machine)
    commit: str = field(default_factory=commit)

    def header(self, **facts: Cell) -> None:
        """Print the environment, and facts that hold for every row."""
        shown = {"commit": self.commit, "lane": self.lane, **facts}
        print(self.bench, *(f"{name}={_text(value)}" for name, value in shown.items()))
        print(self.machine)

    def table(self, rows: Sequence[Row], columns: Sequence[str] | None = None) -> None:
        """Print rows; columns defaults to all of the first row. Too wide: several tables."""
        if rows:
            names = list(columns or rows[0])
            for block in _fitting(names, rows, shutil.get_terminal_size((100, 24)).columns):
                print()
                for line in _lines(block, rows):
                    print(line)

    def write(self, path: Path | None, rows: Sequence[Row]) -> None:
        """Write {"bench", "commit", "machine", "lane", "rows"} to path, if there is one."""
        if path is not None:
            content = {
                "bench": self.bench,
                "commit": self.commit,
                "machine": self.machine,
                "lane": self.lane,
                "rows": [dict(row) for row in rows],
            }
            path.write_text(json.dumps(content, indent=1) + "\n")


def _text(value: Cell) -> str:
    if value is None:
        return "-"
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.{2 if abs(value) < 100 else 1}f}"


def _width(name: str, rows: Sequence[Row]) -> int:
    """Of a column; its heading is broken at underscores."""
    return max(map(len, [*name.split("_"), *(_text(row.get(name)) for row in rows)]))


def _fitting(names: Sequence[str], rows: Sequence[Row], width: int) -> list[list[str]]:
    """names in blocks that fit the width, each led by the first column."""
    blocks = [[names[0]]]
    for name in names[1:]:
        wanted = [*blocks[-1], name]
        fits = sum(_width(each, rows) + len(GAP) for each in wanted) - len(GAP) <= width
        if fits or len(blocks[-1]) == 1:
            blocks[-1].append(name)
        else:
            blocks.append([names[0], name])
    return blocks


def _lines(names: Sequence[str], rows: Sequence[Row]) -> list[str]:
    widths = [_width(name, rows) for name in names]
    headings = [name.split("_") for name in names]
    height = max(map(len, headings))
    padded = [[""] * (height - len(words)) + words for words in headings]
    table = [[words[line] for words in padded] for line in range(height)]
    table += [[_text(row.get(name)) for name in names] for row in rows]
    return [
        GAP.join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()
        for cells in table
    ]
