"""Does a kernel of a balanced call read or write where it must not? compute-sanitizer's memcheck.

Runs bench/sanitized_calls.py, two ranks as processes on one GPU, under the tool of the CUDA
toolkit: from PATH, $CUDA_HOME/bin or /usr/local/cuda/bin. Exit status 0: nothing was found, or
there is no tool, which is said; 1: something was found, or the calls failed.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gpu_timing import gpu_facts, has_gpu, nothing_measured
from report import Report, Row, arguments

TOOL = "compute-sanitizer"
FOUND_STATUS = 86  # of no Python program
PROGRAM = Path(__file__).with_name("sanitized_calls.py")
SUMMARY = re.compile(r"^=+ ERROR SUMMARY: (\d+) error", re.MULTILINE)
NO_TOOL = (
    f"{TOOL} is neither on PATH nor in $CUDA_HOME/bin or /usr/local/cuda/bin: nothing was checked. "
    "It comes with the CUDA toolkit."
)


def find_tool(environment: Mapping[str, str]) -> str | None:
    """The tool's path, None where there is none."""
    folders = [environment.get("PATH", "")]
    if environment.get("CUDA_HOME"):
        folders.append(f"{environment['CUDA_HOME']}/bin")
    folders.append("/usr/local/cuda/bin")
    return shutil.which(TOOL, path=os.pathsep.join(filter(None, folders)))


def command_of(tool: str, program: Sequence[str]) -> list[str]:
    """memcheck of a program and of all processes it starts.

    Errors of driver calls are not asked for: asking a driver for what it may not have is no fault,
    and feplb reports those that are. The process that starts the ranks makes no driver call.
    """
    return [
        tool, "--tool", "memcheck", "--target-processes", "all",
        "--error-exitcode", str(FOUND_STATUS), "--report-api-errors", "no",
        "--require-cuda-init", "no", *program,
    ]  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """What the tool said. summaries: errors of each process that it watched."""

    status: int
    summaries: tuple[int, ...]

    @property
    def sentence(self) -> str:
        """What it means."""
        if self.status == FOUND_STATUS or any(self.summaries):
            return f"memcheck found errors: {sum(self.summaries)}, see above"
        if self.status != 0:
            return f"the calls failed under memcheck, status {self.status}; see above"
        if not self.summaries:
            return "memcheck ended without a summary: nothing is known"
        return f"memcheck found nothing, in {len(self.summaries)} processes"

    @property
    def is_good(self) -> bool:
        """Whether processes were watched and nothing was found."""
        return self.status == 0 and bool(self.summaries) and not any(self.summaries)


def watch(command: Sequence[str]) -> Outcome:
    """Run it, and show what it says as it comes."""
    said = []
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            said.append(line)
    errors = SUMMARY.findall("".join(said))
    return Outcome(process.returncode, tuple(map(int, errors)))


def main(given: Sequence[str] | None = None) -> int:
    options = arguments(str(__doc__).splitlines()[0]).parse_args(given)
    report = Report(bench="sanitizer", lane="ce")
    if not has_gpu():
        return nothing_measured(report, options)
    report.header(**gpu_facts())
    tool = find_tool(os.environ)
    if tool is None:
        print(NO_TOOL)
        report.write(options.json, [])
        return 0
    outcome = watch(command_of(tool, [sys.executable, str(PROGRAM)]))
    print(outcome.sentence)
    row: Row = {
        "tool": "memcheck",
        "status": outcome.status,
        "processes": len(outcome.summaries),
        "errors": sum(outcome.summaries),
    }
    report.write(options.json, [row])
    return 0 if outcome.is_good else 1


if __name__ == "__main__":
    sys.exit(main())
