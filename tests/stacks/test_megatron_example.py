"""examples/megatron_gpt.py runs, trains, and shows what docs/megatron.md says it shows."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_example_trains_twenty_steps_to_the_same_bits() -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "4", str(ROOT / "examples" / "megatron_gpt.py")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "bit-identical on all ranks" in done.stdout
    found = re.search(
        r"greedy +loss ([\d.]+) -> ([\d.]+) +"
        r"max/mean before ([\d.]+), after ([\d.]+), ([\d.]+)% moved",
        done.stdout,
    )
    assert found is not None, done.stdout
    first, last, before, after, moved = (float(number) for number in found.groups())
    assert last < first - 1
    assert after < before
    assert moved >= 5
