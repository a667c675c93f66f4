"""What tests of benches share: how one ends where there is no GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

BENCH = Path(__file__).parents[1] / "bench"


def run_without_a_gpu(name: str, folder: Path) -> tuple[str, dict[str, Any]]:
    """What bench/NAME.py prints with every GPU hidden, and the JSON that it writes."""
    file = folder / "rows.json"
    shown = subprocess.run(
        [sys.executable, str(BENCH / f"{name}.py"), "--quick", "--json", str(file)],
        check=True, capture_output=True, text=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    ).stdout  # fmt: skip
    return shown, json.loads(file.read_text())
